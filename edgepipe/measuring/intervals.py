"""Judge repeated measurements: medians with bootstrap intervals, ratios, spreads and verdicts.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), the percentile interval. What moves a shared
machine moves all samples of a moment alike, so turns are resampled, never single samples; and since every process
lies differently in memory, processes (blocks) are resampled first, then the turns of each. Blocks are few, and a
percentile interval over few is too narrow: its percentiles are moved outwards as a t interval's would be (Hesterberg,
What Teachers Should Know About the Bootstrap, 2015, expanded percentiles).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

CONFIDENCE = 0.95
FLAG_ABOVE = 0.1  # a spread larger than this share of the median is flagged
_RESAMPLES = 10_000
_TAILS = (2.5, 97.5)  # percentiles: the middle 95 %
# Student's t at 97.5 %, for 1 to 10 degrees of freedom; beyond, 1.96 + 2.4 / degrees is right to 1 %
_T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_SPREAD = (10, 90)  # percentiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Hold a median with its 95 % interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """Return the three as figures keep them."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Hold the median over rounds of ours ÷ theirs, with its 95 % interval."""

    value: float
    low: float
    high: float

    def verdict(self, *, bigger_is_better: bool) -> str:
        """Return "tie" when the interval holds 1, else "better" or "worse"."""
        if self.low <= 1 <= self.high:
            return "tie"
        return "better" if (self.low > 1) == bigger_is_better else "worse"

    def to_json(self, *, bigger_is_better: bool) -> dict[str, Any]:
        """Return the ratio as a result keeps it, verdict included."""
        return asdict(self) | {"verdict": self.verdict(bigger_is_better=bigger_is_better)}


def ratio_over_rounds(ours: Sequence[float], theirs: Sequence[float], *, seed: int) -> Ratio:
    """Compare one figure per round of two engines; ValueError unless both have the same number, at least one.

    The ratio is taken within each round, so that the machine's drift from round to round cancels.
    """
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"expected one figure per round of both engines, got {len(ours)} and {len(theirs)}")
    ratios = np.array(ours, float) / np.array(theirs, float)
    picks = np.random.default_rng(seed).integers(0, len(ratios), (_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), _TAILS)
    return Ratio(value=float(np.median(ratios)), low=float(low), high=float(high))


def median_over_blocks(blocks: Sequence[Sequence[float]], *, seed: int) -> Interval:
    """Return the median of all turns of all blocks, with its interval; ValueError unless every block has as many.

    blocks: [blocks][turns], one figure per turn.
    """
    figures = _rectangle(blocks)
    medians = np.median(_resampled(figures, seed), axis=1)
    low, high = np.percentile(medians, expanded_tails(figures.shape[0] if figures.shape[0] > 1 else figures.shape[1]))
    return Interval(value=float(np.median(figures)), low=float(low), high=float(high))


def ratio_over_blocks(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], *, seed: int) -> Ratio:
    """Compare two sides that took turns: one figure per turn, [blocks][turns] each; ValueError unless shapes agree.

    The ratio is taken within each turn, so that whatever both met alike cancels.
    """
    a, b = _rectangle(ours), _rectangle(theirs)
    if a.shape != b.shape:
        raise ValueError(f"expected as many blocks and turns of both sides, got {a.shape} and {b.shape}")
    found = median_over_blocks((a / b).tolist(), seed=seed)
    return Ratio(value=found.value, low=found.low, high=found.high)


def spread(blocks: Sequence[Sequence[float]]) -> float:
    """Return how far the middle 80 % of all turns reach, as a share of their median."""
    figures = np.concatenate([np.asarray(block, float) for block in blocks])
    low, high = np.percentile(figures, _SPREAD)
    return float((high - low) / np.median(figures))


def expanded_tails(count: int) -> tuple[float, float]:
    """Return the percentiles that make a bootstrap over `count` things a 95 % interval: 2.5 and 97.5 for very many.

    For two or three they are the ends of what was drawn: more can't be said.
    """
    if count < 2:
        return 0.0, 100.0
    freedom = count - 1
    quantile = _T_QUANTILES[freedom - 1] if freedom <= len(_T_QUANTILES) else 1.96 + 2.4 / freedom
    tail = 100 * NormalDist().cdf(-quantile * (count / freedom) ** 0.5)
    return tail, 100 - tail


def _rectangle(blocks: Sequence[Sequence[float]]) -> np.ndarray:
    """Return [blocks, turns] float64."""
    turns = {len(block) for block in blocks}
    if len(turns) != 1 or 0 in turns:
        raise ValueError(f"expected blocks of equally many turns, at least one, got {[len(b) for b in blocks]}")
    return np.array(blocks, float)


def _resampled(figures: np.ndarray, seed: int) -> np.ndarray:
    """Draw blocks, then turns inside each drawn block, with replacement. → [resamples, blocks · turns]"""
    blocks, turns = figures.shape
    random = np.random.default_rng(seed)
    block = random.integers(0, blocks, (_RESAMPLES, blocks, 1))
    turn = random.integers(0, turns, (_RESAMPLES, blocks, turns))
    return figures[block, turn].reshape(_RESAMPLES, blocks * turns)
