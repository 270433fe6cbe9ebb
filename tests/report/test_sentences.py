"""Sentences: a verdict doesn't flatter, a tie is called one, and what wasn't measured isn't spoken of."""

from __future__ import annotations

from typing import Any

import pytest

from edgepipe.report.sentences import certainty, verdict


def side(scale: float, perplexity: float | None = 20.0) -> dict[str, Any]:
    """Make one side's figures."""
    more = {} if perplexity is None else {"perplexity": perplexity}
    size = {"bundle_bytes": int(200e6 * scale)}
    return {**size, "ttft_ms": 110 * scale, "token_ms": 10 * scale, "tokens_per_second": 100 / scale, **more}


def judged(value: float, low: float, high: float, said: str) -> dict[str, Any]:
    """Make a ratio that was judged."""
    return {"value": value, "low": low, "high": high, "verdict": said}


@pytest.mark.parametrize(
    ("scale", "perplexity", "words"),
    [
        (1, 20.1, ["2.0 times smaller: 400.0 MB became 200.0 MB.", "Decoding is 2.00 times as fast.", "1.005 times"]),
        (4, 25.0, ["2.00 times as large", "Decoding takes 2.00 times as long.", "Perplexity is +25.0 %."]),
        (2, 19.0, ["1.0 times smaller", "Nothing measurable was lost"]),
        (1, None, ["Quality was not measured here"]),
        (1, float("nan"), ["Perplexity is no number"]),
    ],
)
def test_a_verdict_does_not_flatter(scale: float, perplexity: float | None, words: list[str]) -> None:
    said = " ".join(verdict({"baseline": side(2), "bundle": side(scale, perplexity)}, "float32"))
    assert all(word in said for word in words), said


def test_what_was_judged_has_its_interval() -> None:
    ratios = {"token_ms": judged(0.5, 0.4, 0.625, "better"), "ttft_ms": judged(1.25, 0.8, 1.6, "tie")}
    said = verdict({"baseline": side(2), "bundle": side(1), "ratios": ratios}, "the other bundle")
    assert "Decoding is 2.00 times as fast [1.60, 2.50]." in said
    assert "The first token is a tie with the other bundle: 0.80 times as fast [0.62, 1.25]." in said
    ratios = {"token_ms": judged(1.25, 1.1, 1.5, "worse")}
    said = verdict({"baseline": side(2), "bundle": side(1), "ratios": ratios}, "float32")
    assert "Decoding takes 1.25 times as long [1.10, 1.50]." in said


def test_alone_nothing_is_compared() -> None:
    assert verdict({"bundle": side(1)}, "float32") == ["200.0 MB, 100.0 tokens/s. Nothing is compared here."]
    call = {"batch": 8, "tokens": 128, "ms": 12.5}
    assert verdict({"bundle": {"bundle_bytes": 1e6, "calls": [call]}}, "float32") == [
        "1.0 MB, 12.5 ms for a call of 8x128. Nothing is compared here."
    ]


def test_a_spread_is_explained_on_either_side() -> None:
    restless = side(2) | {"flagged": ["token_ms"]}
    assert certainty({"baseline": restless, "bundle": side(1)})[-1].startswith("* spread over more than 10 %")
    assert certainty({"baseline": side(2), "bundle": side(1)}) == []
