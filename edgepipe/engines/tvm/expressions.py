"""Operators for a GPU, as tensor expressions: TVM's default rules share their loops out among blocks and threads.

The kernels written by hand are made of a processor's vectors. Here a product is one expression over the codes as they
are stored, [out, bytes], which decodes them inside: no float copy of a matrix is written anywhere. What isn't in the
table below is the same on both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from tvm import relax, te, tirx, topi
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from edgepipe.artifacts import QuantizedTensor
from edgepipe.engines.tvm import packed
from edgepipe.engines.tvm.attention import MASKED, Attention
from edgepipe.engines.tvm.convert import Function
from edgepipe.engines.tvm.functions import number
from edgepipe.engines.tvm.moves import inside, product, widen
from edgepipe.engines.tvm.products import ATTRIBUTES, widened
from edgepipe.engines.tvm.schedules import PRODUCT
from edgepipe.engines.tvm.values import Tensor, Value, Weight, attribute


def _decoder_of(value: QuantizedTensor, parts: Sequence[Any]) -> Any:
    """Return the function from row and column to a weight; `parts` are codes, scales and offsets as they are stored."""
    codes, scales, *others = parts
    per_byte, mask = 8 // value.bits, (1 << value.bits) - 1

    def at(row: Any, column: Any) -> Any:
        # Rows of codes are filled up to whole groups, so a column's place is that in the row
        byte = codes(row, column // per_byte).astype("uint32")
        shift = (column % per_byte * value.bits).astype("uint32")
        code = ((byte >> shift) & tirx.const(mask, "uint32")).astype("int32").astype("float32")
        group = column // value.group
        scale = widened(scales(row, group), str(scales.dtype), 1)
        if value.minima is not None:
            return scale * code + widened(others[0](row, group), str(others[0].dtype), 1)
        if value.zero_points is not None:
            return scale * (code - others[0](row, group).astype("float32"))
        return scale * (code - number(1 << (value.bits - 1)))

    return at


def scaled(f: Function, name: str, x: Tensor) -> Tensor:
    """Multiply the columns of x by a weight's column scales."""
    scale = widen(f, f.weight(packed.plan_columns(f.library.weights, name)), "float16")
    return f.te(topi.multiply, x.expr, scale.expr, name="column_scale")


def gather_codes(f: Function, name: str, value: QuantizedTensor, ids: Tensor) -> Tensor:
    """Return rows of a quantized weight [n, width] float32 for ids [n] int64."""
    rows, width = value.shape
    parts = [f.weight(planned).expr for planned in packed.plan_stored(f.library.weights, name, value)]

    def over(index: Any, *stored: Any) -> Any:
        decoded = _decoder_of(value, stored)
        return te.compute((index.shape[0], width), lambda i, j: decoded(inside(index(i), rows), j), name="gather")

    found = f.te(over, ids.expr, *parts, name="gather_codes")
    return scaled(f, name, found) if value.column_scale is not None else found


def matmul(f: Function, node: ir.Node) -> Sequence[Value]:
    """Multiply by a weight as it is stored, or two tensors."""
    x, weight = f.read(node, 0), f.value(node, 1)
    if not isinstance(weight, Weight) or not weight.transposed:
        return [f.emit(relax.op.matmul(x.expr, f.read(node, 1).expr))]
    value = f.quantized(weight.name)
    f.library.products["float32"] += 1
    return [_float_product(f, weight.name, x) if value is None else _codes_product(f, weight.name, value, x)]


def _float_product(f: Function, name: str, x: Tensor) -> Tensor:
    weights = f.library.weights
    matrix, dtype = f.weight(packed.plan_plain(weights, name)), weights[name].dtype

    def over(value: Any, stored: Any) -> Any:
        return _product(value, stored.shape[0], lambda row, column: widened(stored(row, column), dtype, 1))

    return f.te(over, x.expr, matrix.expr, name=f"float_{PRODUCT}")


def _codes_product(f: Function, name: str, value: QuantizedTensor, x: Tensor) -> Tensor:
    if value.column_scale is not None:
        x = scaled(f, name, x)
    parts = [f.weight(planned).expr for planned in packed.plan_stored(f.library.weights, name, value)]

    def over(given: Any, *stored: Any) -> Any:
        return _product(given, value.shape[0], _decoder_of(value, stored))

    return f.te(over, x.expr, *parts, name=f"codes_{PRODUCT}")


def _product(x: Any, rows: Any, weight: Any) -> Any:
    """Return x [..., columns] times the transposed matrix [rows, columns] of which `weight` gives an element."""
    columns = x.shape[-1]
    decoded = te.compute((rows, columns), weight, name="decoded")  # inlined: no rule leaves it in memory
    k = te.reduce_axis((0, columns), name="k")

    def at(*index: Any) -> Any:
        return te.sum(x(*index[:-1], k) * decoded(index[-1], k), axis=k)

    return te.compute((*x.shape[:-1], rows), at, name="product")


def norm(*, centred: bool) -> Any:
    """Return the handler of LayerNormalization (`centred`) or RMSNormalization over the last axis."""

    def handle(f: Function, node: ir.Node) -> Sequence[Value]:
        x = f.read(node, 0)
        width = int(x.shape[-1])
        assert int(attribute(node, "axis", -1)) in (-1, len(x.shape) - 1)
        factors = [f.read(node, i).expr for i in range(1, len(node.inputs)) if node.inputs[i] is not None]
        epsilon = float(attribute(node, "epsilon", 1e-5))
        rows = product(x.shape[:-1])

        def over(value: Any, *rest: Any) -> Any:
            share = number(1.0 / width)
            shifted = value
            if centred:
                k = te.reduce_axis((0, width), name="k")
                total = te.compute((value.shape[0],), lambda i: te.sum(value(i, k), axis=k), name="total")
                shifted = te.compute(value.shape, lambda i, j: value(i, j) - total(i) * share, name="shifted")
            r = te.reduce_axis((0, width), name="r")
            square = te.compute(
                (value.shape[0],), lambda i: te.sum(shifted(i, r) * shifted(i, r), axis=r), name="square"
            )

            def at(i: Any, j: Any) -> Any:
                found = shifted(i, j) / tirx.sqrt(square(i) * share + number(epsilon)) * rest[0](j)
                return found + rest[1](j) if len(rest) > 1 else found

            return te.compute(value.shape, at, name="norm")

        flat = f.reshape(x, [rows, width])
        found = f.te(over, flat.expr, *factors, name="layer_norm" if centred else "rms_norm")
        return [f.reshape(found, x.shape)]

    return handle


def cumsum(f: Function, node: ir.Node) -> Sequence[Value]:
    """Add up along an axis, every element for itself."""
    x, axis = f.read(node, 0), int((f.sizes(node, 1) or [0])[0]) % len(f.read(node, 0).shape)

    def over(value: Any) -> Any:
        k = te.reduce_axis((0, value.shape[axis]), name="k")

        def at(*index: Any) -> Any:
            element = value(*index[:axis], k, *index[axis + 1 :])
            return te.sum(tirx.if_then_else(k <= index[axis], element, tirx.const(0, x.dtype)), axis=k)

        return te.compute(value.shape, at, name="cumsum")

    return [f.te(over, x.expr, name="cumsum")]


def attend(f: Function, a: Attention, operands: Sequence[Tensor], mask: Tensor | None, places: Tensor | None) -> Tensor:
    """Attend: q, k and v are operands, places [B, S] come with a cache, all of which is read.

    Three steps, each over all heads: scores [B, heads, S, N], softmax, the sum over values.
    """
    flat, kv_flat = a.layout == "flat", a.kv_layout == "flat"
    q, k, v = (_by_head(f, x, one, a.head_dim) for x, one in zip(operands, (flat, kv_flat, kv_flat), strict=True))
    share = a.heads // a.kv_heads

    def pick(tensor: Any, flat: bool, b: Any, h: Any, s: Any, d: Any) -> Any:
        return widened(tensor(b, s, h, d) if flat else tensor(b, h, s, d), str(tensor.dtype), 1)

    def scores(query: Any, key: Any) -> Any:
        d = te.reduce_axis((0, a.head_dim), name="d")
        shape = (query.shape[0], a.heads, query.shape[1 if flat else 2], key.shape[1 if kv_flat else 2])

        def at(b: Any, h: Any, s: Any, t: Any) -> Any:
            return te.sum(pick(query, flat, b, h, s, d) * pick(key, kv_flat, b, h // share, t, d), axis=d)

        return te.compute(shape, at, name="scores")

    def hidden(value: Any, *rest: Any) -> Any:
        def at(b: Any, h: Any, s: Any, t: Any) -> Any:
            found = value(b, h, s, t) * number(a.scale)
            if mask is not None:
                full = (b, h, s, t)[4 - len(mask.shape) :]
                sizes = zip(mask.shape, full, strict=True)
                given = rest[0](*(0 if isinstance(size, int) and size == 1 else place for size, place in sizes))
                found = tirx.if_then_else(given, found, number(MASKED)) if a.mask == "bool" else found + given
            if a.causal:
                last = s if places is None else rest[-1](b, s)
                seen = t <= last if not a.window else tirx.all(t <= last, t > last - a.window)
                found = tirx.if_then_else(seen, found, number(MASKED))
            return found

        return te.compute(value.shape, at, name="hidden")

    def summed(weight: Any, value: Any) -> Any:
        t = te.reduce_axis((0, weight.shape[3]), name="t")

        def of(b: Any, h: Any, s: Any, d: Any) -> Any:
            return te.sum(weight(b, h, s, t) * pick(value, kv_flat, b, h // share, t, d), axis=t)

        if flat:
            shape = (weight.shape[0], weight.shape[2], a.heads, a.head_dim)
            return te.compute(shape, lambda b, s, h, d: of(b, h, s, d), name="summed")
        return te.compute((weight.shape[0], a.heads, weight.shape[2], a.head_dim), of, name="summed")

    rest = [tensor.expr for tensor in (mask, places) if tensor is not None]
    found = f.te(hidden, f.te(scores, q.expr, k.expr, name="scores").expr, *rest, name="hidden")
    weights = f.emit(relax.op.nn.softmax(found.expr, -1))
    return f.reshape(f.te(summed, weights.expr, v.expr, name="attention"), operands[0].shape)


def _by_head(f: Function, x: Tensor, flat: bool, head_dim: int) -> Tensor:
    """Return x with an axis for heads: [B, S, heads · head_dim] as [B, S, heads, head_dim]."""
    return f.reshape(x, [*x.shape[:2], int(x.shape[2]) // head_dim, head_dim]) if flat else x


def append(kv_heads: int, head_dim: int, context: int, tokens: int | None, dtype: str) -> Any:
    """Return the kernel (new [1, S, kv_heads · head_dim], positions [1, S], cache) that writes into the cache."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("append")
            T.func_attr(ATTRIBUTES)
            handles = [T.arg(f"a{i}", T.handle()) for i in range(3)]
            s = tirx.Var("s", "int64") if tokens is None else tirx.const(tokens, "int64")
            new = T.match_buffer(handles[0], [1, s, kv_heads * head_dim], "float32")
            places = T.match_buffer(handles[1], [1, s], "int64")
            cache = T.match_buffer(handles[2], [1, kv_heads, context, head_dim], dtype)
            with T.grid(s, kv_heads, head_dim) as (i, j, k):
                with T.sblock("append"):
                    t, h, d = (T.axis.spatial(n, v) for n, v in zip((s, kv_heads, head_dim), (i, j, k), strict=True))
                    T.reads([new[0, t, h * head_dim + d], places[0, t]])
                    T.writes([cache[0, h, places[0, t], d]])
                    T.buffer_store(cache, new[0, t, h * head_dim + d].astype(dtype), [0, h, places[0, t], d])
    return builder.get()


OPERATORS = {  # in place of those that call kernels written for a processor
    "CumSum": cumsum,
    "LayerNormalization": norm(centred=True),
    "MatMul": matmul,
    "RMSNormalization": norm(centred=False),
}
