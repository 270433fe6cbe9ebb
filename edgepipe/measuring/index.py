"""The machine-speed index: how long one fixed piece of work takes at this moment, in ms; smaller is a faster machine.

The work goes through the engine with the bundle's threads: a product with a prompt's chunk of rows, which wants
arithmetic, and products of one row with slices of a buffer as large as the bundle's weights, which want bandwidth and,
as decoding does, many short hand-overs between threads. A piece reads the whole buffer once, as a token does, so that
both take about as long: on a busy machine, work of 2 ms slips through where work of 20 ms is interrupted.

It is measured like what it stands beside. Beside tokens: a burst of pieces, the first not counted, the fastest kept.
Beside prompts, which take as long as many tokens: the mean of many pieces. docs/measure.md says what was tried.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

Json = dict[str, Any]

_ROWS, _SIDE = 128, 512  # a prompt's chunk, times a matrix of 1 MB
_READS = 8  # slices of 1 MB that are read for every product: one unit of work
_PIECES = 3  # counted in a burst
SUSTAINED_PIECES = 12  # beside a prompt
_LARGEST_BUFFER = 256 << 20  # beyond it, caches hold nothing of the buffer anyhow


def buffer_bytes(weight_bytes: int) -> int:
    """Return the size of the buffer that is read: the weights' own, in whole slices of 1 MB, 256 MiB at most."""
    slice_bytes = 4 * _SIDE * _SIDE
    return slice_bytes * max(1, min(weight_bytes, _LARGEST_BUFFER) // slice_bytes)


def open_index(bundle: Path, threads: int | None) -> tuple[Json, Callable[[Json], Json]]:
    """Make the index ready for a bundle; return what it reads, and what times the work once."""
    from edgepipe.measuring.products import FLOAT32, float32_operands
    from edgepipe.runtime.bundle import read_manifest
    from edgepipe.runtime.onnxruntime import bind_products

    manifest = read_manifest(bundle)
    nbytes = buffer_bytes(manifest["files"][manifest["weights"]["file"]]["bytes"])
    slices = np.full((nbytes // (4 * _SIDE * _SIDE), _SIDE, _SIDE), 0.25, np.float32)
    row = np.full((1, _SIDE), 0.5, np.float32)
    pairs = [float32_operands(_ROWS, _SIDE, _SIDE), *((row, one) for one in slices)]
    product, *reads = bind_products(FLOAT32, pairs, "float32", threads)
    following = itertools.cycle(reads)
    units = max(1, len(reads) // _READS)

    def piece() -> float:
        """Return the ms of one unit of work, from a piece of as many as the buffer has."""
        begun = time.perf_counter()
        for _ in range(units):
            product()
            for read in itertools.islice(following, _READS):
                read()
        return 1e3 * (time.perf_counter() - begun) / units

    def turn(asked: Json) -> Json:
        if asked.get("sustained"):
            return {"index_ms": mean([piece() for _ in range(SUSTAINED_PIECES)])}
        return {"index_ms": min([piece() for _ in range(1 + _PIECES)][1:])}

    turn({})  # the first time, pages and threads are new
    return {"read_bytes": nbytes}, turn
