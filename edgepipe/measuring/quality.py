"""Score text token by token through the runtime that ships: perplexity, and how far a bundle is from a float one.

Windows: the text's tokens are cut into windows, each of which starts from nothing. With a stride below the window,
windows overlap and each scores only the tokens that the one before did not. A window's first token is never scored.
Sources: perplexity as in the documentation of transformers, "Perplexity of fixed-length models"; KL divergence and
top-1 agreement as llama.cpp's `perplexity --kl-divergence` takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from edgepipe.errors import StageError
from edgepipe.runtime.sampling import log_softmax

WINDOW_TOKENS = 512

Tick = Callable[[int, int], None]  # windows done, windows in all


@runtime_checkable
class Scorer(Protocol):
    """Say what a bundle offers that predicts the next token of a text."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""

    def token_logprobs(self, prompt: Sequence[int]) -> np.ndarray:
        """Return log p of every token but the first, given those before it."""

    def logit_chunks(self, prompt: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield the logits [tokens, vocab] of all positions, some at a time."""


@dataclass(frozen=True, slots=True)
class Window:
    """Say which tokens a window runs, and from which of its own on it scores."""

    ids: tuple[int, ...]
    first: int  # place within the window, ≥ 1, of the first token that is scored


def cut_windows(ids: Sequence[int], window: int, stride: int = 0) -> list[Window]:
    """Cut token ids into windows of at most `window` tokens, `stride` apart (0: end to end); all score something."""
    step = stride or window
    windows = []
    end = 0  # of the window before
    for start in range(0, len(ids), step):
        first = max(end - start, 1)
        end = min(start + window, len(ids))
        if first < end - start:
            windows.append(Window(tuple(ids[start:end]), first))
        if end == len(ids):
            break
    return windows


def score_windows(model: Scorer, windows: Sequence[Window], tick: Tick | None = None) -> np.ndarray:
    """Return [windows, 2] float64: the negative log-likelihood of each window's scored tokens, and their number."""
    rows = np.empty((len(windows), 2))
    for number, window in enumerate(windows):
        if tick is not None:
            tick(number, len(windows))
        logprobs = model.token_logprobs(window.ids)[window.first - 1 :]
        rows[number] = -logprobs.sum(), logprobs.size
    return rows


def perplexity(rows: np.ndarray) -> float:
    """Return exp of the mean negative log-likelihood per token of rows as `score_windows` makes them."""
    with np.errstate(over="ignore"):  # infinite is what it is then; whoever shows it refuses
        return float(np.exp(rows[:, 0].sum() / rows[:, 1].sum()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Hold how far one model's distributions are from another's, over the same tokens."""

    rows: np.ndarray  # [windows, 5] float64: KL, agreements, NLL of the model, NLL of the reference, scored tokens
    per_token: np.ndarray  # [tokens] float64, KL in nats


def compare_windows(
    model: Scorer, reference: Scorer, windows: Sequence[Window], tick: Tick | None = None
) -> Divergence:
    """Run windows through both models; compare p(next token) wherever a scored token is predicted.

    KL is Σ p_reference · (log p_reference − log p_model), natural log. Agreement: both find the same token most
    likely. Memory: the logits of 64 positions of each model. Raises StageError when logits are no numbers.
    """
    rows = np.zeros((len(windows), 5))
    per_token = []
    for number, window in enumerate(windows):
        if tick is not None:
            tick(number, len(windows))
        for wanted, ours, theirs in _distributions(model, reference, window):
            places = np.arange(len(wanted))
            with np.errstate(invalid="ignore"):  # 0 · −∞, where a probability is too small for a double
                gap = np.exp(theirs) * (theirs - ours)
            kl = np.where(np.isneginf(theirs), 0.0, gap).sum(axis=-1)
            agree = (ours.argmax(axis=-1) == theirs.argmax(axis=-1)).sum()
            rows[number] += (kl.sum(), agree, -ours[places, wanted].sum(), -theirs[places, wanted].sum(), len(wanted))
            per_token.append(kl)
    found = np.concatenate(per_token)
    if not np.isfinite(found).all():
        raise StageError("the logits of one of the bundles are no finite numbers: build it again")
    return Divergence(rows=rows, per_token=found)


def _distributions(
    model: Scorer, reference: Scorer, window: Window
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield, a few positions at a time: scored tokens [P], and log p [P, vocab] of the model and of the reference."""
    start = 0
    context = window.ids[:-1]
    for ours, theirs in zip(model.logit_chunks(context), reference.logit_chunks(context), strict=True):
        skip = min(max(window.first - 1 - start, 0), len(ours))
        wanted = np.asarray(window.ids[start + skip + 1 : start + len(ours) + 1], np.int64)
        start += len(ours)
        if wanted.size:
            yield wanted, log_softmax(ours[skip:]), log_softmax(theirs[skip:])
