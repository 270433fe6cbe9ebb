"""Search for the smallest, or fastest, bundle within a budget: `edgepipe compress MODEL --max-drop 1% --data FILE`.

    float        the uncompressed baseline, scored on the data
    sensitivity  what each matrix loses on each grid, once (quantizers/sensitivity.py)
    frontier     the plans that no other beats in cost and summed loss (numerics/knapsack.py)
    candidates   real bundles of some of them, scored on the same data: halving the frontier between one that keeps the
                 budget and one that doesn't, until they are neighbours

A sum of losses only says in which order plans stand. Whether one keeps the budget is measured, through the runtime that
ships, with the margin of promise.py. The plan that is chosen is a list of `quantize.overrides`: a recipe with it gives
the same bundle without a search.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from edgepipe.artifacts import CompiledModel, Json, Measured, TorchModel
from edgepipe.errors import BudgetError, ConfigError, ContractError
from edgepipe.graph.tasks import GENERATION
from edgepipe.lock import alone
from edgepipe.measuring.evaluation import score_bundle
from edgepipe.numerics.knapsack import Point, frontier
from edgepipe.pipeline import Listener, make_directory, run, run_baseline, run_name
from edgepipe.quantizers.row_options import TERNARY, by_token
from edgepipe.quantizers.sensitivity import Key, Unit
from edgepipe.quantizers.texts import Calibration, check_calibration, fingerprint
from edgepipe.recipe import Recipe, Stage
from edgepipe.rows import Data, open_data
from edgepipe.search.asked import Wanted
from edgepipe.search.costs import bytes_of, times_of
from edgepipe.search.kept import open_losses, read_score, write_score
from edgepipe.search.promise import Drop, check_enough, drop_of
from edgepipe.search.units import overrides_of, that_count, units_of
from edgepipe.store import cache_key, write_json

POINTS = 33  # of the frontier, at equal steps of cost: halving them takes five bundles, beside those at both ends
# Calibration rows, of a model that predicts at every token and of one that answers once a text; each choice runs them
_WRITTEN, _ANSWERED, _TOKENS = 16, 64, 64


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
            **{name: point[name] for name in ("value", "drop", "limit")},
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """Hold what stays the same during one search."""

    model: TorchModel
    recipe: Recipe
    wanted: Wanted
    data: Data
    directory: Path
    runs: Path
    fresh: bool
    listener: Listener

    @property
    def stage(self) -> Stage:
        """Return the recipe's stage `quantize`."""
        return dict(self.recipe.stages)["quantize"]

    def with_overrides(self, overrides: Sequence[str]) -> Recipe:
        """Return the recipe with a plan behind its own overrides, which a plan knows of."""
        stage = replace(self.stage, overrides=tuple(overrides))
        return replace(self.recipe, stages=tuple((n, stage if n == "quantize" else s) for n, s in self.recipe.stages))


def check_search(model: TorchModel, recipe: Recipe, wanted: Wanted) -> None:
    """Refuse, before any work, what a search can't do."""
    first, stage = recipe.stages[0]
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
    check_calibration(model.info, _texts(stage, model.info.task))
    if wanted.options.described.columns:
        wanted.options.places(_data(wanted).suffix)


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
        search = _Search(
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


def _search(search: _Search) -> Found:
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
    units, losses = _sensitivity(search)
    points = _thinned(frontier(_costs(search, units), [[losses[u.name, c] for c in u.choices] for u in units]))
    said = f"{len(units)} matrices or groups of them, {len(losses)} losses; {len(points)} plans on the frontier"
    listener.end("sensitivity", time.perf_counter() - started, reused=False, notes=(said,))

    listener.begin("candidates", 3, 3)
    started = time.perf_counter()
    tried: dict[int, tuple[_Scored, Drop]] = {}

    def holds(place: int) -> bool:
        listener.progress("candidates", len(tried), most_asked(len(points)))
        found = _candidate(search, overrides_of(units, _choices(units, points[place])))
        drop = drop_of(wanted.options, wanted.budget, found.rows, reference.rows)
        tried[place] = found, drop
        return drop.limit <= wanted.budget.amount

    last = furthest(len(points), holds)
    shutil.rmtree(search.directory / "work", ignore_errors=True)  # the last candidate's stages; scores are kept
    record = _record(search, units, losses, points, tried, reference)
    path = search.directory / "search.json"
    if last is None:
        write_json(path, record)
        raise BudgetError(_nothing_holds(search, tried[0][1], path))
    chosen = min(
        (place for place, (_, drop) in tried.items() if drop.limit <= wanted.budget.amount),
        key=lambda place: (points[place].cost, tried[place][0].record["bundle_bytes"]),
    )
    record |= {"chosen": chosen, "units": _units(units, losses, points[chosen])}
    write_json(path, record)
    found, drop = tried[chosen]
    said = (
        f"{found.record['bundle_bytes'] / 1e6:,.1f} MB at {wanted.options.metric} {found.record['value']:.4g}: a drop "
        f"of {wanted.budget.said(drop.value)}, at most {wanted.budget.said(drop.limit)} on new data"
    )
    listener.end("candidates", time.perf_counter() - started, reused=False, notes=(said,))
    plan = overrides_of(units, _choices(units, points[chosen]))
    return Found(recipe=search.with_overrides(plan), record=record, files=found.record["files"])


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


def _texts(stage: Stage, task: str) -> Calibration:
    samples = min(stage.samples, _WRITTEN if task in GENERATION else _ANSWERED)
    return Calibration(source=stage.calibration, samples=samples, tokens=min(stage.tokens, _TOKENS))


def _sensitivity(search: _Search) -> tuple[list[Unit], dict[Key, float]]:
    """Return the units on which the outputs depend, and the loss of each of their choices."""
    from edgepipe.quantizers.modules import module_of
    from edgepipe.quantizers.sensitivity import measure
    from edgepipe.quantizers.texts import batches

    model, stage, listener = search.model, search.stage, search.listener
    texts = _texts(stage, model.info.task)
    module = module_of(model)
    found = batches(model, texts, seed=search.recipe.seed, module=module, progress=listener.progress)
    units = units_of(model, stage, module, found[0])
    grids = {name: getattr(stage, name) for name in ("symmetric", "import_", "method")}
    key = cache_key(
        model.info.fingerprint, model.info.task, grids, asdict(texts), fingerprint(texts), search.recipe.seed
    )
    known, keep = open_losses(search.directory / "sensitivity.jsonl", key, fresh=search.fresh)
    losses = measure(
        module, model.info, model.weights, units, found, known=known, keep=keep, progress=listener.progress
    )
    counted = that_count(units, losses)
    names = {unit.name for unit in counted}
    return counted, {of: loss for of, loss in losses.items() if of[0] in names}


def _costs(search: _Search, units: Sequence[Unit]) -> list[list[float]]:
    """Return what the search makes small: bytes, or ms."""
    if search.wanted.goal == "smallest":
        return bytes_of(units)
    key = cache_key(asdict(search.recipe.target), dict(search.recipe.stages)["compile"].accuracy_level)
    known, keep = open_losses(search.directory / "times.jsonl", key, fresh=search.fresh)
    return times_of(search.model, search.recipe, units, known=known, keep=keep, progress=search.listener.progress)


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Return at most POINTS points at about equal steps of cost, both ends among them."""
    if len(points) <= POINTS:
        return list(points)
    costs = np.array([point.cost for point in points])
    wanted = np.linspace(costs[0], costs[-1], POINTS)
    places = sorted({int(np.abs(costs - cost).argmin()) for cost in wanted})
    return [points[place] for place in places]


def _choices(units: Sequence[Unit], point: Point) -> list[str]:
    return [list(unit.choices)[number] for unit, number in zip(units, point.chosen, strict=True)]


def _candidate(search: _Search, overrides: Sequence[str]) -> _Scored:
    """Build and score the bundle of a plan; one that was scored before isn't built again."""
    recipe = unchecked(search.with_overrides(overrides))
    key = _score_key(search, recipe.to_json())
    if not search.fresh and (kept := read_score(search.directory / "scores", key)) is not None:
        return _Scored(rows=kept[0], record=kept[1])
    work = search.directory / "work"
    compiled = run(search.model, recipe, out=None, runs=work, fresh=False, listener=Inner(search.listener))
    assert not isinstance(compiled, Measured)
    return _score(search, compiled.path, _files(compiled), recipe.to_json())


def unchecked(recipe: Recipe) -> Recipe:
    """Return a recipe without measure, and without the stages' numeric checks: what ships goes through them."""
    stages = ((name, stage) for name, stage in recipe.stages if name != "measure")
    return replace(
        recipe,
        stages=tuple((n, replace(s, check_tokens=0) if hasattr(s, "check_tokens") else s) for n, s in stages),
    )


def _score(search: _Search, bundle: Path, files: Mapping[str, str], recipe: Json) -> _Scored:
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


def _score_key(search: _Search, recipe: Json) -> str:
    info, wanted = search.model.info, search.wanted
    target = asdict(search.recipe.target)
    read = search.stage.reads()  # contents of calibration texts, which the recipe only names
    return cache_key(info.fingerprint, info.task, recipe, read, target, search.data.sha256, asdict(wanted.options))


def _files(bundle: CompiledModel) -> dict[str, str]:
    """Return the hashes of what a bundle computes with: graphs, weights, tokenizer."""
    names = [*bundle.manifest["graphs"].values(), bundle.manifest["weights"]["file"], "tokenizer.json"]
    return {n: bundle.manifest["files"][n]["sha256"] for n in names if n in bundle.manifest["files"]}


def _differing(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    return ", ".join(sorted(n for n in {*ours, *theirs} if ours.get(n) != theirs.get(n))) + " differ"


def _record(
    search: _Search,
    units: Sequence[Unit],
    losses: Mapping[Key, float],
    points: Sequence[Point],
    tried: Mapping[int, tuple[_Scored, Drop]],
    reference: _Scored,
) -> Json:
    """Return what the report shows of a search."""
    from edgepipe.quantizers.outputs import UNITS, kind_of

    wanted, metric = search.wanted, search.wanted.options.described
    fixed = search.model.weights.nbytes - sum(search.model.weights[n].nbytes for unit in units for n in unit.tensors)
    return {
        "max_drop": wanted.budget.amount,
        "relative": wanted.budget.relative,
        "goal": wanted.goal,
        "metric": metric.name,
        "better": metric.better,
        "data": {"name": search.data.name, "sha256": search.data.sha256, "examples": len(reference.rows)},
        "loss_unit": UNITS[kind_of(search.model.info)],
        "fixed_bytes": fixed,
        "float": {key: reference.record[key] for key in ("value", "bundle_bytes", "seconds")},
        "frontier": [_shown(units, point, tried.get(place)) for place, point in enumerate(points)],
        "chosen": None,
        "units": [],
    }


def _shown(units: Sequence[Unit], point: Point, tried: tuple[_Scored, Drop] | None) -> Json:
    """Return a point of the frontier: what it costs, what it may lose, and what its bundle was found to be."""
    nbytes = sum(unit.nbytes(choice) for unit, choice in zip(units, _choices(units, point), strict=True))
    shown: Json = {"cost": point.cost, "loss": point.loss, "bytes": nbytes}
    if tried is None:
        return shown | dict.fromkeys(("value", "drop", "limit", "bundle_bytes", "seconds"))
    scored, drop = tried
    kept = {key: scored.record[key] for key in ("value", "bundle_bytes", "seconds")}
    return shown | kept | {"drop": _number(drop.value), "limit": _number(drop.limit)}


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _units(units: Sequence[Unit], losses: Mapping[Key, float], point: Point) -> list[Json]:
    """Return what each unit got, and what it would lose at its other choices."""
    return [
        {
            "name": unit.name,
            "tensors": list(unit.tensors),
            "choice": choice,
            "bytes": unit.nbytes(choice),
            "choices": [
                {"choice": other, "bytes": unit.nbytes(other), "loss": losses[unit.name, other]}
                for other in unit.choices
            ],
        }
        for unit, choice in zip(units, _choices(units, point), strict=True)
    ]


def _nothing_holds(search: _Search, best: Drop, path: Path) -> str:
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
