"""Sampling once more, from docs/bundle.md alone: plain Python, one token at a time, its own random numbers.

The vectors' tokens come from here, so that neither edgepipe's sampling nor numpy's generator is held to itself.
Source of the generator: O'Neill, "PCG: a family of simple fast space-efficient statistically good algorithms" (2014),
variant XSL-RR 128/64; of its seeding: numpy's SeedSequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_WORD, _DOUBLE_WORD, _WIDE = (1 << 32) - 1, (1 << 64) - 1, (1 << 128) - 1
_MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Hold the options of one answer, called as in docs/runtime.md."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


def seed_words(seed: int) -> list[int]:
    """Return the eight 32-bit words that numpy's SeedSequence makes of a whole number."""
    entropy = [seed >> shift & _WORD for shift in range(0, max(seed.bit_length(), 1), 32)]
    constant = 0x43B0D7E5

    def hashed(value: int) -> int:
        nonlocal constant
        value ^= constant
        constant = constant * 0x931E8875 & _WORD
        value = value * constant & _WORD
        return value ^ value >> 16

    def mixed(x: int, y: int) -> int:
        value = (0xCA01F9DD * x - 0x4973F715 * y) & _WORD
        return value ^ value >> 16

    pool = [hashed(entropy[i] if i < len(entropy) else 0) for i in range(4)]
    for source in range(4):
        for target in range(4):
            if source != target:
                pool[target] = mixed(pool[target], hashed(pool[source]))
    for word in entropy[4:]:
        for target in range(4):
            pool[target] = mixed(pool[target], hashed(word))
    words, constant = [], 0x8B51F9DD
    for i in range(8):
        value = pool[i % 4] ^ constant
        constant = constant * 0x58F38DED & _WORD
        value = value * constant & _WORD
        words.append(value ^ value >> 16)
    return words


class RandomNumbers:
    """Give the random numbers of one row: PCG64."""

    def __init__(self, seed: int) -> None:
        words = seed_words(seed)
        first, second, third, fourth = (words[i] | words[i + 1] << 32 for i in range(0, 8, 2))
        self._increment = ((third << 64 | fourth) << 1 | 1) & _WIDE
        self._state = self._increment + (first << 64 | second)
        self._step()

    def _step(self) -> None:
        self._state = (self._state * _MULTIPLIER + self._increment) & _WIDE

    def next(self) -> float:
        """Return the next one, in [0, 1)."""
        self._step()
        value = (self._state >> 64 ^ self._state) & _DOUBLE_WORD
        turn = self._state >> 122
        value = (value >> turn | value << (64 - turn)) & _DOUBLE_WORD
        return float((value >> 11) * 2.0**-53)


def kept_tokens(logits: np.ndarray, seen: Sequence[int], options: Options) -> dict[int, np.float32]:
    """Return the tokens that may be drawn with their filtered logits, lowest id first. logits [vocab] float32"""
    scores = {token: logits[token] for token in range(len(logits))}
    for token in set(seen) & set(scores):
        penalty = np.float32(options.repetition_penalty)
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    if options.temperature == 0:
        return scores
    scores = {token: score / np.float32(max(options.temperature, 1e-6)) for token, score in scores.items()}
    if options.top_k:
        least = sorted(scores.values())[-min(options.top_k, len(scores))]
        scores = {token: score for token, score in scores.items() if score >= least}
    if options.top_p < 1:
        weights = _weights(scores)
        enough, reached, chosen = options.top_p * math.fsum(weights.values()), 0.0, set()
        for token in sorted(weights, key=lambda token: (-scores[token], token)):
            if reached < enough:
                chosen.add(token)
            reached += weights[token]
        scores = {token: score for token, score in scores.items() if token in chosen}
    return scores


def choose(logits: np.ndarray, seen: Sequence[int], options: Options, numbers: RandomNumbers) -> int:
    """Return the next token of a row."""
    scores = kept_tokens(logits, seen, options)
    if options.temperature == 0:
        return max(scores, key=lambda token: (scores[token], -token))
    weights = _weights(scores)
    border, reached = numbers.next() * math.fsum(weights.values()), 0.0
    for token, weight in weights.items():
        reached += weight
        if reached > border:
            return token
    raise AssertionError("the weights do not reach their sum")


def _weights(scores: dict[int, np.float32]) -> dict[int, float]:
    """Return probabilities up to their sum: float32 numbers, held in float64."""
    largest = max(scores.values())
    return {token: float(np.exp(np.float32(score - largest))) for token, score in scores.items()}
