"""Read sources with a bundle's encoder, and score whole answers to them: the same for every engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from edgepipe.errors import ContractError

# What a decoder reads of a row's source: cross_key.i, cross_value.i [1, kv_heads, tokens, head_dim], and the mask
Source = dict[str, np.ndarray]
SOURCE_MASK = "encoder_attention_mask"  # [1, tokens] int64


class Runs(Protocol):
    """Stand for an opened graph or function."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name."""
        ...


class SourceReader:
    """Hold a bundle's encoder, and its graph `scorer`, opened on first use. Safe for concurrent callers."""

    def __init__(self, encoder: Runs, context: int, open_scorer: Callable[[], Runs] | None) -> None:
        """Join the encoder, the most tokens of a source, and what opens the scorer; None: the bundle has none."""
        self._encoder = encoder
        self._context = context
        self._open_scorer = open_scorer
        self._scorer: Runs | None = None
        self._opening = threading.Lock()

    def read(self, ids: np.ndarray) -> Source:
        """Return what the decoder reads of ids [1, tokens] int64; ContractError for a source that is too long."""
        if ids.shape[1] > self._context:
            raise ContractError(f"a source of {ids.shape[1]} tokens does not fit the {self._context} it may have")
        mask = np.ones(ids.shape, np.int64)
        crossed = self._encoder.run({"input_ids": np.ascontiguousarray(ids, np.int64), "attention_mask": mask})
        return {**crossed, SOURCE_MASK: mask}

    def score(self, ids: np.ndarray, prefix: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return the logits [C] float32 of `tokens` [C] int64 as the next after `prefix` [1, S], for a source [1, N].

        Of the output matrix only the rows of those tokens are read.
        """
        feeds = {"input_ids": prefix, "token_ids": tokens, **self.read(ids)}
        logits: np.ndarray = self.scorer().run(feeds)["logits"][0]
        return logits

    def scorer(self) -> Runs:
        """Return the graph `scorer`; ContractError when the bundle has none."""
        if self._open_scorer is None:
            raise ContractError("the bundle has no graph `scorer`: build it again")
        with self._opening:
            if self._scorer is None:
                self._scorer = self._open_scorer()
            return self._scorer


def reads_sources(reader: SourceReader | None) -> SourceReader:
    """Return a decoder's reader; ContractError when it has none."""
    if reader is None:
        raise ContractError("this decoder continues its prompt and reads no source")
    return reader
