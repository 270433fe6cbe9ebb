"""Which kernels there are to check, and which of them a target needs: a table, readable where numpy is broken."""

from __future__ import annotations

_FLOAT32_LEVELS = frozenset({0, 1, 2, 3})  # accuracy levels that compute in float32 (target.py)
_INT8_LEVELS = frozenset({4})
_ALL = _FLOAT32_LEVELS | _INT8_LEVELS
_NONE: frozenset[int] = frozenset()  # the lowering multiplies 8-bit weights in int8 always (two_parts.py)

# name of a check in kernels.py → accuracy levels of targets whose bundles need it
NEEDED_AT: dict[str, frozenset[int]] = {
    "MatMulNBits 2 bits, float32": _FLOAT32_LEVELS,  # in encoders; decoders multiply in int8
    "MatMulNBits 2 bits, float32, zero points": _FLOAT32_LEVELS,
    "MatMulNBits 2 bits, int8": _ALL,
    "MatMulNBits 2 bits, int8, zero points": _ALL,
    "MatMulNBits 4 bits, float32": _FLOAT32_LEVELS,
    "MatMulNBits 4 bits, float32, zero points": _FLOAT32_LEVELS,
    "MatMulNBits 4 bits, int8": _INT8_LEVELS,
    "MatMulNBits 4 bits, int8, zero points": _INT8_LEVELS,
    "MatMulNBits 8 bits, float32": _NONE,
    "MatMulNBits 8 bits, float32, zero points": _NONE,
    "MatMulNBits 8 bits, int8": _ALL,
    "MatMulNBits 8 bits, int8, zero points": _ALL,
    "GatherBlockQuantized 2 bits": _ALL,
    "GatherBlockQuantized 4 bits": _ALL,
    "GatherBlockQuantized 8 bits": _ALL,
    "FusedMatMul on float16, bfloat16, float32": _ALL,
    "SkipSimplifiedLayerNormalization": _ALL,
    "QuickGelu": _ALL,
    "GroupQueryAttention, float32 cache": _ALL,
    "GroupQueryAttention, float32 cache, not flash": _NONE,  # only where the environment asks for it
    "GroupQueryAttention, float16 cache": _ALL,
    "MultiHeadAttention": _ALL,
}
KERNEL_NAMES = tuple(NEEDED_AT)


def needed_kernels(accuracy_level: int) -> tuple[str, ...]:
    """Return the checks that a target with this accuracy level depends on."""
    return tuple(name for name, levels in NEEDED_AT.items() if accuracy_level in levels)
