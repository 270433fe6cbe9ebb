"""Pass: MatMul by a weight with one scale a row → an integer product of activations in 8 bits.

    MatMul(x, W.T) (+ bias)   dynamic → MatMulIntegerToFloat(DynamicQuantizeLinear(x), W, scales, bias)
                              static  → MatMulIntegerToFloat(QuantizeLinear(x, range of x), W, scales, bias)
                              exact   → MatMul(x, DequantizeLinear(W)): what both are compared with, and where ranges
                                        are observed

These are the operators that onnxruntime would make of DynamicQuantizeLinear · MatMulInteger · Cast · Mul · Add and of
pairs of QuantizeLinear and DequantizeLinear; they are written as such, so that no version's fusions decide what is
integer. x is rounded once for all matrices that read it, per tensor, to uint8 with a zero point; W is int8 [in, out]
without one: on x86 with VNNI or AMX that is the fast pair (uint8 · uint8 took twice, int8 · int8 ten times its time).
Outputs stay float32, since norms, residuals and softmax follow. With column scales (SmoothQuant), x is multiplied by
them first. Attention's own products stay float, so masks of −3.4e38 never meet a range.
Left alone: weights on other grids, and products of two activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from edgepipe.artifacts import QuantizedTensor
from edgepipe.engines.onnxruntime.names import is_transposed, weight_parts
from edgepipe.engines.onnxruntime.place_weights import Lowering, emit, replace_node, take_bias, widened
from edgepipe.engines.onnxruntime.planned import WeightsFile, plan_columns, plan_integers, plan_part
from edgepipe.errors import ContractError
from edgepipe.weights import WeightStore

_LEVELS = 255  # between the smallest and the largest uint8
_TINY = np.float32(1e-10)  # an input that was always zero has no range to divide by
_INPUT = "rounded:"  # what an input is called whose range is observed, with the first weight that reads it

Range = tuple[float, float]  # smallest and largest value that keeps its place; what lies beyond is clipped


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """Say how integer products round what they read."""

    kind: str  # "exact", "dynamic" or "static"
    ranges: Mapping[str, Range] = field(default_factory=dict)  # of static ones, by the name of the input


@dataclass(slots=True, kw_only=True)
class _Inputs:
    """Hold the values that are rounded, each once for all that read it."""

    scaled: dict[tuple[ir.Value, bytes], ir.Value] = field(default_factory=dict)
    rounded: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = field(default_factory=dict)


def integer_products(graph: ir.Graph, weights: WeightStore, file: WeightsFile, arithmetic: Arithmetic) -> None:
    """Lower every product by a weight with one scale a row, in place."""
    low = Lowering(graph=graph, weights=weights, file=file)
    inputs = _Inputs()
    for node in list(graph):
        if node.op_type == "MatMul" and is_transposed(node.inputs[1]):
            names = weight_parts(node.inputs[1])  # type: ignore[arg-type]
            sample = weights.load(names[0])
            if isinstance(sample, QuantizedTensor) and sample.has_integer_rows:
                _lower_product(low, node, names, sample, arithmetic, inputs)


def product_inputs(graph: onnx.GraphProto) -> tuple[str, ...]:
    """Return the names of what the products of an exact graph read: those that get a range."""
    decoded = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    found = (node.input[0] for node in graph.node if node.op_type == "MatMul" and node.input[1] in decoded)
    return tuple(dict.fromkeys(found))


def _lower_product(
    low: Lowering,
    node: ir.Node,
    names: tuple[str, ...],
    sample: QuantizedTensor,
    arithmetic: Arithmetic,
    inputs: _Inputs,
) -> None:
    x = _scaled(low, node, names, sample, inputs)
    rows = sum(low.weights[name].shape[0] for name in names)
    weight = low.initializer(plan_integers(low.weights, names, sample))
    scale = widened(low, node, low.initializer(plan_part(low.weights, names, "scale", sample), (rows,)))
    bias = take_bias(low, node)
    if arithmetic.kind == "exact":
        decoded = emit(low, node, [ir.node("DequantizeLinear", [weight, scale], {"axis": 1})])
        y = emit(low, node, [ir.node("MatMul", [x, decoded])])
        replace_node(low, node, y if bias is None else emit(low, node, [ir.node("Add", [y, bias])]))
        return
    if x not in inputs.rounded:
        rounding = _dynamic(x) if arithmetic.kind == "dynamic" else _static(low, x, arithmetic.ranges)
        low.graph.insert_before(node, rounding[:1])
        inputs.rounded[x] = rounding[1:]
    codes, step, zero = inputs.rounded[x]
    product = ir.node("MatMulIntegerToFloat", [codes, weight, step, scale, zero, None, bias], domain="com.microsoft")
    replace_node(low, node, emit(low, node, [product]))


def _scaled(low: Lowering, node: ir.Node, names: tuple[str, ...], sample: QuantizedTensor, inputs: _Inputs) -> ir.Value:
    """Return what a product reads, multiplied by its weight's column scales where there are some, under a name."""
    x = node.inputs[0]
    assert x is not None
    scales = b"" if sample.column_scale is None else np.asarray(sample.column_scale).tobytes()
    if any(_column_bytes(low.weights, name) != scales for name in names[1:]):
        raise ContractError(f"{', '.join(names)} read the same value, and must have the same column scales")
    if (x, scales) not in inputs.scaled:
        value = x
        if scales:
            columns = widened(low, node, low.initializer(plan_columns(low.weights, names[0], sample)))
            value = emit(low, node, [ir.node("Mul", [x, columns])])
        if not (value.is_graph_input() or value.is_graph_output()):
            value.name = f"{_INPUT}{names[0]}"
        inputs.scaled[x, scales] = value
    return inputs.scaled[x, scales]


def _column_bytes(weights: WeightStore, name: str) -> bytes:
    value = weights.load(name)
    assert isinstance(value, QuantizedTensor)
    return b"" if value.column_scale is None else np.asarray(value.column_scale).tobytes()


def _dynamic(x: ir.Value) -> tuple[ir.Node, ir.Value, ir.Value, ir.Value]:
    """Return the node that rounds x within its own range, and its codes, step and zero point."""
    node = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
    codes, step, zero = node.outputs
    return node, codes, step, zero


def _static(low: Lowering, x: ir.Value, ranges: Mapping[str, Range]) -> tuple[ir.Node, ir.Value, ir.Value, ir.Value]:
    """Return the node that rounds x within a fixed range, and its codes, step and zero point."""
    name = x.name or ""
    if name not in ranges:
        raise ContractError(f"no range was observed for {name}")
    steps, point = step_and_zero(ranges[name])
    step, zero = low.constant(np.array(steps), f"{name}:step"), low.constant(np.array(point), f"{name}:zero")
    node = ir.node("QuantizeLinear", [x, step, zero])
    return node, node.outputs[0], step, zero


def step_and_zero(observed: Range) -> tuple[np.float32, np.uint8]:
    """Return step and zero point of the uint8 grid over a range: zero keeps a code, as DynamicQuantizeLinear has it.

    Source: Jacob et al., arXiv:1712.05877.
    """
    low, high = min(observed[0], 0.0), max(observed[1], 0.0)
    step = max(np.float32((high - low) / _LEVELS), _TINY)
    return step, np.uint8(np.clip(np.rint(-low / step), 0, _LEVELS))
