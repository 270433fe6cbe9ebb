"""Engine auto: build the bundle with every engine of the target, let them take turns on this machine, ship the faster.

What decides is one figure per turn (measuring/figures.py, `whole_ms`), ours ÷ theirs where both stood side by side:

    generates    a prompt and the tokens after it
    else         its calls, every shape counting the same

An engine that isn't installed, or can't build the model, is left out and its sentence kept. Where the interval of the
ratio holds 1, the target's first engine ships. What was decided becomes `compile.engine`, so the stages stay free of
clocks and a recipe repeats the result; figures lie in run.json, outside the bundle.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgepipe.artifacts import CompiledModel, Json, TorchModel
from edgepipe.calibration import open_text
from edgepipe.errors import ConfigError, EdgepipeError, StageError, TargetError
from edgepipe.measuring.call_figures import whole_calls
from edgepipe.measuring.figures import ratios, whole_ms
from edgepipe.measuring.intervals import median_over_blocks, ratio_over_blocks
from edgepipe.measuring.run import describe_machine, fitting, take_blocks
from edgepipe.pipeline import Listener, forget_stages, run_stages
from edgepipe.recipe import Recipe
from edgepipe.stages.measure import Measure
from edgepipe.target import AUTO

_COMPILE = "compile"
_SEED = 0  # of the bootstrap: the same samples give the same intervals
_FIRST, _SECOND = "baseline", "bundle"  # what take_blocks calls two bundles


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Hold what came out: the recipe with its engine, what a report shows, the bundle that doesn't ship."""

    recipe: Recipe
    record: Json
    other: CompiledModel | None


def engine_of(recipe: Recipe) -> str:
    """Return the engine that a recipe asks for: one of ENGINES, or AUTO."""
    return str(dict(recipe.stages)[_COMPILE].engine or recipe.target.engines[0])


def with_engine(recipe: Recipe, engine: str) -> Recipe:
    """Return the recipe with another engine."""
    stages = tuple((n, replace(s, engine=engine) if n == _COMPILE else s) for n, s in recipe.stages)
    return replace(recipe, stages=stages)


def choose_engine(model: TorchModel, recipe: Recipe, *, runs: Path, fresh: bool, listener: Listener) -> Chosen:
    """Build with every engine of the target, measure where there are two, and return what ships.

    Finished stages stay in the run's directory, where the run of the chosen recipe finds them. Raises what the first
    engine raised when none can build the model.
    """
    assert engine_of(recipe) == AUTO
    if fresh:
        forget_stages(model, recipe, runs=runs)
    built, left_out = _build(model, recipe, runs, listener)
    if len(built) == 1:
        (engine,) = built
        why = _alone(engine, left_out)
        record: Json = {"chosen": engine, "why": why, "left_out": left_out, "compared": None, "sides": {}}
        record |= {"ratios": {}, "machine": None, "blocks": 0, "turns": 0}
        return Chosen(recipe=with_engine(recipe, engine), record=record, other=None)
    listener.begin("engines", 1, 1)
    started = time.perf_counter()
    raced = _race({engine: made.path for engine, made in built.items()}, recipe, listener)
    listener.end("engines", time.perf_counter() - started, reused=False, notes=[raced["why"]])
    (other,) = (made for engine, made in built.items() if engine != raced["chosen"])
    record = {**raced, "left_out": left_out}
    return Chosen(recipe=with_engine(recipe, raced["chosen"]), record=record, other=other)


def _build(
    model: TorchModel, recipe: Recipe, runs: Path, listener: Listener
) -> tuple[dict[str, CompiledModel], dict[str, str]]:
    """Return the bundle of every engine that can build one, and why others can't."""
    built: dict[str, CompiledModel] = {}
    failed: dict[str, EdgepipeError] = {}
    recipes = {engine: with_engine(recipe, engine) for engine in recipe.target.engines}
    for engine, own in recipes.items():
        try:
            dict(own.stages)[_COMPILE].meets(recipe.target)
        except (TargetError, ConfigError) as error:  # an option of the other engine too
            failed[engine] = error
    usable = [engine for engine in recipes if engine not in failed]
    names = [name for name, _ in recipe.stages]
    if usable:  # an error of an earlier stage is no engine's
        before = names[names.index(_COMPILE) - 1]
        run_stages(model, recipes[usable[0]], runs=runs, fresh=False, listener=listener, last=before)
    for engine in usable:
        try:
            made = run_stages(model, recipes[engine], runs=runs, fresh=False, listener=listener, last=_COMPILE)
        except (StageError, TargetError) as error:
            failed[engine] = error
            continue
        assert isinstance(made, CompiledModel)
        built[engine] = made
    if not built:
        raise failed[recipe.target.engines[0]]
    return built, {engine: str(error) for engine, error in failed.items()}


def _alone(engine: str, left_out: Mapping[str, str]) -> str:
    whys = "; ".join(f"{other} is left out: {sentence}" for other, sentence in left_out.items())
    return f"{engine} ships, not measured against another: " + (whys or "the target has no other engine")


def _race(bundles: Mapping[str, Path], recipe: Recipe, listener: Listener) -> Json:
    """Let two bundles take turns; return which ships, why, and the figures of both."""
    first, second = bundles
    stage = dict(recipe.stages).get("measure") or Measure()
    paths = {_FIRST: bundles[first], _SECOND: bundles[second]}
    plan = fitting(paths, stage.plan(recipe.target.onnxruntime.threads))
    total, heard = plan.blocks * plan.turns, iter(range(plan.blocks * plan.turns))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.txt"
        file.write_text(open_text(stage.text, purpose="evaluation"), encoding="utf-8")
        called = {_FIRST: f"the bundle of {first}", _SECOND: f"the bundle of {second}"}

        def say(what: str) -> None:
            listener.progress(what, next(heard), total)

        samples = take_blocks(paths, file, plan, say, called=called)
    found = judge({first: samples[_FIRST], second: samples[_SECOND]})
    for engine, bundle in bundles.items():
        found["sides"][engine]["bundle_bytes"] = sum(file.stat().st_size for file in bundle.iterdir())
    machine = describe_machine(plan.threads, bundles)
    return {**found, "machine": machine, "blocks": plan.blocks, "turns": plan.turns}


def judge(samples: Mapping[str, Sequence[Json]]) -> Json:
    """Return which of two engines ships, why, and the figures of both, from blocks of each, the preferred first."""
    (first, theirs), (second, ours) = samples.items()
    whole = ratio_over_blocks([whole_ms(b) for b in ours], [whole_ms(b) for b in theirs], seed=_SEED)
    judged = whole.to_json(bigger_is_better=False)
    chosen = second if judged["verdict"] == "better" else first
    sides = {engine: _figures(blocks) for engine, blocks in samples.items()}
    return {
        "chosen": chosen,
        "why": _why(sides, judged, chosen, what=_work(ours[0])),
        "compared": f"{second} ÷ {first}",
        "sides": sides,
        "ratios": {"whole_ms": judged, **ratios(ours, theirs)},
        "samples": dict(samples),
    }


def _figures(blocks: Sequence[Json]) -> Json:
    """Return the medians of one side, ms, under the names of their ratios."""
    turns = {"whole_ms": [whole_ms(block) for block in blocks]}
    if "calls" in blocks[0]:
        for shape in blocks[0]["calls"]:
            calls = [whole_calls(block, shape) for block in blocks]
            turns[shape] = [[time for turn in block for time in turn] for block in calls]
    else:
        turns["ttft_ms"] = [block["ttft_ms"] for block in blocks]
        turns["token_ms"] = [[time for turn in block["token_ms"] for time in turn] for block in blocks]
    return {name: median_over_blocks(times, seed=_SEED).value for name, times in turns.items()}


def _work(block: Json) -> str:
    if "calls" in block:
        return "a call (the geometric mean over shapes)"
    return f"a prompt of {block['prompt_tokens'][-1]} tokens and {block['bursts'] * block['burst_tokens']} after it"


def _why(sides: Mapping[str, Json], judged: Json, chosen: str, *, what: str) -> str:
    first, second = sides
    other = second if chosen == first else first
    found = (
        f"{what}: {sides[chosen]['whole_ms']:,.1f} ms, with {other} {sides[other]['whole_ms']:,.1f} ms; {second} ÷ "
        f"{first} {judged['value']:.2f} ({judged['low']:.2f} to {judged['high']:.2f})"
    )
    if judged["verdict"] == "tie":
        return f"{chosen} ships, since neither is clearly faster and it is the target's first; {found}"
    return f"{chosen} ships, the faster one; {found}"
