"""The token-agreement guard of the stage `quantize`: what agreement.py works on, and what is said of what it found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from edgepipe.artifacts import Context, Json, ModelInfo, TorchModel
from edgepipe.errors import ConfigError
from edgepipe.graph.tasks import GENERATION
from edgepipe.numerics.grids import Grid
from edgepipe.quantizers.texts import Calibration, batches
from edgepipe.weights import Weight

if TYPE_CHECKING:
    from edgepipe.quantizers.agreement import Held

_WIDER = {"q2": 4, "q4": 8, "q8": 16}  # bits of the next wider grid
_SHOWN = 5  # of the blamed, in the figures of the record


def check_floor(info: ModelInfo, method: str) -> None:
    """Raise ConfigError for a model that writes nothing, and a method after which no layer can go back by itself."""
    if method == "awq":
        raise ConfigError(
            "quantize.agreement: awq scales layers against each other, so that none can get more bits alone: take "
            "another method"
        )
    if info.task not in GENERATION:
        raise ConfigError(
            f"quantize.agreement: expected a model that writes tokens, but {info.name} is for {info.task}: leave it "
            "out, --max-drop keeps a metric of such a model"
        )


def hold_floor(
    model: TorchModel,
    changed: Mapping[str, Weight],
    floor: float,
    calibration: Calibration,
    stored: Callable[[Weight, Grid], Weight],
    grid: Grid,
    ctx: Context,
) -> dict[str, Weight]:
    """Return the weights that get more bits so that the share `floor` of greedy tokens stays the float model's.

    `changed` are the weights as the plan has them; `stored` gives a weight on another grid, whose group and offset
    are those of `grid`. The bytes end where the target's `shipped_ratio` does. Notes and figures go to the record.
    """
    from edgepipe.quantizers.agreement import PROMPTS, answered, hold
    from edgepipe.quantizers.modules import module_of
    from edgepipe.quantizers.sensitivity import readers

    module = module_of(model)
    few = Calibration(source=calibration.source, samples=min(calibration.samples, PROMPTS), tokens=calibration.tokens)
    found = batches(model, few, seed=ctx.seed, module=module, progress=ctx.progress)
    ctx.progress("the float model answers", 0, 1)
    texts = answered(module, model.info, found)
    quantized = {name: weight for name, weight in changed.items() if weight.grid is not None}
    units = [unit for unit in readers(module, list(quantized), found[0]) if all(name in quantized for name in unit)]

    def widen(name: str, now: Weight) -> Weight | None:
        bits = _WIDER.get(now.dtype)
        if bits is None:
            return None
        return stored(model.weights[name], Grid(bits=bits, group=grid.group or 32, symmetric=grid.symmetric))

    held = hold(
        module,
        model.weights,
        quantized,
        units,
        texts,
        floor=floor,
        spare_bytes=_spare(model, changed, ctx.target.budgets.shipped_ratio),
        widen=widen,
        tick=lambda done, total: ctx.progress("which layer is to blame", done, total),
    )
    before, after = held.before, held.after
    count = len(before.parts_at)
    ctx.note(
        f"token agreement {before.share:.3f} over {count} answers{_parting(before.median_parting)}, KL {before.kl:.2g}"
    )
    for one in held.raised:
        ctx.note(
            f"{_named(one.unit)} went from {one.before} to {one.after}: with it in float, KL is {one.kl_in_float:.2g}; "
            f"agreement is now {one.agreement.share:.3f}"
        )
    if after.share < floor:
        why = "the size budget leaves no room for more bits" if held.unaffordable else "more bits bring no more"
        ctx.note(f"the floor of {floor:g} does NOT hold: token agreement stays at {after.share:.3f}, since {why}")
    ctx.figures({"agreement": _figures(held, floor)})
    return held.weights


def _spare(model: TorchModel, changed: Mapping[str, Weight], ratio: float | None) -> float:
    """Return the bytes that the target's ratio of shipped to float32 weights leaves; infinite without one."""
    if ratio is None:
        return float("inf")
    return ratio * 4 * model.weights.parameters - model.weights.replace(changed).nbytes


def _parting(tokens: float | None) -> str:
    return ", of which most never part" if tokens is None else f", the median one parts after {tokens:g} tokens"


def _named(unit: tuple[str, ...]) -> str:
    return unit[0] if len(unit) == 1 else f"{unit[0]} and {len(unit) - 1} more"


def _figures(held: Held, floor: float) -> Json:
    """Return what the report shows: both agreements, who was blamed, and what was raised."""
    return {
        "floor": floor,
        "before": asdict(held.before),
        "after": asdict(held.after),
        "blamed": [asdict(one) for one in held.blamed[:_SHOWN]],
        "raised": [asdict(one) for one in held.raised],
        "unaffordable": [list(unit) for unit in held.unaffordable],
    }
