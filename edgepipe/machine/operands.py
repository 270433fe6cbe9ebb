"""Operands for the instruction-set paths, and the results they must have: exact ones, in the standard library alone."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

_SEED = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Hold the operands of one call and the bytes it must leave in `out`."""

    a: bytes
    b: bytes
    expected: bytes


def _pack(kind: str, values: list[int] | list[float]) -> bytes:
    """Return values as little-endian bytes of one struct letter."""
    return struct.pack(f"<{len(values)}{kind}", *values)


def _whole(random: Random, count: int, low: int, high: int) -> list[int]:
    return [random.randint(low, high) for _ in range(count)]


def fused(lanes: int) -> Case:
    """Make x·y + c, where c = −(x·y rounded): a product that is rounded before the sum leaves 0 everywhere."""
    random = Random(_SEED)
    x, y = ([1 + k / 65536 for k in _whole(random, lanes, 1, 32767)] for _ in range(2))
    product = [p * q for p, q in zip(x, y, strict=True)]  # exact in float64: 33 bits, of which a float32 has 24
    c = [-value for value in struct.unpack(f"<{lanes}f", _pack("f", product))]
    expected = [p + q for p, q in zip(product, c, strict=True)]
    return Case(a=_pack("f", x) + _pack("f", c), b=_pack("f", y), expected=_pack("f", expected))


def add_floats(lanes: int) -> Case:
    """Make x + y of whole floats."""
    random = Random(_SEED)
    x, y = _whole(random, lanes, -9999, 9999), _whole(random, lanes, -9999, 9999)
    return Case(a=_pack("f", x), b=_pack("f", y), expected=_pack("f", [p + q for p, q in zip(x, y, strict=True)]))


def greater() -> Case:
    """Compare 64-bit numbers that differ in their upper halves, or only in their lower ones."""
    x, y = [1 << 40, -5], [1 << 32, -4]
    return Case(a=_pack("q", x), b=_pack("q", y), expected=_pack("q", [-(p > q) for p, q in zip(x, y, strict=True)]))


def exclusive_or(count: int) -> Case:
    """Make a ^ b of bytes."""
    random = Random(_SEED)
    a, b = random.randbytes(count), random.randbytes(count)
    return Case(a=a, b=b, expected=bytes(p ^ q for p, q in zip(a, b, strict=True)))


def products_64(lanes: int) -> Case:
    """Make the lower 64 bits of x·y."""
    random = Random(_SEED)
    x, y = ([random.getrandbits(64) for _ in range(lanes)] for _ in range(2))
    return Case(
        a=_pack("Q", x), b=_pack("Q", y), expected=_pack("Q", [p * q % 2**64 for p, q in zip(x, y, strict=True)])
    )


def pairs_saturated(count: int) -> Case:
    """Make sums of two products u8·s8, kept within 16 bits: what int8 kernels do without VNNI."""
    random = Random(_SEED)
    x = [255, 255, 255, 255, *_whole(random, count - 4, 0, 255)]
    y = [127, 127, -128, -128, *_whole(random, count - 4, -128, 127)]  # both ends are reached
    sums = [x[i] * y[i] + x[i + 1] * y[i + 1] for i in range(0, count, 2)]
    return Case(a=_pack("B", x), b=_pack("b", y), expected=_pack("h", [max(-32768, min(32767, s)) for s in sums]))


def dots(count: int, kind: str) -> Case:
    """Make sums of four products of 8-bit numbers, `kind` ("B" or "b") times signed ones → int32."""
    random = Random(_SEED)
    x = _whole(random, count, *((0, 255) if kind == "B" else (-128, 127)))
    y = _whole(random, count, -128, 127)
    sums = [sum(x[i + j] * y[i + j] for j in range(4)) for i in range(0, count, 4)]
    return Case(a=_pack(kind, x), b=_pack("b", y), expected=_pack("i", sums))


def halves() -> Case:
    """Widen eight halves to floats, then narrow eight floats to halves."""
    random = Random(_SEED)
    narrow = struct.pack("<8e", *(random.uniform(-9, 9) for _ in range(8)))
    wide = struct.pack("<8f", *(random.uniform(-9, 9) for _ in range(8)))
    widened = struct.pack("<8f", *struct.unpack("<8e", narrow))
    return Case(a=narrow, b=wide, expected=widened + struct.pack("<8e", *struct.unpack("<8f", wide)))


def multiply_halves() -> Case:
    """Make eight x·y of whole float16 numbers."""
    random = Random(_SEED)
    x, y = _whole(random, 8, -40, 40), _whole(random, 8, -40, 40)  # products below 2^11: exact
    return Case(a=_pack("e", x), b=_pack("e", y), expected=_pack("e", [p * q for p, q in zip(x, y, strict=True)]))


def _bfloat16(values: list[int]) -> bytes:
    """Return whole numbers up to 256 as bfloat16: the upper halves of their floats."""
    return b"".join(struct.pack("<f", value)[2:] for value in values)


def pairs_bfloat16(count: int) -> Case:
    """Make sums of two products of bfloat16 numbers → float32."""
    random = Random(_SEED)
    x, y = _whole(random, count, -99, 99), _whole(random, count, -99, 99)
    sums = [x[i] * y[i] + x[i + 1] * y[i + 1] for i in range(0, count, 2)]
    return Case(a=_bfloat16(x), b=_bfloat16(y), expected=_pack("f", sums))


def matrix_i8() -> Case:
    """Make [2, 8] · [2, 8]ᵀ of signed bytes → [2, 2] int32."""
    random = Random(_SEED)
    x, y = _whole(random, 16, -128, 127), _whole(random, 16, -128, 127)
    sums = [sum(x[i + k] * y[j + k] for k in range(8)) for i in (0, 8) for j in (0, 8)]
    return Case(a=_pack("b", x), b=_pack("b", y), expected=_pack("i", sums))


def outer() -> Case:
    """Make the outer product [4, 4] of two rows of four floats."""
    random = Random(_SEED)
    x, y = _whole(random, 4, -99, 99), _whole(random, 4, -99, 99)
    return Case(a=_pack("f", x), b=_pack("f", y), expected=_pack("f", [p * q for p in x for q in y]))


_TILES = 16  # rows of a tile, of 64 bytes each
# palette 1; tiles 0 to 2 have 64 bytes a row (a 16-bit number from byte 16 on) and 16 rows (a byte from 48 on)
_TILE_CONFIG = bytes([1]) + bytes(15) + _pack("H", [64] * 3) + bytes(26) + bytes([_TILES] * 3) + bytes(13)


def _tile_product(together: int, low: int, x_kind: Callable[[list[int]], bytes], kind: str) -> Case:
    """Make C[m, n] = Σ A[m, k] · B[k, n], where a row of B holds `together` successive k of each n."""
    random = Random(_SEED)
    depth = _TILES * together
    x = [_whole(random, depth, low, 99) for _ in range(_TILES)]  # [m][k]
    y = [_whole(random, depth, -99, 99) for _ in range(_TILES)]  # [k // together][n · together + k % together]
    sums = [
        sum(x[m][k] * y[k // together][n * together + k % together] for k in range(depth))
        for m in range(_TILES)
        for n in range(_TILES)
    ]
    packed = b"".join(x_kind(row) for row in x), b"".join(_signed(row, together) for row in y)
    return Case(a=_TILE_CONFIG + packed[0], b=packed[1], expected=_pack(kind, sums))


def _signed(values: list[int], together: int) -> bytes:
    return _pack("b", values) if together == 4 else _bfloat16(values)


def tile_bytes() -> Case:
    """Make a product of tiles, unsigned bytes times signed ones → int32, behind the tiles' configuration."""
    return _tile_product(4, 0, lambda row: _pack("B", row), "i")


def tile_bfloat16() -> Case:
    """Make a product of tiles of bfloat16 numbers → float32, behind the tiles' configuration."""
    return _tile_product(2, -99, _bfloat16, "f")
