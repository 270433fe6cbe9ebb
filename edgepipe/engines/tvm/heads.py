"""Operators that work on heads: attention by the kernel of attention.py, and rotary positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from tvm import te, tirx

from edgepipe.artifacts import Json
from edgepipe.engines.tvm import attention as attentions
from edgepipe.engines.tvm import expressions, threads
from edgepipe.engines.tvm.convert import Function
from edgepipe.engines.tvm.moves import inside, joined, transposed
from edgepipe.engines.tvm.values import Value, attribute


@dataclass(slots=True, kw_only=True)
class Cached:
    """Say how a decoder's own attention keeps keys and values: in buffers of the whole context."""

    spec: Json
    dtype: str
    positions: str  # the input that says where new tokens go

    def replaces(self, node: ir.Node) -> bool:
        """Say whether a node is attention over the past."""
        return len(node.inputs) > 4 and node.inputs[4] is not None

    def layer(self, node: ir.Node) -> int:
        """Return the layer of a node: the number in the name of its past."""
        past = node.inputs[4]
        assert past is not None
        return int(str(past.name).rpartition(".")[2])


def attention(f: Function, node: ir.Node) -> Sequence[Value]:
    """Attend, over what the graph gives or over a preallocated cache."""
    if f.cache is not None and f.cache.replaces(node):
        return _cached_attention(f, node)
    q, k, v = (f.read(node, i) for i in range(3))
    flat = len(q.shape) == 3
    heads = int(attribute(node, "q_num_heads", 0)) if flat else int(q.shape[1])
    kv_heads = int(attribute(node, "kv_num_heads", 0)) if flat else int(k.shape[1])
    head_dim = int(q.shape[-1]) // heads if flat else int(q.shape[-1])
    present: list[Value] = []
    kv_flat = flat
    if f.value(node, 4) is not None:  # a growing cache: [B, kv_heads, past, head_dim]
        if flat:
            k, v = (transposed(f, f.reshape(x, [*x.shape[:2], kv_heads, head_dim]), (0, 2, 1, 3)) for x in (k, v))
        k, v = (joined(f, [f.read(node, 4 + i), x], 2) for i, x in enumerate((k, v)))
        present, kv_flat = [k, v], False
    mask = f.read(node, 3) if f.value(node, 3) is not None else None
    a = attentions.Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=float(attribute(node, "scale", None) or head_dim**-0.5),
        layout="flat" if flat else "heads",
        kv_layout="flat" if kv_flat else "heads",
        causal=bool(attribute(node, "is_causal", 0)),
        mask="" if mask is None else mask.dtype,
    )
    if f.library.level.gpu is not None:
        return [expressions.attend(f, a, [q, k, v], mask, None), *present]
    queries, keys = q.shape[1 if flat else 2], k.shape[1 if kv_flat else 2]
    shape = None if mask is None else list(mask.shape)
    kernel = f.library.kernel(
        ("attention", a, str(q.shape), str(k.shape), str(shape)),
        lambda: attentions.attention(a, q.shape[0], queries, keys, shape),
    )
    operands = [q, k, v, *([] if mask is None else [mask])]
    return [*f.call(kernel, operands, [(q.shape, "float32")]), *present]


def _cached_attention(f: Function, node: ir.Node) -> Sequence[Value]:
    cache: Cached = f.cache
    spec, layer = cache.spec, cache.layer(node)
    heads, kv_heads, head_dim, context = (int(spec[n]) for n in ("heads", "kv_heads", "head_dim", "context"))
    positions = f.input(cache.positions)
    tokens = positions.shape[1]
    known = tokens if isinstance(tokens, int) else None
    q = f.read(node, 0)
    kept = []
    shape = (1, kv_heads, context, head_dim)
    sizes = (kv_heads, head_dim, context, known, cache.dtype)
    on_gpu = f.library.level.gpu is not None
    make = expressions.append if on_gpu else attentions.append
    append = f.library.kernel(("append", *sizes), lambda: make(*sizes))
    for index, kind in ((1, "key"), (2, "value")):
        buffer = f.add_cache(f"{kind}.{layer}", shape, cache.dtype)
        kept.append(f.call_in_place(append, [f.read(node, index), positions, buffer], 2))
    a = attentions.Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=float(attribute(node, "scale", None) or head_dim**-0.5),
        layout="flat",
        kv_layout="heads",
        kv_dtype=cache.dtype,
        cached=True,
        causal=True,
        window=int(node.metadata_props.get("sliding_window", 0)),
    )
    one = f.library.has_threads and known == 1 and threads.fits(a, context)
    if on_gpu and not one:
        return [expressions.attend(f, a, [q, *kept], None, positions)]
    kernel = f.library.kernel(
        ("cached_attention", a, context, known),
        lambda: threads.attend_one(a, context) if one else attentions.attention(a, 1, tokens, context, None),
    )
    return f.call(kernel, [q, *kept, positions], [(q.shape, "float32")])


def rotary(f: Function, node: ir.Node) -> Sequence[Value]:
    """Rotate queries or keys by their positions."""
    x, cos, sin = (f.read(node, i) for i in range(3))
    positions = f.read(node, 3) if f.value(node, 3) is not None else None
    flat = len(x.shape) == 3
    heads = int(attribute(node, "num_heads", 0)) if flat else int(x.shape[1])
    head_dim = int(x.shape[-1]) // heads if flat else int(x.shape[-1])
    rotated = int(attribute(node, "rotary_embedding_dim", 0)) or head_dim
    half, interleaved = rotated // 2, bool(attribute(node, "interleaved", 0))

    def over(value: Any, cosine: Any, sine: Any, *where: Any) -> Any:
        def at(*index: Any) -> Any:
            row, step, last = index[0], index[1] if flat else index[2], index[-1]
            d = last % head_dim if flat else last
            first = tirx.EQ(d % 2, 0) if interleaved else d < half
            column = d // 2 if interleaved else d % half
            other = last + tirx.Select(first, 1 if interleaved else half, -1 if interleaved else -half)
            place = (inside(where[0](row, step), cosine.shape[0]), column) if where else (row, step, column)
            turned = tirx.Select(first, tirx.const(-1.0, "float32"), tirx.const(1.0, "float32"))
            found = value(*index) * cosine(*place) + turned * value(*index[:-1], other) * sine(*place)
            return found if rotated == head_dim else tirx.if_then_else(d < rotated, found, value(*index))

        return te.compute(value.shape, at, name="rotary")

    rest = [] if positions is None else [positions.expr]
    return [f.te(over, x.expr, cos.expr, sin.expr, *rest, name="rotary")]
