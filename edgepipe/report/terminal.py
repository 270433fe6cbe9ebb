"""Tables and numbers for people: plain columns, right-aligned figures, units in the header."""

from __future__ import annotations

from collections.abc import Sequence

from edgepipe.artifacts import Json
from edgepipe.measuring.calls import call_name

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
    """Lay out baseline and bundle side by side, one figure a row, what changed, and below it what limits.

    `baseline` names the first; an empty name leaves it out.
    """
    rows = measured_rows(figures)
    if baseline:
        laid_out = table(["", baseline, "bundle", "ratio"], rows)
    else:
        laid_out = table(["", "bundle"], [[title, after] for title, _, after, _ in rows])
    return "\n".join([laid_out, *measured_notes(figures)])


def measured_rows(figures: Json) -> list[list[str]]:
    """Return what was measured as rows: title, baseline, bundle, ratio. A star marks figures that spread too much."""
    before, after = figures["baseline"], figures["bundle"]
    ratios = figures["ratios"] or {}
    flagged = {name for one in (before, after) if one is not None for name in one["flagged"]}
    times = _call_rows if "calls" in after else _token_rows
    rows = [
        _row("bundle, MB", before, after, "bundle_bytes", 1e-6, 1),
        _row("bits per weight", before, after, "bits_per_weight", 1, 2),
        *times(before, after, ratios, flagged),
        _row("load, ms", before, after, "load_ms", 1, 0),
        _row("peak memory, MB", before, after, "memory_peak_bytes", 1e-6, 0),
        _row("  after loading, MB", before, after, "memory_after_load_bytes", 1e-6, 0),
        _row("  without the model, MB", before, after, "memory_without_model_bytes", 1e-6, 0),
    ]
    if after["cache_bytes"] is not None:
        rows.append(_row("KV cache when full, MB", before, after, "cache_bytes", 1e-6, 1))
    if "perplexity" in after:
        rows.append(_row(f"perplexity ({after['perplexity_tokens']} tokens)", before, after, "perplexity", 1, 3))
    return rows


def _token_rows(before: Json | None, after: Json, ratios: Json, flagged: set[str]) -> list[list[str]]:
    """Return the rows of a bundle that generates."""
    return [
        *_ttft_rows(before, after, ratios, flagged),
        _judged("time per output token, ms", before, after, "token_ms", 1, ratios, flagged),
        _row("  95th percentile, ms", before, after, "token_ms_p95", 1, 1),
        _row("  99th percentile, ms", before, after, "token_ms_p99", 1, 1),
        _row("tokens/s", before, after, "tokens_per_second", 1, 1),
        _row("cold start to first token, ms", before, after, "cold_start_ms", 1, 0),
    ]


def _call_rows(before: Json | None, after: Json, ratios: Json, flagged: set[str]) -> list[list[str]]:
    """Return the rows of a bundle that embeds or classifies: a call of each shape."""
    rows = []
    for number, one in enumerate(after["calls"]):
        name = call_name(one["batch"], one["tokens"])
        of = f" of {one['tokens']} tokens" if one["tokens"] else ""
        title = f"call, {one['batch']} at a time{of}, ms" + (" *" if name in flagged else "")
        row = _row(title, before and before["calls"][number], one, "ms", 1, 1)
        rows.append(_with_ratio(row, ratios.get(name)))
        if number + 1 == len(after["calls"]):
            rows.append(_row("  a second", before and before["calls"][number], one, "per_second", 1, 1))
    return [*rows, _row("cold start to first call, ms", before, after, "cold_start_ms", 1, 0)]


def measured_notes(figures: Json) -> list[str]:
    """Return sentences below the table: how sure the times are, and what limits them."""
    after = figures["bundle"]
    notes = [f"95 % intervals: {', '.join(_spoken_intervals(after['intervals']))}."]
    limits = after.get("limits", {})
    for title, limit in _limit_rows(limits):
        by = limit["limited_by"]
        notes.append(
            f"{title} reads {megabytes(limit['bytes'])} MB, {limit['read_ms']:.1f} ms at "
            f"{limits['read_bytes_per_second'] / 1e9:.0f} GB/s, and has {limit['multiply_adds'] / 1e6:,.0f} M "
            f"multiply-adds, {limit['compute_ms']:.1f} ms at {limits['multiply_adds_per_second'] / 1e9:.0f} G/s "
            f"({limits['precision']}): {limit['share']:.0%} of the time it took; {by} limits it."
        )
    if any(one is not None and one["flagged"] for one in (figures["baseline"], after)):
        notes.append("* spread over more than 10 % of the median: other work on the machine, or a changing clock.")
    return notes


def _spoken_intervals(intervals: Json) -> list[str]:
    titles = {"token_ms": "time per output token", "ttft_ms": "TTFT"}
    return [
        f"{titles.get(name, f'a call of {name}')} {found['low']:.1f} to {found['high']:.1f} ms"
        for name, found in intervals.items()
    ]


def _limit_rows(limits: Json) -> list[tuple[str, Json]]:
    """Return what has a limit, as a sentence begins with it."""
    titles = {"token": "An output token", "prefill": "The prompt's first step"}
    rows = [(title, limits[name]) for name, title in titles.items() if name in limits]
    return rows + [(f"A call of {name}", limit) for name, limit in limits.get("calls", {}).items()]


def _ttft_rows(before: Json | None, after: Json, ratios: Json, flagged: set[str]) -> list[list[str]]:
    """Return a row for every prompt length; the middle one is the headline, and has an interval beside its ratio."""
    rows = []
    for number, one in enumerate(after["ttft"]):
        title = f"TTFT at {one['prompt_tokens']} tokens, ms"
        if one["prompt_tokens"] == after["prompt_tokens"]:
            rows.append(_judged(title, before, after, "ttft_ms", 0, ratios, flagged))
        else:
            rows.append(_row(title, before and before["ttft"][number], one, "ttft_ms", 1, 0))
    return rows


def _judged(
    title: str, before: Json | None, after: Json, key: str, digits: int, ratios: Json, flagged: set[str]
) -> list[str]:
    """Return the row of a time whose ratio was judged."""
    row = _row(title + (" *" if key in flagged else ""), before, after, key, 1, digits)
    return _with_ratio(row, ratios.get(key))


def _with_ratio(row: list[str], found: Json | None) -> list[str]:
    """Return a row whose last cell is a ratio that was judged, where there is one."""
    if found is None:
        return row
    tie = ", a tie" if found["verdict"] == "tie" else ""
    return [*row[:-1], f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]{tie}"]


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
