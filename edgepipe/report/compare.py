"""Several bundles side by side: every figure in a column each, and what may be concluded.

Only bundles that were measured in turn, in one measurement, get a ratio with an interval and a verdict. Others were
measured at different times: their times stand beside each other also in units of the speed index that ran beside them,
which is what stays alike when one machine is faster or slower than before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from edgepipe.artifacts import Json
from edgepipe.report.record import ComparedRow, Comparison, Material
from edgepipe.report.rows import Row, between, in_order, measured_rows, show, static_figures
from edgepipe.report.sentences import SPREAD, time_title

_MACHINE = ("cpu", "cores", "threads", "system", "versions")


def compare(materials: Sequence[Material]) -> Comparison:
    """Return the figures of several bundles side by side, and sentences on what may be compared."""
    sides = [measured_rows({"bundle": _side(one)}) for one in materials]
    rows = [*_measured(sides), *_per_index(materials)]
    return Comparison(
        labels=tuple(m.label for m in materials),
        rows=tuple(rows),
        verdict=tuple(_verdicts(materials)),
        notes=tuple(_notes(materials, rows)),
    )


def compared_cells(row: ComparedRow) -> list[str]:
    """Return the values of a row as they are shown, with intervals where there are any."""
    shown = []
    for value, low, high, flagged in zip(row.values, row.lows, row.highs, row.flagged, strict=True):
        interval = "" if low is None or high is None else f" {between(low, high, row.digits)}"
        shown.append(show(value, row.unit, row.digits) + interval + (" *" if flagged else ""))
    return shown


def _side(material: Material) -> Json:
    if material.figures is None:
        return static_figures(material.manifest, material.manifest_bytes)
    return dict(material.figures["bundle"])


def _measured(sides: Sequence[Sequence[Row]]) -> Iterator[ComparedRow]:
    """Yield every figure that any bundle has; where titles differ (tokens of a perplexity), the plain one is shown."""
    by_key = [{row.key: row for row in rows} for rows in sides]
    order: dict[str, Row] = {}
    for rows in sides:
        order |= {row.key: row for row in rows if row.key not in order}
    for key in _merged([[row.key for row in rows] for rows in sides]):
        found = [rows.get(key) for rows in by_key]
        titles = {row.title for row in found if row is not None}
        yield ComparedRow(
            key=key,
            title=titles.pop() if len(titles) == 1 else order[key].title.partition(" (")[0],
            unit=order[key].unit,
            digits=order[key].digits,
            values=tuple(None if row is None else row.bundle for row in found),
            lows=(None,) * len(sides),
            highs=(None,) * len(sides),
            flagged=tuple(row is not None and row.flagged for row in found),
            detail=order[key].detail,
        )


def _merged(lists: Sequence[Sequence[str]]) -> list[str]:
    """Merge lists of keys: each new key stands behind the one before it in its own list."""
    merged: list[str] = []
    for keys in lists:
        at = 0
        for key in keys:
            if key not in merged:
                merged.insert(at, key)
            at = merged.index(key) + 1
    return merged


def _per_index(materials: Sequence[Material]) -> Iterator[ComparedRow]:
    indexed = [_side(material).get("per_index") or {} for material in materials]
    for key in _merged([in_order(_side(m), one) for m, one in zip(materials, indexed, strict=True)]):
        found = [one.get(key) or {} for one in indexed]
        yield ComparedRow(
            key=f"{key}_per_index",
            title=f"{time_title(key)} ÷ index",
            unit="",
            digits=_digits([one["high"] for one in found if one]),
            values=tuple(one.get("value") for one in found),
            lows=tuple(one.get("low") for one in found),
            highs=tuple(one.get("high") for one in found),
            flagged=(False,) * len(found),
            detail=False,
        )


def _digits(values: Sequence[float]) -> int:
    """Return digits after the point that leave about four in all: an index may be far above or below a time."""
    return max(0, 3 - len(str(int(max(values)))) + (max(values) < 1))


def _verdicts(materials: Sequence[Material]) -> Iterator[str]:
    """Yield what is known of every pair: a judged ratio, or once for all others why there is none."""
    apart = []
    for first, second in combinations(materials, 2):
        if first.figures is None or second.figures is None:
            continue
        judged = _judged(first, second) or _judged(second, first)
        yield from judged
        if not judged:
            apart.append((first.figures, second.figures))
    if apart:
        yield _apart(apart)


def _notes(materials: Sequence[Material], rows: Sequence[ComparedRow]) -> Iterator[str]:
    """Yield what to mind when the table is read."""
    texts = {(m.figures.get("text"), _side(m).get("perplexity_tokens")) for m in materials if m.figures is not None}
    if len({text for text in texts if text[1] is not None}) > 1:
        yield "Perplexities were taken over other texts or other tokens: they can't be compared."
    if any(any(row.flagged) for row in rows):
        yield SPREAD


def _judged(ours: Material, theirs: Material) -> list[str]:
    """Return sentences on two bundles that were measured in turn, if `ours` was, with `theirs` as its baseline."""
    figures = ours.figures or {}
    baseline = figures.get("baseline") or {}
    if baseline.get("manifest_sha256") != theirs.manifest_sha256 or not figures.get("ratios"):
        return []
    return [
        f"{ours.label} ÷ {theirs.label}, measured in turn: {time_title(key)} {found['value']:.3f} "
        f"{between(found['low'], found['high'], 3)}, {_verdict(found['verdict'])}."
        for key, found in figures["ratios"].items()
    ]


def _verdict(verdict: str) -> str:
    return "a tie" if verdict == "tie" else verdict


def _apart(pairs: Sequence[tuple[Json, Json]]) -> str:
    sides = [figures for pair in pairs for figures in pair]
    if not all(figures["bundle"].get("per_index") for figures in sides):
        return (
            "Some were measured by an older version, without the speed index: their times can't be compared with the "
            "others'; measure those again."
        )
    if any(one["machine"].get(key) != other["machine"].get(key) for one, other in pairs for key in _MACHINE):
        return (
            "Some were measured on different machines, or with other threads or versions: their times can't be "
            "compared, with or without the index."
        )
    return (
        "Bundles that weren't measured in turn: compare their times ÷ index, which is the time of one fixed piece of "
        "work beside each sample, and take intervals that overlap as no difference; `edgepipe measure BUNDLE --against "
        "OTHER` judges a pair."
    )
