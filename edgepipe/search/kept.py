"""What a search keeps while it works, so that one that was stopped goes on: losses by line, scores by file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgepipe.artifacts import Json
from edgepipe.quantizers.sensitivity import Key
from edgepipe.store import publish, read_json, write_json, write_text

_ROWS = "rows.npy"
_RECORD = "record.json"


def open_losses(path: Path, key: str, *, fresh: bool) -> tuple[dict[Key, float], Callable[[Key, float], None]]:
    """Return the losses that were measured under this key, and what writes down another one at once.

    What was measured under another key goes. The last line may be half there, after a power cut: it isn't read.
    """
    known: dict[Key, float] = {}
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() and not fresh else []
    if lines and json.loads(lines[0]) == {"key": key}:
        for line in lines[1:]:
            unit, choice, loss = json.loads(line)
            known[unit, choice] = loss
    else:
        lines = [json.dumps({"key": key})]
    write_text(path, "".join(f"{line}\n" for line in lines))

    def keep(of: Key, loss: float) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([*of, loss]) + "\n")
            file.flush()
            os.fsync(file.fileno())

    return known, keep


def read_score(folder: Path, key: str) -> tuple[np.ndarray, Json] | None:
    """Return the rows and the record that were kept under a key, None where there are none."""
    try:
        return np.load(folder / key / _ROWS), read_json(folder / key / _RECORD)
    except (OSError, ValueError):
        return None


def write_score(folder: Path, key: str, rows: np.ndarray, record: Json) -> None:
    """Keep rows and a record under a key, whole or not at all."""
    staged = folder / f".{key}.tmp"
    staged.mkdir(parents=True, exist_ok=True)
    np.save(staged / _ROWS, rows)
    write_json(staged / _RECORD, record)
    publish(staged, folder / key)
