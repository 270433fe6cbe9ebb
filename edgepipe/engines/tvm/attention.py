"""Kernel: attention of every head over keys and values, from a graph's values or from a preallocated cache.

Heads are shared out among threads. With several queries, a head's keys are turned once to [head_dim, tokens], so that
the scores of 16 tokens are one vector, and blocks of queries share every load. A single query takes dot products over
the keys as they lie. Softmax and the sum over values are in float32, whatever the cache is kept in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from edgepipe.engines.tvm.functions import exp, scratch
from edgepipe.engines.tvm.products import ATTRIBUTES, LANES, lanes_at, widened

Layout = Literal["flat", "heads"]  # [B, S, heads · head_dim] or [B, heads, S, head_dim]
MASKED = -1e30  # a score that softmax makes nothing of; finite, so that a row without keys is no NaN
_BLOCK = 4  # queries that share a load


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Describe one attention: sizes, layouts, what a query may see."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    layout: Layout  # of queries and of the result
    kv_layout: Layout
    kv_dtype: str = "float32"
    cached: bool = False  # keys and values are a cache, of which a query sees the tokens up to its position
    causal: bool = False
    window: int = 0  # tokens that a query of a cache sees; 0: all
    mask: str = ""  # dtype of the mask, "bool" or "float32"; "": none


def _at(tensor: Any, layout: Layout, head_dim: int, place: tuple[Any, Any, Any, Any]) -> Any:
    b, h, s, d = place
    return tensor[b, s, h * head_dim + d] if layout == "flat" else tensor[b, h, s, d]


def _tensor_shape(layout: Layout, b: Any, h: int, s: Any, d: int) -> list[Any]:
    return [b, s, h * d] if layout == "flat" else [b, h, s, d]


def attention(a: Attention, batch: Any, queries: Any, keys: Any, mask_shape: list[Any] | None) -> Any:
    """Return the kernel (q, k, v[, mask][, positions [B, S]]) → y, for sizes that are numbers or symbols.

    `keys` counts the tokens of k and v, of a cache all it has room for; positions come with a cache.
    """
    single = isinstance(queries, int) and queries == 1
    block = 1 if single else _BLOCK
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("attention")
            T.func_attr(ATTRIBUTES)
            handles = [T.arg(f"a{i}", T.handle()) for i in range(4 + bool(a.mask) + a.cached)]
            names: dict[str, Any] = {}

            def own(size: Any) -> Any:
                """Return a size as the kernel knows it: a number, or a symbol of its own for each of the graph's."""
                if isinstance(size, int):
                    return tirx.const(size, "int64")
                return names.setdefault(str(size), tirx.Var(f"n{len(names)}", "int64"))

            b, s, n = own(batch), own(queries), own(keys)
            q = T.match_buffer(handles[0], _tensor_shape(a.layout, b, a.heads, s, a.head_dim), "float32")
            kv_shape = _tensor_shape(a.kv_layout, b, a.kv_heads, n, a.head_dim)
            k, v = (T.match_buffer(handle, kv_shape, a.kv_dtype) for handle in handles[1:3])
            mask = T.match_buffer(handles[3], [own(d) for d in mask_shape or []], a.mask) if a.mask else None
            places = T.match_buffer(handles[-2], [b, s], "int64") if a.cached else None
            y = T.match_buffer(handles[-1], _tensor_shape(a.layout, b, a.heads, s, a.head_dim), "float32")
            with T.parallel(0, b * a.heads) as number:
                row, head = T.Bind(number // a.heads), T.Bind(number % a.heads)
                kv_head = T.Bind(head // (a.heads // a.kv_heads))
                total = T.Bind(n if places is None else places[row, s - 1] + 1)
                tiles = T.Bind((total + (LANES - 1)) // LANES)
                # Sizes from the arguments alone: TVM moves allocations to the beginning of the thread's work
                room = (n + (LANES - 1)) // LANES * LANES
                scores = T.alloc_buffer([block, room], "float32")
                turned = None if single else T.alloc_buffer([a.head_dim, room], "float32")
                if turned is not None:
                    _turn_keys(a, k, (row, kv_head), total, tiles, turned)
                with T.serial(0, (s + (block - 1)) // block) as group:
                    at = [T.Bind(tirx.min(group * block + r, s - 1)) for r in range(block)]
                    if turned is None:
                        _dot_products(a, q, k, (row, head, kv_head), total, scores)
                    else:
                        _score_tiles(a, q, turned, (row, head), at, tiles, scores)
                    for r in range(block):
                        _mask_row(a, mask, mask_shape, places, (row, head, at[r]), r, total, tiles, scores)
                    sums = [_softmax_row(r, tiles, scores) for r in range(block)]
                    _sum_values(a, v, (row, head, kv_head), at, sums, total, scores, y)
    return builder.get()


def _turn_keys(a: Attention, k: Any, where: tuple[Any, Any], total: Any, tiles: Any, turned: Any) -> None:
    """Write a head's keys as [head_dim, tokens], filled up with zeros."""
    row, head = where
    with T.serial(0, total) as t, T.serial(0, a.head_dim) as d:
        value = widened(_at(k, a.kv_layout, a.head_dim, (row, head, t, d)), a.kv_dtype, 1)
        T.buffer_store(turned, value, [d, t])
    with T.serial(total, tiles * LANES) as t, T.serial(0, a.head_dim) as d:
        T.buffer_store(turned, tirx.const(0, "float32"), [d, t])


def _score_tiles(
    a: Attention, q: Any, turned: Any, where: tuple[Any, Any], at: list[Any], tiles: Any, scores: Any
) -> None:
    """Compute the scores of a block of queries, 16 keys at a time."""
    scale = tirx.Broadcast(tirx.const(a.scale, "float32"), LANES)
    with T.serial(0, tiles) as tile:
        acc = scratch(len(at) * LANES)
        for r in range(len(at)):
            T.buffer_store(acc, tirx.Broadcast(tirx.const(0, "float32"), LANES), [lanes_at(r * LANES)])
        with T.serial(0, a.head_dim) as d:
            keys = T.Bind(turned[d, lanes_at(tile * LANES)])
            for r, s in enumerate(at):
                query = tirx.Broadcast(_at(q, a.layout, a.head_dim, (*where, s, d)), LANES)
                T.buffer_store(acc, acc[lanes_at(r * LANES)] + query * keys, [lanes_at(r * LANES)])
        for r in range(len(at)):
            T.buffer_store(scores, acc[lanes_at(r * LANES)] * scale, [r, lanes_at(tile * LANES)])


def _dot_products(a: Attention, q: Any, k: Any, where: tuple[Any, Any, Any], total: Any, scores: Any) -> None:
    """Compute the scores of a single query, one key after the other."""
    row, head, kv_head = where
    width = math.gcd(LANES, a.head_dim)
    zero = tirx.const(0, "int64")
    with T.serial(0, total) as t:
        acc = scratch(width)
        for d in range(0, a.head_dim, width):
            query = _at(q, a.layout, a.head_dim, (row, head, zero, _ramp(d, width)))
            key = widened(_at(k, a.kv_layout, a.head_dim, (row, kv_head, t, _ramp(d, width))), a.kv_dtype, width)
            value = query * key if d == 0 else acc[_ramp(0, width)] + query * key
            T.buffer_store(acc, value, [_ramp(0, width)])
        parts = [acc[lane] for lane in range(width)]
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [parts[i] + parts[i + half] for i in range(half)]
        T.buffer_store(scores, parts[0] * tirx.const(a.scale, "float32"), [0, t])


def _ramp(start: Any, width: int) -> Any:
    return lanes_at(start, width) if width > 1 else start


def _mask_row(
    a: Attention,
    mask: Any,
    mask_shape: list[Any] | None,
    places: Any,
    where: tuple[Any, Any, Any],
    r: int,
    total: Any,
    tiles: Any,
    scores: Any,
) -> None:
    """Hide what a query may not see, and what fills up the last tile."""
    row, head, s = where
    masked = tirx.const(MASKED, "float32")
    if mask is not None:
        assert mask_shape is not None
        sizes = [None] * (4 - len(mask_shape)) + list(mask_shape)
        with T.serial(0, total) as t:
            full = [row, head, s, t]
            index = [
                tirx.const(0, "int64") if isinstance(size, int) and size == 1 else place
                for size, place in zip(sizes, full, strict=True)
                if size is not None
            ]
            if a.mask == "bool":
                value = tirx.if_then_else(mask[tuple(index)], scores[r, t], masked)
            else:
                value = scores[r, t] + mask[tuple(index)]
            T.buffer_store(scores, value, [r, t])
    if a.causal:
        last = s if places is None else places[row, s]
        with T.serial(last + 1, total) as t:
            T.buffer_store(scores, masked, [r, t])
        if a.window:
            with T.serial(0, tirx.max(last - (a.window - 1), tirx.const(0, "int64"))) as t:
                T.buffer_store(scores, masked, [r, t])
    with T.serial(total, tiles * LANES) as t:
        T.buffer_store(scores, tirx.const(-3.0e38, "float32"), [r, t])


def _softmax_row(r: int, tiles: Any, scores: Any) -> Any:
    """Turn a row of scores into weights; return one over their sum."""
    most = scratch(LANES)
    T.buffer_store(most, scores[r, lanes_at(0)], [lanes_at(0)])
    with T.serial(1, tiles) as tile:
        T.buffer_store(most, tirx.max(most[lanes_at(0)], scores[r, lanes_at(tile * LANES)]), [lanes_at(0)])
    largest = most[0]
    for lane in range(1, LANES):
        largest = tirx.max(largest, most[lane])
    shift = T.Bind(tirx.Broadcast(largest, LANES))
    total = scratch(LANES)
    T.buffer_store(total, tirx.Broadcast(tirx.const(0, "float32"), LANES), [lanes_at(0)])
    with T.serial(0, tiles) as tile:
        weight = T.Bind(exp(scores[r, lanes_at(tile * LANES)] - shift, LANES))
        T.buffer_store(scores, weight, [r, lanes_at(tile * LANES)])
        T.buffer_store(total, total[lanes_at(0)] + weight, [lanes_at(0)])
    added = total[0]
    for lane in range(1, LANES):
        added = added + total[lane]
    return T.Bind(tirx.const(1, "float32") / added)


def _sum_values(
    a: Attention,
    v: Any,
    where: tuple[Any, Any, Any],
    at: list[Any],
    sums: list[Any],
    total: Any,
    scores: Any,
    y: Any,
) -> None:
    """Add up the values by their weights, for a block of queries."""
    row, head, kv_head = where
    width = math.gcd(LANES, a.head_dim)
    with T.serial(0, a.head_dim // width) as piece:
        acc = scratch(len(at) * width)
        for r in range(len(at)):
            zero = tirx.const(0, "float32")
            T.buffer_store(acc, tirx.Broadcast(zero, width) if width > 1 else zero, [_ramp(r * width, width)])
        with T.serial(0, total) as t:
            place = (row, kv_head, t, _ramp(piece * width, width))
            value = T.Bind(widened(_at(v, a.kv_layout, a.head_dim, place), a.kv_dtype, width))
            for r in range(len(at)):
                weight = tirx.Broadcast(scores[r, t], width) if width > 1 else scores[r, t]
                T.buffer_store(acc, acc[_ramp(r * width, width)] + weight * value, [_ramp(r * width, width)])
        for r, s in enumerate(at):
            share = tirx.Broadcast(sums[r], width) if width > 1 else sums[r]
            value = acc[_ramp(r * width, width)] * share
            column = head * a.head_dim + piece * width if a.layout == "flat" else piece * width
            index = [row, s, _ramp(column, width)] if a.layout == "flat" else [row, head, s, _ramp(column, width)]
            T.buffer_store(y, value, index)


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
            with T.serial(0, s) as t, T.serial(0, kv_heads) as head, T.serial(0, head_dim) as d:
                value = new[0, t, head * head_dim + d].astype(dtype)
                T.buffer_store(cache, value, [0, head, places[0, t], d])
    return builder.get()
