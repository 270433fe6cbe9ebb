"""The page: it stands alone, says the figures of the record, and lets nothing of the model's become markup."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from edgepipe.report.gather import gather
from edgepipe.report.page import histograms, render_page, unbroken
from edgepipe.report.record import Report
from edgepipe.report.rows import cells
from edgepipe.report.sections import bundle_sections
from tests.report.conftest import as_older

HOSTILE = '<script>alert(1)</script> & "quotes" `ticks` | pipes'


class _Checker(HTMLParser):
    """Collect text, tags and attributes, and check that tags are closed."""

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

    @property
    def said(self) -> str:
        """Return the text with single spaces."""
        return " ".join(" ".join(self.text).split())


def parsed(html: str) -> _Checker:
    """Read a page to its end."""
    checker = _Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker


def spaced(text: str) -> str:
    """Return text as a parsed page has it: single spaces, code marks become code of its own."""
    return " ".join(text.replace("`", " ").split())


@pytest.fixture
def reports(run: Path, encoder_run: Path, tiny_bundle: Path) -> list[Report]:
    """Report on a decoder, an encoder, a bundle without figures, and on all side by side."""
    return [gather([run]), gather([encoder_run]), gather([tiny_bundle]), gather([run, encoder_run, tiny_bundle])]


def test_pages_need_nothing_else(reports: list[Report]) -> None:
    """No script, no link, no source: a page can be mailed, and says so to the browser as well."""
    for report in reports:
        html = render_page(report)
        seen = parsed(html).seen
        assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in seen}
        assert not any({"src", "href", "srcset", "onload", "onclick"} & set(attributes) for _, attributes in seen)
        assert "url(" not in html
        assert "@import" not in html
        assert "http" not in re.sub(r"http-equiv", "", html)
        assert "default-src 'none'" in html
        assert "prefers-color-scheme: dark" in html
        assert 'name="viewport"' in html


def test_the_verdict_comes_first(reports: list[Report]) -> None:
    for report in reports:
        text = parsed(render_page(report)).said
        one = report.bundles[0]
        first = text.index(spaced(one.verdict[0]))
        assert first < min(text.index(section.title) for section in bundle_sections(one))


def test_every_figure_of_the_record_is_shown(reports: list[Report]) -> None:
    """Rows, cells of every section and sentences stand on the page, as the terminal and Markdown have them."""
    for report in reports:
        text = parsed(render_page(report)).said
        for one in report.bundles:
            for section in bundle_sections(one):
                assert section.title in text
                assert all(spaced(sentence) in text for sentence in section.sentences)
                for row in section.table.rows if section.table is not None else ():
                    assert spaced(" ".join(row)) in text, row
            for row in one.rows:
                assert spaced(cells(row)[0]) in text


def test_sections_are_those_of_the_task(reports: list[Report]) -> None:
    decoder, encoder, unmeasured, _ = ({s.key for s in bundle_sections(r.bundles[0])} for r in reports)
    assert decoder == {"rows", "ttft", "latency", "limits", "start", "parts", "stages", "machine"}
    assert encoder == {"rows", "calls", "limits", "start", "parts", "stages", "machine"}
    assert unmeasured == {"rows", "parts", "stages"}


def test_what_an_older_version_measured_still_has_a_page(change_run: Callable[..., Path]) -> None:
    report = gather([change_run(as_older)])
    one = report.bundles[0]
    assert {s.key for s in bundle_sections(one)} == {"rows", "latency", "parts", "stages", "machine"}
    assert one.verdict[1].startswith("Decoding ")
    assert "[" not in " ".join(one.verdict)  # nothing was judged then
    text = parsed(render_page(report)).said
    assert "Time per output token" in text


def test_what_comes_from_elsewhere_is_text(run: Path) -> None:
    report = gather([run])
    one = dataclasses.replace(
        report.bundles[0],
        name=HOSTILE,
        label=HOSTILE,
        parts=tuple({**part, "part": HOSTILE} for part in report.bundles[0].parts),
        stages=({"stage": HOSTILE, "options": {HOSTILE: HOSTILE}, "notes": [HOSTILE]},),
        source={"model": HOSTILE, "licence": HOSTILE, "lineage": [HOSTILE]},
    )
    html = render_page(Report(bundles=(one,)))
    assert "<script>" not in html
    assert parsed(html).said.count("<script>alert(1)</script>") >= 6


def test_commands_in_sentences_are_code(tiny_bundle: Path) -> None:
    assert f"<code>edgepipe measure {tiny_bundle}</code>" in render_page(gather([tiny_bundle]))


def test_intervals_stay_on_one_line() -> None:
    kept = "\N{NO-BREAK SPACE}"
    assert unbroken("1.24 [0.95, 1.30], a tie") == f"1.24 [0.95,{kept}1.30],{kept}a{kept}tie"
    assert unbroken("1,639 *") == f"1,639{kept}*"


def test_a_broken_budget_is_said_with_the_verdict(change_run: Callable[..., Path]) -> None:
    def edit(record: dict[str, Any]) -> None:
        record["budgets"]["ttft_ms"] = 1e-9

    html = render_page(gather([change_run(edit)]))
    assert 'class="verdict over"' in html
    assert "over budget: TTFT in ms is" in parsed(html).said


def test_histograms_hold_every_sample(run: Path) -> None:
    """Heights are in proportion to counts, sides share an axis, and what is drawn is what was measured."""
    latency = gather([run]).bundles[0].latency
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))["figures"]
    assert [one.side for one in latency] == ["float32", "bundle"]
    assert len({one.end_ms for one in latency}) == 1
    for one, drawn in zip(latency, histograms(latency), strict=True):
        taken = record["baseline" if one.side == "float32" else "bundle"]["samples"]
        assert sum(one.counts) == one.samples == sum(len(turn) for block in taken for turn in block["token_ms"])
        filled = [count for count in one.counts if count]
        assert [bar[3] for bar in drawn["bars"]] == pytest.approx([120 * c / max(filled) for c in filled], abs=0.06)
        assert all(x >= 0 and x + width <= 640 and y + height <= 120.1 for x, y, width, height in drawn["bars"])


def test_shares_of_bytes_sum_to_the_whole(run: Path) -> None:
    parts = gather([run]).bundles[0].parts
    assert sum(part["share"] for part in parts) == pytest.approx(1)
    assert [part["bytes"] for part in parts] == sorted((part["bytes"] for part in parts), reverse=True)
