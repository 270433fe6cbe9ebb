"""The promise of a budget: by how much a metric may drop, and how sure one can be on examples that weren't looked at.

    drop     how much worse the bundle is than the float model, in the budget's own unit
    limit    drop + √2 · (upper end of its 95 % interval − drop)

The interval is the paired bootstrap's: both bundles ran the same examples, and examples are resampled. Its upper end
says where the drop over all such examples may lie, at 97.5 %. A new set of as many examples has a chance of its own,
as large and independent, so the distance grows by √2: a prediction interval (Hahn & Meeker, Statistical Intervals,
1991). Where examples are right or wrong, the distance is 3 of them at least: when none of n has changed, resampling
finds no change either, but up to 3 of n others may (the rule of three: Hanley & Lippman-Hand, JAMA 249, 1983). A bundle
is within the budget when the limit is.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from edgepipe.errors import ConfigError
from edgepipe.measuring import scores
from edgepipe.measuring.metrics import Evaluation

_COUNTED = ("accuracy", "exact")  # metrics of examples that are right or wrong
_RULE_OF_THREE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Say by how much a metric may get worse."""

    amount: float  # of the float model's value when relative (0.01 is 1 %), else in units of the metric
    relative: bool

    def said(self, drop: float) -> str:
        """Return a drop as it is written: "0.4 %", or "0.004"."""
        return f"{100 * drop:.2g} %" if self.relative else f"{drop:.3g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """Say how much worse a bundle is, in the budget's unit; below 0 it is better."""

    value: float
    limit: float  # where it may lie on as many new examples


def parse_budget(text: str) -> Budget:
    """Read "1%" or "0.005"; ConfigError when it is neither, or nothing that a drop may be."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%?)\s*", text)
    amount = float(match[1]) if match else 0.0
    if match is None or amount == 0 or (match[2] and amount >= 100):
        raise ConfigError(
            "--max-drop: expected a share of the float model's value as in 1%, or an amount of the metric as in 0.005, "
            f"got {text!r}"
        )
    return Budget(amount=amount / 100 if match[2] else amount, relative=bool(match[2]))


def check_metric(options: Evaluation) -> None:
    """Raise ConfigError for a metric that one bundle alone hasn't."""
    if options.metric == "kl-to-float":
        raise ConfigError("--max-drop: kl-to-float has no value of the float model to drop from: take another metric")


def drop_of(options: Evaluation, budget: Budget, rows: np.ndarray, reference: np.ndarray) -> Drop:
    """Return how much worse `rows` are than those of the float model, both [examples, k] over the same examples.

    Raises ConfigError when the examples are too few for an interval, or the float model's value has no shares.
    """
    metric = options.described
    sign = 1.0 if metric.better == "lower" else -1.0
    apart = scores.difference(metric.statistic, rows.shape[1])
    both = np.hstack([rows, reference])
    interval = scores.bootstrap(apart, both, seed=options.seed)
    whole = abs(metric.statistic(reference)) if budget.relative else 1.0
    if interval is None or not whole > 0 or not math.isfinite(whole):
        raise ConfigError(
            f"--max-drop: {len(rows)} {metric.over} with a {metric.name} of {metric.statistic(reference):g} tell no "
            "interval of a drop: give more data"
        )
    value = sign * apart(both)
    worst = sign * (interval.high if sign > 0 else interval.low)
    far = math.sqrt(2) * max(0.0, worst - value)
    if metric.name in _COUNTED:
        far = max(far, _RULE_OF_THREE / len(rows))
    limit = value + far
    if not math.isfinite(limit):
        return Drop(value=math.inf, limit=math.inf)
    return Drop(value=value / whole, limit=limit / whole)


def check_enough(options: Evaluation, budget: Budget, reference: np.ndarray) -> None:
    """Raise ConfigError when the examples are too few for the budget: a bundle that equals the float model would fail.

    `reference` are the float model's rows. Raises what `drop_of` raises, too.
    """
    limit = drop_of(options, budget, reference, reference).limit
    if limit > budget.amount:
        raise ConfigError(
            f"--max-drop: of {len(reference)} {options.described.over} none may differ, and others may still lose "
            f"{budget.said(limit)}: for {budget.said(budget.amount)} give "
            f"{math.ceil(len(reference) * limit / budget.amount)} at least"
        )
