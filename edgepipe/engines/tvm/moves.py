"""Operators that move data or convert it, as tensor expressions, which TVM fuses with their neighbours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, te, tirx, topi
from tvm.sym import Analyzer

from edgepipe.engines.tvm import products
from edgepipe.engines.tvm.convert import Function
from edgepipe.engines.tvm.values import Known, Size, Tensor, Value, attribute, size


def inside(index: Any, extent: Size) -> Any:
    """Return an index that lies inside an axis: negative ones count from its end, what is beyond is cut.

    A library checks nothing: an id beyond a table would read whatever lies there.
    """
    return tirx.max(tirx.min(tirx.Select(index < 0, index + extent, index), extent - 1), 0)


def cast(f: Function, x: Tensor, dtype: str) -> Tensor:
    """Return x in another dtype; as bool it says what isn't 0."""
    if x.dtype == dtype:
        return x

    def over(value: Any) -> Any:
        def at(*index: Any) -> Any:
            element = value(*index)
            return tirx.NE(element, tirx.const(0, x.dtype)) if dtype == "bool" else element.astype(dtype)

        return te.compute(value.shape, at, name="cast")

    return f.te(over, x.expr, name="cast")


def widen(f: Function, x: Tensor, dtype: str) -> Tensor:
    """Return stored floats as float32; those of bfloat16 come as their bits."""
    if dtype == "float32":
        return x

    def over(value: Any) -> Any:
        return te.compute(value.shape, lambda *at: products.widened(value(*at), dtype, 1), name="widen")

    return f.te(over, x.expr, name="widen")


def transposed(f: Function, x: Tensor, axes: Sequence[int]) -> Tensor:
    """Return x with its axes in another order."""
    return f.te(lambda value: topi.transpose(value, list(axes)), x.expr, name="transpose")


def transpose(f: Function, node: ir.Node) -> Sequence[Value]:
    """Swap axes."""
    x = f.read(node, 0)
    return [transposed(f, x, attribute(node, "perm", tuple(reversed(range(len(x.shape))))))]


def reshape(f: Function, node: ir.Node) -> Sequence[Value]:
    """Look at data in another shape; 0 keeps a size, −1 is what is left."""
    x = f.read(node, 0)
    wanted = f.sizes(node, 1) or []
    keeps_zero = attribute(node, "allowzero", 0)
    shape = [x.shape[i] if n == 0 and not keeps_zero else n for i, n in enumerate(wanted)]
    if -1 in [n for n in shape if isinstance(n, int)]:
        place = next(i for i, n in enumerate(shape) if isinstance(n, int) and n == -1)
        rest = product([n for i, n in enumerate(shape) if i != place])
        shape[place] = size(product(x.shape) // rest)
    return [f.reshape(x, shape)]


def product(sizes: Sequence[Size]) -> Size:
    """Return the product of sizes."""
    found: Size = 1
    for n in sizes:
        found = found * n
    return size(found)


def unsqueeze(f: Function, node: ir.Node) -> Sequence[Value]:
    """Insert axes of size 1."""
    x = f.read(node, 0)
    rank = len(x.shape) + len(f.sizes(node, 1) or [])
    axes = {int(axis) % rank for axis in f.sizes(node, 1) or []}
    rest = iter(x.shape)
    return [f.reshape(x, [1 if axis in axes else next(rest) for axis in range(rank)])]


def squeeze(f: Function, node: ir.Node) -> Sequence[Value]:
    """Drop axes of size 1."""
    x = f.read(node, 0)
    axes = f.sizes(node, 1)
    drop = {int(a) % len(x.shape) for a in axes} if axes is not None else {i for i, n in enumerate(x.shape) if n == 1}
    return [f.reshape(x, [n for i, n in enumerate(x.shape) if i not in drop])]


def expand(f: Function, node: ir.Node) -> Sequence[Value]:
    """Repeat along axes of size 1."""
    x = f.read(node, 0)
    wanted = f.sizes(node, 1) or []
    rank = max(len(wanted), len(x.shape))
    own, asked = [1] * (rank - len(x.shape)) + list(x.shape), [1] * (rank - len(wanted)) + wanted
    shape = [b if isinstance(a, int) and a == 1 else a for a, b in zip(own, asked, strict=True)]
    return [f.te(topi.broadcast_to, x.expr, shape, name="expand")]


def concat(f: Function, node: ir.Node) -> Sequence[Value]:
    """Put tensors one after another."""
    parts = [f.read(node, i) for i in range(len(node.inputs))]
    return [joined(f, parts, int(attribute(node, "axis")))]


def joined(f: Function, parts: Sequence[Tensor], axis: int) -> Tensor:
    """Return tensors one after another along an axis."""
    return f.te(lambda *values: topi.concatenate(values, axis), *(part.expr for part in parts), name="concat")


def slice_(f: Function, node: ir.Node) -> Sequence[Value]:
    """Take a part of each axis."""
    x = f.read(node, 0)
    starts, ends = f.sizes(node, 1) or [], f.sizes(node, 2) or []
    axes = f.sizes(node, 3) or list(range(len(starts)))
    steps = f.sizes(node, 4) or [1] * len(starts)
    first: list[Size] = [0] * len(x.shape)
    stride, shape = [1] * len(x.shape), list(x.shape)
    loose: set[int] = set()  # axes whose slice may end beyond them, for all that is known of its sizes
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = int(axis) % len(x.shape)
        if not isinstance(step, int) or step < 1:
            return [f.emit(relax.op.strided_slice(x.expr, [axis], [start], [end], [step]))]
        first[axis], stop = _bounds(start, end, x.shape[axis])
        stride[axis] = step
        if not (_at_most(0, first[axis]) and _at_most(stop, x.shape[axis])):
            loose.add(axis)
        shape[axis] = size((stop - first[axis] + (step - 1)) // step)

    def over(value: Any, first: list[Size], shape: list[Size]) -> Any:
        def at(*index: Any) -> Any:
            places = [a + i * s for a, i, s in zip(first, index, stride, strict=True)]
            return value(*(inside(p, value.shape[i]) if i in loose else p for i, p in enumerate(places)))

        return te.compute(shape, at, name="slice")

    return [f.te(over, x.expr, first, shape, name="slice")]


def _at_most(least: Size, most: Size) -> bool:
    """Say whether a size is known to be no larger than another, whatever the sizes of the inputs."""
    if isinstance(least, int) and isinstance(most, int):
        return least <= most
    return bool(Analyzer().can_prove(_expression(least) <= _expression(most)))


def _expression(value: Size) -> Any:
    return tirx.const(value, "int64") if isinstance(value, int) else value


def _bounds(start: Size, end: Size, extent: Size) -> tuple[Size, Size]:
    """Return where a slice begins and ends in an axis: negative ones count from its end, far ones are cut."""

    def bound(value: Size) -> Size:
        if isinstance(value, int):
            if value < 0:
                return size(extent + value)
            if isinstance(extent, int):
                return min(value, extent)
            return value if value < 1 << 30 else extent
        return value

    return bound(start), bound(end)


def split(f: Function, node: ir.Node) -> Sequence[Value]:
    """Cut along an axis."""
    x = f.read(node, 0)
    axis = int(attribute(node, "axis", 0)) % len(x.shape)
    count = len(node.outputs)
    widths = f.sizes(node, 1) or [-(-x.shape[axis] // count)] * count
    places = [int(n) for n in np.cumsum(widths)[:-1]]
    found = f.builder.emit(relax.op.split(x.expr, places, axis))
    return [f.wrap(f.builder.emit(relax.TupleGetItem(found, i))) for i in range(count)]


def range_(f: Function, node: ir.Node) -> Sequence[Value]:
    """Count from a start to a limit."""
    start, limit, delta = (f.value(node, i) for i in range(3))
    assert isinstance(start, Known)
    assert isinstance(limit, Known)
    assert isinstance(delta, Known)
    values: list[Size] = [value.array.reshape(-1)[0] for value in (start, limit, delta)]
    dtype = "int64" if any(v.symbolic for v in (start, limit, delta)) else start.array.dtype.name
    if dtype == "int64":
        values = [size(value) for value in values]
        count = size((values[1] - values[0] + (values[2] - 1)) // values[2])
    else:
        count = max(math.ceil((values[1] - values[0]) / values[2]), 0)
        values = [float(value) for value in values]

    def over(count: Size, first: Size, step: Size) -> Any:
        def at(i: Any) -> Any:
            begin, stride = (tirx.const(v, dtype) if isinstance(v, int | float) else v for v in (first, step))
            return begin + i.astype(dtype) * stride

        return te.compute((count,), at, name="range")

    return [f.te(over, count, values[0], values[2], name="range")]


def gather_nd(f: Function, node: ir.Node) -> Sequence[Value]:
    """Read at indices of several axes."""
    x, ids = f.read(node, 0), f.read(node, 1)
    batch = int(attribute(node, "batch_dims", 0))
    depth = int(ids.shape[-1])
    outer = len(ids.shape) - 1

    def over(value: Any, index: Any) -> Any:
        def at(*place: Any) -> Any:
            chosen = []
            for i in range(depth):
                row = index(*place[:outer], i)
                chosen.append(inside(row, value.shape[batch + i]))
            return value(*place[:batch], *chosen, *place[outer:])

        return te.compute((*index.shape[:-1], *value.shape[batch + depth :]), at, name="gather_nd")

    return [f.te(over, x.expr, ids.expr, name="gather_nd")]


def gather_elements(f: Function, node: ir.Node) -> Sequence[Value]:
    """Read an element for each index."""
    x, ids = f.read(node, 0), f.read(node, 1)
    axis = int(attribute(node, "axis", 0)) % len(x.shape)

    def over(value: Any, index: Any) -> Any:
        def at(*place: Any) -> Any:
            row = index(*place)
            return value(*place[:axis], inside(row, value.shape[axis]), *place[axis + 1 :])

        return te.compute(index.shape, at, name="gather_elements")

    return [f.te(over, x.expr, ids.expr, name="gather_elements")]


def cast_node(f: Function, node: ir.Node) -> Sequence[Value]:
    """Convert elements."""
    return [cast(f, f.read(node, 0), ir.DataType(attribute(node, "to")).numpy().name)]


def where(f: Function, node: ir.Node) -> Sequence[Value]:
    """Choose by a condition."""
    return [f.te(topi.where, *(f.read(node, i).expr for i in range(3)), name="where")]
