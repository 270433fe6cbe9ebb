"""Choose the next token from logits: greedy, temperature, top-k, top-p, repetition penalty.

Pure functions on one row of logits. The order is that of transformers' generation: penalty, temperature, top-k, top-p.
Source: transformers `generation/logits_process.py`; top-p: Holtzman et al., arXiv:1904.09751; penalty: Keskar et al.,
arXiv:1909.05858, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgepipe.errors import ConfigError, ContractError

_SORTED_AT_FIRST = 512  # tokens that top-p sorts before it looks further: enough for almost every step of a real model


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Say how the next token is chosen; values out of range raise ConfigError."""

    temperature: float = 0.0  # 0 = greedy; otherwise logits are divided by it
    top_k: int = 0  # keep the k most likely tokens; 0 = all
    top_p: float = 1.0  # keep the most likely tokens that together hold this probability, in (0, 1]
    repetition_penalty: float = 1.0  # > 1 makes tokens that were already there less likely; 1 = off

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature must be a number of at least 0 (0 = greedy), but is {self.temperature!r}")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int | np.integer) or self.top_k < 0:
            raise ConfigError(f"top_k must be a whole number of at least 0 (0 = all tokens), but is {self.top_k!r}")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ConfigError(f"top_p must be above 0 and at most 1 (1 = all tokens), but is {self.top_p!r}")
        if not (_is_number(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ConfigError(f"repetition_penalty must be above 0 (1 = off), but is {self.repetition_penalty!r}")


def _is_number(value: object) -> bool:
    """Tell whether value is a finite real number (a bool is not)."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def random_generator(seed: int | None, row: int = 0) -> np.random.Generator:
    """Return the random numbers of one row: the same for the same seed + row, fresh ones when seed is None."""
    if seed is None:
        return np.random.Generator(np.random.PCG64())
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ConfigError(f"seed must be a whole number of at least 0, or None for a fresh one, but is {seed!r}")
    return np.random.Generator(np.random.PCG64(int(seed) + row))


def penalize_repetition(logits: np.ndarray, seen: np.ndarray | Sequence[int], penalty: float) -> np.ndarray:
    """Return logits [vocab] float32 where each token in `seen` (ids, repeats count once) is made less likely."""
    if penalty == 1.0 or len(seen) == 0:
        return logits
    ids = np.asarray(seen, np.int64)
    ids = ids[ids < logits.shape[0]]  # added tokens that the head cannot produce
    scores = logits[ids]
    changed = logits.copy()
    factor = np.float32(penalty)
    changed[ids] = np.where(scores < 0, scores * factor, scores / factor)
    return changed


def keep_top_k(logits: np.ndarray, top_k: int) -> np.ndarray:
    """Return logits [vocab] with everything below the k-th largest set to −inf; ties with it stay. 0 keeps all."""
    if top_k == 0 or top_k >= logits.shape[0]:
        return logits
    least = np.partition(logits, -top_k)[-top_k]
    return np.where(logits < least, np.float32(-np.inf), logits)


def keep_top_p(logits: np.ndarray, top_p: float) -> np.ndarray:
    """Return logits [vocab] with the least likely tokens set to −inf while those kept still hold `top_p`.

    Of equally likely tokens the one with the lower id counts as likelier.
    """
    if top_p >= 1.0:
        return logits
    candidates = np.flatnonzero(logits > -np.inf)
    values = logits[candidates]
    weights = np.exp(values - values.max())  # probabilities up to their sum
    enough = top_p * weights.sum(dtype=np.float64)
    # The tokens that are kept are few: sort the likeliest ones only, more of them while they do not hold enough.
    count = _SORTED_AT_FIRST
    while True:
        count = min(count, len(weights))
        likeliest = np.flatnonzero(values >= np.partition(values, -count)[-count])  # ties with the last included
        likeliest = likeliest[np.argsort(-values[likeliest], kind="stable")]
        reached = np.cumsum(weights[likeliest], dtype=np.float64)
        if reached[-1] >= enough or len(likeliest) == len(weights):
            break
        count *= 8
    before = np.concatenate([[0.0], reached[:-1]])  # held by the likelier tokens; 0 for the first, so that it stays
    chosen = candidates[likeliest[before < enough]]
    kept = np.full_like(logits, -np.inf)
    kept[chosen] = logits[chosen]
    return kept


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log probabilities [..., vocab] float64 of logits [..., vocab]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def filter_logits(logits: np.ndarray, seen: np.ndarray | Sequence[int], sampling: Sampling) -> np.ndarray:
    """Return logits [vocab] float32 after penalty, temperature (unless greedy), top-k and top-p."""
    scores = penalize_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return scores
    scores = scores / np.float32(max(sampling.temperature, 1e-6))  # below that, float32 logits would overflow
    return keep_top_p(keep_top_k(scores, sampling.top_k), sampling.top_p)


def choose_token(
    logits: np.ndarray, seen: np.ndarray | Sequence[int], sampling: Sampling, generator: np.random.Generator
) -> int:
    """Return the id of the next token, given logits [vocab] float32 and the ids already there.

    Greedy takes the largest (the lowest id among equals) and draws no random number. Raises ContractError when the
    logits hold NaN or +inf, which no probability can be made from.
    """
    if not np.isfinite(logits.max()):
        raise ContractError(
            "the model gave logits that are not numbers: the bundle is damaged or the engine computed wrongly; "
            "check it with verify_hashes, or build it again"
        )
    scores = filter_logits(logits, seen, sampling)
    if sampling.temperature == 0:
        return int(scores.argmax())
    kept = np.flatnonzero(scores > -np.inf)
    likely = scores[kept]
    reached = np.cumsum(np.exp(likely - likely.max()), dtype=np.float64)
    draw = generator.random() * reached[-1]
    return int(kept[np.searchsorted(reached, draw, side="right")])  # "right": a token of probability 0 is never hit
