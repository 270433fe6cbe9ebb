"""The report of one run as a page: one HTML file that needs no network, no script and no other file.

Verdict first, then before and after, how the latencies are spread, where the bytes are, how it was made, on what. Every
figure comes from the run's record (`run.json`) and the bundle's manifest; charts are drawn from the raw samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import chain

import jinja2
import numpy as np

from edgepipe.artifacts import Json, StageRecord
from edgepipe.report.terminal import measured_rows

_BINS = 40
_CHART_WIDTH, _CHART_HEIGHT = 640, 120  # units of the drawing; it scales with the page
_TAIL = 99.0  # percentile at which the histogram ends: one stall would squeeze everything else into one bar
_NO_WORSE = 1.01  # perplexity ratio up to which the verdict says that nothing was lost


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Hold what a page is made of."""

    figures: Json  # of the stage `measure`: bundle, baseline, text, machine
    manifest: Json
    recipe: Json
    history: tuple[StageRecord, ...]
    over_budget: tuple[str, ...] = ()


def render(page: Page) -> str:
    """Return the page as HTML."""
    template = (resources.files("edgepipe.report") / "page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    after, before = page.figures["bundle"], page.figures["baseline"]
    return environment.from_string(template).render(
        page=page,
        manifest=page.manifest,
        verdict=verdict(page.figures),
        rows=measured_rows(page.figures),
        spread=[spread(name, one) for name, one in (("float32", before), ("bundle", after)) if one is not None],
        histograms=histograms(before, after),
        width=_CHART_WIDTH,
        height=_CHART_HEIGHT,
        parts=byte_parts(page.manifest["weights"]["parts"]),
        samples=sum(len(block["ttft_ms"]) for block in after["samples"]),
    )


def verdict(figures: Json) -> list[str]:
    """Say in short sentences what was won and what was lost, the float32 model beside it where there is one."""
    after, before = figures["bundle"], figures["baseline"]
    if before is None:
        return [
            f"{after['bundle_bytes'] / 1e6:,.1f} MB, {after['tokens_per_second']:,.1f} tokens/s. "
            "No float32 baseline was built, so nothing is compared."
        ]
    quality = after["perplexity"] / before["perplexity"]
    lost = f"Perplexity is {100 * (quality - 1):+.1f} %."
    if quality <= _NO_WORSE:
        lost = f"Nothing measurable was lost: perplexity is {quality:.3f} of the float32 model's."
    return [
        f"{before['bundle_bytes'] / after['bundle_bytes']:.1f} times smaller: "
        f"{before['bundle_bytes'] / 1e6:,.0f} MB became {after['bundle_bytes'] / 1e6:,.1f} MB.",
        _faster("Decoding", before["token_ms"] / after["token_ms"]),
        _faster("The first token", before["ttft_ms"] / after["ttft_ms"]),
        lost,
    ]


def _faster(what: str, ratio: float) -> str:
    if ratio >= 1:
        return f"{what} is {ratio:.2f} times as fast."
    return f"{what} takes {1 / ratio:.2f} times as long."


def token_times(one: Json) -> np.ndarray:
    """Return all raw times per output token of a bundle, ms."""
    times = chain.from_iterable(prompt for block in one["samples"] for prompt in block["token_ms"])
    return np.array(list(times), np.float64)


def spread(name: str, one: Json) -> Json:
    """Return the percentiles a reader asks for."""
    times = token_times(one)
    ttft = [time for block in one["samples"] for time in block["ttft_ms"]]
    p50, p95, p99 = np.percentile(times, (50, 95, 99))
    return {
        "name": name,
        "tokens": len(times),
        "p50": f"{p50:.1f}",
        "p95": f"{p95:.1f}",
        "p99": f"{p99:.1f}",
        "ttft": f"{min(ttft):.0f} – {max(ttft):.0f}",
    }


def histograms(before: Json | None, after: Json) -> Json:
    """Lay out histograms of the time per output token on one axis from 0; bars are (x, y, width, height)."""
    series = [("float32", before), ("bundle", after)]
    times = [(name, token_times(one)) for name, one in series if one is not None]
    end = max(float(np.percentile(values, _TAIL)) for _, values in times)
    drawn = []
    for name, values in times:
        counts, _ = np.histogram(np.minimum(values, end), bins=_BINS, range=(0, end))
        step = _CHART_WIDTH / _BINS
        heights = _CHART_HEIGHT * counts / counts.max()
        bars = [
            (round(i * step + 1, 1), round(_CHART_HEIGHT - h, 1), round(step - 2, 1), round(float(h), 1))
            for i, h in enumerate(heights)
            if h > 0
        ]
        drawn.append({"name": name, "bars": bars})
    return {"series": drawn, "end_ms": f"{end:.0f}"}


def byte_parts(parts: Sequence[Json]) -> list[Json]:
    """Return the weights by part and storage, the largest first, with their share of the bytes in percent."""
    total = sum(part["bytes"] for part in parts)
    largest_first = sorted(parts, key=lambda part: -part["bytes"])
    return [{**part, "share": round(100 * part["bytes"] / total, 2)} for part in largest_first]
