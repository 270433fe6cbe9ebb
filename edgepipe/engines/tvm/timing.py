"""Time the kernels of a product in turns: each alone, on one thread, over random matrices of the real size.

A turn of one row goes through as many matrices as make up a model's bytes, up to 128 MB, so that they come from where
they come from in a model: from memory, unless a cache holds it whole. With more rows one matrix does: multiplying takes
longer than reading. Tiles know nothing of each other, so the first rows of a large matrix stand for all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tvm

from edgepipe.engines.tvm.products import LANES, WORD, Codes, codes_product, float_product, stored_dtype
from edgepipe.engines.tvm.tiling import Product, Tiling
from edgepipe.levels import Level
from edgepipe.runtime.tvm import open_package, use_threads

ROWS = 128  # of x where any number may come
_MOST_BYTES = 128e6
_MOST_OUT = 4096  # rows of a matrix
_TURN_S = 1e-3  # a turn is at least about as long: short ones are repeated until the clock sees something


def shortened(product: Product) -> Product:
    """Return a product with the first rows of its matrix."""
    out, columns = product.w.shape
    return replace(product, w=replace(product.w, shape=(min(out, _MOST_OUT), columns)))


def matrix_bytes(product: Product) -> int:
    """Return the bytes of a product's matrix."""
    return sum(math.prod(shape) * np.dtype(stored_dtype(dtype)).itemsize for shape, dtype in _matrix(product))


def compiled(product: Product, tiling: Tiling, level: Level) -> Any:
    """Compile one kernel for this machine."""
    if isinstance(product.w, Codes):
        kernel = codes_product(product.w, product.rows, tiling, integers=product.integers)
    else:
        kernel = float_product(product.w, product.rows, tiling)
    module = tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")})
    return tvm.compile(module, target=tvm.target.Target(level.target()))["main"]


class Operands:
    """Hold random operands of a product of a model whose matrices take so many bytes."""

    def __init__(self, product: Product, model_bytes: int) -> None:
        self._ffi = open_package()
        w, rows = product.w, product.rows or ROWS
        self._random = np.random.default_rng(0)
        self._y = tvm.runtime.tensor(np.zeros((rows, w.shape[0]), np.float32))
        columns, x = w.shape[1], []
        if isinstance(w, Codes):
            columns = w.columns
            x = [self._filled((rows, w.groups), "float32") for _ in range(1 + bool(product.integers))]
        x.insert(0, self._filled((rows, columns), "int8" if product.integers else "float32"))
        count = int(min(model_bytes, _MOST_BYTES) / matrix_bytes(product)) if rows == 1 else 1
        parts = [self._filled(*one) for one in _matrix(product)]
        matrices = [parts, *([tvm.runtime.tensor(part.numpy()) for part in parts] for _ in range(count - 1))]
        self._calls = [[*x, *matrix, self._y] for matrix in matrices]

    def _filled(self, shape: Sequence[int], dtype: str) -> Any:
        if dtype in ("uint8", "int8"):
            array = self._random.integers(0, 256, shape, np.uint8).view(dtype)
        else:
            array = self._random.standard_normal(shape, np.float32)
            array = (array.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else array.astype(dtype)
        return tvm.runtime.tensor(array)

    def turn(self, kernel: Any) -> Callable[[], float]:
        """Return what takes one turn of a kernel → seconds for a pass over the matrices."""
        use_threads(self._ffi, 1)
        begun = time.perf_counter()
        self._pass(kernel)  # warm
        again = max(1, int(_TURN_S / (time.perf_counter() - begun)))

        def take() -> float:
            begun = time.perf_counter()
            for _ in range(again):
                self._pass(kernel)
            return (time.perf_counter() - begun) / again

        return take

    def _pass(self, kernel: Any) -> None:
        for call in self._calls:
            kernel(*call)


def _matrix(product: Product) -> list[tuple[tuple[int, ...], str]]:
    """Return shapes and dtypes of what a matrix consists of, in the order of the kernel's arguments."""
    w = product.w
    if not isinstance(w, Codes):
        return [((w.tiles, w.shape[1], w.width), w.dtype)]
    grouped = (w.tiles, w.groups, LANES)
    parts = [((w.tiles, w.columns // w.per_word, LANES * WORD), "uint8"), (grouped, w.scale_dtype)]
    offsets: dict[str, list[tuple[tuple[int, ...], str]]]
    offsets = {"middle": [], "zero_points": [(grouped, "uint8")], "minima": [(grouped, w.minima_dtype)]}
    return [*parts, *offsets[w.offset]]
