"""What a search may choose for each matrix, and how a choice is written into a recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from edgepipe.artifacts import TorchModel
from edgepipe.graph.tasks import GENERATION
from edgepipe.numerics.grids import Grid
from edgepipe.quantizers.sensitivity import Key, Unit, readers
from edgepipe.quantizers.texts import Batch
from edgepipe.recipe import Stage
from edgepipe.weights import Weight

# From many bits to few. Groups of 16 at 2 bits have no fast kernel (docs/quantize.md); at 8 bits scales weigh little.
CHOICES = ("16", "8/32", "8/128", "4/16", "4/32", "4/64", "4/128", "2/32", "2/64")
_ENCODER = re.compile(r"(^|\.)encoder\.")  # of an encoder-decoder: what reads the source at once
_SIXTEEN = Grid(bits=16, group=32, symmetric=True)


def grid_of(choice: str, *, symmetric: bool) -> Grid:
    """Return the grid that a choice names."""
    bits, _, group = choice.partition("/")
    return Grid(bits=int(bits), group=int(group), symmetric=symmetric) if group else _SIXTEEN


def units_of(model: TorchModel, stage: Stage, module: Any, batch: Batch) -> list[Unit]:
    """Return the matrices that the stage `quantize` puts on grids, those that read one tensor together.

    Together are only those that came stored alike, so that all of them keep their grid or none. Of choices that keep
    it, one is left: the narrowest.
    """
    matrices = [
        name for name in model.weights if stage.stored(model.weights[name], grid_of("2/32", symmetric=True)).grid
    ]
    groups: list[tuple[str, ...]] = []
    for group in readers(module, matrices, batch):
        alike: dict[tuple[str, str | None, bool], list[str]] = {}
        for name in group:
            weight = model.weights[name]
            alike.setdefault((weight.dtype, weight.grid, name in model.info.embeddings), []).append(name)
        groups += [tuple(names) for names in alike.values()]
    return [_unit([model.weights[name] for name in group], stage) for group in groups]


def _unit(weights: Sequence[Weight], stage: Stage) -> Unit:
    symmetric = stage.symmetric and stage.method != "hqq"
    choices: dict[str, Mapping[str, Weight]] = {}
    kept = None
    for choice in CHOICES:
        stored = {w.name: stage.stored(w, grid_of(choice, symmetric=symmetric)) for w in weights}
        if all(stored[w.name] is w for w in weights):
            kept = choice, stored
        else:
            choices[choice] = stored
    if kept is not None:
        choices[kept[0]] = kept[1]
    name = weights[0].name if len(weights) == 1 else f"{weights[0].name} and {len(weights) - 1} more"
    return Unit(name=name, choices=choices)


def at_once(task: str, name: str) -> bool:
    """Say whether a matrix meets all tokens of a text in one run, and never one alone."""
    return task not in GENERATION or bool(_ENCODER.search(name))


def that_count(units: Sequence[Unit], losses: Mapping[Key, float]) -> list[Unit]:
    """Return the units on which the outputs depend: a head that isn't asked for loses nothing at any width."""
    return [unit for unit in units if any(losses[unit.name, choice] > 0 for choice in unit.choices)]


def overrides_of(units: Sequence[Unit], chosen: Sequence[str]) -> tuple[str, ...]:
    """Return the plan as `quantize.overrides` has it: one entry a matrix, in the order of the units."""
    return tuple(
        f"{escaped(name)}={choice}" for unit, choice in zip(units, chosen, strict=True) for name in unit.tensors
    )


def escaped(name: str) -> str:
    """Return a name as a pattern that matches it alone."""
    return name.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]")
