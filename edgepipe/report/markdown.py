"""The report as Markdown: GitHub's tables, with cells padded so that it reads well as plain text too."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from edgepipe.report.record import BundleReport, Report
from edgepipe.report.sections import Section, Table, bundle_sections, comparison_section

# What Markdown, or the HTML in it, would take as its own: names come from models. An underscore inside a word and a
# bracket that begins no link are text anyway, and read better as they are.
_SPECIAL = re.compile(r"([\\`*<>|~#&]|(?<!\w)_|_(?!\w)|\](?=[(\[])|^\[)")
_OURS = re.compile(r"(`edgepipe [^`|<>]*`)")  # a command that a sentence of ours names


def render_markdown(report: Report) -> str:
    """Return the report as Markdown."""
    lines = [f"# {escape(report.title)}", ""]
    if report.comparison is None:
        lines += _bundle(report.bundles[0], "##")
    else:
        lines += _sentences(report.comparison.verdict)
        lines += _section(comparison_section(report.comparison), "##")
        for one in report.bundles:
            lines += [f"## {escape(one.label)}", "", *_bundle(one, "###")]
    return "\n".join(lines).rstrip() + "\n"


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _bundle(one: BundleReport, heading: str) -> Iterator[str]:
    yield from _sentences(one.verdict)
    for sentence in one.over_budget:
        yield from (f"**{escape(sentence)}**", "")
    yield from _sentences(one.remarks)
    for section in bundle_sections(one):
        yield from _section(section, heading)


def _section(section: Section, heading: str) -> Iterator[str]:
    yield from (f"{heading} {escape(section.title)}", "")
    if section.table is not None:
        yield from (*_table(section.table), "")
    yield from _sentences(section.sentences)


def _sentences(sentences: Iterable[str]) -> Iterator[str]:
    for sentence in sentences:
        parts = _OURS.split(sentence)
        yield from ("".join(part if _OURS.fullmatch(part) else _keep_ends(part) for part in parts), "")


def _keep_ends(part: str) -> str:
    """Escape a part of a sentence, the spaces at its ends kept."""
    return _SPECIAL.sub(r"\\\1", re.sub(r"\s+", " ", part))


def _table(table: Table) -> list[str]:
    """Lay out a table; details of the row above are indented by two spaces that Markdown keeps."""
    right = [i > 0 and i not in table.words for i in range(len(table.header))]
    lines = [[_cell(cell) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(right))]
    rule = [f"{'-' * (w - 1)}:" if r else "-" * w for w, r in zip(widths, right, strict=True)]
    padded = [
        [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)]
        for line in lines
    ]
    return [f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:])]


def _cell(cell: str) -> str:
    return ("\N{NO-BREAK SPACE}" * 2 if cell.startswith("  ") else "") + escape(cell)
