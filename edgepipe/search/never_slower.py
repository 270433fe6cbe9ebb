"""Never slower: a matrix stays on its grid only if its product is faster on this machine, or the size goal needs it.

The product with each kind of matrix (shape and grid) is timed in turn with the float one (measuring/kernel_times.py), a
step of decoding and a prompt apart:

    decoder     the step decides, since a token at a time is most of the work; what a prompt loses is said
    encoder     texts decide: it never runs one row

A matrix goes back to 16 bits when it is clearly slower: the interval of the ratio lies above 1.05. The kind that wastes
most time for its bytes is first, as long as the target's `shipped_ratio` allows it. What is undone becomes
`quantize.overrides`, so the stages stay free of clocks and a recipe repeats the result.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgepipe.artifacts import Json, TorchModel
from edgepipe.errors import ConfigError
from edgepipe.measuring.kernel_times import STEP, TEXT, Kind, Raced, race
from edgepipe.pipeline import Listener
from edgepipe.quantizers.row_options import by_token
from edgepipe.recipe import Recipe
from edgepipe.search.units import at_once, escaped, grid_of
from edgepipe.weights import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Hold what was found of one kind of matrix."""

    kind: Kind
    tensors: tuple[str, ...]
    raced: tuple[Raced, ...]  # what decides is the first
    extra_bytes: int  # that all of them cost in 16 bits
    undone: bool
    why: str

    @property
    def wasted_ms(self) -> float:
        """Return the time that the grid costs for one run of all of them."""
        return (self.raced[0].ms - self.raced[0].float_ms) * len(self.tensors)

    def to_json(self) -> Json:
        """Return what the report shows."""
        races = [
            {"rows": r.rows, "ms": r.ms, "float_ms": r.float_ms, "ratio": r.ratio.to_json(bigger_is_better=False)}
            for r in self.raced
        ]
        return {
            "shape": list(self.kind.shape),
            "stored": self.kind.dtype,
            "bits_per_weight": 8 * self.kind.nbytes / (self.kind.shape[0] * self.kind.shape[1]),
            "tensors": list(self.tensors),
            "races": races,
            "undone": self.undone,
            "why": self.why,
        }


def never_slower(model: TorchModel, recipe: Recipe, *, listener: Listener) -> tuple[Recipe, list[Json]]:
    """Return the recipe without grids that make this machine slower, and what was found of each kind of matrix.

    Raises ConfigError when the recipe's grids aren't known before its stages run, or have no product of their own.
    """
    name, stage = recipe.stages[0]
    if name != "quantize" or stage.activations != "none" or by_token(stage):
        raise ConfigError(
            "--never-slower times the products of weight-only grids of MODEL itself: it goes neither with "
            "quantize.activations, nor with --bits 1.58, nor with stages before quantize"
        )
    listener.begin("never slower", 1, 1)
    started = time.perf_counter()
    judged = _judge(model, recipe, listener)
    judged = _within_size(judged, _spare(model, recipe))
    plan = tuple(f"{escaped(name)}=16" for one in judged if one.undone for name in one.tensors)
    stages = tuple((n, replace(s, overrides=(*s.overrides, *plan)) if n == "quantize" else s) for n, s in recipe.stages)
    notes = [f"{_named(one)}: {one.why}" for one in judged]
    listener.end("never slower", time.perf_counter() - started, reused=False, notes=notes)
    return replace(recipe, stages=stages), [one.to_json() for one in judged]


def _judge(model: TorchModel, recipe: Recipe, listener: Listener) -> list[Judged]:
    """Time every kind of matrix once."""
    kinds: dict[tuple[Kind, bool], list[tuple[Weight, Weight]]] = {}
    stage = dict(recipe.stages)["quantize"]
    for name in model.weights:
        weight = model.weights[name]
        stored = stage.stored(weight, stage.plan(weight, model.info.embeddings))
        if stored.grid is None or name in model.info.embeddings:  # a table is gathered from: no product to time
            continue
        whole = at_once(model.info.task, name)
        floats = stage.stored(weight, grid_of("16", symmetric=True))
        kinds.setdefault((Kind.of(stored), whole), []).append((stored, floats))
    planned = sum(stored.nbytes for pairs in kinds.values() for stored, _ in pairs)
    rest = planned, 4 * sum(stored.size for pairs in kinds.values() for stored, _ in pairs)
    engine = recipe.target.onnxruntime
    level = dict(recipe.stages)["compile"].accuracy_level
    found = []
    for number, ((kind, whole), pairs) in enumerate(kinds.items()):
        listener.progress("products", number, len(kinds))
        with tempfile.TemporaryDirectory() as folder:
            raced = race(
                *pairs[0],
                rows=(TEXT,) if whole else (STEP, TEXT),
                rest=rest,
                accuracy_level=level if level >= 0 else engine.accuracy_level,
                many_rows=whole,
                threads=engine.threads,
                folder=Path(folder),
            )
        extra = sum(floats.nbytes - stored.nbytes for stored, floats in pairs)
        tensors = tuple(stored.name for stored, _ in pairs)
        found.append(_judged(kind, tensors, tuple(raced), extra))
    return found


def _judged(kind: Kind, tensors: tuple[str, ...], raced: tuple[Raced, ...], extra: int) -> Judged:
    first = raced[0]
    said = ", ".join(f"{one.ratio.value:.2f} times the float one's time {_rows(one.rows)}" for one in raced)
    if first.slower:
        why = f"undone, since it takes {said}"
    elif any(one.slower for one in raced):
        why = f"kept: it takes {said}, and a token at a time is most of the work"
    else:
        why = f"kept: it takes {said}"
    return Judged(kind=kind, tensors=tensors, raced=raced, extra_bytes=extra, undone=first.slower, why=why)


def _within_size(judged: Sequence[Judged], spare: float) -> list[Judged]:
    """Undo what fits into the bytes that are left, the most wasteful for its bytes first; the rest is kept."""
    kept: set[Kind] = set()
    slow = [one for one in judged if one.undone]
    for one in sorted(slow, key=lambda one: -one.wasted_ms / max(1, one.extra_bytes)):
        if one.extra_bytes > spare:
            kept.add(one.kind)
        else:
            spare -= one.extra_bytes
    return [
        replace(one, undone=False, why=one.why.replace("undone, since", "kept, since the size goal needs it, though"))
        if one.kind in kept
        else one
        for one in judged
    ]


def _spare(model: TorchModel, recipe: Recipe) -> float:
    """Return the bytes that the target's ratio of shipped to float32 weights leaves; infinite without one."""
    ratio = recipe.target.budgets.shipped_ratio
    if ratio is None:
        return float("inf")
    stage = dict(recipe.stages)["quantize"]
    planned = (stage.stored(w, stage.plan(w, model.info.embeddings)) for w in model.weights.values())
    return float(ratio * 4 * model.weights.parameters - sum(weight.nbytes for weight in planned))


def _rows(rows: int) -> str:
    return "for a token" if rows == STEP else f"for {rows}"


def _named(one: Judged) -> str:
    out, n_in = one.kind.shape
    return f"{len(one.tensors)} of {out} × {n_in} in {one.kind.dtype}"
