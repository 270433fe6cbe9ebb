"""Two graphs of one matrix product each, as onnxruntime reads them: the base install can run graphs but not build them.

y [m, n] = a [m, k] · b [k, n]. A test builds both anew with the package onnx and compares.
"""

from __future__ import annotations

import numpy as np

# ONNX MatMul, opset 13: float32 · float32 → float32
FLOAT32 = (
    b'\x08\x08:[\n\x11\n\x01a\n\x01b\x12\x01y"\x06MatMul\x12\x01gZ\x15\n\x01a\x12\x10\n\x0e\x08\x01\x12\n\n\x03\x12\x01m'
    b"\n\x03\x12\x01kZ\x15\n\x01b\x12\x10\n\x0e\x08\x01\x12\n\n\x03\x12\x01k\n\x03\x12\x01nb\x15\n\x01y\x12\x10\n\x0e\x08"
    b"\x01\x12\n\n\x03\x12\x01m\n\x03\x12\x01nB\x04\n\x00\x10\r"
)
# ONNX MatMulInteger, opset 13: uint8 · int8 → int32
INT8 = (
    b'\x08\x08:b\n\x18\n\x01a\n\x01b\x12\x01y"\rMatMulInteger\x12\x01gZ\x15\n\x01a\x12\x10\n\x0e\x08\x02\x12\n\n\x03\x12'
    b"\x01m\n\x03\x12\x01kZ\x15\n\x01b\x12\x10\n\x0e\x08\x03\x12\n\n\x03\x12\x01k\n\x03\x12\x01nb\x15\n\x01y\x12\x10\n\x0e"
    b"\x08\x06\x12\n\n\x03\x12\x01m\n\x03\x12\x01nB\x04\n\x00\x10\r"
)


def float32_operands(m: int, k: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return operands whose values slow no arithmetic down: no denormals, no infinities."""
    return np.full((m, k), 0.5, np.float32), np.full((k, n), 0.25, np.float32)


def int8_operands(m: int, k: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a uint8 and an int8 operand."""
    return np.full((m, k), 3, np.uint8), np.full((k, n), -2, np.int8)
