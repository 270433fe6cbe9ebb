"""The page of a run: it stands alone, says the figures of the record, and lets nothing of the model's become markup."""

from __future__ import annotations

import copy
import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe.artifacts import StageRecord
from edgepipe.report.page import Page, byte_parts, histograms, render, token_times, verdict
from edgepipe.runtime.bundle import read_manifest


def figures_of(scale: float, perplexity: float) -> dict[str, Any]:
    """Make one side's figures with samples that are easy to check."""
    block = {"ttft_ms": [100 * scale, 120 * scale], "token_ms": [[10 * scale] * 9 + [50 * scale]] * 2}
    return {
        "bundle_bytes": int(200e6 * scale),
        "bits_per_weight": 16 * scale,
        "ttft_ms": 110 * scale,
        "token_ms": 10 * scale,
        "tokens_per_second": 100 / scale,
        "load_ms": 300.0,
        "memory_peak_bytes": int(300e6 * scale),
        "cache_bytes": 1_000_000,
        "prompt_tokens": 128,
        "ttft": [{"prompt_tokens": 128, "ttft_ms": 110 * scale}],
        "token_ms_p95": 50 * scale,
        "token_ms_p99": 50 * scale,
        "cold_start_ms": 900.0,
        "memory_after_load_bytes": int(250e6 * scale),
        "memory_without_model_bytes": int(90e6),
        "flagged": [],
        "perplexity": perplexity,
        "perplexity_tokens": 1000,
        "samples": [block, block],
    }


@pytest.fixture
def page(tiny_bundle: Path) -> Page:
    """Make a page of the tiny bundle with figures of ours: twice as fast and half as large as float32."""
    machine = {"cpu": "A <b>CPU</b>", "cores": 2, "threads": 0, "system": "Linux", "python": "3.11"}
    ratio = {"value": 0.5, "low": 0.45, "high": 0.55, "verdict": "better"}
    figures = {
        "baseline": figures_of(2, 20.0),
        "bundle": figures_of(1, 20.1),
        "ratios": {"token_ms": ratio, "ttft_ms": ratio},
        "text": "prose-eval",
        "machine": machine,
    }
    record = StageRecord(stage="quantize", options={"bits": 4}, key="k", notes=("all < nothing & more",))
    return Page(
        figures=figures, manifest=read_manifest(tiny_bundle), recipe={"target": "cpu", "seed": 0}, history=(record,)
    )


class _Checker(HTMLParser):
    """Collect tags, and complain about any that is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.text.append(data)


def parsed(html: str) -> _Checker:
    """Read a page to its end."""
    checker = _Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker


def test_the_page_needs_nothing_else(page: Page) -> None:
    """No script, no link, no source: it can be mailed, and says so to the browser as well."""
    html = render(page)
    seen = parsed(html).seen
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in seen}
    assert not any({"src", "href", "onload", "onclick"} & set(attributes) for _, attributes in seen)
    assert "url(" not in html
    assert "http" not in re.sub(r"http-equiv", "", html)
    assert "default-src 'none'" in html
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_the_verdict_comes_first_and_the_figures_are_those_of_the_record(page: Page) -> None:
    text = " ".join(" ".join(parsed(render(page)).text).split())
    assert text.index("2.0 times smaller: 400 MB became 200.0 MB.") < text.index("Before and after")
    assert "Decoding is 2.00 times as fast." in text
    assert "The first token is 2.00 times as fast." in text
    assert "Nothing measurable was lost: perplexity is 1.005" in text
    assert "float32 40 20.0 100.0 100.0 200 – 240" in text  # tokens, p50, p95, p99, TTFT from least to most
    assert "bundle 40 10.0 50.0 50.0 100 – 120" in text
    for part in page.manifest["weights"]["parts"]:
        assert f"{part['bytes'] / 1e6:,.1f}" in text


def test_what_comes_from_elsewhere_is_text(page: Page) -> None:
    manifest = copy.deepcopy(page.manifest) | {"name": "<script>alert(1)</script>"}
    html = render(dataclasses.replace(page, manifest=manifest))
    assert "<script>" not in html
    assert "<b>CPU" not in html
    text = "".join(parsed(html).text)
    assert "<script>alert(1)</script> for cpu" in text
    assert "all < nothing & more" in text


def test_a_broken_budget_is_said_with_the_verdict(page: Page) -> None:
    html = render(dataclasses.replace(page, over_budget=("over budget: TTFT in ms is 110.000",)))
    assert 'class="verdict over"' in html
    assert "over budget: TTFT in ms is 110.000" in html


@pytest.mark.parametrize(
    ("scale", "perplexity", "words"),
    [
        (4, 25.0, ["0.5 times smaller", "Decoding takes 2.00 times as long.", "Perplexity is +25.0 %."]),
        (2, 19.0, ["1.0 times smaller", "Nothing measurable was lost"]),
    ],
)
def test_a_verdict_does_not_flatter(scale: float, perplexity: float, words: list[str]) -> None:
    said = " ".join(verdict({"baseline": figures_of(2, 20.0), "bundle": figures_of(scale, perplexity)}))
    assert all(word in said for word in words), said


def test_without_a_baseline_nothing_is_compared(page: Page) -> None:
    alone = dataclasses.replace(page, figures={**page.figures, "baseline": None})
    text = " ".join("".join(parsed(render(alone)).text).split())
    assert "No float32 baseline was built" in text
    assert "times smaller" not in text


def test_histograms_hold_every_sample() -> None:
    """Heights are in proportion to counts, and both sides share an axis."""
    before, after = figures_of(2, 20.0), figures_of(1, 20.0)
    drawn = histograms(before, after)
    assert [series["name"] for series in drawn["series"]] == ["float32", "bundle"]
    assert float(drawn["end_ms"]) == np.percentile(token_times(before), 99)
    for series in drawn["series"]:
        heights = sorted(bar[3] for bar in series["bars"])
        assert heights == pytest.approx([120 / 9, 120], abs=0.1)
        assert all(x >= 0 and x + width <= 640 and y + height <= 120.1 for x, y, width, height in series["bars"])


def test_shares_of_bytes_sum_to_the_whole(page: Page) -> None:
    parts = byte_parts(page.manifest["weights"]["parts"])
    assert sum(part["share"] for part in parts) == pytest.approx(100, abs=0.1)
    assert [part["bytes"] for part in parts] == sorted((part["bytes"] for part in parts), reverse=True)
