"""What a library's weights file holds: matrices packed for the kernels of products.py, small tensors as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from edgepipe.artifacts import QuantizedTensor
from edgepipe.engines.onnxruntime.planned import PlannedTensor
from edgepipe.engines.tvm.products import LANES, WORD, Codes, Floats
from edgepipe.numerics.grids import unpack
from edgepipe.weights import WeightStore

_WIDE = 32  # rows of a tile of floats: two vectors share a broadcast of x
_NARROW_ROWS = 128  # matrices with fewer rows get narrow tiles: less padding, and more tiles to share out


def codes_of(value: QuantizedTensor) -> Codes:
    """Describe a quantized matrix for the kernels; groups are filled up to whole words."""
    per_word = 8 * WORD // value.bits
    kind = "minima" if value.minima is not None else "zero_points" if value.zero_points is not None else "middle"
    return Codes(
        shape=value.shape,
        bits=value.bits,
        group=-(-value.group // per_word) * per_word,
        offset=kind,
        scale_dtype=np.asarray(value.scale).dtype.name,
        minima_dtype="float16" if value.minima is None else np.asarray(value.minima).dtype.name,
        middle=1 << (value.bits - 1),
    )


def floats_of(shape: tuple[int, int], dtype: str) -> Floats:
    """Describe a float matrix for the kernels."""
    return Floats(shape=shape, width=_WIDE if shape[0] >= _NARROW_ROWS else LANES, dtype=dtype)


def _part(
    weights: WeightStore,
    name: str,
    suffix: str,
    like: tuple[tuple[int, ...], str],
    make: Callable[[QuantizedTensor], np.ndarray],
) -> PlannedTensor:
    """Plan what `make` takes from a quantized matrix; `like` is its shape and dtype."""

    def load() -> np.ndarray:
        value = weights.load(name)
        assert isinstance(value, QuantizedTensor)
        return make(value)

    return PlannedTensor(name=f"{weights[name].name}:{suffix}", shape=like[0], dtype=like[1], load=load)


def plan_codes(weights: WeightStore, name: str, w: Codes) -> list[PlannedTensor]:
    """Plan codes, scales and offsets of a quantized matrix."""

    def part(suffix: str, shape: tuple[int, ...], dtype: str, make: Callable[[QuantizedTensor], np.ndarray]) -> None:
        planned.append(_part(weights, name, suffix, (shape, dtype), make))

    planned: list[PlannedTensor] = []
    words = w.columns // w.per_word
    part("codes", (w.tiles, words, LANES * WORD), "uint8", lambda value: packed_codes(value, w))
    grouped = (w.tiles, w.groups, LANES)
    part("scale", grouped, w.scale_dtype, lambda value: _tiled(np.asarray(value.scale), w))
    if w.offset == "zero_points":
        part("zero_points", grouped, "uint8", lambda value: _tiled(np.asarray(value.zero_points), w))
    elif w.offset == "minima":
        part("minima", grouped, w.minima_dtype, lambda value: _tiled(np.asarray(value.minima), w))
    return planned


def packed_codes(value: QuantizedTensor, w: Codes) -> np.ndarray:
    """Pack codes [out, columns] for vector loads → [tiles, words, 64] uint8; what pads a tile or a group is 0."""
    rows = value.shape[0]
    codes = unpack(np.asarray(value.codes), value.bits).reshape(rows, value.groups, -1)[:, :, : value.group]
    filled = np.zeros((w.tiles * LANES, w.groups, w.group), np.uint8)
    filled[:rows, :, : value.group] = codes
    places = filled.reshape(w.tiles, LANES, w.columns // w.per_word, 8 // w.bits, WORD)
    packed = np.zeros((*places.shape[:3], WORD), np.uint8)
    for place in range(8 // w.bits):
        packed |= places[:, :, :, place] << np.uint8(place * w.bits)
    return packed.transpose(0, 2, 1, 3).reshape(w.tiles, -1, LANES * WORD)


def _tiled(values: np.ndarray, w: Codes) -> np.ndarray:
    """Return values [out, groups] as [tiles, groups, 16]."""
    filled = np.zeros((w.tiles * LANES, w.groups), values.dtype)
    filled[: values.shape[0]] = values
    return filled.reshape(w.tiles, LANES, w.groups).transpose(0, 2, 1)


def plan_floats(weights: WeightStore, name: str, w: Floats) -> PlannedTensor:
    """Plan a float matrix in tiles [tiles, in, width]."""

    def load() -> np.ndarray:
        value = np.asarray(weights.load(name))
        filled = np.zeros((w.tiles * w.width, w.shape[1]), value.dtype)
        filled[: w.shape[0]] = value
        return filled.reshape(w.tiles, w.width, -1).transpose(0, 2, 1)

    shape = (w.tiles, w.shape[1], w.width)
    return PlannedTensor(name=f"{weights[name].name}:tiles", shape=shape, dtype=w.dtype, load=load)


def plan_plain(weights: WeightStore, name: str) -> PlannedTensor:
    """Plan a float tensor as it is stored."""
    record = weights[name]

    def load() -> np.ndarray:
        return np.asarray(weights.load(name))

    return PlannedTensor(name=record.name, shape=record.shape, dtype=record.dtype, load=load)


def plan_stored(weights: WeightStore, name: str, value: QuantizedTensor) -> list[PlannedTensor]:
    """Plan codes [out, bytes], scales and offsets [out, groups] of a quantized matrix as they are stored."""
    kinds = ["codes", "scale", *(kind for kind in ("zero_points", "minima") if getattr(value, kind) is not None)]
    planned = []
    for kind in kinds:
        array = np.asarray(getattr(value, kind))
        take = partial(_stored, kind)
        planned.append(_part(weights, name, kind, (array.shape, array.dtype.name), take))
    return planned


def _stored(kind: str, value: QuantizedTensor) -> np.ndarray:
    return np.asarray(getattr(value, kind))


def plan_columns(weights: WeightStore, name: str) -> PlannedTensor:
    """Plan the column scales of a quantized matrix, by which x is multiplied instead."""
    record = weights[name]

    def load() -> np.ndarray:
        value = weights.load(name)
        assert isinstance(value, QuantizedTensor)
        assert value.column_scale is not None
        return np.asarray(value.column_scale)

    return PlannedTensor(name=f"{record.name}:column_scale", shape=(record.shape[1],), dtype="float16", load=load)
