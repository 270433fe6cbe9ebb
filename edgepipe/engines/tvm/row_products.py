"""Share out a product of one row among a GPU's threads, with what is fused behind it.

A warp has an output: each of its threads multiplies runs of 8 neighbouring weights, whose codes it loads at once
and whose scale it reads once, and their sums are added by shuffles. TVM's rule for such products (dlight's GEMV) loads
and decodes each weight for itself.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import s_tir, tirx
from tvm.s_tir.dlight.analysis import normalize_prim_func
from tvm.s_tir.dlight.base import try_inline_contiguous_spatial

_RUN = 8  # neighbouring weights of a thread
_WARP, _BLOCK = 32, 128  # threads
_UNROLLED = 8  # runs of a thread
_LOADED = 16  # bytes, the most of one load
_SIZES = {"uint8": 1, "float16": 2, "uint16": 2, "float32": 4}


def one_row(function: Any) -> Any:
    """Return the schedule of a function whose first block is such a product; None where the sizes don't suit."""
    schedule = s_tir.Schedule(function)
    infos = normalize_prim_func(schedule)
    infos = None if infos is None else try_inline_contiguous_spatial(schedule, infos)
    if infos is None or len(infos) > 2 or [kind for kind in infos[0].dom_kind() if kind != "S"] != ["R"]:
        return None
    block = infos[0].block_rv
    *outer, inner = schedule.get_loops(block)
    extents = [schedule.get(loop).extent for loop in (*outer, inner)]
    if not outer or not all(isinstance(extent, tirx.IntImm) for extent in extents):
        return None
    *heights, columns = (int(extent) for extent in extents)
    height = math.prod(heights)
    if columns % _RUN or columns < _RUN * _WARP or height != heights[-1]:
        return None
    reads = [region.source for region in schedule.get(block).reads]
    matrix = _largest(reads)
    vector = next(
        (i for i, one in enumerate(reads) if i != matrix and one.dtype == "float32" and _last(one) == columns), None
    )
    if vector is None:
        return None
    block_x, own_row = schedule.split(schedule.fuse(*outer), [None, math.gcd(height, _BLOCK // _WARP)])
    rest, run = schedule.split(inner, [None, _RUN])
    runs, lane = schedule.split(rest, [None, _WARP])  # the last ones may lack runs
    schedule.reorder(block_x, own_row, lane, runs, run)
    for loop, axis in ((block_x, "blockIdx.x"), (own_row, "threadIdx.y"), (lane, "threadIdx.x")):
        schedule.bind(loop, axis)
    schedule.unroll(run)
    if columns <= _UNROLLED * _RUN * _WARP:
        schedule.unroll(runs)  # all loads are under way before the first is needed
    for place in (matrix, vector):
        loaded = schedule.cache_read(block, place, "local")
        schedule.compute_at(loaded, runs)
        _load_at_once(schedule, loaded, reads[place])
    if len(infos) == 2:
        schedule.reverse_compute_at(infos[1].block_rv, own_row)
        schedule.set_scope(block, 0, "local")
    return schedule


def _last(buffer: Any) -> int:
    return int(buffer.shape[-1])


def _largest(tensors: list[Any]) -> int:
    sizes = [math.prod(int(n) for n in one.shape) * _SIZES.get(str(one.dtype), 0) for one in tensors]
    return sizes.index(max(sizes))


def _load_at_once(schedule: Any, block: Any, buffer: Any) -> None:
    """Have a copy load as many bytes at a time as lie aligned in every row."""
    loop = schedule.get_loops(block)[-1]
    size = _SIZES[str(buffer.dtype)]
    count = math.gcd(int(schedule.get(loop).extent), _LOADED // size, _last(buffer))
    if count > 1:
        schedule.vectorize(schedule.split(loop, [None, count])[-1])
