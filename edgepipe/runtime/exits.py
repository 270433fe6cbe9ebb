"""Run an encoder whose texts may leave between its layers: part after part, and fewer rows in each.

    part_0   layers up to the first exit: answers, gate (log odds that they are right already), next_states
    part_i   the states of the rows that stayed → the same; the last part has neither gate nor states

A row leaves where its gate says more than the threshold, log odds > ln(t / (1 − t)). At 1 no row does, at 0 all do at
the first exit. Rows that left are in no later run, and where none is left the later parts don't run at all. While all
stay, arrays keep their shape, so that what comes out at 1 is what one graph gives.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgepipe.errors import ConfigError
from edgepipe.runtime.growing import Graph

GATE = "gate"  # a part's output [rows] float32
PART = "part_"  # and a number: the name of the graph of the layers up to an exit
USUAL_THRESHOLD = 0.5  # leave where that is likelier right than not: what gates are trained to say


def has_exits(manifest: Mapping[str, Any]) -> bool:
    """Say whether a bundle is of a model whose texts, or a decoder's tokens, may leave between its layers."""
    return bool(manifest["model"].get("exits"))


def check_threshold(threshold: object, manifest: Mapping[str, Any]) -> float:
    """Return the threshold that counts; ConfigError when it is no share, or the bundle has no exits.

    Of a decoder all tokens go through all layers unless somebody asks for less: what one loses, the next ones build on.
    """
    if threshold is None:
        return USUAL_THRESHOLD if "model" in manifest["ends"] else 1.0
    if not has_exits(manifest):
        raise ConfigError("exit_threshold: this bundle's model has no exits, all of it is run: leave it out")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise ConfigError(f"exit_threshold must be a number from 0 to 1, but is {threshold!r}")
    return float(threshold)


class LeavingGraph:
    """Offer what one graph offers, over the parts of a model with exits. Safe for concurrent callers."""

    def __init__(self, parts: Sequence[Graph], depths: Sequence[int], threshold: float) -> None:
        """Join opened parts; `depths` are the layers behind each, all of them last."""
        self._parts = parts
        self._depths = depths
        self._least = math.inf if threshold == 1 else -math.inf
        if 0 < threshold < 1:
            self._least = math.log(threshold / (1 - threshold))
        self._run: Counter[int] = Counter()
        self._counting = threading.Lock()

    @property
    def rows_by_depth(self) -> dict[int, int]:
        """Return how many rows left after how many layers, since the graph was opened."""
        with self._counting:
            return {depth: self._run[depth] for depth in self._depths}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name, each row's from where it left."""
        mask = feeds["attention_mask"]
        rows = np.arange(len(mask))  # that are still there
        answers: dict[str, np.ndarray] = {}
        for depth, part in zip(self._depths, self._parts, strict=True):
            found = part.run(feeds)
            states, gate = found.pop("next_states", None), found.pop(GATE, None)
            stays = np.zeros(len(rows), bool) if gate is None else ~(gate > self._least)
            for name, value in found.items():
                whole = answers.setdefault(name, np.empty((len(mask), *value.shape[1:]), value.dtype))
                whole[rows[~stays]] = value[~stays]
            with self._counting:
                self._run[depth] += int((~stays).sum())
            if not stays.any() or states is None:
                break
            seen = feeds["attention_mask"]
            if not stays.all():
                rows = rows[stays]
                # Padding on the right was for rows that have left
                longest = int(np.flatnonzero(mask[rows].any(0)).max(initial=0)) + 1
                states, seen = states[stays, :longest], mask[rows, :longest]
            feeds = {"states": np.ascontiguousarray(states), "attention_mask": np.ascontiguousarray(seen)}
        return answers
