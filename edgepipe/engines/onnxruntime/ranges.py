"""Observe the ranges of what integer products read: the exact graphs run over a calibration set.

minmax       the smallest and the largest value seen
percentile   the values that leave out half of 0.01 % at either end
entropy      the symmetric threshold that loses least of the distribution (least Kullback–Leibler divergence between the
             histogram and itself in 256 levels), cut at the smallest and the largest value

Histograms and both rules are onnxruntime's own (onnxruntime.quantization.calibrate, after MXNet and TensorRT: Migacz,
"8-bit inference with TensorRT", GTC 2017); its calibrators around them are not used: they keep the values of all
batches in memory until the last, write the graph anew with every weight inside, and at their default of 128 bins
entropy has one threshold to choose from. Here a run has 512 tokens at most, and what stays of it is counts.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from edgepipe.artifacts import ActivationPlan, Json, OnnxModel
from edgepipe.engines.onnxruntime.integer_products import Range, product_inputs
from edgepipe.errors import ConfigError, StageError
from edgepipe.runtime.onnxruntime import open_session

_TOKENS = 512  # in one run: what all its products read is in memory at once
_BINS = 2048  # of a histogram at first; more when later values lie beyond it
_LEVELS = 256  # of the grid that entropy looks for
_PERCENTILE = 99.99
_ANSWERED = 5  # tokens that a scorer is asked about

Arrays = dict[str, np.ndarray]


class _Seen:
    """Gather what was seen of each input of one graph, as `rule` needs it."""

    def __init__(self, rule: str) -> None:
        from onnxruntime.quantization.calibrate import HistogramCollector

        self._ends: dict[str, Range] = {}
        self._histograms = None
        if rule != "minmax":
            self._histograms = HistogramCollector(rule, False, _BINS, _LEVELS, _PERCENTILE, "same")

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """Count the values of one run; StageError where one isn't finite."""
        for name, array in values.items():
            low, high = float(array.min()), float(array.max())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise StageError(f"over the calibration set, {name} has values that are not finite: it has no range")
            before = self._ends.get(name, (low, high))
            self._ends[name] = min(low, before[0]), max(high, before[1])
        if self._histograms is not None:
            with contextlib.redirect_stdout(io.StringIO()):  # it says what it does on the standard output
                self._histograms.collect({name: array.astype(np.float32) for name, array in values.items()})

    def ranges(self) -> dict[str, Range]:
        """Return the range of every input."""
        if self._histograms is None or not self._ends:
            return dict(self._ends)
        with contextlib.redirect_stdout(io.StringIO()):
            found = self._histograms.compute_collection_result()
        return {name: (float(chosen[0]), float(chosen[1])) for name, chosen in found.items()}


def observe_ranges(
    model: OnnxModel,
    plan: ActivationPlan,
    directory: Path,
    files: Mapping[str, str],
    cache_dtype: str,
    progress: Callable[[int, int], None],
) -> dict[str, dict[str, Range]]:
    """Return the range of every input of an integer product: graph → input → range.

    `files` names the exact graphs in `directory`, beside their weights; `progress` is told (runs done, runs in all).
    """
    pieces = [piece for batch in plan.batches for piece in _pieces(batch)]
    if not pieces:
        raise ConfigError("static ranges are those seen over a calibration set, and this plan has none")
    watched = {name: _Watched(directory, files[name], plan.ranges) for name in sorted(files, key=_ORDER.index)}
    for done, batch in enumerate(pieces):
        progress(done, len(pieces))
        crossed: Arrays = {}  # what an encoder gives a decoder
        for name, graph in watched.items():
            answers = name in ("decoder", "scorer") and "decoder_input_ids" in batch
            feeds = _feeds(name, model.spec, batch, cache_dtype) | (crossed if answers else {})
            mask = batch["decoder_mask" if answers else "attention_mask"]
            outputs = graph.run(feeds, mask.astype(bool))
            crossed = outputs if name == "encoder" else crossed
    return {name: graph.ranges() for name, graph in watched.items()}


_ORDER = ("model", "encoder", "decoder", "scorer")


def _pieces(batch: Mapping[str, np.ndarray]) -> Iterator[Arrays]:
    """Cut a batch into runs."""
    rows, tokens = batch["input_ids"].shape
    step = max(1, _TOKENS // tokens)
    for start in range(0, rows, step):
        yield {name: array[start : start + step] for name, array in batch.items()}


class _Watched:
    """Run an exact graph and gather what its products read."""

    def __init__(self, directory: Path, file: str, rule: str) -> None:
        """Open the graph with what its products read among its outputs."""
        proto = onnx.load(directory / file, load_external_data=False)
        self._inputs = product_inputs(proto.graph)
        self._own = [value.name for value in proto.graph.output]
        given = {value.name for value in proto.graph.input}.union(self._own)
        proto.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            for name in self._inputs
            if name not in given
        )
        watched = directory / f"watched-{file}"
        onnx.save(proto, watched)
        try:
            self._session = open_session(watched, None)
        finally:
            watched.unlink()
        self._known = {end.name for end in self._session.get_inputs()}
        self._outputs = [end.name for end in self._session.get_outputs()]
        self._seen = _Seen(rule)

    def run(self, feeds: Arrays, mask: np.ndarray) -> Arrays:
        """Run once, count what was read where `mask` [rows, tokens] is true, and return the graph's own outputs.

        Keys and values that a graph writes in place stay in the memory they were given.
        """
        binding = self._session.io_binding()
        feeds = {name: np.ascontiguousarray(array) for name, array in feeds.items() if name in self._known}
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            past = name.replace("present_", "past_")
            if "seqlens_k" in feeds and past in values:
                binding.bind_ortvalue_output(name, values[past])
            else:
                binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        found = dict(zip(self._outputs, (value.numpy() for value in binding.get_outputs()), strict=True))
        read = {name: (found if name in found else feeds)[name] for name in self._inputs}
        self._seen.add({n: x[mask] if x.shape[: mask.ndim] == mask.shape else x for n, x in read.items()})
        return {name: found[name] for name in self._own}

    def ranges(self) -> dict[str, Range]:
        """Return the range of everything that was watched."""
        return self._seen.ranges()


def _feeds(name: str, spec: Json, batch: Arrays, cache_dtype: str) -> Arrays:
    """Return what a graph is given for a batch, beside the keys and values of a source."""
    answers = name in ("decoder", "scorer") and "decoder_input_ids" in batch
    ids = batch["decoder_input_ids" if answers else "input_ids"]
    feeds: Arrays = {"input_ids": ids, "token_type_ids": np.zeros_like(ids), "attention_mask": batch["attention_mask"]}
    feeds |= {"encoder_attention_mask": batch["attention_mask"], "token_ids": np.arange(_ANSWERED, dtype=np.int64)}
    if name != "decoder":
        return feeds
    rows, tokens = ids.shape
    growing = "ends" in spec
    shape = (rows, spec["kv_heads"], 0 if growing else spec["context"], spec["head_dim"])
    empty = np.zeros(shape, np.float32 if growing else cache_dtype)
    feeds |= {f"past_{kind}.{i}": empty.copy() for kind in ("key", "value") for i in range(spec["layers"])}
    feeds["seqlens_k"] = np.full(rows, tokens - 1, np.int32)
    feeds["total_sequence_length"] = np.array([tokens], np.int32)
    feeds["logits_positions"] = np.tile(np.arange(tokens, dtype=np.int64), (rows, 1))
    return feeds
