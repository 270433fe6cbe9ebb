"""Judge interleaved measurements: a ratio of medians, its bootstrap interval over rounds, and a verdict.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), the percentile interval. Rounds are resampled,
not single samples, since what moves a shared machine moves all samples of a round alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_RESAMPLES = 10_000
_TAILS = (2.5, 97.5)  # percentiles: the middle 95 %


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
