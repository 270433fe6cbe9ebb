"""Keep what a killed training goes on from: `last`, `best` and `plan.json` in one folder.

    plan.json   what this run is (a key) and what was decided once: the number of steps
    last/       the trained weights, the optimizer's state, how far it came, the curves
    best/       the weights that did best on held-out data

Each directory is written beside its place, flushed, and renamed: whole, or not at all. One process writes and reads;
the others hear from it, so machines need no common disk.
"""
# ruff: noqa: TID253  checkpoints hold tensors: this file is imported only where a model is trained

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgepipe.artifacts import Json
from edgepipe.store import publish, read_json, tidy, write_json

_PLAN, _LAST, _BEST = "plan.json", "last", "best"
_FILE = "state.pt"


def open_folder(folder: Path, key: str) -> Json:
    """Return what an earlier run with this key decided; what another run left in the folder is cleared away."""
    tidy(folder, f"{_LAST}|{_BEST}")
    try:
        plan = read_json(folder / _PLAN)
    except (OSError, ValueError):
        plan = {}
    if isinstance(plan, dict) and plan.get("key") == key:
        return plan
    for name in (_LAST, _BEST):
        shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _PLAN, {"key": key})
    return {"key": key}


def save_plan(folder: Path, plan: Json) -> None:
    """Write down what was decided."""
    write_json(folder / _PLAN, plan)


def save_last(folder: Path, weights: Mapping[str, Tensor], optimizer: Json, state: Json) -> None:
    """Replace the checkpoint that a resumed run begins at."""
    _save(folder, _LAST, {"weights": dict(weights), "optimizer": optimizer, "state": state})


def save_best(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Replace the weights that did best."""
    _save(folder, _BEST, {"weights": dict(weights)})


def load_last(folder: Path) -> Any | None:
    """Return weights, optimizer and state of the checkpoint, None where there is none yet."""
    return _load(folder / _LAST / _FILE)


def load_best(folder: Path) -> dict[str, Tensor] | None:
    """Return the weights that did best, None without any."""
    found = _load(folder / _BEST / _FILE)
    return None if found is None else found["weights"]


def put_weights(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the parameters of these names."""
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)


def _save(folder: Path, name: str, content: Json) -> None:
    staged = folder / f".{name}.tmp"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    torch.save(content, staged / _FILE)
    publish(staged, folder / name)


def _load(path: Path) -> Any | None:
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
