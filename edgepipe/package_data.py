"""Find and read the TOML files that edgepipe ships: one file per target, one per calibration set.

The folders lie at the top of the repository, where people look for them, and inside the package in a wheel
(pyproject.toml, force-include). A file fills a frozen dataclass: the fields are the allowed keys, a field whose type is
another dataclass is a table, and everything that does not fit is a ConfigError that names file and line.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from edgepipe.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent
_MAX_BYTES = 1 << 20  # a settings file is a few kB: whatever is larger was named by mistake

Record = TypeVar("Record")


def data_folder(kind: str) -> Path:
    """Return the folder of `kind` ("targets" or "calibration"): inside an installed package, else of the checkout."""
    for folder in (_PACKAGE / "_data" / kind, _PACKAGE.parent / kind):
        if folder.is_dir():
            return folder
    raise ConfigError(f"this installation of edgepipe has no {kind} folder: install it again from a wheel or a clone")


def list_names(kind: str) -> tuple[str, ...]:
    """Return the names of the TOML files of `kind`, sorted."""
    return tuple(sorted(path.stem for path in data_folder(kind).glob("*.toml")))


def find_named(kind: str, name: str, noun: str) -> Path:
    """Return the TOML file called `name`; an unknown name is a ConfigError that lists the known ones."""
    names = list_names(kind)
    if name in names:
        return data_folder(kind) / f"{name}.toml"
    raise ConfigError(f"unknown {noun} {name!r}{did_you_mean(name, names)}: known are {', '.join(names)}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the closest known word, or an empty string when none is close."""
    close = difflib.get_close_matches(word.lower(), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def read_record(path: Path, kind: type[Record], extra: dict[str, object] | None = None) -> Record:
    """Fill the dataclass `kind` from a TOML file; fields in `extra` come from the caller and are no keys of the file.

    Raises ConfigError with path and line for a file that can't be read, unknown or missing keys and wrong types; what
    the record's own `__post_init__` refuses gets the path put in front.
    """
    text = _read_text(path)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:  # its message ends in "(at line 3, column 5)"
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    try:
        return _fill(kind, table, _Place(path, text, ""), extra or {})
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(str(path)) else f"{path}: {message}") from error


def fill_record(kind: type[Record], table: dict[str, Any], name: str) -> Record:
    """Fill the dataclass `kind` from values that come from flags or several files; `name` is put before each key."""
    return _fill(kind, table, _Place(None, "", name), {})


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Say which table of which file is being read, so that an error can name the line."""

    path: Path | None  # None: the values come from nowhere that has lines
    text: str
    table: str  # "" for the top of the file

    def at(self, key: str) -> str:
        """Return "file, line 3: " for the line that sets `key` in this table, or the file alone if no line does."""
        if self.path is None:
            return ""
        table = ""
        for number, line in enumerate(self.text.splitlines(), start=1):
            if header := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line):
                table = header[1]
                if not self.table and table == key:
                    return f"{self.path}, line {number}: "
            elif table == self.table and re.match(rf"""\s*["']?{re.escape(key)}["']?\s*[=.]""", line):
                return f"{self.path}, line {number}: "
        return f"{self.path}: "

    def name(self, key: str) -> str:
        """Return the key as a reader would write it: "onnxruntime.threads"."""
        return f"{self.table}.{key}" if self.table else key


def _read_text(path: Path) -> str:
    """Read a small UTF-8 file; anything else at that path is a ConfigError."""
    try:
        if path.is_file() and path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes: a settings file has at most {_MAX_BYTES}")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: expected a TOML file") from error
    except OSError as error:
        raise ConfigError(f"{path} can't be read ({error.strerror}): expected a TOML file") from error


def _fill(kind: type[Record], table: dict[str, Any], place: _Place, extra: dict[str, object]) -> Record:
    """Build one record from one TOML table."""
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name not in extra}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    for key in table:
        if key not in fields:
            where, name = place.at(key), place.name(key)
            known = ", ".join(fields)
            raise ConfigError(f"{where}unknown key {name!r}{did_you_mean(key, fields)}: known are {known}")
    values = dict(extra)
    for key, field in fields.items():
        if key in table:
            values[key] = _convert(table[key], hints[key], place, key)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{place.at(key)}the key {place.name(key)!r} is missing")
    return kind(**values)


def _convert(value: object, hint: Any, place: _Place, key: str) -> object:
    """Check one TOML value against a field's type: a scalar, Literal, tuple of one kind, X | None or table."""
    if hint == int | float:  # a whole number stays, or becomes, one
        value = int(value) if isinstance(value, float) and value.is_integer() else value
        hint = int if type(value) is int else float
    if isinstance(hint, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, dict):
            return _fill(hint, value, _Place(place.path, place.text, place.name(key)), {})
        expected = "a table"
    elif typing.get_origin(hint) is tuple:
        (item_kind, _) = typing.get_args(hint)
        if isinstance(value, list) and all(type(item) is item_kind for item in value):
            return tuple(value)
        expected = {str: "a list of strings", int: "a list of whole numbers"}[item_kind]
    elif typing.get_origin(hint) is typing.Literal:
        if value in typing.get_args(hint):
            return value
        expected = "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    else:
        if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
            return value
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        expected = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}[hint]
    raise ConfigError(f"{place.at(key)}{place.name(key)!r} must be {expected}, not {value!r}")
