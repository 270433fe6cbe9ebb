"""Grids: pack and unpack codes, round to nearest, decode.

Round-to-nearest over groups of one row, the baseline every other method is judged by. The symmetric grid uses the
full range of the code as llama.cpp's Q4_0 does (scale = extreme / −2^(bits−1), where `extreme` is the element of the
largest magnitude with its sign), which loses less than scale = max|w| / (2^(bits−1) − 1). Scales are rounded to float16
*before* the codes are chosen, so the shipped grid is the one the codes were rounded to.
Source: ggml-quants.c (Q4_0, Q4_1); Jacob et al., arXiv:1712.05877, for the zero point.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from edgepipe.artifacts import QuantizedTensor

# Below 2^-14 float16 loses digits of a scale, which costs little since codes are chosen for the rounded one. At 2^-20
# four bits are left, and weights below it are as good as zero.
_SMALLEST_FP16 = np.float32(2.0**-20)
_LARGEST_FP16 = np.float32(65504.0)
_ELEMENTS_AT_ONCE = 1 << 22  # 16 MB of float32: bounds the memory of rounding without slowing it


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Say which grid one tensor goes on."""

    bits: int
    group: int  # 0: a whole row
    symmetric: bool  # else integer zero points


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes [..., n] uint8 of 2, 4 or 8 bits into bytes [..., n · bits / 8], the first in the lowest bits."""
    per_byte = 8 // bits
    packed: np.ndarray = codes[..., 0::per_byte]
    for place in range(1, per_byte):
        packed = packed | (codes[..., place::per_byte] << (place * bits))
    return packed


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Unpack bytes [..., m] into codes [..., m · 8 / bits] uint8; the inverse of `pack`."""
    if bits == 8:
        return packed
    per_byte = 8 // bits
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * per_byte), np.uint8)
    for place in range(per_byte):
        part = codes[..., place::per_byte]
        np.right_shift(packed, place * bits, out=part)
        np.bitwise_and(part, (1 << bits) - 1, out=part)
    return codes


def dequantize(tensor: QuantizedTensor) -> np.ndarray:
    """Decode a quantized tensor to float32 [out, in]."""
    rows, columns = tensor.shape
    codes = unpack(np.asarray(tensor.codes), tensor.bits).reshape(rows, tensor.groups, tensor.group)
    value = codes.astype(np.float32)
    scale = np.asarray(tensor.scale, np.float32)[..., None]
    if tensor.minima is not None:
        value *= scale
        value += np.asarray(tensor.minima, np.float32)[..., None]
    else:
        if tensor.zero_points is not None:
            value -= np.asarray(tensor.zero_points, np.float32)[..., None]
        else:
            value -= np.float32(1 << (tensor.bits - 1))
        value *= scale
    value = value.reshape(rows, -1)[:, :columns]
    if tensor.column_scale is not None:
        value *= np.asarray(tensor.column_scale, np.float32)
    return value


def row_group(columns: int, bits: int) -> int:
    """Return the group that takes a whole row of `columns` elements, filled up to whole bytes."""
    in_a_byte = 8 // bits
    return -(-columns // in_a_byte) * in_a_byte


def round_to_nearest(weight: np.ndarray, *, bits: int, group: int, symmetric: bool) -> QuantizedTensor:
    """Quantize weight [out, in], of any float type, to the nearest point of a 2-, 4- or 8-bit grid per group of a row.

    Symmetric grids have no offset; asymmetric ones integer zero points. Group 0 takes whole rows.
    Raises ValueError as `check_values` does.
    Works on a few million elements at a time, so that a large embedding is never held in float32.
    """
    rows, columns = weight.shape
    group = group or row_group(columns, bits)
    groups = -(-columns // group)
    codes = np.empty((rows, groups * group * bits // 8), np.uint8)
    scale = np.empty((rows, groups), np.float16)
    zeros = None if symmetric else np.empty((rows, groups), np.uint8)
    step = max(1, _ELEMENTS_AT_ONCE // (groups * group))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        blocks = np.zeros((part.stop - start, groups * group), np.float32)
        blocks[:, :columns] = weight[part]
        check_values(blocks, bits)
        chosen, scale[part], offset = _round_blocks(blocks.reshape(-1, groups, group), bits, symmetric)
        codes[part] = pack(chosen.reshape(len(blocks), -1), bits)
        if zeros is not None and offset is not None:
            zeros[part] = offset
    return QuantizedTensor(
        shape=(rows, columns), bits=bits, group=group, codes=codes, scale=scale, zero_points=zeros, source_grid="rtn"
    )


def check_values(weight: np.ndarray, bits: int) -> None:
    """Raise ValueError unless codes of some bits with float16 scales hold all values of a weight."""
    largest = max(weight.max(initial=0), -weight.min(initial=0))  # NaN if there is one
    if not np.isfinite(largest):
        raise ValueError("the weight has values that are not finite")
    limit = _LARGEST_FP16 * ((1 << bits) - 1) / 2
    if largest > limit:
        raise ValueError(
            f"the weight's values reach {largest:.3g}, and {bits}-bit codes with float16 scales hold up to {limit:.3g}"
            "; quantize.overrides NAME=16 keeps a bfloat16 weight as it is"
        )


def group_grid(blocks: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale [..., 1] float32 (a float16's value) and zero [..., 1] float32 of groups [..., group] float32.

    They are those that round-to-nearest takes: value = scale · (code − zero), codes 0 to 2^bits − 1.
    """
    rows = blocks.reshape(-1, 1, blocks.shape[-1])
    _, scale, zero = _round_blocks(rows, grid.bits, grid.symmetric)
    shape = (*blocks.shape[:-1], 1)
    zeros = np.full(shape, 1 << (grid.bits - 1), np.float32) if zero is None else zero.reshape(shape).astype(np.float32)
    return _safe(scale).reshape(shape), zeros


def nearest(values: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    """Return the nearest points of a grid to float32 values; scale and zero broadcast."""
    points: np.ndarray = scale * (np.clip(np.rint(values / scale) + zero, 0, (1 << bits) - 1) - zero)
    return points


def in_groups(weight: np.ndarray, group: int) -> np.ndarray:
    """Return weight [out, in] as float32 [out, groups, group], rows padded with zeros to whole groups."""
    rows, columns = weight.shape
    padded = np.zeros((rows, -(-columns // group) * group), np.float32)
    padded[:, :columns] = weight
    return padded.reshape(rows, -1, group)


def on_grid(weight: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, grid: Grid, source: str) -> QuantizedTensor:
    """Quantize weight [out, in] with the scales and zero points [out, groups] that a method found.

    They are rounded to what ships, float16 and whole codes, before codes are chosen: whatever precision the method
    worked in, the result lies on one grid. Zero points of a symmetric grid aren't looked at.
    """
    blocks = in_groups(weight, grid.group)
    if not (np.isfinite(blocks).all() and np.isfinite(scale).all()):
        raise ValueError("the weight has values that are not finite")
    top = (1 << grid.bits) - 1
    halves = _to_float16(np.asarray(scale, np.float32))
    zeros = None
    middle = np.float32(1 << (grid.bits - 1))
    if not grid.symmetric and zero is not None:
        zeros = np.clip(np.rint(zero), 0, top).astype(np.uint8)
    offset = middle if zeros is None else zeros.astype(np.float32)[..., None]
    codes = np.clip(np.rint(blocks / _safe(halves)[..., None]) + offset, 0, top).astype(np.uint8)
    return QuantizedTensor(
        shape=(weight.shape[0], weight.shape[1]),
        bits=grid.bits,
        group=grid.group,
        codes=pack(codes.reshape(len(codes), -1), grid.bits),
        scale=halves,
        zero_points=zeros,
        source_grid=source,
    )


def pin_zeros(tensor: QuantizedTensor, zeros: np.ndarray) -> QuantizedTensor:
    """Return a tensor whose values are exactly 0 where `zeros` [out, in] says so: both kinds of offset have that code.

    A grid with float minima need not have it, and isn't taken.
    """
    if tensor.minima is not None:
        raise ValueError("a grid with minima has no code for zero")
    rows, columns = tensor.shape
    codes = unpack(np.asarray(tensor.codes), tensor.bits).reshape(rows, tensor.groups, tensor.group).copy()
    middle = np.full((rows, tensor.groups), 1 << (tensor.bits - 1), np.uint8)
    zero = (middle if tensor.zero_points is None else np.asarray(tensor.zero_points))[..., None]
    padded = np.zeros((rows, tensor.groups * tensor.group), bool)
    padded[:, :columns] = zeros
    codes = np.where(padded.reshape(codes.shape), zero, codes)
    return dataclasses.replace(tensor, codes=pack(codes.reshape(rows, -1), tensor.bits))


def _round_blocks(blocks: np.ndarray, bits: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Round blocks [rows, groups, group] → codes like them, scale [rows, groups] float16, zero points or None."""
    top = (1 << bits) - 1
    zero = None
    if symmetric:
        middle = 1 << (bits - 1)
        largest, smallest = blocks.max(axis=-1), blocks.min(axis=-1)
        extreme = np.where(largest > -smallest, largest, smallest)
        scale = _to_float16(extreme / np.float32(-middle))
        codes = np.rint(blocks / _safe(scale)[..., None]) + middle
    else:
        low = np.minimum(blocks.min(axis=-1), 0)
        high = np.maximum(blocks.max(axis=-1), 0)
        scale = _to_float16((high - low) / np.float32(top))
        zero = np.clip(np.rint(-low / _safe(scale)), 0, top).astype(np.uint8)
        codes = np.rint(blocks / _safe(scale)[..., None]) + zero[..., None]
    return np.clip(codes, 0, top).astype(np.uint8), scale, zero


def _to_float16(scale: np.ndarray) -> np.ndarray:
    """Round scales to float16, keeping their sign and away from zero and infinity."""
    magnitude = np.clip(np.abs(scale), _SMALLEST_FP16, _LARGEST_FP16)
    return np.where(scale == 0, np.float32(1), np.copysign(magnitude, scale)).astype(np.float16)


def _safe(scale: np.ndarray) -> np.ndarray:
    """Return float16 scales as float32, the precision in which codes are chosen."""
    return scale.astype(np.float32)


def quantized_nbytes(shape: tuple[int, int], *, bits: int, group: int, offset_bytes: int = 0) -> int:
    """Return the bytes a grid needs: packed codes, one float16 scale a group, and `offset_bytes` a group.

    Group 0 takes whole rows.
    """
    group = group or row_group(shape[1], bits)
    groups = -(-shape[1] // group)
    return shape[0] * groups * (group * bits // 8 + 2 + offset_bytes)
