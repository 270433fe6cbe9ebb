"""Read files of examples: rows of .tsv, .csv and .jsonl by the names of their parts, and plain text.

.tsv: tab-separated, nothing quoted. .csv: comma-separated, double quotes. .jsonl: an object a line. All UTF-8. What
doesn't fit is a ConfigError that names file and line. Evaluation and training read their data through this.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgepipe.artifacts import Json
from edgepipe.calibration import Purpose, list_sets
from edgepipe.errors import ConfigError
from edgepipe.package_data import data_folder

_MOST_DATA_BYTES = 1 << 30  # a larger file was named by mistake: evaluating it would take weeks
_PASSAGE_CHARACTERS = 1 << 20  # of a text that are cut into tokens at a time
_SUFFIXES = (".tsv", ".csv", ".jsonl")
# A cell that is one of these words makes the first line a header.
_HEADER_WORDS = {"text", "sentence", "sentence1", "sentence2", "score", "label", "input", "output", "reference", "ref"}
_HEADER_WORDS |= {"mr", "source", "target", "question", "answer"}

# Why a shipped set is refused, by its own purpose.
_REFUSALS = {
    "calibration": "a score on it would flatter the bundle: evaluate on text that no compression step has seen",
    "evaluation": "a score on it would flatter the model that was made with it: take other text",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Hold a file's bytes: read once, so that what is hashed is what is scored."""

    name: str  # for people: the path as given, or the name of a shipped set
    suffix: str  # ".tsv"
    content: bytes
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Say where the parts of an example stand: a number from 0, or a name of the header or JSON key."""

    places: Mapping[str, str]  # part → column
    header: bool | None = None  # None: look at the first line
    option: str = "--columns"  # what a user corrects, for messages


def open_data(given: str, purpose: Purpose | Literal["training", "trimming"] = "evaluation") -> Data:
    """Read a file, or the shipped set of that name; refuse a shipped text that is meant for something else.

    A score on text that steered the compression would flatter it. Raises ConfigError, also for what can't be read.
    """
    path = Path(given)
    sets = {one.name: one for one in list_sets()}
    if not path.exists() and given in sets:
        path = data_folder("calibration") / sets[given].file
    if path.exists() and not path.is_file():
        raise ConfigError(f"expected a file of {purpose} data, but {given} is no regular file")
    try:
        size = path.stat().st_size
        if size > _MOST_DATA_BYTES:
            raise ConfigError(f"{given} has {size} bytes, but {_MOST_DATA_BYTES} is the most: cut it")
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        known = ", ".join(one.name for one in sets.values() if _serves(one.purpose, purpose))
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{given} can't be read ({reason}): give a file, or one of the texts {known}") from None
    sha256 = hashlib.sha256(content).hexdigest()
    for one in sets.values():
        if one.sha256 == sha256 and not _serves(one.purpose, purpose):
            raise ConfigError(f"{given} is the {one.purpose} set {one.name}, and {_REFUSALS[one.purpose]}")
    if not content.strip():
        raise ConfigError(f"{given} is empty: give a file with {purpose} data")
    return Data(name=given, suffix=path.suffix.lower(), content=content, sha256=sha256)


def _serves(set_purpose: str, purpose: str) -> bool:
    """Say whether a shipped set may be used: training may see what calibration sees, a vocabulary may serve any."""
    return purpose == "trimming" or (set_purpose == "evaluation") == (purpose == "evaluation")


def read_text(data: Data) -> str:
    """Return the whole file as one text."""
    try:
        return data.content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{data.name}, line {line}: expected UTF-8, but it is not: convert the file") from None


def read_texts(data: Data) -> list[str]:
    """Return every text in a file: cells of a table, strings of JSON objects, else lines and what they make together.

    Lines alone would leave out how line ends are cut into tokens; together they are given in passages of 1 MiB.
    """
    if data.suffix == ".jsonl":
        found = [text for _, record in _records(data) for text in _strings(record)]
    elif data.suffix in _SUFFIXES:
        lines = [row for _, row in _table_lines(data)]
        found = [cell for row in lines[1 if lines and _names_columns(lines[0]) else 0 :] for cell in row]
    else:
        text = read_text(data)
        found = [*_passages(text), *text.splitlines()]
    texts = [text for text in found if text.strip()]
    if not texts:
        raise ConfigError(f"{data.name} holds no texts: give a file with some")
    return texts


def _passages(text: str) -> Iterator[str]:
    """Yield a text in pieces of about 1 MiB that begin where a line does."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _PASSAGE_CHARACTERS) + 1 or len(text)
        yield text[start:end]
        start = end


def first_names(data: Data) -> list[str]:
    """Return the keys of a .jsonl file's first object, or the cells of a table's first line."""
    text = read_text(data)
    line = text[: len(text) - len(text.lstrip())].count("\n") + 1
    first = text.lstrip().partition("\n")[0].rstrip("\r")
    if data.suffix == ".jsonl":
        return list(_json_object(data, line, first))
    cells = first.split("\t") if data.suffix == ".tsv" else next(csv.reader([first]), [])
    return [cell.strip() for cell in cells]


def parse_columns(option: str, text: str) -> dict[str, str]:
    """Return "a=b,c=d" as a table; `option` is what a user wrote it behind."""
    found: dict[str, str] = {}
    for entry in filter(None, text.split(",")):
        key, sign, value = (part.strip() for part in entry.partition("="))
        if not (key and sign and value) or key in found:
            raise ConfigError(f"{option}: expected name=value,name=value with every name once, got {text!r}")
        found[key] = value
    return found


def rows(data: Data, columns: Columns, lists: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each line's place and its parts, all texts that aren't blank; `lists` names a part that may be a list."""
    if data.suffix not in _SUFFIXES:
        raise ConfigError(f"{data.name}: expected a file that ends in {', '.join(_SUFFIXES)}: name it so")
    found = _json_rows(data, columns) if data.suffix == ".jsonl" else _table_rows(data, columns)
    empty = True
    for line, parts in found:
        empty = False
        place = f"{data.name}, line {line}"
        for part, cell in parts.items():
            texts = cell if part == lists and isinstance(cell, list) and cell else [cell]
            if not all(isinstance(text, str) and text.strip() for text in texts):
                raise ConfigError(
                    f"{place}: expected a text in column {columns.places[part]} ({part}), "
                    f"but it holds {short(cell)}: correct it, or name the columns with {columns.option}"
                )
        yield place, parts
    if empty:
        raise ConfigError(f"{data.name} holds no examples: give a file with some")


def _table_rows(data: Data, columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line numbers and parts of a .tsv or .csv file."""
    places: dict[str, int] | None = None
    for line, row in _table_lines(data):
        if places is None:
            places, is_header = _places(data, columns, row)
            if is_header:
                continue
        if row:
            yield line, _cells(data, columns, places, row, line)


def _table_lines(data: Data) -> Iterator[tuple[int, list[str]]]:
    """Yield line numbers and cells of a .tsv or .csv file."""
    text = io.StringIO(read_text(data), newline="")
    if data.suffix == ".tsv":
        reader = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(text, strict=True)
    line = 1
    try:
        for row in reader:
            yield line, row
            line = reader.line_num + 1  # where the next one begins: quoted cells may hold line ends
    except csv.Error as error:
        raise ConfigError(f"{data.name}, line {line}: not a well-formed {data.suffix} line: {error}") from None


def _cells(data: Data, columns: Columns, places: Mapping[str, int], row: Sequence[str], line: int) -> dict[str, Any]:
    """Return the parts of one row; raise ConfigError when it is too short."""
    for part, place in places.items():
        if place >= len(row):
            raise ConfigError(
                f"{data.name}, line {line}: expected a column {columns.places[part]} ({part}), counted from 0, "
                f"but the line has {len(row)} columns: correct it, or name the columns with {columns.option}"
            )
    return {part: row[place] for part, place in places.items()}


def _places(data: Data, columns: Columns, first: Sequence[str]) -> tuple[dict[str, int], bool]:
    """Return each part's column, and whether the first line is a header."""
    names = [cell.strip() for cell in first]
    by_name = any(not place.isdecimal() for place in columns.places.values())
    is_header = columns.header
    if is_header is None:
        is_header = by_name or _names_columns(names)
    places = {}
    for part, place in columns.places.items():
        if place.isdecimal():
            places[part] = int(place)
        elif is_header and place in names:
            places[part] = names.index(place)
        else:
            there = f"the header has {', '.join(names)}" if is_header else "the file has no header"
            raise ConfigError(
                f"{data.name}: expected a column {place!r} ({part}), but {there}: correct {columns.option}"
            )
    return places, is_header


def _names_columns(cells: Sequence[str]) -> bool:
    """Say whether a first line looks like a header."""
    return any(cell.strip().lower() in _HEADER_WORDS for cell in cells)


def _json_rows(data: Data, columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line numbers and parts of a .jsonl file; numbers are given as texts."""
    for line, record in _records(data):
        if missing := [key for key in columns.places.values() if key not in record]:
            raise ConfigError(
                f"{data.name}, line {line}: expected the key {missing[0]!r}, but it has "
                f"{', '.join(record) or 'none'}: correct it, or name the keys with {columns.option}"
            )
        parts = {part: record[key] for part, key in columns.places.items()}
        yield line, {k: str(v) if isinstance(v, int | float) else v for k, v in parts.items()}


def _json_object(data: Data, line: int, text: str) -> dict[str, Any]:
    """Return the object of one line."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{data.name}, line {line}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{data.name}, line {line}: expected a JSON object, but it holds {short(record)}")
    return record


def _records(data: Data) -> Iterator[tuple[int, Json]]:
    """Yield line numbers and objects of a .jsonl file."""
    for line, text in enumerate(read_text(data).split("\n"), start=1):
        if text.strip():
            yield line, _json_object(data, line, text)


def _strings(value: object) -> Iterator[str]:
    """Yield the strings in a JSON value, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)


def short(value: object) -> str:
    """Return a value for a message, not endless."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + " …"
