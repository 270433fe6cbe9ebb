"""Compress: the library function behind `edgepipe compress`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe.artifacts import CompiledModel, Json, Measured, TorchModel
from edgepipe.errors import ConfigError, StageError
from edgepipe.target import AUTO

if TYPE_CHECKING:
    from edgepipe.pipeline import Listener
    from edgepipe.recipe import Recipe
    from edgepipe.search.asked import Asked, Room
    from edgepipe.search.budget import Found
    from edgepipe.search.engines import Chosen


def compress(
    model: str,
    recipe: Recipe,
    *,
    listener: Listener,
    out: Path | None = None,
    runs: Path = Path("runs"),
    fresh: bool = False,
    task: str | None = None,
    asked: Asked | None = None,
    without_slower: bool = False,
    room: Room | None = None,
    keep_both: bool = False,
) -> Json:
    """Compress MODEL by a recipe and return the summary: bundle path, bytes, bits per weight and what was measured.

    `runs` keeps finished stages, so that a run that was stopped, or one with the same beginning, needn't repeat them;
    `fresh` repeats them all. `task` overrides the task that the model's config describes. With `asked` the grids of the
    recipe are searched for first (docs/quantize.md): the smallest bundle whose metric stays within a budget. With
    `without_slower` grids whose products are slower than float ones on this machine are undone first. Where the recipe
    leaves the engine open the faster one is chosen (docs/tvm.md), and with `keep_both` the other's bundle stays beside
    it. A bundle that can't run on this machine isn't measured, and the summary says why. `room` cuts the widest member
    that fits out of a nested student (docs/prune.md). Raises ConfigError before any work begins, StageError or
    TargetError when a stage fails, BudgetError when no bundle keeps the budget: none is written then. Of several
    processes that a launcher started the first one does this; the others help it train, and end here.
    """
    from edgepipe.pipeline import run, run_name
    from edgepipe.sources import open_model
    from edgepipe.training.processes import dismiss_the_others, follow, follows

    _check_flags(recipe, asked, room, out, without_slower=without_slower, keep_both=keep_both)
    recipe, unmeasured = _without_measuring(recipe)
    source = open_model(model, task)
    if follows():
        follow(source, recipe.stages, recipe.target, recipe.seed)
        raise SystemExit(0)
    beside: Json = {}
    found = _found(source, recipe, asked, runs=runs, fresh=fresh, listener=listener)
    if found is not None:
        recipe, beside["search"] = found.recipe, found.record
    recipe, elastic = _cut_to(source, recipe, room, runs=runs, listener=listener)
    beside |= elastic
    if without_slower:
        from edgepipe.search.never_slower import never_slower

        recipe, beside["products"] = never_slower(source, recipe, listener=listener)
    directory = runs / run_name(source, recipe)
    place = out if out is not None else directory / "bundle"
    chosen = _settled(source, recipe, place, runs=runs, fresh=fresh, listener=listener, keep_both=keep_both)
    if chosen is not None:
        recipe, fresh, beside["engines"] = chosen.recipe, False, chosen.record  # what is there was made just now
    before = _manifest_sha256(place)
    summary: Json = {}

    def finish(result: CompiledModel | Measured) -> None:
        """Sum up and write the report before another run may change what they speak of."""
        if found is not None:
            summary["search"] = found.summary
        summary.update(elastic)
        summary.update(_summary(result, before))
        if chosen is not None:
            summary["engines"] = _engines(chosen, place, keep_both=keep_both)
        if without_slower:
            summary["undone"] = [name for one in beside["products"] if one["undone"] for name in one["tensors"]]
        summary["left_beside"] = left_beside(place, recipe, summary.get("engines", {}).get("kept"))
        summary.update(_reported(result, recipe, directory, beside, unmeasured))

    def accept(bundle: CompiledModel) -> None:
        """Let nothing be written that isn't the bundle whose drop was measured."""
        if found is not None:
            found.check(bundle)

    run(
        source,
        recipe,
        out=out,
        runs=runs,
        fresh=fresh,
        listener=listener,
        accept=accept,
        finish=finish,
        beside=beside,
    )
    dismiss_the_others()
    return summary


def _found(
    source: TorchModel, recipe: Recipe, asked: Asked | None, *, runs: Path, fresh: bool, listener: Listener
) -> Found | None:
    """Return what a search for a budget of quality found; None where nobody asks for one."""
    if asked is None:
        return None
    from edgepipe.search.asked import wanted_of
    from edgepipe.search.budget import search_plan

    wanted = wanted_of(asked, source.info.task)
    return search_plan(source, recipe, wanted, runs=runs, fresh=fresh, listener=listener)


def _cut_to(
    source: TorchModel, recipe: Recipe, room: Room | None, *, runs: Path, listener: Listener
) -> tuple[Recipe, Json]:
    """Return the recipe that cuts a nested student to a budget, and what is recorded of that."""
    if room is None:
        return recipe, {}
    from edgepipe.search.elastic import choose_member

    recipe, record = choose_member(source, recipe, room, runs=runs, listener=listener)
    return recipe, {"elastic": record}


def _check_flags(
    recipe: Recipe, asked: Asked | None, room: Room | None, out: Path | None, *, without_slower: bool, keep_both: bool
) -> None:
    """Refuse flags that don't go with each other or with the recipe's engine, and an output that can't be replaced."""
    from edgepipe.pipeline import check_output
    from edgepipe.search.engines import engine_of

    if out is not None:
        check_output(out)
    if without_slower and asked is not None:
        raise ConfigError("--never-slower and --max-drop: leave one out; --goal fastest searches by time")
    if asked is not None and room is not None:
        raise ConfigError("--max-drop and a budget of bytes or time: leave one out")
    engine = engine_of(recipe)
    if keep_both and engine != AUTO:
        raise ConfigError("--keep-both keeps the bundles of two engines: it goes with --engine auto")
    timed = "--never-slower" if without_slower else "--goal fastest" if asked and asked.goal == "fastest" else None
    if timed and engine != "onnxruntime":
        raise ConfigError(f"{timed} times onnxruntime's kernels: take --engine onnxruntime, not {engine}")
    if engine == AUTO and (asked is not None or room is not None):
        flag = "--max-drop" if room is None else "a budget of bytes or time"
        raise ConfigError(f"{flag} measures one engine's bundle: name an engine in place of auto")
    if dict(recipe.stages)["compile"].tune and (asked is not None or room is not None):
        raise ConfigError("--tune tunes one bundle, and --max-drop or a budget builds many: leave one out")
    _check_measured_here(recipe, timed or ("--max-drop" if asked else "--budget-ms" if room and room.ms else None))


def _check_measured_here(recipe: Recipe, flag: str | None) -> None:
    """Refuse a flag that measures bundles, and a choice between engines, where this machine can't."""
    from edgepipe.search.engines import engine_of

    instead = "leave it out"
    if flag is None and engine_of(recipe) == AUTO and len(recipe.target.engines) > 1:
        flag, instead = "--engine auto", "name an engine"
    if flag and (reason := why_not_measured(recipe)):
        raise ConfigError(f"{flag} measures on this machine, and {reason}: {instead}")


def _without_measuring(recipe: Recipe) -> tuple[Recipe, str]:
    """Return the recipe without `measure` where this machine can't, and why; else as it is, and an empty text."""
    stages = tuple(one for one in recipe.stages if one[0] != "measure")
    reason = why_not_measured(recipe) if len(stages) < len(recipe.stages) else ""
    return (dataclasses.replace(recipe, stages=stages), reason) if reason else (recipe, "")


def why_not_measured(recipe: Recipe) -> str:
    """Say why this machine can't measure what a recipe builds; empty where it can."""
    from edgepipe.engines.native import lacking, level_here
    from edgepipe.search.engines import engine_of

    target = recipe.target
    if target.measurable != "here":
        return f"the target {target.name} can't be measured from here"
    if engine_of(recipe) == "onnxruntime" or not (target.tvm.level or target.tvm.gpu):
        return ""
    return lacking(target.tvm.named or target.tvm.on(level_here()))


def _settled(
    source: TorchModel, recipe: Recipe, place: Path, *, runs: Path, fresh: bool, listener: Listener, keep_both: bool
) -> Chosen | None:
    """Choose the engine where the recipe leaves it open; None where it names one."""
    from edgepipe.pipeline import check_apart, check_output, run_name
    from edgepipe.search.engines import choose_engine, engine_of

    if engine_of(recipe) != AUTO:
        return None
    check_apart(place, runs / run_name(source, recipe))  # before both are built
    for engine in recipe.target.engines if keep_both else ():
        check_output(place_beside(place, engine))
    return choose_engine(source, recipe, runs=runs, fresh=fresh, listener=listener)


def _engines(chosen: Chosen, place: Path, *, keep_both: bool) -> Json:
    """Return what is said of the choice, once the other bundle lies beside the one at `place` if it is kept."""
    from edgepipe.pipeline import publish_beside

    said = {key: value for key, value in chosen.record.items() if key != "samples"}
    if keep_both and chosen.other is not None:
        kept = place_beside(place, chosen.other.manifest["engine"])
        publish_beside(chosen.other, kept)
        said["kept"] = str(kept)
    return said


def place_beside(bundle: Path, engine: str) -> Path:
    """Return where the bundle goes that doesn't ship: beside the one that does, named by its engine."""
    named = bundle if bundle.name not in ("", "..") else Path(os.path.realpath(bundle))  # --out .
    return named.with_name(f"{named.name}-{engine}")


def left_beside(place: Path, recipe: Recipe, kept: str | None) -> list[str]:
    """Return the bundles of other engines that earlier runs left beside this one, all but `kept`, which is new."""
    places = [place_beside(place, engine) for engine in recipe.target.engines]
    return [str(one) for one in places if (one / "manifest.json").is_file() and str(one) != kept]


def _summary(result: CompiledModel | Measured, before: str | None) -> Json:
    """Return what is said of a bundle, and of its figures where it was measured; `before`: see _manifest_sha256."""
    bundle = result.model if isinstance(result, Measured) else result
    weights = bundle.manifest["weights"]
    summary: Json = {
        "bundle": str(bundle.path),
        "bundle_bytes": sum(f.stat().st_size for f in bundle.path.iterdir()),
        "weight_bytes": weights["bytes"],
        "bits_per_weight": weights["bits_per_weight"],
        "task": bundle.manifest["task"],
        "cache_bytes": (bundle.manifest["cache"] or {}).get("bytes"),
        "replaced": before is not None and before != _manifest_sha256(bundle.path),  # another bundle stood there
    }
    if isinstance(result, Measured):
        summary |= {"figures": result.figures} | _headline(result.figures)
    return summary


def _manifest_sha256(bundle: Path) -> str | None:
    """Return the hash of a bundle's manifest, None where there is no bundle."""
    from edgepipe.store import file_sha256

    manifest = bundle / "manifest.json"
    return file_sha256(manifest) if manifest.is_file() else None


def _reported(result: CompiledModel | Measured, recipe: Recipe, directory: Path, beside: Json, unmeasured: str) -> Json:
    """Write the run's report and return where it is, with broken budgets or why nothing was measured."""
    from edgepipe.report.budgets import over_budget

    if isinstance(result, Measured):
        broken = over_budget(result.figures, dataclasses.asdict(recipe.target.budgets), recipe.target.name)
        return {"over_budget": broken, "report": str(_write_report(directory, result.model.path))}
    if not unmeasured:
        return {}
    history = [dataclasses.asdict(one) for one in result.history]
    record = {"recipe": recipe.to_json(), "history": history, **beside, "not_measured": unmeasured}
    return {"not_measured": unmeasured, "report": str(_write_report(directory, result.path, record))}


def _write_report(directory: Path, bundle: Path, unmeasured: Json | None = None) -> Path:
    """Write the run's report; StageError when the disk doesn't take it: the bundle is there all the same.

    `unmeasured` is the record of a run that measured nothing, which no file keeps.
    """
    from edgepipe.report.outputs import write_run_report

    try:
        return write_run_report(directory, bundle, unmeasured)
    except OSError as error:
        raise StageError(f"the bundle is at {bundle}, but not its report: {error.strerror}") from error


def _headline(figures: Json) -> Json:
    known = ("ttft_ms", "token_ms", "tokens_per_second", "calls", "memory_peak_bytes", "perplexity")
    keys = [key for key in known if key in figures["bundle"]]
    line: Json = {key: figures["bundle"][key] for key in keys}
    line["baseline"] = None if figures["baseline"] is None else {key: figures["baseline"][key] for key in keys}
    return line
