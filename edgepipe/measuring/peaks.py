"""Measure what this machine can do at most, now: bytes read per second at one size, multiply-adds per second.

Bandwidth: every thread ORs its part of a buffer together, 8 bytes at a time, over and over; the fastest pass counts.
Multiply-adds: a large matrix product through the engine, in float32 and in int8 (uint8 · int8 → int32); the fastest.
Both are what this software reaches here, not what the processor's data sheet promises.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

Json = dict[str, Any]

_SECONDS = 0.4  # of repetitions per measurement
_LEAST = 5  # repetitions, however long they take
_LARGEST_BUFFER = 1 << 30  # bandwidth no longer changes beyond
_PRODUCT = (512, 1024, 1024)  # m, k, n: large enough that handing out work costs nothing


def measure_peaks(bundle: Path, threads: int | None) -> Json:
    """Return read bandwidth at the bundle's bytes per token and the peaks of matrix products, per second."""
    from edgepipe.measuring.limits import bytes_per_run
    from edgepipe.measuring.products import FLOAT32, INT8, float32_operands, int8_operands
    from edgepipe.runtime.bundle import read_manifest
    from edgepipe.runtime.onnxruntime import bind_products

    count = threads or os.cpu_count() or 1
    nbytes = bytes_per_run(read_manifest(bundle))
    rows, inner, columns = _PRODUCT
    work = rows * inner * columns
    (floats,) = bind_products(FLOAT32, [float32_operands(*_PRODUCT)], "float32", threads)
    (integers,) = bind_products(INT8, [int8_operands(*_PRODUCT)], "int32", threads)
    return {
        "threads": count,
        "read_bytes_per_second": read_bandwidth(nbytes, count),
        "multiply_adds_per_second": {"float32": work / fastest(floats), "int8": work / fastest(integers)},
    }


def read_bandwidth(nbytes: int, threads: int) -> float:
    """Return the bytes per second at which `threads` threads read a buffer of `nbytes` again and again."""
    words = max(threads, min(nbytes, _LARGEST_BUFFER) // 8)
    parts = np.array_split(np.ones(words, np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:

        def read() -> None:
            list(pool.map(np.bitwise_or.reduce, parts))

        return 8 * words / fastest(read)


def fastest(work: Callable[[], None]) -> float:
    """Return the seconds of the quickest of some repetitions: the machine's own speed, disturbances left out."""
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(times) < _LEAST or time.perf_counter() < end:
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)
