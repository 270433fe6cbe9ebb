"""Lossless import: GGUF blocks → the same codes, scales and minima as a QuantizedTensor.

Each format stores blocks of one row. The functions below only move bits: decoding the result gives exactly what
ggml's own dequantisation gives. 5- and 6-bit codes are kept in 8-bit containers (no engine has kernels for them);
the k-quants' scales are products of a float16 and a 6- or 8-bit integer and need float32 to stay exact.
Source: ggml-common.h and ggml-quants.c (block_q4_0 … block_q6_K), `gguf.quants` for the layouts in Python.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgepipe.artifacts import QuantizedTensor
from edgepipe.numerics.grids import pack

# codes [blocks, block] uint8, scale [blocks, groups per block], minima likewise or None
Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufGrid:
    """Describe one GGUF format that can be kept as it is."""

    name: str
    width: int  # bits of a code in the source: compared with the bits asked for
    bits: int  # bits of the container it is kept in
    block: int  # elements of a block
    block_bytes: int
    group: int  # elements that share a scale
    scale_dtype: type[np.floating]
    minima: bool
    split: Callable[[np.ndarray], Parts]  # [blocks, block_bytes] uint8 → parts

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Return the bytes the imported tensor takes."""
        groups = shape[0] * shape[1] // self.group
        per_group = np.dtype(self.scale_dtype).itemsize * (2 if self.minima else 1)
        return shape[0] * shape[1] * self.bits // 8 + groups * per_group


def _half(block: np.ndarray, start: int) -> np.ndarray:
    """Read the float16 at byte `start` of every block. → [blocks, 1] float16"""
    return np.ascontiguousarray(block[:, start : start + 2]).view(np.float16)


def _nibbles(block: np.ndarray) -> np.ndarray:
    """Split bytes so that all low nibbles come before all high ones (element i and i + n share byte i)."""
    return np.concatenate([block & 0x0F, block >> 4], axis=1)


def _high_bits(block: np.ndarray) -> np.ndarray:
    """Read 4 bytes as 32 single bits, shifted to bit 4 of a code. → [blocks, 32] uint8"""
    return np.unpackbits(block, axis=1, bitorder="little") << 4


def _q4_0(b: np.ndarray) -> Parts:
    return _nibbles(b[:, 2:18]), _half(b, 0), None


def _q4_1(b: np.ndarray) -> Parts:
    return _nibbles(b[:, 4:20]), _half(b, 0), _half(b, 2)


def _q5_0(b: np.ndarray) -> Parts:
    return (_nibbles(b[:, 6:22]) | _high_bits(b[:, 2:6])) + np.uint8(128 - 16), _half(b, 0), None


def _q5_1(b: np.ndarray) -> Parts:
    return _nibbles(b[:, 8:24]) | _high_bits(b[:, 4:8]), _half(b, 0), _half(b, 2)


def _q8_0(b: np.ndarray) -> Parts:
    return b[:, 2:34] ^ np.uint8(0x80), _half(b, 0), None  # int8 → offset binary: q + 128


def _k_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpack the k-quants' twelve bytes into eight 6-bit scales and eight 6-bit minima. → [blocks, 8] uint8 each"""
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale = np.concatenate([low & 0x3F, (high & 0x0F) | ((low >> 2) & 0x30)], axis=1)
    minimum = np.concatenate([middle & 0x3F, (high >> 4) | ((middle >> 2) & 0x30)], axis=1)
    return scale, minimum


def _k_affine(b: np.ndarray, codes: np.ndarray) -> Parts:
    scale, minimum = _k_scales(b[:, 4:16])
    return codes, _half(b, 0).astype(np.float32) * scale, -(_half(b, 2).astype(np.float32) * minimum)


def _q4_k(b: np.ndarray) -> Parts:
    codes = _nibbles(b[:, 16:144].reshape(-1, 32)).reshape(len(b), 256)
    return _k_affine(b, codes)


def _q5_k(b: np.ndarray) -> Parts:
    low = _nibbles(b[:, 48:176].reshape(-1, 32)).reshape(len(b), 8, 32)
    high = (b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    return _k_affine(b, (low | (high << 4)).reshape(len(b), 256))


def _q6_k(b: np.ndarray) -> Parts:
    low = _nibbles(b[:, 0:128].reshape(-1, 64)).reshape(len(b), 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    high = (b[:, 128:192].reshape(len(b), 2, 1, 32) >> shifts) & 3
    codes = (low | (high << 4)).reshape(len(b), 256) + np.uint8(128 - 32)
    scale = b[:, 192:208].view(np.int8).astype(np.float32)
    return codes, _half(b, 208).astype(np.float32) * scale, None


def _grid(
    name: str, width: int, bits: int, split: Callable[[np.ndarray], Parts], *, block: int, block_bytes: int, group: int
) -> GgufGrid:
    k_quant = block == 256
    return GgufGrid(
        name=name,
        width=width,
        bits=bits,
        block=block,
        block_bytes=block_bytes,
        group=group,
        scale_dtype=np.float32 if k_quant else np.float16,
        minima=name.endswith(("_1", "4_K", "5_K")),
        split=split,
    )


GRIDS: dict[str, GgufGrid] = {
    grid.name: grid
    for grid in (
        _grid("Q4_0", 4, 4, _q4_0, block=32, block_bytes=18, group=32),
        _grid("Q4_1", 4, 4, _q4_1, block=32, block_bytes=20, group=32),
        _grid("Q5_0", 5, 8, _q5_0, block=32, block_bytes=22, group=32),
        _grid("Q5_1", 5, 8, _q5_1, block=32, block_bytes=24, group=32),
        _grid("Q8_0", 8, 8, _q8_0, block=32, block_bytes=34, group=32),
        _grid("Q4_K", 4, 4, _q4_k, block=256, block_bytes=144, group=32),
        _grid("Q5_K", 5, 8, _q5_k, block=256, block_bytes=176, group=32),
        _grid("Q6_K", 6, 8, _q6_k, block=256, block_bytes=210, group=16),
    )
}


def import_blocks(raw: np.ndarray, shape: tuple[int, int], grid: GgufGrid) -> QuantizedTensor:
    """Turn the bytes of one GGUF tensor [out · in / block · block_bytes] uint8 into a QuantizedTensor, bit for bit.

    Raises ValueError when the bytes don't fit the shape.
    """
    rows, columns = shape
    if columns % grid.block or raw.size != rows * columns // grid.block * grid.block_bytes:
        raise ValueError(f"{grid.name}: {raw.size} bytes do not hold {rows} × {columns} elements")
    codes, scale, minima = grid.split(raw.reshape(-1, grid.block_bytes))
    return QuantizedTensor(
        shape=shape,
        bits=grid.bits,
        group=grid.group,
        codes=pack(codes.reshape(rows, columns), grid.bits),
        scale=scale.reshape(rows, -1),
        minima=None if minima is None else minima.reshape(rows, -1),
        source_grid=grid.name,
    )
