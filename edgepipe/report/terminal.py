"""Tables and numbers for people: plain columns, right-aligned figures, units in the header."""

from __future__ import annotations

from collections.abc import Sequence

from edgepipe.artifacts import Json

_MISSING = "–"


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
    """Lay out baseline and bundle side by side, one figure a row, and what changed.

    `baseline` names the first; an empty name leaves it out.
    """
    rows = measured_rows(figures)
    if not baseline:
        return table(["", "bundle"], [[title, after] for title, _, after, _ in rows])
    return table(["", baseline, "bundle", "ratio"], rows)


def measured_rows(figures: Json) -> list[list[str]]:
    """Return what was measured as rows: title, baseline, bundle, ratio."""
    before, after = figures["baseline"], figures["bundle"]
    return [
        _row("bundle, MB", before, after, "bundle_bytes", 1e-6, 1),
        _row("bits per weight", before, after, "bits_per_weight", 1, 2),
        _row(f"TTFT at {after['prompt_tokens']} tokens, ms", before, after, "ttft_ms", 1, 0),
        _row("time per output token, ms", before, after, "token_ms", 1, 1),
        _row("tokens/s", before, after, "tokens_per_second", 1, 1),
        _row("load, ms", before, after, "load_ms", 1, 0),
        _row("peak memory, MB", before, after, "memory_peak_bytes", 1e-6, 0),
        _row("KV cache when full, MB", before, after, "cache_bytes", 1e-6, 1),
        _row(f"perplexity ({after['perplexity_tokens']} tokens)", before, after, "perplexity", 1, 3),
    ]


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
    between = _MISSING if interval is None else f"{interval[0]:,.5g} to {interval[1]:,.5g}"
    return [title, f"{found['value']:,.5g}", between]


def _row(title: str, before: Json | None, after: Json, key: str, factor: float, digits: int) -> list[str]:
    new = after[key] * factor
    if before is None:
        return [title, _MISSING, f"{new:,.{digits}f}", _MISSING]
    old = before[key] * factor
    return [title, f"{old:,.{digits}f}", f"{new:,.{digits}f}", f"{new / old:.3f}"]


def _is_figure(cell: str) -> bool:
    return cell == _MISSING or not cell or cell[0].isdigit() or cell[0] in "+-−"
