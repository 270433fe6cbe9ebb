"""The models that a search chooses among: the whole one, and where the recipe prunes, those pruned by half and in full.

    loss of a plan = distance(pruned model, whole model) + Σ what each matrix of it loses on its grid

Both are distances of outputs over the same calibration rows (quantizers/outputs.py), so plans of all branches stand on
one frontier: what no other plan beats in cost and loss, whichever model it is of.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe.artifacts import TorchModel
from edgepipe.errors import ConfigError
from edgepipe.graph.tasks import GENERATION
from edgepipe.numerics.knapsack import Point, frontier
from edgepipe.pipeline import Listener, lend_stage, run_stages
from edgepipe.quantizers.sensitivity import Key, Unit
from edgepipe.quantizers.texts import Batch, Calibration, fingerprint
from edgepipe.recipe import Recipe, Stage, stage_options
from edgepipe.rows import Data
from edgepipe.search.asked import Wanted
from edgepipe.search.costs import bytes_of, times_of
from edgepipe.search.kept import open_losses
from edgepipe.search.units import overrides_of, that_count, units_of
from edgepipe.store import cache_key

PRUNE = "prune"
SHARES = (0.0, 0.5, 1.0)  # of prune.ratio; each is cut, recovered and measured by itself
POINTS = 33  # of the frontier, at equal steps of cost: halving them takes five bundles, beside those at both ends
# Calibration rows, of a model that predicts at every token and of one that answers once a text; each choice runs them
_WRITTEN, _ANSWERED, _TOKENS = 16, 64, 64
_PRUNED: Key = ("", "pruned")  # the key of what pruning alone costs, among those of matrices


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """Hold one of the models, and what its matrices may become."""

    ratio: float  # of what is pruned
    recipe: Recipe
    runs: Path  # where its stages are kept
    model: TorchModel
    loss: float  # of what is pruned
    units: tuple[Unit, ...]
    losses: Mapping[Key, float]

    @property
    def fixed_bytes(self) -> int:
        """Return the bytes of weights that no plan changes."""
        weights = self.model.weights
        return weights.nbytes - sum(weights[name].nbytes for unit in self.units for name in unit.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Hold a point of the frontier: a branch, and a choice for each of its units."""

    branch: Branch
    chosen: tuple[str, ...]
    cost: float
    loss: float

    @property
    def recipe(self) -> Recipe:
        """Return the recipe that gives its bundle."""
        overrides = overrides_of(self.branch.units, self.chosen)
        recipe = self.branch.recipe
        stage = replace(dict(recipe.stages)["quantize"], overrides=overrides)
        return replace(recipe, stages=tuple((n, stage if n == "quantize" else s) for n, s in recipe.stages))

    @property
    def nbytes(self) -> int:
        """Return the bytes of all its weights."""
        chosen = zip(self.branch.units, self.chosen, strict=True)
        return self.branch.fixed_bytes + sum(unit.nbytes(choice) for unit, choice in chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Hold the texts that every branch reads, and the module of the whole model."""

    whole: Any
    texts: Calibration
    batches: Sequence[Batch]


def check_pruning(recipe: Recipe, data: Data) -> None:
    """Refuse a stage `prune` whose options a search can't vary, or that learns from what the drop is measured on."""
    stage = dict(recipe.stages).get(PRUNE)
    if stage is None:
        return
    if recipe.stages[0][0] != PRUNE:
        raise ConfigError("--max-drop: it prunes before quantize: put prune first in the recipe's stages")
    for name in ("ffn", "ffn_widths", "kv_heads", "hidden", "layers", "decoder_layers", "sparsity", "pattern"):
        if getattr(stage, name):
            raise ConfigError(f"--max-drop: of pruning it searches the ratio alone: leave prune.{name} out")
    if stage.data and stage.reads()["data"] == data.sha256:
        raise ConfigError(
            f"--max-drop: prune.data is {stage.data}, on which the drop is measured: what was learned from it would "
            "look better there than elsewhere, so give another file"
        )


def branches(search: Search, heard: Listener) -> list[Branch]:
    """Return the branches, each measured; those that round to a model that is there already are left out."""
    from edgepipe.quantizers.modules import module_of
    from edgepipe.quantizers.texts import batches

    texts = texts_of(search.stage, search.model.info.task)
    whole = module_of(search.model)
    batched = batches(search.model, texts, seed=search.recipe.seed, module=whole, progress=search.listener.progress)
    rows = _Rows(whole=whole, texts=texts, batches=batched)
    found: list[Branch] = []
    shapes = []
    for ratio, recipe in _recipes(search.recipe):
        runs = search.directory / (f"pruned-{ratio:g}" if ratio else "work")
        model = search.model
        if ratio:
            model = _pruned(search, recipe, runs, heard)
        shape = {name: model.weights[name].shape for name in model.weights}
        if shape in shapes:
            continue
        shapes.append(shape)
        found.append(_branch(search, (ratio, recipe, runs), model, rows))
    return found


def _recipes(recipe: Recipe) -> Iterator[tuple[float, Recipe]]:
    stage = dict(recipe.stages).get(PRUNE)
    without = tuple((name, one) for name, one in recipe.stages if name != PRUNE)
    yield 0.0, replace(recipe, stages=without)
    for share in SHARES[1:]:
        if stage is not None and stage.ratio:
            cut = replace(stage, ratio=share * stage.ratio)
            yield cut.ratio, replace(recipe, stages=((PRUNE, cut), *without))


def _pruned(search: Search, recipe: Recipe, runs: Path, heard: Listener) -> TorchModel:
    """Return the model that the stage `prune` of a recipe gives; it is kept for the bundles of its branch."""
    found = run_stages(search.model, recipe, runs=runs, fresh=search.fresh, listener=heard, last=PRUNE)
    assert isinstance(found, TorchModel)
    return found


def texts_of(stage: Stage, task: str) -> Calibration:
    """Return the texts over which losses are measured: as calibration has them, but few."""
    samples = min(stage.samples, _WRITTEN if task in GENERATION else _ANSWERED)
    return Calibration(source=stage.calibration, samples=samples, tokens=min(stage.tokens, _TOKENS))


def _branch(search: Search, branch: tuple[float, Recipe, Path], model: TorchModel, rows: _Rows) -> Branch:
    """Measure what pruning lost, and what each matrix of what is left loses on each grid."""
    from edgepipe.quantizers.modules import module_of
    from edgepipe.quantizers.sensitivity import apart, measure

    ratio, recipe, runs = branch
    stage, listener = search.stage, search.listener
    prune = dict(recipe.stages).get(PRUNE)
    module = rows.whole if prune is None else module_of(model)
    units = units_of(model, stage, module, rows.batches[0])
    grids = {name: getattr(stage, name) for name in ("symmetric", "import_", "method")}
    texts = asdict(rows.texts), fingerprint(rows.texts)
    info = search.model.info
    own: tuple[Any, ...] = () if prune is None else (stage_options(prune), prune.reads())
    key = cache_key(info.fingerprint, info.task, grids, *texts, search.recipe.seed, *own)
    path = search.directory / ("sensitivity.jsonl" if prune is None else f"sensitivity-{ratio:g}.jsonl")
    known, keep = open_losses(path, key, fresh=search.fresh)
    lost = 0.0
    if prune is not None:
        if _PRUNED not in known:
            keep(_PRUNED, apart(module, rows.whole, model.info, rows.batches))
            known, keep = open_losses(path, key, fresh=False)
        lost = known[_PRUNED]
    losses = measure(
        module, model.info, model.weights, units, rows.batches, known=known, keep=keep, progress=listener.progress
    )
    counted = that_count(units, losses)
    names = {unit.name for unit in counted}
    return Branch(
        ratio=ratio,
        recipe=recipe,
        runs=runs,
        model=model,
        loss=lost,
        units=tuple(counted),
        losses={of: loss for of, loss in losses.items() if of[0] in names},
    )


def plans_of(search: Search, found: Sequence[Branch]) -> list[Plan]:
    """Return the frontier over all branches, from the least loss to the least cost, thinned out."""
    plans = [
        Plan(
            branch=branch,
            chosen=_choices(branch, point),
            cost=point.cost + rest,
            loss=point.loss + branch.loss,
        )
        for branch in found
        for costs, rest in [_costs(search, branch)]
        for point in frontier(costs, [[branch.losses[u.name, c] for c in u.choices] for u in branch.units])
    ]
    return _thinned(unbeaten(plans))


def unbeaten(plans: Sequence[Plan]) -> list[Plan]:
    """Return the plans that no other beats in both, from the least loss down."""
    left: list[Plan] = []
    for plan in sorted(plans, key=lambda one: (one.loss, one.cost)):
        if not left or plan.cost < left[-1].cost:
            left.append(plan)
    return left


def _choices(branch: Branch, point: Point) -> tuple[str, ...]:
    return tuple(list(unit.choices)[number] for unit, number in zip(branch.units, point.chosen, strict=True))


def _costs(search: Search, branch: Branch) -> tuple[list[list[float]], float]:
    """Return what the search makes small, of every choice of every unit and of what is left: bytes, or ms."""
    if search.wanted.goal == "smallest":
        return bytes_of(branch.units), float(branch.fixed_bytes)
    key = cache_key(asdict(search.recipe.target), dict(search.recipe.stages)["compile"].accuracy_level)
    known, keep = open_losses(search.directory / "times.jsonl", key, fresh=search.fresh and not branch.ratio)
    progress = search.listener.progress
    return times_of(branch.model, branch.recipe, branch.units, known=known, keep=keep, progress=progress), 0.0


def _thinned(plans: Sequence[Plan]) -> list[Plan]:
    """Return at most POINTS plans at about equal steps of cost, both ends among them."""
    if len(plans) <= POINTS:
        return list(plans)
    costs = np.array([plan.cost for plan in plans])
    wanted = np.linspace(costs[0], costs[-1], POINTS)
    places = sorted({int(np.abs(costs - cost).argmin()) for cost in wanted})
    return [plans[place] for place in places]


def clear_away(found: Sequence[Branch]) -> None:
    """Remove what bundles were built from; what pruning made stays, for the next search."""
    for branch in found:
        if branch.ratio:
            for run in branch.runs.iterdir():
                for part in run.iterdir():
                    if part.is_dir() and not part.name.endswith(f"-{PRUNE}"):
                        shutil.rmtree(part)
        else:
            shutil.rmtree(branch.runs, ignore_errors=True)


def hand_over(search: Search, plan: Plan) -> None:
    """Give what the chosen model was pruned to, perhaps long trained, to the run that ships it."""
    if plan.branch.ratio:
        lend_stage(search.model, plan.recipe, PRUNE, plan.branch.runs, search.runs)
