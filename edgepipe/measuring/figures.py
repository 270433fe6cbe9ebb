"""Sum up the samples of a bundle's blocks: medians with intervals, spreads, what limits; the raw samples stay beside.

p50, p95 and p99 are over all tokens; intervals and spreads of one bundle over turns (the median of a turn's tokens, and
its TTFT).
What is compared, with another bundle or with the speed index, is the fastest token of each burst against what ran
beside it: a burst's fastest token is what the machine can do at that moment, other work left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import median

import numpy as np

from edgepipe.artifacts import Json
from edgepipe.measuring.call_figures import call_figures, call_index, call_ratios, whole_calls
from edgepipe.measuring.intervals import FLAG_ABOVE, median_over_blocks, ratio_over_blocks, spread
from edgepipe.measuring.limits import (
    Limit,
    answer_limit,
    decoder_work,
    has_source,
    on_processor,
    precision,
    prefill_limit,
    source_limit,
    source_work,
    token_limit,
)

_SEED = 0  # of the bootstrap: the same samples give the same intervals
_STARTS = ("import_ms", "load_ms", "first_token_ms", "first_call_ms")  # what a cold start is made of, one per block
_PERPLEXITY = {"perplexity": "perplexity", "perplexity_tokens": "tokens"}
TURN_TIMES: dict[str, Callable[[Json], list[float]]] = {  # a block's figures, one per turn
    "token_ms": lambda block: [median(times) for times in block["token_ms"]],
    "ttft_ms": lambda block: list(block["ttft_ms"]),
}


def side_figures(bundle: Path, blocks: Sequence[Json], alone: Mapping[str, Json]) -> Json:
    """Return the figures of one bundle from its blocks and from what processes of their own found, by their kind."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    weights = manifest["weights"]
    starts = [name for name in _STARTS if name in blocks[0]]
    figures: Json = {
        "manifest_sha256": hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest(),
        "bundle_bytes": sum(f.stat().st_size for f in bundle.iterdir()),
        "weight_bytes": weights["bytes"],
        "bits_per_weight": weights["bits_per_weight"],
        "cache_bytes": (manifest["cache"] or {}).get("bytes"),
        **{name: median(block[name] for block in blocks) for name in starts},
        "cold_start_ms": median(float(sum(block[name] for name in starts)) for block in blocks),
        "memory_after_load_bytes": max(block["memory_after_load_bytes"] for block in blocks),
        "memory_peak_bytes": max(block["memory_peak_bytes"] for block in blocks),
        "memory_without_model_bytes": alone["memory"]["memory_bytes"],
    }
    arithmetic = _arithmetic(bundle, manifest)
    peaks = alone["limits"] if on_processor(manifest) else None
    if takes_calls(blocks):
        figures |= call_figures(manifest, blocks, peaks, arithmetic)
    else:
        figures |= token_figures(blocks)
        if "perplexity" in alone:  # a model that continues a text
            figures |= {key: alone["perplexity"][name] for key, name in _PERPLEXITY.items()}
        if peaks is not None and (manifest["task"] == "text-generation" or has_source(manifest)):
            figures["limits"] = _limits(manifest, arithmetic, peaks, figures, blocks[0])
    return figures | {"samples": list(blocks)}


def _arithmetic(bundle: Path, manifest: Json) -> str:
    """Return the arithmetic of most of a bundle's products: a library's manifest says it, ONNX graphs show it."""
    if "library" in manifest:
        return str(manifest["library"]["arithmetic"])
    return precision(b"".join((bundle / file).read_bytes() for file in manifest["graphs"].values()))


def takes_calls(blocks: Sequence[Json]) -> bool:
    """Say whether blocks are of whole calls (calls.py), not of prompts and tokens (generation.py)."""
    return "calls" in blocks[0]


def token_figures(blocks: Sequence[Json]) -> Json:
    """Return what is particular to a bundle that generates: TTFT and time per output token."""
    token_ms = np.concatenate([times for block in blocks for times in block["token_ms"]])
    p50, p95, p99 = (float(value) for value in np.percentile(token_ms, (50, 95, 99)))
    turns = {name: [take(block) for block in blocks] for name, take in TURN_TIMES.items()}
    spreads = {name: spread(times) for name, times in turns.items()}
    return {
        "prompt_tokens": blocks[0]["prompt_tokens"][-1],
        "ttft_ms": median(time for block in blocks for time in block["ttft_ms"]),
        "ttft": [_ttft(blocks, length) for length in sorted(set(blocks[0]["prompt_tokens"]))],
        "token_ms": p50,
        "token_ms_p95": p95,
        "token_ms_p99": p99,
        "tokens_per_second": 1e3 / p50,
        "intervals": {name: _interval(times) for name, times in turns.items()},
        "per_index": per_index(blocks),
        "spread": spreads,
        "flagged": [name for name, value in spreads.items() if value > FLAG_ABOVE],
    }


def ratios(ours: Sequence[Json], theirs: Sequence[Json]) -> Json:
    """Return ours ÷ theirs of every time, over bursts or prompts that stood side by side, with interval and verdict."""
    if takes_calls(ours):
        return call_ratios(ours, theirs)
    pairs = {
        "token_ms": ([fastest_of_bursts(b) for b in ours], [fastest_of_bursts(b) for b in theirs]),
        "ttft_ms": ([b["ttft_ms"] for b in ours], [b["ttft_ms"] for b in theirs]),
    }
    return {name: ratio_over_blocks(a, b, seed=_SEED).to_json(bigger_is_better=False) for name, (a, b) in pairs.items()}


def per_index(blocks: Sequence[Json]) -> Json:
    """Return the times in units of the index beside them: what stays alike when the machine's speed changes."""
    tokens = [
        [time / index for time, index in zip(fastest_of_bursts(block), chain(*block["index_ms"]), strict=True)]
        for block in blocks
    ]
    prompts = [
        [time / index for time, index in zip(block["ttft_ms"], block["prompt_index_ms"], strict=True)]
        for block in blocks
    ]
    return {
        "token_ms": median_over_blocks(tokens, seed=_SEED).to_json(),
        "ttft_ms": median_over_blocks(prompts, seed=_SEED).to_json(),
    }


def fastest_of_bursts(block: Json) -> list[float]:
    """Return the fastest token of every burst of a block, ms, in the order they were taken."""
    return list(chain.from_iterable(_fastest_by_turn(block)))


def whole_ms(block: Json) -> list[float]:
    """Return one figure per turn for all that it did, ms: a prompt and the tokens after it, the fastest of every burst
    standing for its burst; of calls the geometric mean over their shapes, so that each counts the same.
    """
    if "calls" in block:
        shapes = [[median(times) for times in whole_calls(block, name)] for name in block["calls"]]
        return [float(np.exp(np.mean(np.log(turn)))) for turn in zip(*shapes, strict=True)]
    tokens = block["burst_tokens"]
    pairs = zip(block["ttft_ms"], _fastest_by_turn(block), strict=True)
    return [ttft + tokens * sum(fastest) for ttft, fastest in pairs]


def _fastest_by_turn(block: Json) -> list[list[float]]:
    pairs = zip(block["token_ms"], block["index_ms"], strict=True)
    return [np.array(turn).reshape(len(index), -1).min(axis=1).tolist() for turn, index in pairs]


def index_figures(blocks: Sequence[Json]) -> Json:
    """Return the index over a whole measurement."""
    by_turn = call_index(blocks) if takes_calls(blocks) else [block["index_ms"] for block in blocks]
    turns = [[median(index) for index in block] for block in by_turn]
    found = median_over_blocks(turns, seed=_SEED)
    samples = sum(len(index) for block in by_turn for index in block)
    return {"ms": found.value, "low": found.low, "high": found.high, "spread": spread(turns), "samples": samples}


def _interval(turns: list[list[float]]) -> Json:
    found = median_over_blocks(turns, seed=_SEED)
    return {"low": found.low, "high": found.high}


def _ttft(blocks: Sequence[Json], length: int) -> Json:
    """Return the row of one prompt length."""
    parts = [block["ttft"][str(length)] for block in blocks]
    whole = [[sum(both) for both in zip(p["tokenize_ms"], p["first_step_ms"], strict=True)] for p in parts]
    found = median_over_blocks(whole, seed=_SEED)
    return {
        "prompt_tokens": length,
        "tokenize_ms": median(time for p in parts for time in p["tokenize_ms"]),
        "first_step_ms": median(time for p in parts for time in p["first_step_ms"]),
        "ttft_ms": found.value,
        "low": found.low,
        "high": found.high,
        "spread": spread(whole),
    }


def _limits(manifest: Json, arithmetic: str, peaks: Json, figures: Json, block: Json) -> Json:
    """Set the time per token and the first step of its prompt beside what could be at best."""
    prompt = figures["prompt_tokens"]
    first_step = next(row["first_step_ms"] for row in figures["ttft"] if row["prompt_tokens"] == prompt)
    token, prefill = _both_limits(manifest, arithmetic, peaks, figures, block, first_step)
    return {
        "precision": arithmetic,
        "threads": peaks["threads"],
        "read_bytes_per_second": peaks["read_bytes_per_second"],
        "multiply_adds_per_second": peaks["multiply_adds_per_second"][arithmetic],
        "token": token.to_json(),
        "prefill": prefill.to_json(),
    }


def _both_limits(
    manifest: Json, arithmetic: str, peaks: Json, figures: Json, block: Json, first_step_ms: float
) -> tuple[Limit, Limit]:
    """Return the limits of the token in the middle of a turn and of what comes before the first one."""
    from edgepipe.runtime.text_generation import PROMPT_CHUNK

    work, prompt, token_ms = decoder_work(manifest), figures["prompt_tokens"], figures["token_ms"]
    middle = block["bursts"] * block["burst_tokens"] // 2
    if not has_source(manifest):
        return (
            token_limit(work, prompt + middle, peaks, arithmetic, token_ms),
            prefill_limit(work, prompt, PROMPT_CHUNK, peaks, arithmetic, first_step_ms),
        )
    source = source_work(manifest)
    positions = len(manifest["model"]["decoder_prefix_ids"]) + middle
    return (
        answer_limit(work, source, positions, prompt, peaks, arithmetic, token_ms),
        source_limit(work, source, prompt, peaks, arithmetic, first_step_ms),
    )
