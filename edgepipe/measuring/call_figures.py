"""Sum up calls of a bundle that embeds or classifies: per shape a median with its interval, and what limits.

The figures of one shape are named like "8x128": batch 8 of 128 tokens. What is compared, with another bundle or with
the speed index, is each call against what ran beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import median
from typing import Any

from edgepipe.artifacts import Json
from edgepipe.measuring.calls import call_name
from edgepipe.measuring.intervals import FLAG_ABOVE, median_over_blocks, ratio_over_blocks, spread
from edgepipe.measuring.limits import call_limit

_SEED = 0  # of the bootstrap: the same samples give the same intervals


def call_figures(manifest: Mapping[str, Any], blocks: Sequence[Json], peaks: Json | None, arithmetic: str) -> Json:
    """Return what is particular to calls of one bundle; without `peaks` no limits. figures.py has the rest."""
    shapes = [(batch, tokens) for batch, tokens in blocks[0]["shapes"]]
    spreads, intervals, indexed, rows, limits = {}, {}, {}, [], {}
    for batch, tokens in shapes:
        name = call_name(batch, tokens)
        turns = [[median(times) for times in whole_calls(block, name)] for block in blocks]
        found = median_over_blocks(turns, seed=_SEED)
        spreads[name] = spread(turns)
        intervals[name] = {"low": found.low, "high": found.high}
        quotients = [
            [t / i for t, i in zip(_flat(whole_calls(block, name)), _flat(block["index_ms"][name]), strict=True)]
            for block in blocks
        ]
        indexed[name] = median_over_blocks(quotients, seed=_SEED).to_json()
        run_ms = median(_flat(chain.from_iterable(block["calls"][name]["run_ms"] for block in blocks)))
        rows.append(
            {
                "batch": batch,
                "tokens": tokens,
                "ms": found.value,
                "low": found.low,
                "high": found.high,
                "spread": spreads[name],
                "tokenize_ms": median(_flat(chain.from_iterable(b["calls"][name]["tokenize_ms"] for b in blocks))),
                "run_ms": run_ms,
                "per_second": 1e3 * batch / found.value,
                "tokens_per_second": None if tokens is None else 1e3 * batch * tokens / found.value,
            }
        )
        if peaks is not None and tokens is not None and manifest["model"].get("layers"):
            limits[name] = call_limit(manifest, batch, tokens, peaks, arithmetic, run_ms).to_json()
    figures = {
        "calls": rows,
        "intervals": intervals,
        "per_index": indexed,
        "spread": spreads,
        "flagged": [name for name, value in spreads.items() if value > FLAG_ABOVE],
    }
    if peaks is None:
        return figures
    return figures | {
        "limits": {
            "precision": arithmetic,
            "threads": peaks["threads"],
            "read_bytes_per_second": peaks["read_bytes_per_second"],
            "multiply_adds_per_second": peaks["multiply_adds_per_second"][arithmetic],
            "calls": limits,
        },
    }


def call_ratios(ours: Sequence[Json], theirs: Sequence[Json]) -> Json:
    """Return ours ÷ theirs of every shape, over calls that stood side by side, with interval and verdict."""
    return {
        name: ratio_over_blocks(
            [_flat(whole_calls(block, name)) for block in ours],
            [_flat(whole_calls(block, name)) for block in theirs],
            seed=_SEED,
        ).to_json(bigger_is_better=False)
        for name in ours[0]["calls"]
    }


def call_index(blocks: Sequence[Json]) -> list[list[list[float]]]:
    """Return the index samples of every block, one list per turn."""
    return [[_flat(turn) for turn in zip(*block["index_ms"].values(), strict=True)] for block in blocks]


def whole_calls(block: Json, name: str) -> list[list[float]]:
    """Return the ms of whole calls of one shape, a list per turn."""
    parts = block["calls"][name]
    return [
        [a + b for a, b in zip(tokenize, run, strict=True)]
        for tokenize, run in zip(parts["tokenize_ms"], parts["run_ms"], strict=True)
    ]


def _flat(turns: Any) -> list[float]:
    return list(chain.from_iterable(turns))
