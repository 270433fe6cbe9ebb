"""Tables and numbers for people: plain columns, right-aligned figures, units in the header."""

from __future__ import annotations

from collections.abc import Sequence

from edgepipe.artifacts import Json
from edgepipe.report.rows import MISSING, cells, measured_rows
from edgepipe.report.sentences import intervals, limit_sentences, spread_note

_QUESTIONS = {  # what a new bundle may be asked, by its task; others read no text, or answer with arrays
    "text-generation": "What is the capital of France?",
    "text2text-generation": "A text to answer.",
    "feature-extraction": "A text to embed.",
    "text-classification": "A text to classify.",
}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows under a header; columns after the first are right-aligned unless they hold words."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    numeric = [i > 0 and all(_is_figure(r[i]) for r in rows) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("─" * w for w in widths))
    return "\n".join(lines)


def megabytes(nbytes: float) -> str:
    """Write bytes as megabytes (10^6), one decimal."""
    return f"{nbytes / 1e6:,.1f}"


def measured_table(figures: Json, baseline: str = "float32") -> str:
    """Lay out baseline and bundle side by side, one figure a row, what changed, and below it what limits.

    `baseline` names the first; an empty name leaves it out.
    """
    rows = [cells(row) for row in measured_rows(figures)]
    if baseline:
        laid_out = table(["", baseline, "bundle", "ratio"], rows)
    else:
        laid_out = table(["", "bundle"], [[title, after] for title, _, after, _ in rows])
    return "\n".join([laid_out, *measured_notes(figures)])


def measured_notes(figures: Json) -> list[str]:
    """Return sentences below the table: how sure the times are, and what limits them."""
    return [*intervals(figures), *limit_sentences(figures["bundle"]), *spread_note(figures)]


def evaluated_table(found: Json) -> str:
    """Lay out what `edgepipe eval` found: a figure a row, with its 95 % interval."""
    other, metric = found["against"], found["metric"]
    rows = [_estimate_row(f"{metric}, {found['count']} {found['over']}", found)]
    if other is not None and "value" in other:
        rows.append(_estimate_row("the other bundle", other))
        verdict = other["difference"]["verdict"]
        rows.append(_estimate_row("difference" + (f": {verdict}" if verdict else ""), other["difference"]))
    for name, detail in found["details"].items():
        title = name.replace("_", " ")
        if isinstance(detail, dict) and "interval" in detail:
            rows.append(_estimate_row(title, detail))
        elif isinstance(detail, int | float):
            rows.append([title, f"{detail:,}" if isinstance(detail, int) else f"{detail:,.5g}", ""])
    said = [f"{name}: {detail}" for name, detail in found["details"].items() if isinstance(detail, str)]
    return "\n".join([table(["", "value", "95 % interval"], rows), *said])


def _estimate_row(title: str, found: Json) -> list[str]:
    interval = found["interval"]
    between = MISSING if interval is None else f"{interval[0]:,.5g} to {interval[1]:,.5g}"
    return [title, f"{found['value']:,.5g}", between]


def _is_figure(cell: str) -> bool:
    return cell == MISSING or not cell or cell[0].isdigit() or cell[0] in "+-−"


def finished_lines(summary: Json) -> list[str]:
    """Return what a person is told when a bundle is there: figures, where it is, how to try it, what it replaced."""
    lines = [f"\n{measured_table(summary['figures'])}\n"] if "figures" in summary else []
    bundle, question = summary["bundle"], _QUESTIONS.get(summary["task"])
    where = "there" if "not_measured" in summary else "try it"
    lines.append(f"bundle: {bundle}" + (f'    {where}: edgepipe run {bundle} "{question}"' if question else ""))
    if "not_measured" in summary:
        lines.append(f"not measured: {summary['not_measured']}; `edgepipe measure` does it there")
    if summary["replaced"]:
        lines.append("It replaced the earlier bundle there, which was another one; --out keeps several.")
    lines += [f"{path} beside it is of an earlier run; --keep-both replaces it" for path in summary["left_beside"]]
    if "engines" in summary:
        lines.append(f"engine: {summary['engines']['why']}")
    if "report" in summary:
        lines.append(f"report: {summary['report']}")
    return lines
