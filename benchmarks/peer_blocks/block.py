"""What every peer's block does alike: take a job, time the engine on it, print a JSON document as the last line.

A block is one process. It runs in its peer's own environment, so this file imports the standard library and numpy only.
The job comes on stdin:

    {"kind": "speed", "path": …, "threads": 2, "settings": {…}, "started": SECONDS, "seed": 0, "prompts": 3,
     "shapes": [[128, 128], [16, 64]]}                                 → times in ms, memory in bytes, the ids given
    {"kind": "quality", "path": …, "threads": 2, "settings": {…}, "windows": [[ID, …], …]}    → mean log-likelihood

Prompts are fixed random token ids, a new one each time and the same for every engine, so nothing can be reused. A shape
is (prompt tokens, new tokens); its first prompt warms up and isn't counted. The very first prompt of the process ends
the cold start, which began when the driver started the process. Every engine generates greedily and is kept from ending
early. Nothing is tokenized.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT = 2048  # tokens that engines with a fixed cache are told to hold
END_IDS = (2,)  # SmolLM2's end-of-text ids: <|im_end|>
FIRST_PLAIN_ID = 100  # below lie special tokens
VOCABULARY = 49152

Moments = list[float]  # seconds from the start of the prompt to each new token
Generate = Callable[[list[int], int], tuple[Moments, list[int]]]  # prompt, number of new tokens → moments and ids
Score = Callable[[list[int]], np.ndarray]  # ids → natural-log probability of each id after the first, [ids - 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Hold an opened engine: how it generates and what it executes."""

    generate: Generate
    facts: dict[str, Any] = field(default_factory=dict)  # what it says of itself: versions, precision executed


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Say how an engine is opened for speed, and how it is opened to score text."""

    open: Callable[[Path, int, dict[str, Any]], Engine]  # path, threads, settings
    score: Callable[[Path, int, dict[str, Any]], Score]


def memory_bytes(field_name: str = "VmHWM") -> int:
    """Return one line of /proc/self/status in bytes: VmHWM, the peak of this process, unless told otherwise."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field_name + ":"))


def random_prompt(generator: np.random.Generator, tokens: int) -> list[int]:
    """Draw a prompt of plain token ids."""
    ids: list[int] = generator.integers(FIRST_PLAIN_ID, VOCABULARY, tokens).tolist()
    return ids


def by_steps(first: Callable[[list[int]], np.ndarray], following: Callable[[int], np.ndarray]) -> Generate:
    """Make a greedy loop of two functions that return the last position's logits [vocabulary], which may be written."""

    def choose(logits: np.ndarray) -> int:
        logits[list(END_IDS)] = -np.inf
        return int(logits.argmax())

    def generate(prompt: list[int], new_tokens: int) -> tuple[Moments, list[int]]:
        begun = time.perf_counter()
        ids = [choose(first(prompt))]
        moments = [time.perf_counter() - begun]
        while len(ids) < new_tokens:
            ids.append(choose(following(ids[-1])))
            moments.append(time.perf_counter() - begun)
        return moments, ids

    return generate


def log_softmax_at(logits: np.ndarray, ids: list[int]) -> np.ndarray:
    """Return the log-probability of ids[i] under logits[i]. [n, vocabulary], n ids → [n] float64"""
    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    result: np.ndarray = values[np.arange(len(ids)), ids] - np.log(np.exp(values).sum(axis=1))
    return result


def take_speed(peer: Peer, job: dict[str, Any]) -> dict[str, Any]:
    """Open the engine, run every shape, and return raw samples."""
    begun = time.perf_counter()
    engine = peer.open(Path(job["path"]), job["threads"], job["settings"])
    load_ms = 1e3 * (time.perf_counter() - begun)
    after_load = memory_bytes()
    random = np.random.default_rng(job["seed"])
    shapes, cold_start_ms = [], None
    for prompt_tokens, new_tokens in job["shapes"]:
        ttft_ms, token_ms, tokens = [], [], []
        for number in range(job["prompts"] + 1):
            asked = time.monotonic()
            moments, ids = engine.generate(random_prompt(random, prompt_tokens), new_tokens)
            if len(ids) != new_tokens or len(moments) != new_tokens:
                raise RuntimeError(f"expected {new_tokens} new tokens, got {len(ids)} in {len(moments)} steps")
            if cold_start_ms is None:
                cold_start_ms = 1e3 * (asked + moments[0] - job["started"])
            if number:  # the first prompt of a shape touches memory and warms caches
                times = 1e3 * np.diff(moments, prepend=0.0)
                ttft_ms.append(round(float(times[0]), 3))
                token_ms.append(np.round(times[1:], 3).tolist())
                tokens.append(ids)
        shape = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        shapes.append(shape | {"ttft_ms": ttft_ms, "token_ms": token_ms, "tokens": tokens})
    return {
        "cold_start_ms": round(cold_start_ms or 0.0, 1),
        "load_ms": round(load_ms, 1),
        "memory_after_load_bytes": after_load,
        "memory_peak_bytes": memory_bytes(),
        "shapes": shapes,
        "facts": engine.facts,
    }


def take_quality(peer: Peer, job: dict[str, Any]) -> dict[str, Any]:
    """Score windows of a text, each from nothing, and return the mean negative log-likelihood per token."""
    score = peer.score(Path(job["path"]), job["threads"], job["settings"])
    found = np.concatenate([score(window) for window in job["windows"]])
    if found.size != sum(len(window) - 1 for window in job["windows"]):
        raise RuntimeError(f"expected a score for every token but each window's first, got {found.size}")
    return {"nll": -float(found.mean()), "tokens": int(found.size)}


def main(peer: Peer) -> None:
    """Do the job that stdin holds."""
    job = json.load(sys.stdin)
    take = {"speed": take_speed, "quality": take_quality}[job["kind"]]
    out = os.dup(1)  # engines print to stdout as they like: only the answer goes where the driver reads
    os.dup2(2, 1)
    answer = json.dumps(take(peer, job))
    os.write(out, (answer + "\n").encode())
