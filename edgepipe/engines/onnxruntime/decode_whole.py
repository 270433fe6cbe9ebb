"""Decode a whole quantized matrix with standard operators, which onnxruntime folds into a constant when it loads.

    value = scale · (code − middle) + minima      or      scale · (code − zero point)

GatherBlockQuantized over all rows would say the same in one node, but onnxruntime folds neither it nor
DequantizeLinear: the matrix would be decoded at every run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from edgepipe.artifacts import QuantizedTensor
from edgepipe.engines.onnxruntime.planned import middle_code

Constant = Callable[[np.ndarray, str], ir.Value]


def decode_whole(
    codes: ir.Value, parts: Mapping[str, ir.Value], rows: int, sample: QuantizedTensor, constant: Constant
) -> list[ir.Node]:
    """Return nodes that turn planned parts of a matrix into float32 [rows, columns]; the last gives it.

    `codes` [rows, bytes] uint8; `parts`: scale and minima [rows, groups], zero_points [rows, bytes] packed as codes.
    `sample` has the grid, `constant` gives the graph's small constant for an array and a name.
    """
    nodes: list[ir.Node] = []

    def then(kind: str, inputs: list[ir.Value], attributes: dict[str, int | str] | None = None) -> ir.Value:
        nodes.append(ir.node(kind, inputs, attributes or {}))
        return nodes[-1].outputs[0]

    def shape(*dims: int) -> ir.Value:
        return constant(np.array(dims, np.int64), f"shape_{'x'.join(map(str, dims))}")

    def floats(value: ir.Value) -> ir.Value:
        return then("Cast", [value], {"to": int(ir.DataType.FLOAT)})

    def unpacked(value: ir.Value, count: int) -> ir.Value:
        """Return packed codes as floats [rows, count]."""
        if sample.bits == 8:
            return floats(value)
        last = constant(np.array([-1], np.int64), "last_axis")
        low = then("BitwiseAnd", [value, constant(np.array(15, np.uint8), "low_nibble")])
        high = then("BitShift", [value, constant(np.array(4, np.uint8), "nibble")], {"direction": "RIGHT"})
        both = then("Concat", [then("Unsqueeze", [one, last]) for one in (low, high)], {"axis": -1})
        pairs = then("Reshape", [both, shape(rows, -1)])
        bounds = [constant(np.array([v], np.int64), f"int_{v}") for v in (0, count, -1)]
        return floats(then("Slice", [pairs, *bounds]))

    def per_group(value: ir.Value) -> ir.Value:
        return then("Reshape", [value, shape(rows, sample.groups, 1)])

    wide = sample.groups * sample.group
    values = then("Reshape", [unpacked(codes, wide), shape(rows, sample.groups, sample.group)])
    if "zero_points" in parts:
        middle = per_group(unpacked(parts["zero_points"], sample.groups))
    else:  # plan_part moves codes that are kept with minima to the middle of their container
        zero = (1 << (sample.bits - 1)) - (middle_code(sample) if "minima" in parts else 0)
        middle = constant(np.array(zero, np.float32), f"code_{zero}")
    values = then("Mul", [then("Sub", [values, middle]), per_group(floats(parts["scale"]))])
    if "minima" in parts:
        values = then("Add", [values, per_group(floats(parts["minima"]))])
    whole = then("Reshape", [values, shape(rows, wide)])
    if wide != sample.shape[1]:
        bounds = [constant(np.array([v], np.int64), f"int_{v}") for v in (0, sample.shape[1], -1)]
        then("Slice", [whole, *bounds])
    return nodes
