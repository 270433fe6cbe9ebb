"""Loss curves: where their points, grid and numbers stand in a drawing; the page's template draws them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from edgepipe.artifacts import Json
from edgepipe.report.record import Phase, Training

_GAPS = 5  # at most so many between the lines of the grid
_NICE = (1.0, 2.0, 2.5, 5.0)


def loss_curves(training: Training | None, width: float, height: float) -> list[Json]:
    """Lay out the curves of every phase that has any: paths in a drawing of `width` × `height`, grid and its numbers.

    Each phase has axes of its own: steps from 0, losses between the nearest lines of the grid.
    """
    return [] if training is None else list(_curves(training.phases, width, height))


def _curves(phases: Sequence[Phase], width: float, height: float) -> Iterator[Json]:
    for phase in phases:
        train, held_out = _finite(phase.train), _finite(phase.held_out)
        points = train + held_out
        if not points:
            continue
        losses = ticks(min(loss for _, loss in points), max(loss for _, loss in points))
        steps = ticks(0, max(phase.steps, 1), whole=True)
        end, low, high = steps[-1], losses[0], losses[-1]

        def placed(step: float, loss: float, end: float = end, low: float = low, high: float = high) -> str:
            return f"{width * step / end:.1f} {height * (high - loss) / (high - low):.1f}"

        best = phase.best_step is not None and phase.best_loss is not None
        yield {
            "phase": phase.phase,
            "train": "L".join(placed(*point) for point in train),
            "held_out": "L".join(placed(*point) for point in held_out),
            "best": placed(phase.best_step or 0, phase.best_loss or 0.0) if best else "",
            "rows": [tick(loss, (high - loss) / (high - low), height, losses) for loss in losses],
            "columns": [tick(step, step / end, width, steps) for step in steps],
        }


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Return few round numbers at equal distances, the first at or below `low`, the last at or above `high`."""
    if high <= low:
        high = low + max(abs(low), 1.0) * 0.1
    step = next(step for step in _steps((high - low) / _GAPS) if not whole or step == int(step))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, last + 1)]


def _steps(least: float) -> Iterator[float]:
    """Yield round distances that are at least so wide, the smallest first."""
    power = math.floor(math.log10(least))
    while True:
        scale = 10.0**power
        yield from (nice * scale for nice in _NICE if nice * scale >= least)
        power += 1


def tick(value: float, share: float, length: float, all_of_them: Sequence[float]) -> Json:
    """Return one line of the grid, with as many digits as tell it from the others."""
    apart = all_of_them[1] - all_of_them[0]
    digits = next(n for n in range(20) if math.isclose(round(apart, n), apart, rel_tol=1e-6))
    return {"at": round(share * length, 1), "percent": round(100 * share, 2), "said": f"{value:,.{digits}f}"}


def _finite(rows: Sequence[Json]) -> list[tuple[float, float]]:
    return [(row["step"], row["loss"]) for row in rows if row["loss"] is not None]
