"""Kernels for a GPU that are shared out among its threads by hand.

Attention of one new token: TVM's rules make four kernels of it, which read the whole cache. Here a block of threads has
a head. Each thread takes keys of its own and keeps their scores in shared memory; largest score and sum of weights come
from all of them. Then a group of threads adds up the values of some tokens, and the groups' sums are added.

What is in shared memory is never written and read in one loop: TVM would have all threads wait inside, and not all of
them run it as often.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from edgepipe.engines.tvm.attention import Attention
from edgepipe.engines.tvm.functions import number
from edgepipe.engines.tvm.products import ATTRIBUTES, widened

SCHEDULED = "tirx.is_scheduled"
_THREADS = 256
_LOADED = 16  # bytes, the most of one load
_SHARED = 48 * 1024  # bytes of shared memory that every GPU gives a block. Source: NVIDIA, CUDA C++ Programming Guide
_LOWEST = -3.0e38  # below every score


def fits(a: Attention, context: int) -> bool:
    """Say whether `attend_one` serves a cache of `context` tokens."""
    width = _width(a)
    return a.head_dim % width == 0 and a.head_dim <= _THREADS and 4 * (context + (1 + width) * _THREADS) <= _SHARED


def _width(a: Attention) -> int:
    """Return the channels of a key or value that a thread loads at once."""
    return _LOADED // (4 if a.kv_dtype == "float32" else 2)


def attend_one(a: Attention, context: int) -> Any:
    """Return the kernel (q [1, 1, heads · head_dim], k, v: caches, place [1, 1]) → [1, 1, heads · head_dim]."""
    width = _width(a)
    pieces = a.head_dim // width  # of a token's key or value
    groups = _THREADS // pieces  # of threads that share a token's value
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("attend_one")
            T.func_attr({**ATTRIBUTES, SCHEDULED: True})
            handles = [T.arg(f"a{i}", T.handle()) for i in range(5)]
            q = T.match_buffer(handles[0], [1, 1, a.heads * a.head_dim], "float32")
            k, v = (T.match_buffer(h, [1, a.kv_heads, context, a.head_dim], a.kv_dtype) for h in handles[1:3])
            places = T.match_buffer(handles[3], [1, 1], "int64")
            y = T.match_buffer(handles[4], [1, 1, a.heads * a.head_dim], "float32")
            with (
                T.thread_binding(0, a.heads, thread="blockIdx.x") as head,
                T.thread_binding(0, _THREADS, thread="threadIdx.x") as thread,
            ):
                scores = T.alloc_buffer([context], "float32", scope="shared")
                parts = T.alloc_buffer([_THREADS], "float32", scope="shared")
                sums = T.alloc_buffer([_THREADS * width], "float32", scope="shared")
                own = T.alloc_buffer([width], "float32", scope="local")
                loaded = T.alloc_buffer([width], a.kv_dtype, scope="local")
                kv_head = T.Bind(head // (a.heads // a.kv_heads))
                last = T.Bind(places[0, 0].astype("int32"))
                first = T.Bind(tirx.max(last - (a.window - 1), 0) if a.window else tirx.const(0, "int32"))
                mine = T.Bind(first + thread)  # this thread's first token
                count = T.Bind(tirx.max((last - mine + _THREADS) // _THREADS, 0))  # and how many it has

                T.buffer_store(own, number(_LOWEST), [0])
                with T.serial(0, count) as i:
                    t = T.Bind(mine + i * _THREADS)
                    dot = T.alloc_buffer([1], "float32", scope="local")
                    T.buffer_store(dot, number(0.0), [0])
                    for d in range(0, a.head_dim, width):
                        with T.vectorized(0, width) as lane:
                            T.buffer_store(loaded, k[0, kv_head, t, d + lane], [lane])
                        for lane in range(width):
                            query, key = q[0, 0, head * a.head_dim + d + lane], widened(loaded[lane], a.kv_dtype, 1)
                            T.buffer_store(dot, dot[0] + query * key, [0])
                    score = T.Bind(dot[0] * number(a.scale))
                    T.buffer_store(scores, score, [t])
                    T.buffer_store(own, tirx.max(own[0], score), [0])
                most = _over_threads(parts, thread, own, tirx.max)

                T.buffer_store(own, number(0.0), [0])
                with T.serial(0, count) as i:
                    T.buffer_store(own, own[0] + tirx.exp(scores[mine + i * _THREADS] - most), [0])
                total = _over_threads(parts, thread, own, lambda one, other: one + other)

                group, piece = T.Bind(thread // pieces), T.Bind(thread % pieces)
                for lane in range(width):
                    T.buffer_store(own, number(0.0), [lane])
                with T.If(group < groups), T.Then():
                    with T.serial(0, tirx.max((last - first - group + groups) // groups, 0)) as i:
                        t = T.Bind(first + group + i * groups)
                        weight = T.Bind(tirx.exp(scores[t] - most))
                        with T.vectorized(0, width) as lane:
                            T.buffer_store(loaded, v[0, kv_head, t, piece * width + lane], [lane])
                        for lane in range(width):
                            value = widened(loaded[lane], a.kv_dtype, 1)
                            T.buffer_store(own, own[lane] + weight * value, [lane])
                for lane in range(width):
                    T.buffer_store(sums, own[lane], [thread * width + lane])
                T.evaluate(_all_wait())
                with T.If(thread < a.head_dim), T.Then():
                    T.buffer_store(own, number(0.0), [0])
                    with T.serial(0, groups) as g:
                        T.buffer_store(own, own[0] + sums[g * a.head_dim + thread], [0])
                    T.buffer_store(y, own[0] / total, [0, 0, head * a.head_dim + thread])
    return builder.get()


def _all_wait() -> Any:
    return T.tvm_storage_sync("shared")


def _over_threads(parts: Any, thread: Any, own: Any, join: Callable[[Any, Any], Any]) -> Any:
    """Return what `join` makes of all threads' `own[0]`, the same for each of them."""
    T.evaluate(_all_wait())
    T.buffer_store(parts, own[0], [thread])
    size = _THREADS
    while size > 1:
        size //= 2
        T.evaluate(_all_wait())
        with T.If(thread < size), T.Then():
            T.buffer_store(parts, join(parts[thread], parts[thread + size]), [thread])
    T.evaluate(_all_wait())
    return T.Bind(parts[0])
