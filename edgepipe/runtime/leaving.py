"""Run a decoder whose tokens may leave between its layers (docs/bundle.md: parts of a decoder).

A token goes through part after part until a gate is above the threshold; the head is run once, for where it left. The
keys and values of the layers it has skipped are made of its state at the exit, so that later tokens find something
there. A prompt goes through all layers: it is run at once, and only its last token's answer is wanted. So does the very
first token wherever it runs: later ones look at it when they look at nothing (attention sinks, arXiv:2309.17453).

Rows run one after another, each with a cache of its own: they leave at different layers.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from edgepipe.errors import ContractError
from edgepipe.runtime.exits import GATE, PART

FILL, HEAD = "fill_", "head"  # names of graphs: keys and values of a part's layers, by its number; logits

Leaves = Callable[[int, float], bool]  # exit, log odds of its gate → whether a token leaves there
Run = Callable[[], None]


class Bindable(Protocol):
    """Say what an engine's opened graph offers; runtime/onnxruntime.py has one."""

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Run:
        """Return what computes the graph once from arrays into arrays, which stay where they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Hold the opened graphs of a decoder with exits, and the layers behind each part."""

    parts: Sequence[Bindable]
    fills: Mapping[int, Bindable]  # by the number of the part whose layers they fill
    head: Bindable
    depths: Sequence[int]  # growing; all layers last

    def layers(self, number: int) -> range:
        """Return the layers of a part."""
        return range((0, *self.depths)[number], self.depths[number])


def ends_of_parts(model: Mapping[str, Any], cache_dtype: str) -> dict[str, dict[str, Any]]:
    """Return inputs and outputs of the graphs by name, as a manifest describes ends; an axis with a name is free."""
    heads, size = int(model["kv_heads"]), int(model["head_dim"])

    def end(dtype: str, *shape: int | str) -> dict[str, Any]:
        return {"dtype": dtype, "shape": [*shape]}

    ids, wanted = end("int64", "batch", "sequence"), end("int64", "batch", "wanted")
    states = end("float32", "batch", "sequence", int(model["hidden_size"]))
    normed = end("float32", "batch", "wanted", int(model["hidden_size"]))
    cache = end(cache_dtype, "batch", heads, int(model["context"]), size)
    lengths = {"seqlens_k": end("int32", "batch"), "total_sequence_length": end("int32", 1)}
    between = {"states": states, "added": states}
    logits = end("float32", "batch", "wanted", int(model["vocab_size"]))
    found: dict[str, dict[str, Any]] = {HEAD: {"inputs": {"normed": normed}, "outputs": {"logits": logits}}}
    depths = (0, *model["exits"], model["layers"])
    for number, (first, last) in enumerate(itertools.pairwise(depths)):
        layers = [f"{kind}.{i}" for i in range(first, last) for kind in ("key", "value")]
        inputs = {**(between if number else {"input_ids": ids}), **lengths, "logits_positions": wanted}
        outputs = {"normed": normed, **{f"present_{layer}": cache for layer in layers}}
        if number < len(depths) - 2:
            outputs |= {"next_states": states, "next_added": states, GATE: end("float32", "batch", "wanted")}
        inputs |= {f"past_{layer}": cache for layer in layers}
        found[f"{PART}{number}"] = {"inputs": inputs, "outputs": outputs}
        if number:
            new = {f"new_{layer}": end("float32", "batch", "sequence", heads * size) for layer in layers}
            found[f"{FILL}{number}"] = {"inputs": {**between, "position_ids": ids}, "outputs": new}
    return found


def join_parts(graphs: Mapping[str, Bindable], model: Mapping[str, Any]) -> Parts:
    """Return opened graphs, given by name, in the order in which they run."""
    depths = (*model["exits"], model["layers"])
    return Parts(
        parts=[graphs[f"{PART}{number}"] for number in range(len(depths))],
        fills={number: graphs[f"{FILL}{number}"] for number in range(1, len(depths))},
        head=graphs[HEAD],
        depths=depths,
    )


@dataclass(slots=True, kw_only=True)
class Row:
    """Hold the cache of one sequence, and what its single tokens are run with."""

    buffers: dict[str, np.ndarray]  # key.i, value.i [1, kv_heads, context, head_dim]
    step: _Bound | None = None  # made when the first single token is run


@dataclass(slots=True, kw_only=True)
class _Bound:
    """Hold arrays for runs of some tokens, and the graphs bound to them."""

    arrays: dict[str, np.ndarray]
    gates: list[np.ndarray]  # [1, 1] float32
    new: list[dict[str, np.ndarray]]  # of each part's fill: key.i, value.i [1, 1, width] float32
    parts: list[Run] = field(default_factory=list)
    fills: list[Run] = field(default_factory=list)
    head: Run


def above(threshold: float) -> Leaves:
    """Return the rule of a threshold: leave where a gate's probability is higher; at 1 never, at 0 always."""
    if threshold in (0, 1):
        return lambda _number, _odds: threshold == 0
    least = math.log(threshold / (1 - threshold))
    return lambda _number, odds: odds > least


def taking(ways: Sequence[int]) -> Leaves:
    """Return a rule by which each token leaves behind the part that it has been given, one token after another."""
    place = -1

    def rule(number: int, _odds: float) -> bool:
        nonlocal place
        place += number == 0  # every token is asked at the first exit
        return ways[place] == number

    return rule


class LeavingDecoder:
    """Offer what one graph of a decoder offers, over its parts. Safe for concurrent calls on different caches."""

    reader = None  # there is no encoder in front

    def __init__(self, parts: Parts, model: Mapping[str, Any], cache_dtype: str, leaves: Leaves) -> None:
        """Join opened graphs, the manifest's facts of the model, and the rule of leaving."""
        self._parts = parts
        self._leaves = leaves
        self._dtype = np.dtype(cache_dtype)
        self._hidden = int(model["hidden_size"])
        self._shape = (1, int(model["kv_heads"]), int(model["context"]), int(model["head_dim"]))
        self.context = int(model["context"])
        self.vocab_size = int(model["vocab_size"])
        self.cache_bytes = 2 * self._dtype.itemsize * parts.depths[-1] * math.prod(self._shape)
        self._left: Counter[int] = Counter()
        self._counting = threading.Lock()

    @property
    def tokens_by_depth(self) -> dict[int, int]:
        """Return how many single tokens left after how many layers, since it was opened."""
        with self._counting:
            return {depth: self._left[depth] for depth in self._parts.depths}

    def new_cache(self, batch: int) -> list[Row]:
        """Make an empty cache for `batch` sequences."""
        names = [f"{kind}.{i}" for i in range(self._parts.depths[-1]) for kind in ("key", "value")]
        return [Row(buffers={name: np.zeros(self._shape, self._dtype) for name in names}) for _ in range(batch)]

    def read_source(self, cache: list[Row], row: int, ids: np.ndarray) -> None:
        """Refuse a source: there is no encoder in front."""
        raise ContractError("this decoder has no encoder in front, and reads no source")

    def score(self, ids: np.ndarray, prefix: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Refuse a source."""
        raise ContractError("this decoder has no encoder in front, and scores no answers to a source")

    def run(
        self, cache: list[Row], input_ids: np.ndarray, past: np.ndarray, lengths: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """Append tokens to the cache and return logits [batch, P, vocab] float32.

        input_ids [batch, sequence] int64, rows right-padded; past [batch]: tokens of each row already in the cache, a
        smaller number rewinds it; lengths [batch]: valid new tokens; positions [batch, P]: the new positions to score.
        Where more than one is scored, tokens run one by one, as if they had been generated.
        """
        longest = int((past + lengths).max())
        if longest > self.context:
            raise ContractError(f"{longest} tokens do not fit the context of {self.context}")
        found = []
        for number, row in enumerate(cache):
            ids = np.asarray(input_ids[number, : int(lengths[number])], np.int64)
            if positions.shape[1] == 1 and len(ids) > 1:
                found.append(self._prompt(row, ids, int(past[number]), int(positions[number, 0])))
                continue
            scored = [self._step(row, int(token), int(past[number]) + i) for i, token in enumerate(ids)]
            found.append(np.stack([scored[i] for i in positions[number]]))
        return np.stack(found)

    def _prompt(self, row: Row, ids: np.ndarray, past: int, wanted: int) -> np.ndarray:
        """Append ids [n] through all layers; return the logits [1, vocab] at one of them."""
        bound = self._bind(row, len(ids))
        _put(bound.arrays, ids, past)
        bound.arrays["logits_positions"][:] = wanted
        for run in bound.parts:
            run()
        bound.head()
        logits: np.ndarray = bound.arrays["logits"][0]
        return logits

    def _step(self, row: Row, token: int, past: int) -> np.ndarray:
        """Append a token through as many layers as it wants; return its logits [vocab]."""
        if row.step is None:
            row.step = self._bind(row, 1)
        bound = row.step
        _put(bound.arrays, np.array([token]), past)
        last = len(bound.parts) - 1
        for number, run in enumerate(bound.parts):
            run()
            if number == last:
                break
            gone = self._leaves(number, float(bound.gates[number][0, 0]))
            if gone and past:
                break
        if number < last:
            for name in ("states", "added"):
                bound.arrays[name][:] = bound.arrays[f"{name}.{number}"]
        for later in range(number + 1, last + 1):
            bound.fills[later - 1]()
            for name, value in bound.new[later - 1].items():
                row.buffers[name][0, :, past] = value.reshape(self._shape[1], self._shape[3])
        bound.head()
        with self._counting:
            self._left[self._parts.depths[number]] += 1
        logits: np.ndarray = bound.arrays["logits"][0, 0].copy()
        return logits

    def _bind(self, row: Row, tokens: int) -> _Bound:
        """Make arrays for some new tokens of a row, and bind the graphs to them: once for single tokens, 0.4 ms a time
        for a prompt.
        """
        last = len(self._parts.parts) - 1
        dims, width = (1, tokens, self._hidden), (1, tokens, self._shape[1] * self._shape[3])
        arrays: dict[str, np.ndarray] = {
            "input_ids": np.zeros((1, tokens), np.int64),
            "position_ids": np.zeros((1, tokens), np.int64),
            "logits_positions": np.zeros((1, 1), np.int64),
            "seqlens_k": np.zeros(1, np.int32),
            "total_sequence_length": np.zeros(1, np.int32),
            "normed": np.zeros((1, 1, self._hidden), np.float32),
            "logits": np.zeros((1, 1, self.vocab_size), np.float32),
            **{f"{name}.{k}": np.zeros(dims, np.float32) for k in range(last) for name in ("states", "added")},
            **{name: np.zeros(dims, np.float32) for name in ("states", "added")},
        }
        gates = [np.zeros((1, 1), np.float32) for _ in range(last)]
        new = [
            {f"{kind}.{i}": np.zeros(width, np.float32) for i in self._parts.layers(k) for kind in ("key", "value")}
            for k in range(1, last + 1)
        ]
        head = self._parts.head.bind({"normed": arrays["normed"]}, {"logits": arrays["logits"]})
        bound = _Bound(arrays=arrays, gates=gates, new=new, head=head)
        shared = {name: arrays[name] for name in ("seqlens_k", "total_sequence_length", "logits_positions")}
        for number, part in enumerate(self._parts.parts):
            names = [f"{kind}.{i}" for i in self._parts.layers(number) for kind in ("key", "value")]
            inputs = {**shared, **{f"past_{name}": row.buffers[name] for name in names}}
            outputs = {"normed": arrays["normed"], **{f"present_{name}": row.buffers[name] for name in names}}
            if number:
                inputs |= {name: arrays[f"{name}.{number - 1}"] for name in ("states", "added")}
            else:
                inputs["input_ids"] = arrays["input_ids"]
            if number < last:
                outputs |= {f"next_{name}": arrays[f"{name}.{number}"] for name in ("states", "added")}
                outputs[GATE] = gates[number]
            bound.parts.append(part.bind(inputs, outputs))
        if tokens == 1:
            given = {name: arrays[name] for name in ("states", "added", "position_ids")}
            for number in range(1, last + 1):
                made = {f"new_{name}": value for name, value in new[number - 1].items()}
                bound.fills.append(self._parts.fills[number].bind(given, made))
        return bound


def _put(arrays: Mapping[str, np.ndarray], ids: np.ndarray, past: int) -> None:
    """Write new tokens and where they stand into the arrays that graphs read."""
    arrays["input_ids"][0] = ids
    arrays["position_ids"][0] = np.arange(past, past + len(ids))
    arrays["seqlens_k"][0] = past + len(ids) - 1
    arrays["total_sequence_length"][0] = past + len(ids)
