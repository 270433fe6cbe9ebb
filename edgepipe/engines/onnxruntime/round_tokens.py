"""Pass: what a product by a layer of the plan reads is rounded token by token first.

    MatMul(x, W.T)   → MatMul(rounded x, W.T)    rounded x = level · scale, of each row of x's last axis
                                                 (numerics/tokens.py says how both are found; here as float operators)
    with `normalizes`, LayerNormalization(x) without weights stands in the portable graph already

x is rounded once for all matrices that read it. What the product reads has 2^bits different values per token at most.
The product itself stays whatever place_weights makes of the matrix: on a CPU no kernel multiplies 4 bits by 4 bits, and
float arithmetic on rounded values gives the same sums. Left alone: what the plan doesn't name (embedding, heads).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepipe.artifacts import ActivationPlan, TokenGrid
from edgepipe.engines.onnxruntime.names import ROUNDED, is_transposed, weight_parts
from edgepipe.engines.onnxruntime.place_weights import Lowering, emit
from edgepipe.engines.onnxruntime.planned import WeightsFile
from edgepipe.errors import ContractError
from edgepipe.numerics.tokens import TINY
from edgepipe.weights import WeightStore


def round_tokens(graph: ir.Graph, weights: WeightStore, file: WeightsFile, plan: ActivationPlan) -> None:
    """Round what the products of a plan's layers read, in place; ContractError for one that isn't such a product."""
    assert plan.tokens is not None
    low = Lowering(graph=graph, weights=weights, file=file)
    layers = {weights[name].name for name in plan.layers}
    rounded: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        parts = [
            p for value in node.inputs if value is not None and value.is_graph_input() for p in weight_parts(value)
        ]
        name = next((part for part in parts if weights[part].name in layers), None)
        if name is None:
            continue
        if node.op_type != "MatMul" or not is_transposed(node.inputs[1]):
            raise ContractError(f"{name} should read rounded tokens: {node.op_type} is no product that could")
        x = node.inputs[0]
        assert x is not None
        if x not in rounded:
            rounded[x] = _rounded(low, node, x, plan.tokens)
            rounded[x].name = f"{ROUNDED}{name}"
            rounded[x].shape, rounded[x].dtype = x.shape, ir.DataType.FLOAT
        node.replace_input_with(0, rounded[x])


def _rounded(low: Lowering, before: ir.Node, x: ir.Value, grid: TokenGrid) -> ir.Value:
    """Insert the operators that round x, and return their result."""
    half, top = 1 << (grid.bits - 1), (1 << grid.bits) - 1
    last = low.constant(np.array([-1], np.int64), "last_axis")

    def then(kind: str, *inputs: ir.Value) -> ir.Value:
        return emit(low, before, [ir.node(kind, list(inputs))])

    def number(value: float) -> ir.Value:
        return low.constant(np.array(value, np.float32), f"number_{value:g}")

    def end(kind: str) -> ir.Value:
        return emit(low, before, [ir.node(kind, [x, last], {"keepdims": 1})])

    smallest, largest = end("ReduceMin"), end("ReduceMax")
    zero: ir.Value | None = None
    if grid.form == "zero points":
        smallest, largest = then("Min", smallest, number(0)), then("Max", largest, number(0))
        scale = then("Div", then("Sub", largest, smallest), number(top))
    else:
        opposite = then("Neg", smallest)
        extreme = then("Where", then("Greater", largest, opposite), largest, smallest)
        signed = grid.form == "signed"
        scale = then("Div", extreme, number(-half)) if signed else then("Div", then("Abs", extreme), number(half - 1))
    scale = then("Where", then("Less", then("Abs", scale), number(TINY)), number(1), scale)
    level = then("Round", then("Div", x, scale))
    if grid.form == "zero points":
        zero = then("Round", then("Div", then("Neg", smallest), scale))
        level = then("Max", then("Min", level, then("Sub", number(top), zero)), then("Neg", zero))
    else:
        level = then("Clip", level, number(-half), number(half - 1))
    return then("Mul", level, scale)
