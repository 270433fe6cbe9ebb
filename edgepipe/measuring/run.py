"""Measure a bundle beside another one: fresh processes that take turns, raw samples kept.

A block is one fresh process of each bundle. Within it they take turns: prompts first, then tokens in bursts of a few,
so that whatever happens to the machine meets both; who goes first alternates. After each pair of bursts a third process
times the fixed work of the machine-speed index. Short bursts also make a busy machine matter less: a process that has
slept a little is let in at once.
"""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from edgepipe.artifacts import Json
from edgepipe.measuring.child import WORKER, Child, answer_of
from edgepipe.measuring.figures import index_figures, ratios, side_figures
from edgepipe.measuring.intervals import CONFIDENCE, FLAG_ABOVE

_PACKAGES = ("edgepipe", "numpy", "onnxruntime", "tokenizers")  # what a measured process runs on


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Say how much is measured."""

    threads: int  # of the engine; 0 leaves the number to it
    blocks: int  # fresh processes per bundle
    turns: int  # per process
    tokens: int  # scored for the perplexity at most; 0 is the whole text


def measure_bundles(
    bundles: Mapping[str, Path],
    text: str,
    plan: Plan,
    *,
    progress: Callable[[str, int, int], None],
    work_dir: Path | None = None,
) -> Json:
    """Return the figures of the bundles "bundle" and, where there is one, "baseline" (docs/measure.md: their shape).

    `work_dir` is where temporary files go (None: the system's folder). Raises StageError when a process fails.
    """
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        file = Path(folder) / "text.txt"
        file.write_text(text, encoding="utf-8")
        steps = iter(range(plan.blocks * plan.turns + 3 * len(bundles)))
        total = plan.blocks * plan.turns + 3 * len(bundles)
        samples = take_blocks(bundles, file, plan, lambda what: progress(what, next(steps), total))
        alone: dict[str, dict[str, Json]] = {name: {} for name in bundles}
        for kind in ("memory", "limits", "perplexity"):
            for name, path in bundles.items():
                progress(f"{kind} of the {name}", next(steps), total)
                alone[name][kind] = answer_of(kind, path, file, plan.threads, plan.tokens)
    sides = {name: side_figures(path, samples[name], **alone[name]) for name, path in bundles.items()}
    first = samples["bundle"][0]
    return {
        "schema": 1,
        "task": "text-generation",
        "taken_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(plan.threads),
        "method": {
            "blocks": plan.blocks,
            "turns": plan.turns,
            "bursts": len(first["index_ms"][0]),
            "counted_tokens": len(first["token_ms"][0]),
            "prompt_tokens": sorted(first["prompt_tokens"]),
            "confidence": CONFIDENCE,
            "flag_above": FLAG_ABOVE,
        },
        "index": index_figures(samples["bundle"]),
        "bundle": sides["bundle"],
        "baseline": sides.get("baseline"),
        "ratios": ratios(samples["bundle"], samples["baseline"]) if "baseline" in samples else None,
        "since": None,
    }


def take_blocks(
    bundles: Mapping[str, Path],
    file: Path,
    plan: Plan,
    say: Callable[[str], None],
    programs: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, list[Json]]:
    """Return the raw samples of every bundle, one record per block.

    `programs` replaces the worker of a bundle by another one that speaks like it, for trials of the method itself.
    """
    programs = programs or {}
    blocks: dict[str, list[Json]] = {name: [] for name in bundles}
    threads = str(plan.threads)
    with Child("the index", ["index", str(bundles["bundle"]), str(file), threads]) as clock:
        for block in range(plan.blocks):
            with contextlib.ExitStack() as stack:
                children = {}
                for name in _order(list(bundles), block):
                    path = bundles[name]
                    child = Child(path.name, ["speed", str(path), str(file), threads], programs.get(name, WORKER))
                    children[name] = stack.enter_context(child)
                turns: dict[str, list[Json]] = {name: [] for name in bundles}
                for turn in range(plan.turns):
                    say(f"block {block + 1} of {plan.blocks}, turn {turn + 1} of {plan.turns}")
                    number = block * plan.turns + turn
                    for name, taken in _take_turn(children, clock, number, plan).items():
                        turns[name].append(taken)
                for name, child in children.items():
                    blocks[name].append(_block(child.ready, turns[name]))
    return blocks


def _take_turn(children: Mapping[str, Child], clock: Child, number: int, plan: Plan) -> dict[str, Json]:
    """Let every bundle run its prompts, then bursts in turn, the index after each pair; return what each took."""
    names = list(children)
    taken: dict[str, Json] = {}
    for name in _order(names, number):
        answer = children[name].ask({"prompts": number, "of": plan.blocks * plan.turns})
        taken[name] = {**answer, "token_ms": [], "index_ms": []}
    bursts = min(child.ready["bursts"] for child in children.values())
    tokens = min(child.ready["burst_tokens"] for child in children.values())
    for burst in range(bursts):
        for name in _order(names, burst):
            answer = children[name].ask({"tokens": tokens})
            taken[name]["token_ms"] += answer["token_ms"]
            taken[name]["memory_peak_bytes"] = answer["memory_peak_bytes"]
        index_ms = clock.ask({})["index_ms"]
        for name in names:
            taken[name]["index_ms"].append(index_ms)
    return taken


def _order(names: list[str], number: int) -> list[str]:
    return names if number % 2 else names[::-1]


def _block(ready: Json, turns: list[Json]) -> Json:
    """Put a process's turns beside what it said when it was ready: one list per kind of sample."""
    ttft = {
        length: {
            "tokenize_ms": [turn["ttft"][length][0] for turn in turns],
            "first_step_ms": [turn["ttft"][length][1] for turn in turns],
        }
        for length in turns[0]["ttft"]
    }
    return {
        **ready,
        "ttft_ms": [sum(turn["ttft"][str(ready["prompt_tokens"][-1])]) for turn in turns],
        "ttft": ttft,
        "token_ms": [turn["token_ms"] for turn in turns],
        "index_ms": [turn["index_ms"] for turn in turns],
        "memory_peak_bytes": turns[-1]["memory_peak_bytes"],
    }


def describe_machine(threads: int) -> Json:
    """Return what the figures were taken on, and with which versions."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
    }
