"""Budgets: which limits of its target a measured bundle breaks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgepipe.artifacts import Json
from edgepipe.report.rows import same_tokens


def over_budget(figures: Json, budgets: Mapping[str, Any], target: str) -> list[str]:
    """Return one sentence for every budget of the target that the figures break; what wasn't measured breaks none."""
    after, before = figures["bundle"], figures.get("baseline")
    checks = [("TTFT in ms", "ttft_ms", after.get("ttft_ms"))]
    if before is not None:
        checks.append(("shipped ratio", "shipped_ratio", after["bundle_bytes"] / before["bundle_bytes"]))
        if None not in (after.get("perplexity"), before.get("perplexity")) and same_tokens(before, after):
            checks.append(("perplexity ratio", "perplexity_ratio", after["perplexity"] / before["perplexity"]))
    return [
        f"over budget: {title} is {value:.3f}, the target {target} allows {allowed:.3f}"
        for title, name, value in checks
        if (allowed := budgets.get(name)) is not None and value is not None
        if not value <= allowed  # a perplexity that is no number is over budget too
    ]
