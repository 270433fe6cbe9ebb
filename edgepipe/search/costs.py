"""What the choices of a plan cost: the bytes of their matrices, or the time of their products on this machine.

Times are those of measuring/kernel_times.py: one row for a decoder, a text of 128 tokens for what reads a text at once.
They are added up; everything beside products is the same in every plan. An embedding counts where it is the output head
as well, as in most small decoders; where rows are only gathered it costs no time. Each kind of matrix (shape and grid)
is timed once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from edgepipe.artifacts import TorchModel
from edgepipe.graph.tasks import GENERATION
from edgepipe.measuring.kernel_times import STEP, TEXT, Kind, race
from edgepipe.quantizers.sensitivity import Key, Unit
from edgepipe.recipe import Recipe
from edgepipe.search.units import at_once
from edgepipe.weights import Weight

_TIE = 1e-9  # ms that a byte counts: of two plans that take as long, the smaller one


def bytes_of(units: Sequence[Unit]) -> list[list[float]]:
    """Return the bytes of every choice of every unit."""
    return [[float(unit.nbytes(choice)) for choice in unit.choices] for unit in units]


def times_of(
    model: TorchModel,
    recipe: Recipe,
    units: Sequence[Unit],
    *,
    known: Mapping[Key, float],
    keep: Callable[[Key, float], None],
    progress: Callable[[str, int, int], None],
) -> list[list[float]]:
    """Return the ms of every choice of every unit; `known` kinds aren't timed again, `keep` gets each new one."""
    found = dict(known)
    kinds = {
        _kind(model, weight): weight for unit in units for choice in unit.choices.values() for weight in choice.values()
    }
    rest = 0, 4 * sum(model.weights[name].size for unit in units for name in unit.tensors)
    level = dict(recipe.stages)["compile"].accuracy_level
    engine = recipe.target.onnxruntime
    for number, (kind, weight) in enumerate(kinds.items()):
        progress("products", number, len(kinds))
        if kind in found or _gathered(model, weight.name):
            continue
        whole = at_once(model.info.task, weight.name)
        with tempfile.TemporaryDirectory() as folder:
            (raced,) = race(
                weight,
                model.weights[weight.name],
                rows=(TEXT if whole else STEP,),
                rest=(rest[1] * weight.nbytes // (4 * weight.size), rest[1]),
                accuracy_level=level if level >= 0 else engine.accuracy_level,
                many_rows=whole,
                threads=engine.threads,
                folder=Path(folder),
            )
        found[kind] = raced.ms
        keep(kind, raced.ms)
    return [
        [
            sum(found.get(_kind(model, weight), 0.0) + _TIE * weight.nbytes for weight in choice.values())
            for choice in unit.choices.values()
        ]
        for unit in units
    ]


def _kind(model: TorchModel, weight: Weight) -> Key:
    """Name what decides the time of a product with a matrix, and which work it does."""
    kind = Kind.of(weight)
    work = "gathered" if _gathered(model, weight.name) else at_once(model.info.task, weight.name)
    return f"{kind.shape[0]}x{kind.shape[1]} {work}", f"{kind.dtype} {kind.grid} {kind.nbytes}"


def _gathered(model: TorchModel, name: str) -> bool:
    """Say whether rows of a weight are only looked up."""
    return name in model.info.embeddings and model.info.task not in GENERATION
