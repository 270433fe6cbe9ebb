"""Observe the range of every float value of a plain graph over calibration texts, on the CPU.

With 16 bits the smallest and the largest value are good ends: nothing needs to be cut. Values of padding don't count:
no token that counts reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from edgepipe.engines.qnn.qdq import Range
from edgepipe.errors import StageError
from edgepipe.runtime.onnxruntime import open_graph

Arrays = dict[str, np.ndarray]


def observe(
    plain: onnx.ModelProto, feeds: Sequence[Mapping[str, np.ndarray]], work: Path, progress: Callable[[int, int], None]
) -> dict[str, Range]:
    """Return the range of every float value that a node gives; `work` is a folder for the graph that is watched."""
    watched = onnx.ModelProto()
    watched.CopyFrom(plain)
    outputs = {value.name for value in plain.graph.output}
    floats = [v for v in plain.graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    watched.graph.output.extend(value for value in floats if value.name not in outputs)
    file = work / "watched.onnx"
    onnx.save(watched, file)
    try:
        graph = open_graph(file, None)
    finally:
        file.unlink()
    found: dict[str, Range] = {}
    for done, feed in enumerate(feeds):
        progress(done, len(feeds))
        tokens = int(feed["attention_mask"].sum())
        for name, value in graph.run(feed).items():
            rows = value.ndim == 3 and value.shape[1] == feed["attention_mask"].shape[1]
            counted = value[:, :tokens] if rows else value
            low, high = float(counted.min()), float(counted.max())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise StageError(f"over the calibration texts {name} has values that are not finite: it has no range")
            before = found.get(name, (low, high))
            found[name] = min(low, before[0]), max(high, before[1])
    return found


def padded(ids: Sequence[int], tokens: int, inputs: Sequence[str], padding: int) -> Arrays:
    """Return what a graph of one text of `tokens` tokens is given for some ids, cut or padded on the right."""
    row = list(ids[:tokens])
    given = {
        "input_ids": [*row, *[padding] * (tokens - len(row))],
        "attention_mask": [*[1] * len(row), *[0] * (tokens - len(row))],
        "token_type_ids": [0] * tokens,
    }
    return {name: np.array([given[name]], np.int64) for name in inputs}
