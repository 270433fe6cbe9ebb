"""Search for the smallest, or fastest, bundle within a budget: `edgepipe compress MODEL --max-drop 1% --data FILE`.

    float        the uncompressed baseline, scored on the data
    sensitivity  what each matrix loses on each grid, once (quantizers/sensitivity.py)
    frontier     the plans that no other beats in cost and summed loss (numerics/knapsack.py); where the recipe prunes,
                 over models pruned by none, half and all of `prune.ratio` (branches.py)
    candidates   real bundles of some of them, scored on the same data: halving the frontier between one that keeps the
                 budget and one that doesn't, until they are neighbours

A sum of losses only says in which order plans stand. Whether one keeps the budget is measured, through the runtime that
ships, with the margin of promise.py. The plan that is chosen is a list of `quantize.overrides`: a recipe with it gives
the same bundle without a search.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from edgepipe.artifacts import CompiledModel, Json, Measured, TorchModel
from edgepipe.errors import BudgetError, ConfigError, ContractError
from edgepipe.lock import alone
from edgepipe.measuring.evaluation import score_bundle
from edgepipe.pipeline import Listener, make_directory, run, run_baseline, run_name
from edgepipe.quantizers.row_options import TERNARY, by_token
from edgepipe.quantizers.texts import check_calibration
from edgepipe.recipe import Recipe
from edgepipe.rows import Data, open_data
from edgepipe.search.asked import Wanted
from edgepipe.search.branches import (
    PRUNE,
    Branch,
    Plan,
    Search,
    branches,
    check_pruning,
    clear_away,
    hand_over,
    plans_of,
    texts_of,
)
from edgepipe.search.kept import read_score, write_score
from edgepipe.search.promise import Drop, check_enough, drop_of
from edgepipe.store import cache_key, write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Hold what a search found."""

    recipe: Recipe
    record: Json  # for run.json and the report
    files: Mapping[str, str]  # name → sha256 of what the bundle that was scored runs

    @property
    def summary(self) -> Json:
        """Return what the last line of stdout says of it."""
        names = ("metric", "max_drop", "relative", "goal", "data")
        point = self.record["frontier"][self.record["chosen"]]
        return {name: self.record[name] for name in names} | {
            "float_value": self.record["float"]["value"],
            **{name: point[name] for name in ("prune_ratio", "value", "drop", "limit")},
            "bundles_tried": sum(one["value"] is not None for one in self.record["frontier"]),
        }

    def check(self, bundle: CompiledModel) -> None:
        """Raise ContractError when a bundle isn't the one that was scored: the promise wouldn't be its own."""
        if (shipped := _files(bundle)) != self.files:
            raise ContractError(
                f"this bundle isn't the one that kept the budget ({_differing(shipped, self.files)}), so it wasn't "
                "shipped: repeat the command with --fresh"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """Hold a bundle's rows, and what is said of it."""

    rows: np.ndarray
    record: Json  # value, bundle_bytes, seconds, files


def check_search(model: TorchModel, recipe: Recipe, wanted: Wanted) -> None:
    """Refuse, before any work, what a search can't do."""
    first, stage = next(one for one in recipe.stages if one[0] != PRUNE)
    if first != "quantize":
        raise ConfigError(
            f"--max-drop: it searches how MODEL itself is quantized, but the recipe has {first} first: run that by "
            "itself (`edgepipe distill` writes a directory), and compress what it made"
        )
    for name, usual in (("activations", "none"), ("overrides", ()), ("agreement", 0.0)):
        if getattr(stage, name) != usual:
            raise ConfigError(f"--max-drop: the search decides what quantize.{name} would: leave one of them out")
    if by_token(stage):
        raise ConfigError(
            f"--max-drop: it searches grids of 2 to 16 bits, and trains nothing: leave quantize.bits={TERNARY} out"
        )
    check_calibration(model.info, texts_of(stage, model.info.task))
    data = _data(wanted)
    check_pruning(recipe, data)
    if wanted.options.described.columns:
        wanted.options.places(data.suffix)


def _data(wanted: Wanted) -> Data:
    """Read what a drop is measured on: it steers the choice, so no set that is for evaluation."""
    return open_data(wanted.data, "calibration")


def search_plan(
    model: TorchModel, recipe: Recipe, wanted: Wanted, *, runs: Path, fresh: bool, listener: Listener
) -> Found:
    """Return the recipe of the smallest, or fastest, bundle within the budget, and how it was found.

    Work is kept in runs/NAME/search; a search that was stopped goes on there. Raises BudgetError when no bundle keeps
    the budget, and what `run` and `score_bundle` raise.
    """
    check_search(model, recipe, wanted)
    directory = runs / run_name(model, recipe) / "search"
    make_directory(directory)
    with alone(directory / ".lock", str(directory)):
        search = Search(
            model=model,
            recipe=recipe,
            wanted=wanted,
            data=_data(wanted),
            directory=directory,
            runs=runs,
            fresh=fresh,
            listener=listener,
        )
        return _search(search)


def _search(search: Search) -> Found:
    listener, wanted = search.listener, search.wanted
    listener.begin("float model", 1, 3)
    started = time.perf_counter()
    baseline = run_baseline(search.model, search.recipe, runs=search.runs, fresh=search.fresh, listener=Inner(listener))
    reference = _score(search, baseline.path, _files(baseline), unchecked(search.recipe).to_json() | {"baseline": True})
    check_enough(wanted.options, wanted.budget, reference.rows)  # before what takes long
    value = f"{wanted.options.metric} {reference.record['value']:.4g}"
    listener.end("float model", time.perf_counter() - started, reused=False, notes=(value,))

    listener.begin("sensitivity", 2, 3)
    started = time.perf_counter()
    found = branches(search, Inner(listener))
    plans = plans_of(search, found)
    said = _measured(found, len(plans))
    listener.end("sensitivity", time.perf_counter() - started, reused=False, notes=(said,))

    listener.begin("candidates", 3, 3)
    started = time.perf_counter()
    tried: dict[int, tuple[_Scored, Drop]] = {}

    def holds(place: int) -> bool:
        listener.progress("candidates", len(tried), most_asked(len(plans)))
        scored = _candidate(search, plans[place])
        drop = drop_of(wanted.options, wanted.budget, scored.rows, reference.rows)
        tried[place] = scored, drop
        return drop.limit <= wanted.budget.amount

    last = furthest(len(plans), holds)
    clear_away(found)
    record = _record(search, plans, tried, reference)
    path = search.directory / "search.json"
    if last is None:
        write_json(path, record)
        raise BudgetError(_nothing_holds(search, tried[0][1], path))
    chosen = min(
        (place for place, (_, drop) in tried.items() if drop.limit <= wanted.budget.amount),
        key=lambda place: (plans[place].cost, tried[place][0].record["bundle_bytes"]),
    )
    record |= {"chosen": chosen, "units": _units(plans[chosen])}
    write_json(path, record)
    hand_over(search, plans[chosen])
    scored, drop = tried[chosen]
    size, value = scored.record["bundle_bytes"] / 1e6, scored.record["value"]
    said = (
        f"{size:,.1f} MB at {wanted.options.metric} {value:.4g}: a drop of {wanted.budget.said(drop.value)}, "
        f"at most {wanted.budget.said(drop.limit)} on new data"
    )
    listener.end("candidates", time.perf_counter() - started, reused=False, notes=(said,))
    return Found(recipe=plans[chosen].recipe, record=record, files=scored.record["files"])


def _measured(found: Sequence[Branch], plans: int) -> str:
    """Say what was measured of the branches."""
    ways = ", ".join(f"{one.ratio:.3g}" for one in found if one.ratio)
    pruned = f"prune.ratio 0, {ways}; " if ways else ""
    units, losses = found[0].units, sum(len(one.losses) for one in found)
    return f"{pruned}{len(units)} matrices or groups of them, {losses} losses; {plans} plans on the frontier"


def furthest(count: int, holds: Callable[[int], bool]) -> int | None:
    """Return the last of `count` places that holds, if those that hold come first; None when the first doesn't.

    Each place is asked once at most: both ends, then the middle of what is left.
    """
    if not holds(0):
        return None
    if count == 1 or holds(count - 1):
        return count - 1
    good, bad = 0, count - 1
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good


def most_asked(count: int) -> int:
    """Return how many places `furthest` asks at most."""
    return min(count, 2 + max(0, count - 2).bit_length())


def _candidate(search: Search, plan: Plan) -> _Scored:
    """Build and score the bundle of a plan; one that was scored before isn't built again."""
    recipe = unchecked(plan.recipe)
    key = _score_key(search, recipe.to_json())
    if not search.fresh and (kept := read_score(search.directory / "scores", key)) is not None:
        return _Scored(rows=kept[0], record=kept[1])
    compiled = run(search.model, recipe, out=None, runs=plan.branch.runs, fresh=False, listener=Inner(search.listener))
    assert not isinstance(compiled, Measured)
    return _score(search, compiled.path, _files(compiled), recipe.to_json())


def unchecked(recipe: Recipe) -> Recipe:
    """Return a recipe without measure, and without the stages' numeric checks: what ships goes through them."""
    stages = ((name, stage) for name, stage in recipe.stages if name != "measure")
    return replace(
        recipe,
        stages=tuple((n, replace(s, check_tokens=0) if hasattr(s, "check_tokens") else s) for n, s in stages),
    )


def _score(search: Search, bundle: Path, files: Mapping[str, str], recipe: Json) -> _Scored:
    """Score a bundle on the data, and keep what came out."""
    key = _score_key(search, recipe)
    if not search.fresh and (kept := read_score(search.directory / "scores", key)) is not None:
        return _Scored(rows=kept[0], record=kept[1])
    started = time.perf_counter()
    options = search.wanted.options
    rows = score_bundle(bundle, search.data, options, progress=search.listener.progress)
    record: Json = {
        "value": options.described.statistic(rows),
        "bundle_bytes": sum(file.stat().st_size for file in bundle.iterdir()),
        "seconds": time.perf_counter() - started,
        "files": dict(files),
    }
    write_score(search.directory / "scores", key, rows, record)
    return _Scored(rows=rows, record=record)


def _score_key(search: Search, recipe: Json) -> str:
    info, wanted = search.model.info, search.wanted
    target = asdict(search.recipe.target)
    read = {name: stage.reads() for name, stage in search.recipe.stages if hasattr(stage, "reads")}  # texts, data
    return cache_key(info.fingerprint, info.task, recipe, read, target, search.data.sha256, asdict(wanted.options))


def _files(bundle: CompiledModel) -> dict[str, str]:
    """Return the hashes of what a bundle computes with: graphs, weights, tokenizer."""
    names = [*bundle.manifest["graphs"].values(), bundle.manifest["weights"]["file"], "tokenizer.json"]
    return {n: bundle.manifest["files"][n]["sha256"] for n in names if n in bundle.manifest["files"]}


def _differing(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    return ", ".join(sorted(n for n in {*ours, *theirs} if ours.get(n) != theirs.get(n))) + " differ"


def _record(
    search: Search, plans: Sequence[Plan], tried: Mapping[int, tuple[_Scored, Drop]], reference: _Scored
) -> Json:
    """Return what the report shows of a search."""
    from edgepipe.quantizers.outputs import UNITS, kind_of

    wanted, metric = search.wanted, search.wanted.options.described
    return {
        "max_drop": wanted.budget.amount,
        "relative": wanted.budget.relative,
        "goal": wanted.goal,
        "metric": metric.name,
        "better": metric.better,
        "data": {"name": search.data.name, "sha256": search.data.sha256, "examples": len(reference.rows)},
        "loss_unit": UNITS[kind_of(search.model.info)],
        "float": {key: reference.record[key] for key in ("value", "bundle_bytes", "seconds")},
        "frontier": [_shown(plan, tried.get(place)) for place, plan in enumerate(plans)],
        "chosen": None,
        "units": [],
    }


def _shown(plan: Plan, tried: tuple[_Scored, Drop] | None) -> Json:
    """Return a point of the frontier: what it costs, what it may lose, and what its bundle was found to be."""
    shown: Json = {"prune_ratio": plan.branch.ratio, "cost": plan.cost, "loss": plan.loss, "bytes": plan.nbytes}
    if tried is None:
        return shown | dict.fromkeys(("value", "drop", "limit", "bundle_bytes", "seconds"))
    scored, drop = tried
    kept = {key: scored.record[key] for key in ("value", "bundle_bytes", "seconds")}
    return shown | kept | {"drop": _number(drop.value), "limit": _number(drop.limit)}


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _units(plan: Plan) -> list[Json]:
    """Return what each unit got, and what it would lose at its other choices."""
    return [
        {
            "name": unit.name,
            "tensors": list(unit.tensors),
            "choice": choice,
            "bytes": unit.nbytes(choice),
            "choices": [
                {"choice": other, "bytes": unit.nbytes(other), "loss": plan.branch.losses[unit.name, other]}
                for other in unit.choices
            ],
        }
        for unit, choice in zip(plan.branch.units, plan.chosen, strict=True)
    ]


def _nothing_holds(search: Search, best: Drop, path: Path) -> str:
    budget, options = search.wanted.budget, search.wanted.options
    return (
        f"no bundle keeps {options.metric} within {budget.said(budget.amount)} of the float model's: that with the "
        f"most bits may lose {budget.said(best.limit)} on new data ({budget.said(best.value)} on {search.data.name}); "
        f"allow more, or give more data. Nothing was shipped; what was tried is in {path}"
    )


class Inner:
    """Pass on the progress of what runs inside a search; its stages are the search's own affair."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def begin(self, stage: str, number: int, total: int) -> None:
        """Hear that a stage of a bundle begins."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Pass on how far it is."""
        self._listener.progress(what, done, total)

    def end(self, stage: str, seconds: float, *, reused: bool, notes: Sequence[str]) -> None:
        """Hear that it is done."""
