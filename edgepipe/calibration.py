"""Open a calibration or evaluation set, and refuse one whose bytes are not the ones its TOML file vouches for.

calibration/NAME.toml says where a text comes from; the text lies beside it. A set is for evaluation or for
calibration, never both: a score on text that steered the compression would flatter it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from edgepipe.errors import ConfigError
from edgepipe.package_data import data_folder, find_named, list_names, read_record

Purpose = Literal["evaluation", "calibration"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSet:
    """Describe one set: a UTF-8 text of passages that are separated by blank lines."""

    name: str  # file name without .toml
    file: str  # plain name of the text beside the TOML file
    purpose: Purpose
    description: str  # one line for people
    source: str  # where the text comes from
    licence: str  # SPDX id
    seed: int  # of the sampling that chose the passages; 0 when nothing was sampled
    count: int  # passages
    sha256: str  # of the file's bytes, lower-case hex

    def __post_init__(self) -> None:
        """Refuse names that leave the folder and hashes that can't be one."""
        if self.file in {"", "..", "."} or PurePath(self.file).name != self.file or "\\" in self.file:
            raise ConfigError(f"file must be a plain file name beside the TOML file, not {self.file!r}")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ConfigError(f"sha256 must be 64 lower-case hex digits, not {self.sha256!r}")


def list_sets() -> tuple[TextSet, ...]:
    """Return the records of all sets that come with edgepipe, sorted by name; the texts are not opened."""
    return tuple(describe_set(name) for name in list_names("calibration"))


def describe_set(name: str) -> TextSet:
    """Return the record of one set; an unknown name is a ConfigError that lists the known ones."""
    path = find_named("calibration", name, "calibration set")
    return read_record(path, TextSet, {"name": name})


def open_text(name: str, *, purpose: Purpose = "evaluation") -> str:
    """Return the text of a set that is meant for `purpose`, its bytes checked against the recorded sha256.

    Raises ConfigError: unknown set, a set for the other purpose, a missing or changed file.
    """
    record = describe_set(name)
    if record.purpose != purpose:
        fitting = ", ".join(s.name for s in list_sets() if s.purpose == purpose) or "none yet"
        raise ConfigError(f"{name} is for {record.purpose} and can't serve {purpose}: sets for that are {fitting}")
    return _verified_bytes(record).decode("utf-8")


def passages(text: str) -> tuple[str, ...]:
    """Split a text at its blank lines."""
    return tuple(part.strip() for part in re.split(r"\n\s*\n", text) if part.strip())


def _verified_bytes(record: TextSet) -> bytes:
    """Read a set's file and compare its hash with the recorded one."""
    path = data_folder("calibration") / record.file
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"the text of {record.name} can't be read from {path}: {error.strerror}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != record.sha256:
        raise ConfigError(
            f"{path} is not the text that {record.name}.toml vouches for (expected sha256 {record.sha256}, "
            f"got {found}): restore the file, or record the new hash and measure everything again"
        )
    return data
