"""How each operator of the dialect is converted: a table from its name to a handler.

A handler takes the function in the making and the node, and returns the node's outputs. Elementwise operators and
moves of data are tensor expressions, which TVM fuses; products, attention and norms call the kernels written by hand.
What isn't in the table is refused with the node's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
from tvm import relax, te, tirx, topi

from edgepipe.engines.tvm import expressions, functions, heads, matrices, moves
from edgepipe.engines.tvm.convert import Function
from edgepipe.engines.tvm.norms import norm
from edgepipe.engines.tvm.values import Value, attribute
from edgepipe.levels import Level

Handler = Callable[[Function, ir.Node], Sequence[Value]]


def operators(level: Level) -> Mapping[str, Handler]:
    """Return the handlers of a library for a level."""
    return OPERATORS if level.gpu is None else {**OPERATORS, **expressions.OPERATORS}


def _elementwise(compute: Callable[[Any], Any], name: str) -> Handler:
    def handle(f: Function, node: ir.Node) -> list[Value]:
        def over(x: Any) -> Any:
            return te.compute(x.shape, lambda *at: compute(x(*at)), name=name)

        return [f.te(over, f.read(node, 0).expr, name=name)]

    return handle


def _binary(compute: Callable[[Any, Any], Any], name: str) -> Handler:
    """Return a handler of an operator of two operands or more, with broadcasting."""

    def handle(f: Function, node: ir.Node) -> list[Value]:
        result = f.read(node, 0)
        for index in range(1, len(node.inputs)):
            result = f.te(compute, result.expr, f.read(node, index).expr, name=name)
        return [result]

    return handle


def _divide(a: Any, b: Any) -> Any:
    return topi.divide(a, b) if str(a.dtype).startswith("float") else topi.floor_divide(a, b)


def _gelu(f: Function, node: ir.Node) -> Sequence[Value]:
    compute = functions.gelu_tanh if attribute(node, "approximate", "none") == "tanh" else functions.gelu
    return _elementwise(compute, "gelu")(f, node)


def _clip(f: Function, node: ir.Node) -> Sequence[Value]:
    x = f.read(node, 0)
    for index, compute in ((1, topi.maximum), (2, topi.minimum)):
        if f.value(node, index) is not None:
            x = f.te(compute, x.expr, f.read(node, index).expr, name="clip")
    return [x]


def _reduction(compute: Callable[..., Any], name: str) -> Handler:
    def handle(f: Function, node: ir.Node) -> Sequence[Value]:
        x = f.read(node, 0)
        axes = f.sizes(node, 1) or ([] if attribute(node, "noop_with_empty_axes", 0) else list(range(len(x.shape))))
        if not axes:
            return [x]
        where = [int(axis) % len(x.shape) for axis in axes]
        keep = bool(attribute(node, "keepdims", 1))
        if name == "ReduceMean":
            count = moves.product([x.shape[axis] for axis in where])

            def mean(value: Any, count: Any) -> Any:
                total = topi.sum(value, where, keep)
                shared = tirx.const(float(count), "float32") if isinstance(count, int) else count.astype("float32")
                return te.compute(total.shape, lambda *at: total(*at) / shared, name="mean")

            return [f.te(mean, x.expr, count, name="mean")]
        if name == "ReduceL2":
            x = f.te(lambda value: topi.multiply(value, value), x.expr, name="square")
        found = f.te(lambda value: compute(value, where, keep), x.expr, name=name)
        return [f.te(topi.sqrt, found.expr, name="sqrt") if name == "ReduceL2" else found]

    return handle


def _softmax(f: Function, node: ir.Node) -> Sequence[Value]:
    return [f.emit(relax.op.nn.softmax(f.read(node, 0).expr, int(attribute(node, "axis", -1))))]


def _cumsum(f: Function, node: ir.Node) -> Sequence[Value]:
    axis = (f.sizes(node, 1) or [0])[0]
    return [f.emit(relax.op.cumsum(f.read(node, 0).expr, axis=int(axis)))]


def _norm(*, centred: bool) -> Handler:
    def handle(f: Function, node: ir.Node) -> Sequence[Value]:
        x = f.read(node, 0)
        width = int(x.shape[-1])
        assert int(attribute(node, "axis", -1)) in (-1, len(x.shape) - 1)
        factors = [f.read(node, i) for i in range(1, len(node.inputs)) if node.inputs[i] is not None]
        rows = moves.product(x.shape[:-1])
        known = rows if isinstance(rows, int) else None
        epsilon, bias = float(attribute(node, "epsilon", 1e-5)), len(factors) > 1
        kernel = f.library.kernel(
            ("layer_norm" if centred else "rms_norm", width, epsilon, known, bias),
            lambda: norm(width, epsilon, known, centred=centred, bias=bias),
        )
        (found,) = f.call(kernel, [f.reshape(x, [rows, width]), *factors], [((rows, width), "float32")])
        return [f.reshape(found, x.shape)]

    return handle


OPERATORS: Mapping[str, Handler] = {
    "Abs": _elementwise(tirx.abs, "abs"),
    "Add": _binary(topi.add, "add"),
    "And": _binary(topi.logical_and, "logical_and"),
    "Attention": heads.attention,
    "Cast": moves.cast_node,
    "Clip": _clip,
    "Concat": moves.concat,
    "Cos": _elementwise(tirx.cos, "cos"),
    "CumSum": _cumsum,
    "Div": _binary(_divide, "divide"),
    "Equal": _binary(topi.equal, "equal"),
    "Erf": _elementwise(functions.erf, "erf"),
    "Exp": _elementwise(functions.exp, "exp"),
    "Expand": moves.expand,
    "Gather": matrices.gather,
    "GatherElements": moves.gather_elements,
    "GatherND": moves.gather_nd,
    "Gelu": _gelu,
    "Greater": _binary(topi.greater, "greater"),
    "GreaterOrEqual": _binary(topi.greater_equal, "greater_equal"),
    "Identity": lambda f, node: [f.read(node, 0)],
    "LayerNormalization": _norm(centred=True),
    "Less": _binary(topi.less, "less"),
    "LessOrEqual": _binary(topi.less_equal, "less_equal"),
    "MatMul": matrices.matmul,
    "Max": _binary(topi.maximum, "maximum"),
    "Min": _binary(topi.minimum, "minimum"),
    "Mul": _binary(topi.multiply, "multiply"),
    "Neg": _elementwise(lambda x: tirx.const(0, x.dtype) - x, "negative"),
    "Not": _elementwise(tirx.Not, "logical_not"),
    "Or": _binary(topi.logical_or, "logical_or"),
    "Pow": _binary(topi.power, "power"),
    "RMSNormalization": _norm(centred=False),
    "Range": moves.range_,
    "Reciprocal": _elementwise(lambda x: functions.number(1.0) / x, "reciprocal"),
    "ReduceL2": _reduction(topi.sum, "ReduceL2"),
    "ReduceMax": _reduction(topi.max, "ReduceMax"),
    "ReduceMean": _reduction(topi.sum, "ReduceMean"),
    "ReduceSum": _reduction(topi.sum, "ReduceSum"),
    "Relu": _elementwise(lambda x: tirx.max(x, functions.number(0.0)), "relu"),
    "Reshape": moves.reshape,
    "RotaryEmbedding": heads.rotary,
    "Sigmoid": _elementwise(functions.sigmoid, "sigmoid"),
    "Sin": _elementwise(tirx.sin, "sin"),
    "Slice": moves.slice_,
    "Softmax": _softmax,
    "Split": moves.split,
    "Sqrt": _elementwise(tirx.sqrt, "sqrt"),
    "Squeeze": moves.squeeze,
    "Sub": _binary(topi.subtract, "subtract"),
    "Tanh": _elementwise(functions.tanh, "tanh"),
    "Transpose": moves.transpose,
    "Unsqueeze": moves.unsqueeze,
    "Where": moves.where,
}
