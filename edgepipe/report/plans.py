"""A search for a budget as the report shows it: bundles that were tried, what was chosen, who got more bits and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from edgepipe.artifacts import Json
from edgepipe.report.curves import tick, ticks
from edgepipe.report.record import Search
from edgepipe.report.rows import MISSING

_SHOWN = 12  # matrices in the table; a sentence counts the others


def search_of(record: Json) -> Search:
    """Return the search that a run recorded."""
    examples = record["data"]["examples"]
    points = tuple(
        {
            **{key: point[key] for key in ("cost", "bytes", "loss", "value", "drop", "limit", "bundle_bytes")},
            "prune_ratio": point.get("prune_ratio", 0.0),
            "example_ms": None if point["seconds"] is None else 1000 * point["seconds"] / examples,
        }
        for point in record["frontier"]
    )
    names = ("metric", "better", "max_drop", "relative", "goal", "data", "loss_unit", "chosen")
    return Search(
        **{name: record[name] for name in names},
        float_value=record["float"]["value"],
        points=points,
        units=tuple(record["units"]),
    )


def tried(search: Search) -> Iterator[tuple[str, ...]]:
    """Yield a row for every bundle that was built and scored, the costliest first."""
    for place, point in enumerate(search.points):
        if point["value"] is None:
            continue
        within = point["limit"] is not None and point["limit"] <= search.max_drop
        yield (
            *((f"{100 * point['prune_ratio']:.3g} %",) if search.prunes else ()),
            f"{point['bytes'] / 1e6:,.2f}",
            f"{point['bundle_bytes'] / 1e6:,.1f}",
            f"{point['loss']:.2g}",
            f"{point['value']:.4g}",
            said(search, point["drop"]),
            said(search, point["limit"]),
            f"{point['example_ms']:,.1f}",
            "chosen" if place == search.chosen else "within the budget" if within else "over",
        )


def said(search: Search, drop: float | None) -> str:
    """Write a drop in the budget's unit."""
    if drop is None:
        return MISSING
    return f"{100 * drop:.2f} %" if search.relative else f"{drop:.4g}"


def budget_sentences(search: Search) -> Iterator[str]:
    """Say what was promised, on what it was measured, and what the columns are."""
    yield (
        f"Asked for: the {search.goal} bundle whose {search.metric} drops by {said(search, search.max_drop)} at most "
        f"from the float model's {search.float_value:.4g}, on {search.data['examples']:,} examples of "
        f"{search.data['name']}."
    )
    yield (
        "At most: the drop on as many new examples of the same kind, at 97.5 % (paired bootstrap over the examples). "
        "The loss is a sum over the matrices, each rounded alone; it only says in which order plans stand. The time is "
        "that of one pass, not taken in turn."
    )
    if search.prunes:
        yield (
            "Pruned: the share of FFN channels and heads that was asked for. Each such model is measured by itself; "
            "how far pruning alone moved its outputs is part of the loss."
        )
    left = sum(point["value"] is None for point in search.points)
    if left:
        yield f"{left} more plans of the frontier weren't built: each lies between two that were."


def more_bits(search: Search) -> tuple[list[tuple[str, ...]], str]:
    """Return a row for each unit that got more bits than most do, the dearest first, and a sentence about them.

    "Else" is what it would lose on the grid that most have.
    """
    common = common_choice(search.units)
    rows = []
    for unit in search.units:
        losses = {one["choice"]: one for one in unit["choices"]}
        if bits_of(unit["choice"]) <= bits_of(common) or common not in losses:
            continue
        own, other = losses[unit["choice"]], losses[common]
        more = own["bytes"] - other["bytes"]
        rows.append((other["loss"] - own["loss"], unit, more, own["loss"], other["loss"]))
    rows.sort(key=lambda row: -row[0])
    cells: list[tuple[str, ...]] = [
        (
            unit["name"],
            unit["choice"],
            f"{unit['bytes'] / 1e6:,.2f}",
            f"{more / 1e6:,.2f}",
            f"{own:.2g}",
            f"{other:.2g}",
        )
        for _, unit, more, own, other in rows[:_SHOWN]
    ]
    if not cells:
        return [], f"None: most matrices lie on {common}, and no other on more bits."
    rest = f" {len(rows) - _SHOWN} more did." if len(rows) > _SHOWN else ""
    return cells, (
        f"Most matrices lie on {common} (bits/group). These got more, since there they would lose more for each byte "
        f"saved than others; the last column is what each alone would lose on {common}.{rest}"
    )


def common_choice(units: Sequence[Json]) -> str:
    """Return the choice that most parameters have."""
    counts: Counter[str] = Counter()
    for unit in units:
        counts[unit["choice"]] += max(one["bytes"] for one in unit["choices"])
    return counts.most_common(1)[0][0]


def bits_of(choice: str) -> int:
    """Return the bits of a choice: 4 of "4/32"."""
    return int(choice.partition("/")[0])


def frontier_drawing(search: Search, width: float, height: float) -> Json:
    """Lay out the tried bundles: MB of the matrices from left to right, the drop upwards, each up to its limit."""
    shown = [(p, place) for place, p in enumerate(search.points) if p["value"] is not None and p["limit"] is not None]
    factor = 100 if search.relative else 1
    tops = [factor * point["limit"] for point, _ in shown]
    ends = [factor * point["drop"] for point, _ in shown]
    # what lies far over the budget would press all else to the bottom
    highest = min(max(*tops, factor * search.max_drop), 5 * factor * search.max_drop)
    rows = ticks(min(0.0, *ends), highest)
    columns = ticks(0, max(point["bytes"] / 1e6 for point, _ in shown))
    low, high, end = rows[0], rows[-1], columns[-1]

    def up(drop: float) -> float:
        return round(height * (high - min(drop, high)) / (high - low), 1)

    def along(point: Json) -> float:
        return round(width * float(point["bytes"]) / 1e6 / end, 1)

    (chosen,) = (point for point, place in shown if place == search.chosen)
    return {
        "points": [
            {"x": along(point), "y": up(factor * point["drop"]), "to": up(factor * point["limit"])}
            for point, _ in shown
        ],
        "chosen": f"{along(chosen)} {up(factor * chosen['drop'])}",
        "budget": up(factor * search.max_drop),
        "rows": [tick(value, (high - value) / (high - low), height, rows) for value in rows],
        "columns": [tick(value, value / end, width, columns) for value in columns],
    }
