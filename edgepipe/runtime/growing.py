"""A decoder whose graph takes past keys and values and gives longer ones back: the cache grows by concatenation.

Graphs of the framework's exporter are such. Rows run one after another, each with a cache of its own, so that rows of
a batch may have any lengths; a step copies the row's cache once. With an encoder in front, `read_source` puts the keys
and values of the source into a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from edgepipe.errors import ContractError


class Graph(Protocol):
    """Say what an engine's loaded graph offers; runtime/onnxruntime.py has one."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name."""


@dataclass(slots=True, kw_only=True)
class Row:
    """Hold the keys and values of one row, and those of its source."""

    past: dict[str, np.ndarray]  # past_key.i, past_value.i: [1, kv_heads, tokens, head_dim] float32
    source: dict[str, np.ndarray] = field(default_factory=dict)  # cross_key.i …, encoder_attention_mask


class GrowingDecoder:
    """Run the graph `decoder` of a bundle, behind its graph `encoder` if there is one. Safe for concurrent callers."""

    def __init__(self, decoder: Graph, encoder: Graph | None, model: Mapping[str, Any]) -> None:
        self._decoder = decoder
        self._encoder = encoder
        self._layers = int(model["layers"])
        self._shape = (1, int(model["kv_heads"]), 0, int(model["head_dim"]))
        self.context = int(model["context"])
        self.vocab_size = int(model["vocab_size"])
        self.cache_bytes = 2 * 4 * self._layers * self._shape[1] * self.context * self._shape[3]

    def new_cache(self, batch: int) -> list[Row]:
        """Make an empty cache for `batch` sequences."""
        names = [f"past_{kind}.{layer}" for layer in range(self._layers) for kind in ("key", "value")]
        return [Row(past=dict.fromkeys(names, np.zeros(self._shape, np.float32))) for _ in range(batch)]

    def read_source(self, cache: list[Row], row: int, ids: np.ndarray) -> None:
        """Run the encoder over ids [1, tokens] and keep what the row's decoder reads of it; its past is emptied."""
        assert self._encoder is not None, "this decoder has no source"
        mask = np.ones_like(ids)
        crossed = self._encoder.run({"input_ids": ids, "attention_mask": mask})
        cache[row] = Row(past=self.new_cache(1)[0].past, source={**crossed, "encoder_attention_mask": mask})

    def score(self, ids: np.ndarray, prefix: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return the logits [C] float32 of `tokens` [C] as the next after `prefix` [1, S], for a source [1, N]."""
        cache = self.new_cache(1)
        self.read_source(cache, 0, ids)
        logits: np.ndarray = self._run_row(cache[0], prefix, 0)[-1, tokens]
        return logits

    def run(
        self, cache: list[Row], input_ids: np.ndarray, past: np.ndarray, lengths: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """Append tokens to the cache and return logits [batch, P, vocab] float32.

        input_ids [batch, sequence] int64, rows right-padded; past [batch]: tokens of each row already in the cache, a
        smaller number rewinds it; lengths [batch]: valid new tokens; positions [batch, P]: the new positions to score.
        """
        longest = int((past + lengths).max())
        if longest > self.context:
            raise ContractError(f"{longest} tokens do not fit the context of {self.context}")
        return np.stack(
            [
                self._run_row(cache[row], input_ids[row : row + 1, : int(lengths[row])], int(past[row]))[positions[row]]
                for row in range(len(cache))
            ]
        )

    def _run_row(self, row: Row, ids: np.ndarray, past: int) -> np.ndarray:
        """Append ids [1, n] to one row after `past` tokens; return logits [n, vocab]."""
        kept = {name: np.ascontiguousarray(value[:, :, :past]) for name, value in row.past.items()}
        found = self._decoder.run({"input_ids": np.ascontiguousarray(ids, np.int64), **row.source, **kept})
        logits: np.ndarray = found.pop("logits")[0]
        row.past = {name.replace("present_", "past_"): value for name, value in found.items()}
        return logits
