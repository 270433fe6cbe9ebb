"""The report as a page: one HTML file that needs no network, no script and no other file; charts are drawn in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources

import jinja2

from edgepipe.artifacts import Json
from edgepipe.report.curves import loss_curves
from edgepipe.report.plans import frontier_drawing
from edgepipe.report.record import BundleReport, Latency, Report
from edgepipe.report.sections import bundle_sections, comparison_section
from edgepipe.report.sentences import limit_title

_TOGETHER = re.compile(r"\[[^\]]*\]|, a tie| \*$")
_CHART_WIDTH, _CHART_HEIGHT = 640, 120  # units of the drawing; it scales with the page
_CURVE_HEIGHT = 240


def render_page(report: Report) -> str:
    """Return the report as HTML."""
    template = (resources.files("edgepipe.report") / "page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["unbroken"] = unbroken
    return environment.from_string(template).render(
        report=report,
        comparison=None if report.comparison is None else comparison_section(report.comparison),
        bundles=[(one, list(bundle_sections(one)), _drawn(one)) for one in report.bundles],
        width=_CHART_WIDTH,
        height=_CHART_HEIGHT,
        curve_height=_CURVE_HEIGHT,
    )


def _drawn(one: BundleReport) -> Json:
    """Lay out everything that is drawn of one bundle, by the key of its section."""
    return {
        "latency": histograms(one.latency),
        "limits": limit_bars(one),
        "training": loss_curves(one.training, _CHART_WIDTH, _CURVE_HEIGHT),
        "search": None if one.search is None else frontier_drawing(one.search, _CHART_WIDTH, _CURVE_HEIGHT),
    }


def unbroken(cell: str) -> str:
    """Return a figure whose interval, verdict and star stay on one line where its cell has to break."""
    return _TOGETHER.sub(lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), cell)


def histograms(latency: Sequence[Latency]) -> list[Json]:
    """Lay out histograms of the time per output token on one axis from 0; bars are (x, y, width, height)."""
    drawn = []
    for one in latency:
        step = _CHART_WIDTH / len(one.counts)
        heights = [_CHART_HEIGHT * count / max(one.counts) for count in one.counts]
        bars = [
            (round(i * step + 1, 1), round(_CHART_HEIGHT - height, 1), round(step - 2, 1), round(height, 1))
            for i, height in enumerate(heights)
            if height > 0
        ]
        drawn.append({"side": one.side, "bars": bars, "end_ms": f"{one.end_ms:,.0f}"})
    return drawn


def limit_bars(one: BundleReport) -> list[Json]:
    """Lay out, for the bundle's own limits, how much of the measured time the limit explains, in percent."""
    return [
        {
            "title": limit_title(limit.figure),
            "share": round(100 * min(1.0, limit.share), 1),
            "said": f"{limit.share:.0%}",
        }
        for limit in one.limits
        if limit.side == "bundle"
    ]
