"""How long the engine takes for the product with one matrix, as it would ship and in float, one after the other.

A graph of a single product is lowered as a bundle's are, and run through the runtime that ships: for one row (a step of
decoding) and for many (a prompt, a text). Both take turns, so that what moves the machine moves both; a ratio is taken
within each turn, and their median has a 95 % interval by bootstrap.

In a model a matrix is read once a run, and the others are read before it comes again: before every run as many bytes
are read as the rest of the model has, or a float matrix that fits the cache would seem to cost nothing to read. The
figure of a turn is the least of a few tries: a product takes less than a slice of the scheduler, and a try into which
another process's slice fell says nothing of it. On a busy machine that is not enough: as long as the interval holds
the bound, further turns are taken, and the first turns alone never find a product slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgepipe.measuring.intervals import Ratio, ratio_over_rounds
from edgepipe.weights import Weight, WeightStore

STEP, TEXT = 1, 128  # rows of a product: a step of decoding, and a prompt or text
TURNS = 15  # at a time
MOST_TURNS = 4 * TURNS
CLEARLY = 1.05  # times as long: below, twice the bytes would buy nothing that anybody sees
_TRIES = 5  # in a turn, of which the least counts
_MOST_READ = 256 << 20  # bytes read between two runs: beyond, no cache holds anything


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Say what decides the time of a product, beside the rows."""

    shape: tuple[int, int]  # (out, in)
    dtype: str  # "q4", "float16" …
    nbytes: int  # tells groups and offsets apart
    grid: str | None

    @classmethod
    def of(cls, weight: Weight) -> Kind:
        """Return the kind of a stored matrix."""
        out, n_in = weight.shape
        return cls(shape=(out, n_in), dtype=weight.dtype, nbytes=weight.nbytes, grid=weight.grid)


@dataclass(frozen=True, slots=True, kw_only=True)
class Raced:
    """Say how long products of one matrix take on two kinds of storage, for some number of rows."""

    rows: int
    ms: float  # of the first, the median over turns
    float_ms: float
    ratio: Ratio  # first ÷ second

    @property
    def slower(self) -> bool:
        """Say whether the first is clearly slower: the interval lies above 1.05."""
        return self.ratio.low > CLEARLY


def race(
    quantized: Weight,
    floats: Weight,
    *,
    rows: Sequence[int],
    rest: tuple[int, int],
    accuracy_level: int,
    many_rows: bool,
    threads: int,
    folder: Path,
) -> list[Raced]:
    """Time the product with a matrix on its grid and in float in turn, for each number of rows.

    `rest` are the bytes that the rest of the model has in memory, quantized and in float. `many_rows` says that the
    graph is lowered as an encoder's. `folder` must exist; the graphs are left there.
    """
    sides = [
        _product(weight, folder / name, accuracy_level=accuracy_level, many_rows=many_rows, threads=threads)
        for name, weight in (("quantized", quantized), ("float", floats))
    ]
    others = [np.ones(min(nbytes, _MOST_READ) // 8, np.int64) for nbytes in rest]
    return [_race(sides, others, quantized.shape[1], count) for count in rows]


def _product(
    weight: Weight, folder: Path, *, accuracy_level: int, many_rows: bool, threads: int
) -> Callable[[Mapping[str, np.ndarray]], object]:
    """Write and open the graph of one product; return what runs it."""
    import onnx
    import onnx_ir as ir

    from edgepipe.engines.onnxruntime.place_weights import place_weights
    from edgepipe.engines.onnxruntime.planned import FILE_NAME, WeightsFile
    from edgepipe.graph.dialect import GraphBuilder
    from edgepipe.runtime.onnxruntime import open_graph

    out, n_in = weight.shape
    builder = GraphBuilder("product")
    x = builder.input("x", ir.DataType.FLOAT, [1, "rows", n_in])
    y = builder.op("MatMul", [x, builder.weight(weight.name, [n_in, out], transposed=True)])
    builder.output("y", y, ir.DataType.FLOAT, [1, "rows", out])
    source = ir.from_proto(onnx.load_model_from_string(builder.finish()))
    file = WeightsFile()
    place_weights(source.graph, WeightStore({weight.name: weight}), file, accuracy_level, many_rows=many_rows)
    source.graph.inputs[:] = [value for value in source.graph.inputs if value.uses()]
    source.graph.opset_imports["com.microsoft"] = 1
    folder.mkdir(exist_ok=True)
    (folder / "product.onnx").write_bytes(ir.to_proto(source).SerializeToString(deterministic=True))
    file.write(folder / FILE_NAME, lambda _done, _total: None)
    return open_graph(folder / "product.onnx", threads or None).run


def _race(
    sides: Sequence[Callable[[Mapping[str, np.ndarray]], object]], others: Sequence[np.ndarray], width: int, rows: int
) -> Raced:
    feeds = {"x": np.random.default_rng(0).normal(size=(1, rows, width)).astype(np.float32)}
    for side in sides:
        side(feeds)  # the first run may set things up
    times: list[list[float]] = [[], []]
    for turn in range(MOST_TURNS):
        least = [float("inf"), float("inf")]
        for attempt in range(_TRIES):
            for number in (0, 1) if (turn + attempt) % 2 else (1, 0):
                others[number].sum()
                started = time.perf_counter()
                sides[number](feeds)
                least[number] = min(least[number], 1000 * (time.perf_counter() - started))
        for found, best in zip(times, least, strict=True):
            found.append(best)
        if (turn + 1) % TURNS == 0:
            ratio = ratio_over_rounds(*times, seed=0)
            if ratio.high < CLEARLY or (ratio.low > CLEARLY and turn >= TURNS):
                break
    ms, float_ms = (float(np.median(one)) for one in times)
    return Raced(rows=rows, ms=ms, float_ms=float_ms, ratio=ratio)
