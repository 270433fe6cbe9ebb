"""Operators that read matrices of the weights: products by the kernels of products.py, and gathers of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from tvm import relax, te, tirx

from edgepipe.engines.tvm import expressions, packed, products
from edgepipe.engines.tvm.convert import Function
from edgepipe.engines.tvm.moves import cast, inside, product
from edgepipe.engines.tvm.values import Known, Size, Tensor, Value, Weight, attribute


def gather_rows(f: Function, name: str, ids: Tensor) -> Tensor:
    """Return rows of a weight [n, width] float32 for ids [n] int64."""
    library = f.library
    record = library.weights[name]
    (count,) = ids.shape
    rows = count if isinstance(count, int) else None
    value = f.quantized(name)
    if value is not None and library.level.gpu is not None:
        return expressions.gather_codes(f, name, value, ids)
    if value is None and record.name in library.multiplied:
        return _gather_tiles(f, packed.floats_of((record.shape[0], record.shape[1]), record.dtype), name, ids)
    if value is None:
        table = f.weight(packed.plan_plain(library.weights, name))
        return _gather_plain(f, table, ids, record.dtype)
    w = packed.codes_of(value)
    kernel = library.kernel(("gather_codes", w, rows), lambda: products.gather_codes(w, rows))
    parts = [f.weight(planned) for planned in packed.plan_codes(library.weights, name, w)]
    (found,) = f.call(kernel, [ids, *parts], [((count, w.shape[1]), "float32")])
    return expressions.scaled(f, name, found) if value.column_scale is not None else found


def _gather_tiles(f: Function, w: products.Floats, name: str, ids: Tensor) -> Tensor:
    table = f.weight(packed.plan_floats(f.library.weights, name, w))

    def over(data: Any, index: Any) -> Any:
        def at(i: Any, j: Any) -> Any:
            row = inside(index(i), w.shape[0])
            return products.widened(data(row // w.width, j, row % w.width), w.dtype, 1)

        return te.compute((*index.shape, w.shape[1]), at, name="gather")

    return f.te(over, table.expr, ids.expr, name="gather")


def _gather_plain(f: Function, table: Tensor, ids: Tensor, dtype: str) -> Tensor:
    rows = table.shape[0]

    def over(data: Any, index: Any) -> Any:
        def at(i: Any, *rest: Any) -> Any:
            return products.widened(data(inside(index(i), rows), *rest), dtype, 1)

        return te.compute((*index.shape, *data.shape[1:]), at, name="gather")

    return f.te(over, table.expr, ids.expr, name="gather")


def gather(f: Function, node: ir.Node) -> Sequence[Value]:
    """Read slices at indices, of a weight or of a tensor."""
    data, indices = f.value(node, 0), f.value(node, 1)
    axis = int(attribute(node, "axis", 0))
    if isinstance(data, Weight) and not data.transposed and axis == 0:
        ids = cast(f, f.read(node, 1), "int64")
        found = gather_rows(f, data.name, f.reshape(ids, [product(ids.shape)]))
        return [f.reshape(found, [*ids.shape, *found.shape[1:]])]
    x = f.read(node, 0)
    axis %= len(x.shape)
    if isinstance(indices, Known) and not indices.array.shape and not indices.symbolic:
        place = int(indices.array)

        def pick(value: Any) -> Any:
            row = place if place >= 0 else value.shape[axis] + place
            shape = (*value.shape[:axis], *value.shape[axis + 1 :])
            return te.compute(shape, lambda *at: value(*at[:axis], row, *at[axis:]), name="gather")

        return [f.te(pick, x.expr, name="gather")]
    ids = f.read(node, 1)
    rank = len(ids.shape)

    def over(value: Any, index: Any) -> Any:
        def at(*place: Any) -> Any:
            row = index(*place[axis : axis + rank])
            return value(*place[:axis], inside(row, value.shape[axis]), *place[axis + rank :])

        return te.compute((*value.shape[:axis], *index.shape, *value.shape[axis + 1 :]), at, name="gather")

    return [f.te(over, x.expr, ids.expr, name="gather")]


def matmul(f: Function, node: ir.Node) -> Sequence[Value]:
    """Multiply by a packed weight, or two tensors."""
    x, weight = f.read(node, 0), f.value(node, 1)
    if not isinstance(weight, Weight) or not weight.transposed:
        return [f.emit(relax.op.matmul(x.expr, f.read(node, 1).expr))]
    rows = product(x.shape[:-1])
    flat = f.reshape(x, [rows, x.shape[-1]])
    value = f.quantized(weight.name)
    if value is None:
        found = _float_product(f, weight.name, flat, rows)
    else:
        found = _codes_product(f, weight.name, flat, rows, x.expr)
    return [f.reshape(found, [*x.shape[:-1], found.shape[-1]])]


def _float_product(f: Function, name: str, x: Tensor, rows: Size) -> Tensor:
    library = f.library
    library.products["float32"] += 1
    record = library.weights[name]
    w = packed.floats_of((record.shape[0], record.shape[1]), record.dtype)
    known = rows if isinstance(rows, int) else None
    tiling = library.tiling(w, known, "")
    kernel = library.kernel(("float_product", w, known, tiling), lambda: products.float_product(w, known, tiling))
    weight = f.weight(packed.plan_floats(library.weights, name, w))
    (found,) = f.call(kernel, [x, weight], [((rows, w.shape[0]), "float32")])
    return found


def _codes_product(f: Function, name: str, x: Tensor, rows: Size, source: Any) -> Tensor:
    """Multiply x [rows, in] by packed codes; `source` is what x is a view of."""
    library = f.library
    value = f.quantized(name)
    assert value is not None
    w = packed.codes_of(value)
    known = rows if isinstance(rows, int) else None
    integers = library.level.byte_products if library.integers else ""
    library.products["int8" if integers else "float32"] += 1
    if value.column_scale is not None:
        operands = _operands(f, w, expressions.scaled(f, name, x), rows)
    else:  # several matrices that multiply one tensor share its sums
        operands = f.once(("operands", source, w.columns, w.group), lambda: _operands(f, w, x, rows))
    tiling = library.tiling(w, known, integers)
    kernel = library.kernel(
        ("codes_product", w, known, tiling, integers),
        lambda: products.codes_product(w, known, tiling, integers=integers),
    )
    parts = [f.weight(planned) for planned in packed.plan_codes(library.weights, name, w)]
    (found,) = f.call(kernel, [*operands, *parts], [((rows, w.shape[0]), "float32")])
    return found


def _operands(f: Function, w: products.Codes, x: Tensor, rows: Size) -> list[Tensor]:
    """Return x [rows, in] as products read it: filled up or rounded, and the sums of its groups."""
    x = _filled_up(f, x, w.columns)
    shape = (w.columns, w.group, rows if isinstance(rows, int) else None)
    groups = ((rows, w.groups), "float32")
    if f.library.integers:
        kernel = f.library.kernel(("rounded", *shape), lambda: products.rounded(*shape))
        return f.call(kernel, [x], [((rows, w.columns), "int8"), groups, groups])
    kernel = f.library.kernel(("group_sums", *shape), lambda: products.group_sums(*shape))
    return [x, *f.call(kernel, [x], [groups])]


def _filled_up(f: Function, x: Tensor, columns: int) -> Tensor:
    """Return x [rows, width] with zeros up to whole groups."""
    width = int(x.shape[-1])
    if width == columns:
        return x

    def over(value: Any) -> Any:
        def at(i: Any, j: Any) -> Any:
            return tirx.if_then_else(j < width, value(i, j), tirx.const(0, "float32"))

        return te.compute((value.shape[0], columns), at, name="fill_up")

    return f.te(over, x.expr, name="fill_up")
