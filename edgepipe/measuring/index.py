"""The machine-speed index: how long one fixed piece of work takes at this moment, in ms; smaller is a faster machine.

The work goes through the engine with the bundle's threads: a product with a prompt's chunk of rows, which wants
arithmetic, and products of one row with slices of a buffer as large as the bundle's weights, which want bandwidth and,
as decoding does, many short hand-overs between threads. It is measured like tokens: a burst of pieces of some
milliseconds, the first not counted, the fastest kept. docs/measure.md says what was tried in its place.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Json = dict[str, Any]

_ROWS, _SIDE = 128, 512  # a prompt's chunk, times a matrix of 1 MB
_READS = 16  # slices of 1 MB per piece of work, the next ones each time
_PIECES = 4  # counted in a burst
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

    def piece() -> float:
        begun = time.perf_counter()
        product()
        for read in itertools.islice(following, _READS):
            read()
        return 1e3 * (time.perf_counter() - begun)

    def turn(_asked: Json) -> Json:
        return {"index_ms": min([piece() for _ in range(1 + _PIECES)][1:])}

    for _ in range(len(reads) // _READS + 1):
        piece()  # the first time, pages and threads are new
    return {"read_bytes": nbytes}, turn
