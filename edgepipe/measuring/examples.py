"""Read evaluation data: pairs with a score, texts with a label, inputs with references (rows.py reads the files)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from edgepipe.errors import ConfigError
from edgepipe.rows import Columns, Data, rows, short

Example = TypeVar("Example")


@dataclass(frozen=True, slots=True)
class Pair:
    """Hold two texts and how alike people found them."""

    first: str
    second: str
    score: float
    place: str  # file and line, for messages


@dataclass(frozen=True, slots=True)
class Labelled:
    """Hold a text and its label as the file writes it."""

    text: str
    label: str
    place: str  # file and line, for messages


@dataclass(frozen=True, slots=True)
class Asked:
    """Hold an input and every text that would be a right answer."""

    text: str
    references: tuple[str, ...]
    place: str  # file and line of its first appearance, for messages


def read_pairs(data: Data, columns: Columns) -> list[Pair]:
    """Return the pairs: parts `score` (a number), `first`, `second`. At least two, with scores that differ."""
    found = []
    for place, cells in rows(data, columns):
        number = cells["score"]
        try:
            score = float(number)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise ConfigError(
                f"{place}: expected a score in column {columns.places['score']}, but it holds "
                f"{short(number)}: correct it, name the columns with --columns, or say --header if it is one"
            )
        found.append(Pair(cells["first"], cells["second"], score, place))
    if len({pair.score for pair in found}) < 2:
        raise ConfigError(f"{data.name}: expected pairs with different scores, but all are the same: ranks need two")
    return found


def read_labelled(data: Data, columns: Columns) -> list[Labelled]:
    """Return the labelled texts: parts `text` and `label`."""
    return [Labelled(cells["text"], cells["label"], place) for place, cells in rows(data, columns)]


def read_asked(data: Data, columns: Columns) -> list[Asked]:
    """Return inputs with their references, parts `input` and `reference`; lines with the same input are one example.

    A reference in .jsonl may be a list of texts.
    """
    grouped: dict[str, tuple[str, list[str]]] = {}
    for place, cells in rows(data, columns, lists="reference"):
        _, references = grouped.setdefault(cells["input"], (place, []))
        reference = cells["reference"]
        references += [reference] if isinstance(reference, str) else reference
    return [Asked(text, tuple(dict.fromkeys(references)), place) for text, (place, references) in grouped.items()]


def sample(examples: Sequence[Example], limit: int, seed: int) -> list[Example]:
    """Return `limit` of the examples, drawn without replacement and in the file's order; 0 or more than all: all."""
    if not limit or limit >= len(examples):
        return list(examples)
    chosen = np.random.default_rng(seed).permutation(len(examples))[:limit]
    return [examples[i] for i in sorted(chosen.tolist())]
