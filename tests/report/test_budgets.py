"""Budgets: at the limit is within it, and what wasn't measured breaks none."""

from __future__ import annotations

import dataclasses
import math

import pytest

from edgepipe.report.budgets import over_budget
from edgepipe.target import Budgets


@pytest.mark.parametrize(
    ("bundle", "baseline", "broken"),
    [
        ({"ttft_ms": 99.0, "bundle_bytes": 30, "perplexity": 10.4}, {"bundle_bytes": 100, "perplexity": 10.0}, []),
        ({"ttft_ms": 100.0, "bundle_bytes": 30, "perplexity": 10.5}, {"bundle_bytes": 100, "perplexity": 10.0}, []),
        (
            {"ttft_ms": 100.1, "bundle_bytes": 31, "perplexity": 10.6},
            {"bundle_bytes": 100, "perplexity": 10.0},
            ["TTFT in ms is 100.100", "shipped ratio is 0.310", "perplexity ratio is 1.060"],
        ),
        (
            {"ttft_ms": 1.0, "bundle_bytes": 3, "perplexity": math.nan},
            {"bundle_bytes": 100, "perplexity": 10.0},
            ["perplexity ratio is nan"],
        ),
        ({"ttft_ms": 101.0, "bundle_bytes": 31, "perplexity": 99.0}, None, ["TTFT in ms is 101.000"]),
    ],
)
def test_budgets_that_are_broken(
    bundle: dict[str, float], baseline: dict[str, float] | None, broken: list[str]
) -> None:
    """At the limit is within it; a perplexity that is no number is not."""
    budgets = dataclasses.asdict(Budgets(shipped_ratio=0.3, perplexity_ratio=1.05, ttft_ms=100))
    found = over_budget({"bundle": bundle, "baseline": baseline}, budgets, "cpu")
    assert len(found) == len(broken)
    for sentence, words in zip(found, broken, strict=True):
        assert sentence.startswith(f"over budget: {words}, the target cpu allows ")
    assert over_budget({"bundle": bundle, "baseline": baseline}, dataclasses.asdict(Budgets()), "cpu") == []


def test_perplexities_of_other_tokens_are_not_compared() -> None:
    sides = {"bundle": {"bundle_bytes": 1, "perplexity": 99.0, "perplexity_tokens": 7}}
    for tokens, broken in ((7, 1), (6, 0)):
        sides["baseline"] = {"bundle_bytes": 1, "perplexity": 10.0, "perplexity_tokens": tokens}
        assert len(over_budget(sides, {"perplexity_ratio": 1.05}, "board")) == broken


@pytest.mark.parametrize("baseline", [None, {"bundle_bytes": 100}, {"bundle_bytes": 100, "perplexity": 10.0}])
def test_what_was_not_measured_breaks_none(baseline: dict[str, float] | None) -> None:
    """An encoder has neither TTFT nor perplexity."""
    budgets = {"perplexity_ratio": 1.0, "ttft_ms": 1.0, "shipped_ratio": 0.4}
    assert over_budget({"bundle": {"bundle_bytes": 30}, "baseline": baseline}, budgets, "board") == []
