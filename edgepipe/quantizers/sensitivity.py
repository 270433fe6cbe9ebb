"""Sensitivity: how far the model's outputs move when one matrix alone is rounded, measured for each choice of a grid.

    loss(unit, choice) = mean over the calibration's rows of distance(model with the unit rounded, float model)

A unit is a matrix, or those matrices that read the same tensor (queries, keys and values; gate and up), which an
engine multiplies as one: they get one choice. The distance is that of outputs.py. It is read on the float torch module
with exactly the values that ship, so no graph is exported for it; the search that adds losses up (they are taken to be
independent of each other) checks the sum's promise on real bundles.
Source: Dong et al., HAWQ (arXiv:1905.03696), for a choice of bits by layer from a sensitivity; the divergence of the
outputs in place of its Hessian as in Hubara et al., arXiv:2006.10518.
"""
# ruff: noqa: TID253  sensitivity is read on a torch module: this file is imported only where one runs

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgepipe.artifacts import ModelInfo
from edgepipe.errors import StageError
from edgepipe.quantizers.modules import run_batch, slots_of, swapped
from edgepipe.quantizers.outputs import distances, kind_of, reference_rows, rows_of
from edgepipe.quantizers.texts import Batch
from edgepipe.weights import Weight, WeightStore

Key = tuple[str, str]  # unit, choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Name matrices that get one choice, and what each choice stores."""

    name: str
    choices: Mapping[str, Mapping[str, Weight]]  # "4/32" → name of the weight → as it would be stored

    @property
    def tensors(self) -> tuple[str, ...]:
        """Return the names of its weights."""
        return tuple(next(iter(self.choices.values())))

    def nbytes(self, choice: str) -> int:
        """Return the bytes of a choice."""
        return sum(weight.nbytes for weight in self.choices[choice].values())


def readers(module: Any, names: Collection[str], batch: Batch) -> list[tuple[str, ...]]:
    """Return the linear layers' weights called `names` by the tensor that they read; every other name is alone.

    The order is that in which the module runs them, then that of `names`.
    """
    seen: list[tuple[Any, list[str]]] = []  # what was read, kept alive so that no other takes its place

    def look(name: str, x: Any) -> None:
        known = next((group for tensor, group in seen if tensor is x), None)
        if known is None:
            seen.append((x, [name]))
        elif name not in known:
            known.append(name)

    handles = [
        child.register_forward_pre_hook(lambda _, given, name=name: look(f"{name}.weight", given[0]))
        for name, child in module.named_modules()
        if isinstance(child, torch.nn.Linear) and f"{name}.weight" in names
    ]
    try:
        run_batch(module, batch)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, tuple[str, ...]] = {}
    for _, group in seen:
        left = tuple(name for name in group if name not in found)  # one that runs twice belongs to its first group
        found |= dict.fromkeys(left, left)
    together = dict.fromkeys(found.values())
    return [*together, *((name,) for name in names if name not in found)]


def measure(
    module: Any,
    info: ModelInfo,
    weights: WeightStore,
    units: Sequence[Unit],
    batches: Sequence[Batch],
    *,
    known: Mapping[Key, float],
    keep: Callable[[Key, float], None],
    progress: Callable[[str, int, int], None],
) -> dict[Key, float]:
    """Return the loss of every choice of every unit; `known` ones aren't measured again, `keep` gets each new one.

    `module` computes the model of `weights`. Raises StageError when the float model's outputs aren't finite.
    """
    wanted = [(unit, choice) for unit in units for choice in unit.choices]
    found = {(unit.name, choice): known[unit.name, choice] for unit, choice in wanted if (unit.name, choice) in known}
    left = [(unit, choice) for unit, choice in wanted if (unit.name, choice) not in found]
    if not left:
        return found
    slots = slots_of(module, weights)
    progress("sensitivity", len(found), len(wanted))
    reference, step = reference_rows(module, info, batches)
    if not all(bool(torch.isfinite(rows).all()) for rows in reference):
        raise StageError("the model's own outputs aren't finite on the calibration texts: it can't be measured")
    for unit, choice in left:
        values = {name: WeightStore({name: w}).float32(name) for name, w in unit.choices[choice].items()}
        with swapped(slots, values):
            loss = _distance(module, info, batches, (reference, step))
        found[unit.name, choice] = loss
        keep((unit.name, choice), loss)
        progress("sensitivity", len(found), len(wanted))
    return found


def apart(module: Any, whole: Any, info: ModelInfo, batches: Sequence[Batch]) -> float:
    """Return how far a module's outputs are from those of the one it was pruned from: the same mean distance."""
    return _distance(module, info, batches, reference_rows(whole, info, batches))


def _distance(
    module: Any, info: ModelInfo, batches: Sequence[Batch], reference: tuple[Sequence[torch.Tensor], int]
) -> float:
    """Return the mean distance of a module's rows from reference rows, of which every `step`-th was kept."""
    expected, step = reference
    parts = [
        distances(kind_of(info), rows_of(module, info, batch)[::step], rows)
        for batch, rows in zip(batches, expected, strict=True)
    ]
    return float(torch.cat(parts).mean())
