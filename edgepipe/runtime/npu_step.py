"""Run a decoder on an NPU: one token a call, behind a cache of fixed length that lies in this process.

The graph takes 16-bit levels of the cache and gives those of the new place alone; they are moved, never computed with.
A prompt runs token by token as well. The graph's ends (engines/qnn/cached_attention.py), P = the context:

    input_ids, position_ids [1, 1] int64 · past_mask [1, 1, 1, P] uint16: 65535 where the cache holds a token, else 0
    past_key.i [1, kv_heads, head_dim, P], past_value.i [1, kv_heads, P, head_dim] uint16
    → logits [1, 1, vocab] float32 · new_key.i [1, kv_heads, head_dim, 1], new_value.i [1, kv_heads, 1, head_dim] uint16
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgepipe.errors import ConfigError, ContractError
from edgepipe.runtime.onnxruntime import Graph

PAST, NEW = "past_", "new_"  # begin the names of what is read of a cache, and of what is written to it
PAST_MASK = "past_mask"
CACHE_DTYPE = "uint16"  # levels on grids that the graph knows
_SEEN = np.uint16(65535)

Arrays = dict[str, np.ndarray]


def ends_of_step(model: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the inputs and outputs that a step has, as a manifest describes ends, from the model's facts."""
    heads, width, places = int(model["kv_heads"]), int(model["head_dim"]), int(model["context"])
    layers = range(int(model["layers"]))
    inputs = {name: _end("int64", 1, 1) for name in ("input_ids", "position_ids")}
    inputs[PAST_MASK] = _end(CACHE_DTYPE, 1, 1, 1, places)
    outputs = {"logits": _end("float32", 1, 1, int(model["vocab_size"]))}
    for begin, count, ends in ((PAST, places, inputs), (NEW, 1, outputs)):
        ends |= {f"{begin}key.{layer}": _end(CACHE_DTYPE, 1, heads, width, count) for layer in layers}
        ends |= {f"{begin}value.{layer}": _end(CACHE_DTYPE, 1, heads, count, width) for layer in layers}
    return {"inputs": inputs, "outputs": outputs}


def _end(dtype: str, *shape: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape)}


def write_place(cache: np.ndarray, new: np.ndarray, place: int) -> None:
    """Write new keys [1, H, D, 1] or values [1, H, 1, D] to a place of a cache [1, H, D, P] or [1, H, P, D]."""
    if new.shape[-1] == 1 and cache.shape[2] == new.shape[2]:
        cache[..., place] = new[..., 0]
    else:
        cache[:, :, place] = new[:, :, 0]


def read_zeros(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Return the levels that mean 0 in each tensor of the cache; ConfigError where a manifest doesn't say."""
    names = [name for name in ends_of_step(manifest["model"])["inputs"] if name.startswith(PAST) and name != PAST_MASK]
    npu = manifest.get("npu")
    zeros = npu.get("cache_zeros") if isinstance(npu, dict) else None
    if not isinstance(zeros, dict) or set(zeros) != set(names):
        raise ConfigError("manifest.json: npu.cache_zeros must name every past_key and past_value: build it again")
    if not all(type(zero) is int and 0 <= zero < 1 << 16 for zero in zeros.values()):
        raise ConfigError("manifest.json: npu.cache_zeros must be whole numbers below 65536: copy the bundle again")
    return zeros


class Decoder:
    """Offer a step on an NPU as a decoder (text_generation.py says what that is). Rows run one after another."""

    def __init__(self, graph: Graph, manifest: Mapping[str, Any]) -> None:
        """Take an opened graph and the checked manifest of its bundle."""
        model = manifest["model"]
        self._graph = graph
        self._zeros = read_zeros(manifest)
        self._ends = ends_of_step(model)["inputs"]
        self.context = int(model["context"])
        self.vocab_size = int(model["vocab_size"])
        self.cache_bytes = sum(2 * int(np.prod(self._ends[name]["shape"])) for name in self._zeros)

    def new_cache(self, batch: int) -> list[Arrays]:
        """Make an empty cache for `batch` sequences: zeros at every place, for what is hidden must not be large."""
        made = range(batch)
        return [{n: np.full(self._ends[n]["shape"], zero, np.uint16) for n, zero in self._zeros.items()} for _ in made]

    def read_source(self, cache: list[Arrays], row: int, ids: np.ndarray) -> None:
        """Refuse: no encoder stands before this decoder."""
        raise ContractError("a decoder on an NPU reads no source: build the bundle for another target")

    def score(self, ids: np.ndarray, prefix: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Refuse: no encoder stands before this decoder."""
        raise ContractError("a decoder on an NPU reads no source: build the bundle for another target")

    def run(
        self, cache: list[Arrays], input_ids: np.ndarray, past: np.ndarray, lengths: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """Append tokens to the cache and return logits [batch, P, vocab] float32.

        input_ids [batch, sequence] int64, rows right-padded; past [batch]: tokens of each row already in the cache, a
        smaller number rewinds it; lengths [batch]: valid new tokens; positions [batch, P]: the new positions to score.
        """
        longest = int((past + lengths).max())
        if longest > self.context:
            raise ContractError(f"{longest} tokens do not fit the context of {self.context}")
        found = np.empty((*positions.shape, self.vocab_size), np.float32)
        for number, row in enumerate(cache):
            for step in range(int(lengths[number])):
                logits = self._step(row, int(input_ids[number, step]), int(past[number]) + step)
                found[number, positions[number] == step] = logits
        return found

    def _step(self, row: Arrays, token: int, place: int) -> np.ndarray:
        """Run one token at a place of the cache and write its keys and values there; return logits [vocab]."""
        mask = np.zeros(self._ends[PAST_MASK]["shape"], np.uint16)
        mask[..., :place] = _SEEN
        ids = {name: np.array([[value]], np.int64) for name, value in (("input_ids", token), ("position_ids", place))}
        values = self._graph.run({**ids, PAST_MASK: mask, **row})
        for name, cached in row.items():
            write_place(cached, values[NEW + name.removeprefix(PAST)], place)
        logits: np.ndarray = values["logits"][0, 0]
        return logits
