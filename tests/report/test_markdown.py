"""Markdown: GitHub reads its tables, and nothing of a model's becomes markup."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from edgepipe.report.gather import gather
from edgepipe.report.markdown import escape, render_markdown
from edgepipe.report.record import Report
from edgepipe.report.sections import bundle_sections


def tables(text: str) -> list[list[list[str]]]:
    """Return the tables of a Markdown text: rows of cells, the rule left out."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        assert all(re.fullmatch(r"-{2,}[-:]", cell) for cell in rows[1])
        found.append([rows[0], *rows[2:]])
    return found


def test_tables_are_the_sections(run: Path, encoder_run: Path, tiny_bundle: Path) -> None:
    for path in (run, encoder_run, tiny_bundle):
        report = gather([path])
        expected = [s.table for s in bundle_sections(report.bundles[0]) if s.table is not None]
        found = tables(render_markdown(report))
        assert len(found) == len(expected)
        for rows, table in zip(found, expected, strict=True):
            assert all(len(row) == len(table.header) for row in rows)
            assert [re.sub(r"\\(.)", r"\1", row[1]) for row in rows[1:]] == [row[1].strip() for row in table.rows]


def test_the_verdict_stands_below_the_title(run: Path) -> None:
    report = gather([run])
    lines = [line for line in render_markdown(report).splitlines() if line]
    assert lines[0] == "# tiny-llama for cpu"
    assert lines[1 : 1 + len(report.bundles[0].verdict)] == [escape(s) for s in report.bundles[0].verdict]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", r"a\|b"),
        ("<img src=x>", r"\<img src=x\>"),
        ("*bold* _soft_ `code`", r"\*bold\* \_soft\_ \`code\`"),
        ("q4 Q4_1", "q4 Q4_1"),
        ("see [link](place)", r"see [link\](place)"),
        ("[name]: place", r"\[name]: place"),
        ("once [0.95, 1.05]: twice", "once [0.95, 1.05]: twice"),
        ("two\nlines\t here", "two lines here"),
        ("# no heading", r"\# no heading"),
    ],
)
def test_markup_is_escaped(text: str, shown: str) -> None:
    assert escape(text) == shown


def test_a_name_can_t_leave_its_cell(run: Path) -> None:
    report = gather([run])
    hostile = "a | b\n\n# c <b>"
    parts = tuple({**part, "part": hostile} for part in report.bundles[0].parts)
    one = dataclasses.replace(report.bundles[0], parts=parts, remarks=("`edgepipe measure <b>|`",), name=hostile)
    text = render_markdown(Report(bundles=(one,)))
    assert re.search(r"(?<!\\)<b", text) is None
    assert sum(line.startswith("# ") for line in text.splitlines()) == 1
    assert all(len({len(row) for row in rows}) == 1 for rows in tables(text))
