"""Elastic students: the widest member of a nested family whose bundle keeps to a number of bytes, or of milliseconds.

A member has the first k of its layers at one nested width and the others at the next: widths never shrink with depth
and differ by a step at most, which did best where mixtures were compared (MatFormer, arXiv:2310.07707). So members have
an order, and halving finds the widest that fits. Each that is asked about is cut out, built and weighed, or timed;
nothing is trained.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgepipe.artifacts import Json, Measured, TorchModel
from edgepipe.errors import BudgetError, ConfigError
from edgepipe.lock import alone
from edgepipe.pipeline import Listener, make_directory, run, run_name
from edgepipe.recipe import Recipe
from edgepipe.search.asked import Room
from edgepipe.search.budget import Inner, furthest, most_asked, unchecked
from edgepipe.stages.measure import Measure
from edgepipe.students.config import nested_widths, read_student

_QUICK = {"blocks": 1, "turns": 3, "tokens": 64, "output_tokens": 10}  # a budget wants one time, not the whole report


def members(layers: int, widths: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the widths of the layers of every member, the narrowest first."""
    found = [(widths[0],) * layers]
    for narrow, wide in itertools.pairwise(widths):
        found += [(narrow,) * (layers - count) + (wide,) * count for count in range(1, layers + 1)]
    return found


def choose_member(
    model: TorchModel, recipe: Recipe, room: Room, *, runs: Path, listener: Listener
) -> tuple[Recipe, Json]:
    """Return the recipe that cuts out the widest member that fits, and the record of what was asked.

    Raises ConfigError for a model that isn't nested, and a recipe that does other things first; BudgetError when the
    narrowest member doesn't fit.
    """
    widths = nested_widths(model.info.config)
    first, stage = recipe.stages[0]
    if not widths or "encoder" not in model.info.config:
        sizes = ", ".join(map(str, widths))
        why = (
            f"a decoder, whose layers have one width: cut it out with prune.ffn, one of {sizes}"
            if widths
            else "no student with nested widths: train one with `edgepipe distill --set distill.nested=[...]`"
        )
        raise ConfigError(f"--budget-{'bytes' if room.nbytes else 'ms'}: {model.info.name} is {why}")
    if first != "prune" or stage.recover_steps:
        raise ConfigError("--budget-bytes and --budget-ms cut MODEL itself, and train nothing: leave other stages out")
    student = read_student(model.info.config)
    layers = student.encoder_shape().layers + (student.decoder_shape().layers if student.decoder else 0)
    family = members(layers, widths)
    directory = runs / run_name(model, recipe) / "elastic"
    make_directory(directory)
    asked: dict[int, float] = {}

    def cut(place: int) -> Recipe:
        chosen = replace(stage, importance="nested", ffn_widths=family[place])
        return replace(recipe, stages=(("prune", chosen), *recipe.stages[1:]))

    def fits(place: int) -> bool:
        listener.progress("members", len(asked), most_asked(len(family)))
        bundle = run(model, unchecked(cut(place)), out=None, runs=directory, fresh=False, listener=Inner(listener))
        assert not isinstance(bundle, Measured)
        asked[place] = _taken(bundle.path, room, recipe, Inner(listener))
        return asked[place] <= room.most

    listener.begin("members", 1, 1)
    started = time.perf_counter()
    with alone(directory / ".lock", str(directory)):
        last = furthest(len(family), fits)
        for path in directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
    if last is None:
        raise BudgetError(
            f"no member of {model.info.name} fits in {room.say(room.most)}: the nearest possible is the narrowest's "
            f"{room.say(asked[0])}"
        )
    said = f"{len(asked)} of {len(family)} were built; {room.say(asked[last])}: {', '.join(map(str, family[last]))}"
    listener.end("members", time.perf_counter() - started, reused=False, notes=(said,))
    unit = "bytes" if room.nbytes else "ms"
    tried = [{"ffn_widths": list(family[place]), unit: value} for place, value in sorted(asked.items())]
    record: Json = {"unit": unit, "most": room.most, "members": len(family), "tried": tried}
    return cut(last), {**record, "ffn_widths": list(family[last])}


def _taken(bundle: Path, room: Room, recipe: Recipe, listener: Listener) -> float:
    """Return the bytes of a bundle, or the time that a budget is about."""
    if room.nbytes:
        return float(sum(file.stat().st_size for file in bundle.iterdir()))
    given = replace(dict(recipe.stages).get("measure") or Measure(), **_QUICK)
    threads = recipe.target.onnxruntime.threads
    figures = given.figures({"bundle": bundle}, default_threads=threads, progress=listener.progress)["bundle"]
    if "ttft_ms" in figures:
        return float(figures["ttft_ms"])
    single = [call for call in figures["calls"] if call["batch"] == 1]
    return float(statistics.median(call["ms"] for call in single[-1:]))
