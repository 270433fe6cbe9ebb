"""Observe the range of every float value of a plain graph over calibration texts, on the CPU.

With 16 bits the smallest and the largest value are good ends: nothing needs to be cut. Values of padding don't count:
no token that counts reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from edgepipe.engines.qnn.cached_attention import HIDDEN
from edgepipe.engines.qnn.qdq import Range
from edgepipe.errors import StageError
from edgepipe.runtime.npu_step import NEW, PAST, PAST_MASK, write_place
from edgepipe.runtime.onnxruntime import Graph, open_graph

Arrays = dict[str, np.ndarray]


def observe(
    plain: onnx.ModelProto, feeds: Sequence[Mapping[str, np.ndarray]], work: Path, progress: Callable[[int, int], None]
) -> dict[str, Range]:
    """Return the range of every float value that a node gives; `work` is a folder for the graph that is watched."""
    graph = _watched(plain, work)
    found: dict[str, Range] = {}
    for done, feed in enumerate(feeds):
        progress(done, len(feeds))
        tokens = int(feed["attention_mask"].sum())
        for name, value in graph.run(feed).items():
            rows = value.ndim == 3 and value.shape[1] == feed["attention_mask"].shape[1]
            _widen(found, name, value[:, :tokens] if rows else value)
    return found


def observe_steps(
    plain: onnx.ModelProto, rows: Sequence[Sequence[int]], work: Path, progress: Callable[[int, int], None]
) -> dict[str, Range]:
    """Do the same with a decoder's step: every row token by token, behind the cache that its own steps have made."""
    graph = _watched(plain, work)
    found: dict[str, Range] = {}
    done, total = 0, sum(map(len, rows))
    for row in rows:
        for _, values in stepped(graph, plain, row):
            progress(done, total)
            done += 1
            for name, value in values.items():
                _widen(found, name, value)
    return found


def stepped(graph: Graph, plain: onnx.ModelProto, row: Sequence[int]) -> Iterator[tuple[int, Arrays]]:
    """Run a decoder's float step over the ids of a row; yield each place and all that the step gave there."""
    feeds = {}
    for value in plain.graph.input:
        tensor = value.type.tensor_type
        shape = [dim.dim_value for dim in tensor.shape.dim]
        feeds[value.name] = np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    feeds[PAST_MASK][:] = HIDDEN
    caches = [name for name in feeds if name.startswith(PAST) and name != PAST_MASK]
    for place, token in enumerate(row):
        feeds["input_ids"][:], feeds["position_ids"][:] = token, place
        values = graph.run(feeds)
        yield place, values
        for name in caches:
            write_place(feeds[name], values[NEW + name.removeprefix(PAST)], place)
        feeds[PAST_MASK][..., place] = 0


def _watched(plain: onnx.ModelProto, work: Path) -> Graph:
    """Open a graph with every float value among its outputs."""
    watched = onnx.ModelProto()
    watched.CopyFrom(plain)
    outputs = {value.name for value in plain.graph.output}
    floats = [v for v in plain.graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    watched.graph.output.extend(value for value in floats if value.name not in outputs)
    file = work / "watched.onnx"
    onnx.save(watched, file)
    try:
        return open_graph(file, None)
    finally:
        file.unlink()


def _widen(found: dict[str, Range], name: str, value: np.ndarray) -> None:
    low, high = float(value.min()), float(value.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise StageError(f"over the calibration texts {name} has values that are not finite: it has no range")
    before = found.get(name, (low, high))
    found[name] = min(low, before[0]), max(high, before[1])


def padded(ids: Sequence[int], tokens: int, inputs: Sequence[str], padding: int) -> Arrays:
    """Return what a graph of one text of `tokens` tokens is given for some ids, cut or padded on the right."""
    row = list(ids[:tokens])
    given = {
        "input_ids": [*row, *[padding] * (tokens - len(row))],
        "attention_mask": [*[1] * len(row), *[0] * (tokens - len(row))],
        "token_type_ids": [0] * tokens,
    }
    return {name: np.array([given[name]], np.int64) for name in inputs}
