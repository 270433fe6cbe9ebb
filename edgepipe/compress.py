"""Compress: the library function behind `edgepipe compress`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe.artifacts import CompiledModel, Json, Measured, TorchModel
from edgepipe.errors import ConfigError, StageError

if TYPE_CHECKING:
    from edgepipe.pipeline import Listener
    from edgepipe.recipe import Recipe
    from edgepipe.search.asked import Asked, Room
    from edgepipe.search.budget import Found


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
) -> Json:
    """Compress MODEL by a recipe and return the summary: bundle path, bytes, bits per weight and what was measured.

    `runs` keeps finished stages, so that a run that was stopped, or one with the same beginning, needn't repeat them;
    `fresh` repeats them all. `task` overrides the task that the model's config describes. With `asked` the grids of the
    recipe are searched for first (docs/quantize.md): the smallest bundle whose metric stays within a budget. With
    `without_slower` grids whose products are slower than float ones on this machine are undone first. Raises
    ConfigError before any work begins, StageError or TargetError when a stage fails, BudgetError when no bundle keeps
    the budget: none is written then. `room` cuts the widest member that fits out of a nested student
    (docs/prune.md). Of several processes that a launcher started the first one does this; the others
    help it train, and end here.
    """
    from edgepipe.pipeline import check_output, run, run_name
    from edgepipe.report.budgets import over_budget
    from edgepipe.sources import open_model
    from edgepipe.training.processes import dismiss_the_others, follow, follows

    if out is not None:
        check_output(out)
    source = open_model(model, task)
    if follows():
        follow(source, recipe.stages, recipe.target, recipe.seed)
        raise SystemExit(0)
    if asked is not None and (without_slower or room is not None):
        raise ConfigError(
            "--never-slower and --max-drop: leave one out; --goal fastest searches by time"
            if without_slower
            else "--max-drop and a budget of bytes or time: leave one out"
        )
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
    before = _manifest_sha256(out if out is not None else directory / "bundle")
    summary: Json = {}

    def finish(result: CompiledModel | Measured) -> None:
        """Sum up and write the report before another run may change what they speak of."""
        if found is not None:
            summary["search"] = found.summary
        summary.update(elastic)
        summary.update(_summary(result, before))
        if without_slower:
            summary["undone"] = [name for one in beside["products"] if one["undone"] for name in one["tensors"]]
        if isinstance(result, Measured):
            budgets, name = dataclasses.asdict(recipe.target.budgets), recipe.target.name
            summary["over_budget"] = over_budget(result.figures, budgets, name)
            summary["report"] = str(_write_report(directory, result.model.path))

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


def _write_report(directory: Path, bundle: Path) -> Path:
    """Write the run's report; StageError when the disk doesn't take it: the bundle is there all the same."""
    from edgepipe.report.outputs import write_run_report

    try:
        return write_run_report(directory, bundle)
    except OSError as error:
        raise StageError(f"the bundle is at {bundle}, but not its report: {error.strerror}") from error


def _headline(figures: Json) -> Json:
    known = ("ttft_ms", "token_ms", "tokens_per_second", "calls", "memory_peak_bytes", "perplexity")
    keys = [key for key in known if key in figures["bundle"]]
    line: Json = {key: figures["bundle"][key] for key in keys}
    line["baseline"] = None if figures["baseline"] is None else {key: figures["baseline"][key] for key in keys}
    return line
