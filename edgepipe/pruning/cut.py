"""Cut what isn't kept out of every tensor: the model becomes smaller, and no mask is left.

Tensors are cut when they are read. One that lies on a grid stays there where bits can move: rows always, columns where
whole groups of the grid stay (a key/value group often is). Otherwise its kept values are decoded; behind the stage
quantize they are rounded to nearest again, on the same kind of grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from edgepipe.artifacts import QuantizedTensor, TorchModel
from edgepipe.numerics.grids import dequantize, quantized_nbytes, round_to_nearest
from edgepipe.pruning.families import FFN, HIDDEN, Anatomy, Stack
from edgepipe.pruning.importance import Kept
from edgepipe.students.from_teacher import spans
from edgepipe.weights import Value, Weight, WeightStore

Places = tuple[np.ndarray | None, ...]  # of each axis: what is kept, None where all is


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Hold the smaller model's weights."""

    weights: WeightStore
    decoded: int  # tensors that left the grid they were on


def cut_weights(model: TorchModel, anatomy: Anatomy, kept: Sequence[Kept], hidden: np.ndarray, *, rounds: bool) -> Cut:
    """Return the weights of the smaller model under its names; `rounds`: what leaves its grid is rounded again."""
    found: dict[str, Weight] = {}
    renamed: dict[str, str] = {}
    decoded = 0
    whole = len(hidden) == anatomy.stacks[0].hidden
    residual = None if whole else hidden
    for name, weight in model.weights.items():
        stack = next((one for one in anatomy.stacks if name.startswith(one.prefix)), None)
        if stack is None:
            axes = anatomy.outside.get(name, ())
            places: Places = tuple(residual if axis == HIDDEN else None for axis in axes)
            new = name
        else:
            own = kept[anatomy.stacks.index(stack)]
            number, _, part = name.removeprefix(stack.prefix).partition(".")
            layer = int(number)
            if layer not in own.layers:
                continue
            new = f"{stack.prefix}{own.layers.index(layer)}.{part}"
            places = tuple(_places(axis, stack, own, layer, residual) for axis in stack.axes[part])
        found[new], left = _cut(weight, new, places, rounds=rounds)
        renamed[name] = new
        decoded += left
    aliases = {alias: renamed[name] for alias, name in model.weights.aliases.items() if name in renamed}
    return Cut(weights=WeightStore(found, aliases), decoded=decoded)


def _places(axis: str, stack: Stack, kept: Kept, layer: int, residual: np.ndarray | None) -> np.ndarray | None:
    """Return what is kept of one axis; None where all of it is."""
    if axis == HIDDEN:
        return residual
    if axis == FFN:
        return kept.ffn[layer] if len(kept.ffn[layer]) < stack.ffn else None
    attention, _, side = axis.partition(".")
    if side not in ("queries", "keys"):
        return None
    groups = kept.groups[layer, attention]
    width = stack.head_dim * (stack.heads // stack.kv_heads if side == "queries" else 1)
    return spans(groups, width) if len(groups) < stack.kv_heads else None


def _cut(weight: Weight, name: str, places: Places, *, rounds: bool) -> tuple[Weight, bool]:
    """Return a weight without what isn't kept, and whether it leaves the grid it is on."""
    if all(place is None for place in places):
        return dataclasses.replace(weight, name=name), False
    shape = tuple(n if place is None else len(place) for n, place in zip(weight.shape, places, strict=True))
    if weight.grid is None:
        nbytes = weight.nbytes // max(1, weight.size) * int(np.prod(shape))
        load = partial(_take, weight, places)
        return dataclasses.replace(weight, name=name, shape=shape, nbytes=nbytes, load=load), False
    value = weight.load()
    assert isinstance(value, QuantizedTensor), f"{weight.name} says that it lies on a grid"
    rows, columns = places
    if columns is None or _whole_groups(columns, value) is not None:
        nbytes = taken(value, rows, columns).nbytes
        codes = partial(_take_codes, weight, rows, columns)
        return dataclasses.replace(weight, name=name, shape=shape, nbytes=nbytes, load=codes), False
    load = partial(_take, weight, places)
    if not rounds:
        nbytes = 4 * int(np.prod(shape))
        return Weight(name=name, shape=shape, dtype="float32", nbytes=nbytes, load=load), True
    return round_again(Weight(name=name, shape=shape, dtype="float32", nbytes=0, load=load), grid_kind(value)), True


def grid_kind(value: QuantizedTensor) -> tuple[int, int, bool]:
    """Return bits, group (0: a whole row) and whether a grid has no zero points; minima become zero points."""
    symmetric = value.zero_points is None and value.minima is None
    return value.bits, 0 if value.group >= value.shape[1] else value.group, symmetric


def round_again(weight: Weight, kind: tuple[int, int, bool]) -> Weight:
    """Return a float weight that is rounded to nearest on a kind of grid when it is read."""
    bits, group, symmetric = kind
    nbytes = quantized_nbytes(
        (weight.shape[0], weight.shape[1]), bits=bits, group=group, offset_bytes=0 if symmetric else 1
    )

    def load() -> QuantizedTensor:
        return round_to_nearest(np.asarray(weight.load()), bits=bits, group=group, symmetric=symmetric)

    return dataclasses.replace(weight, dtype=f"q{bits}", nbytes=nbytes, load=load, grid="rtn")


def on_grids_again(changed: WeightStore, before: WeightStore) -> WeightStore:
    """Return float weights on the kinds of grid that they were on before."""
    found: dict[str, Weight] = {}
    for name, weight in before.items():
        if weight.grid is not None and changed[name].grid is None:
            value = weight.load()
            assert isinstance(value, QuantizedTensor), f"{name} says that it lies on a grid"
            found[name] = round_again(changed[name], grid_kind(value))
    return changed.replace(found)


def _take(weight: Weight, places: Places) -> np.ndarray:
    """Read the kept values, decoded where they lie on a grid."""
    value = weight.load()
    array = dequantize(value) if isinstance(value, QuantizedTensor) else value
    for axis, place in enumerate(places):
        if place is not None:
            array = np.take(array, place, axis=axis)
    return array


def _take_codes(weight: Weight, rows: np.ndarray | None, columns: np.ndarray | None) -> Value:
    value = weight.load()
    assert isinstance(value, QuantizedTensor), f"{weight.name} lay on a grid before"
    return taken(value, rows, columns)


def taken(value: QuantizedTensor, rows: np.ndarray | None, columns: np.ndarray | None) -> QuantizedTensor:
    """Return the kept rows, and columns in whole groups, of a tensor on a grid: bits move, nothing is rounded."""
    groups = None if columns is None else _whole_groups(columns, value)
    parts: dict[str, Any] = {}
    for part in ("codes", "scale", "zero_points", "minima"):
        array = getattr(value, part)
        if array is None:
            continue
        array = array if rows is None else array[rows]
        if groups is not None:
            each = array.shape[1] // value.groups  # bytes of a group's codes, or 1
            array = array.reshape(len(array), value.groups, each)[:, groups].reshape(len(array), -1)
        parts[part] = np.ascontiguousarray(array)
    shape = (len(parts["codes"]), value.shape[1] if columns is None else len(columns))
    return dataclasses.replace(value, shape=shape, **parts)


def _whole_groups(columns: np.ndarray, value: QuantizedTensor) -> np.ndarray | None:
    """Return the groups that some columns are, None where a group is cut."""
    if len(columns) % value.group:
        return None
    blocks = columns.reshape(-1, value.group)
    whole = bool((blocks == blocks[:, :1] + np.arange(value.group)).all() and (blocks[:, 0] % value.group == 0).all())
    return blocks[:, 0] // value.group if whole else None
