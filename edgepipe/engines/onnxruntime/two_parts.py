"""Activations in two int8 parts: float32-like results from kernels that only multiply int8.

    s = max|x| / 127 per group ;  high = s · round(x / s) ;  low = x − high
    y = MatMulNBits([high; low], W) summed over both

onnxruntime's 8-bit products have int8 kernels only: their float32 path decodes the whole weight at every call (100 ms
for a head of 28 M weights, where this takes 2). `high` lies on the grid the kernel rounds to, so nothing of it is
lost, and rounding `low` costs 1/254 of what rounding x would: about 16 bits. The weight is read once for both rows, so
a step costs little more; a long prompt costs twice the multiply-adds. Residual quantization as in product codes:
Juang and Gray, "Multiple stage vector quantization for speech coding", ICASSP 1982, with one level more.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

_LARGEST = 127.0  # of a signed 8-bit code; the kernel's grid is symmetric
_TINY = 1e-30  # a group of zeros would divide by zero

Constant = Callable[[np.ndarray, str], ir.Value]


def split_in_two(x: ir.Value, columns: int, group: int, constant: Constant) -> list[ir.Node]:
    """Return nodes that turn x [..., columns] into [2, ..., columns], the part on the int8 grid and the rest.

    `constant` gives the graph's small constant for an array and a name.
    """
    outer = [0] * (rank(x) - 1)  # Reshape keeps these axes as they are
    groups = -(-columns // group)
    nodes: list[ir.Node] = []

    def then(kind: str, inputs: list[ir.Value], attributes: dict[str, int] | None = None) -> ir.Value:
        nodes.append(ir.node(kind, inputs, attributes or {}))
        return nodes[-1].outputs[0]

    def scalar(value: float, name: str) -> ir.Value:
        return constant(np.array(value, np.float32), name)

    short = groups * group - columns
    if short:
        x = then("Pad", [x, pads(len(outer) + 1, short, constant)])
    blocks = then("Reshape", [x, split_groups(len(outer) + 1, groups, group, constant)])
    last = constant(np.array([-1], np.int64), "last_axis")
    largest = then("ReduceMax", [then("Abs", [blocks]), last], {"keepdims": 1})
    step = then("Mul", [largest, scalar(1 / _LARGEST, "per_code")])
    step = then("Max", [step, scalar(_TINY, "tiny")])
    high = then("Mul", [then("Round", [then("Div", [blocks, step])]), step])
    low = then("Sub", [blocks, high])
    first = constant(np.array([0], np.int64), "first_axis")
    both = then("Concat", [then("Unsqueeze", [high, first]), then("Unsqueeze", [low, first])], {"axis": 0})
    whole = constant(np.array([0, *outer, groups * group], np.int64), f"parts_{len(outer)}d_{groups * group}")
    rows = then("Reshape", [both, whole])
    if short:
        bounds = [constant(np.array([v], np.int64), f"int_{v}") for v in (0, columns, -1)]
        then("Slice", [rows, *bounds])
    return nodes


def rank(x: ir.Value) -> int:
    """Return the number of axes of a value; a graph of the Llama builder doesn't say, and has three: [B, S, in]."""
    return 3 if x.shape is None else len(x.shape)


def pads(axes: int, short: int, constant: Constant) -> ir.Value:
    """Return Pad's constant that adds `short` elements at the end of the last of `axes` axes."""
    return constant(np.array([0] * (2 * axes - 1) + [short], np.int64), f"pad_{axes}d_{short}")


def split_groups(axes: int, groups: int, group: int, constant: Constant) -> ir.Value:
    """Return Reshape's constant that splits the last of `axes` axes into groups."""
    return constant(np.array([0] * (axes - 1) + [groups, group], np.int64), f"groups_{axes}d_{groups}x{group}")


def sum_of_two(y: ir.Value, constant: Constant) -> ir.Node:
    """Return the node that adds the products [2, ..., out] of both parts."""
    return ir.node("ReduceSum", [y, constant(np.array([0], np.int64), "first_axis")], {"keepdims": 0})
