"""Measure a bundle beside another one: fresh processes that take turns, raw samples kept.

A block is one fresh process of each bundle. Within it they take turns: prompts first, then tokens in bursts of a few,
so that whatever happens to the machine meets both; who goes first alternates. After each pair of bursts a third process
times the fixed work of the machine-speed index. Short bursts also make a busy machine matter less: a process that has
slept a little is let in at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from edgepipe.artifacts import Json
from edgepipe.errors import ConfigError
from edgepipe.measuring.calls import call_name
from edgepipe.measuring.child import WORKER, Child, answer_of
from edgepipe.measuring.figures import index_figures, ratios, side_figures
from edgepipe.measuring.generation import Lengths, shared_prompt
from edgepipe.measuring.intervals import CONFIDENCE, FLAG_ABOVE
from edgepipe.runtime.bundle import GENERATION, read_manifest
from edgepipe.store import versions

_PACKAGES = ("edgepipe", "numpy", "onnxruntime", "tokenizers")  # what a measured process runs on
_OF_ENGINE = {"tvm": ("apache-tvm", "apache-tvm-ffi")}  # and that of another engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Say how much is measured."""

    threads: int  # of the engine; 0 leaves the number to it
    blocks: int  # fresh processes per bundle
    turns: int  # per process
    tokens: int  # scored for the perplexity at most; 0 is the whole text
    prompt: int = 128  # tokens of the prompt whose TTFT is the headline; others are timed beside it
    output: int = 80  # tokens that follow it, in bursts


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
    task = _task(bundles)
    plan = fitting(bundles, plan)
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        file = Path(folder) / "text.txt"
        file.write_text(text, encoding="utf-8")
        kinds = ["memory", "limits", *(["perplexity"] if task == "text-generation" else [])]
        total = plan.blocks * plan.turns + len(kinds) * len(bundles)
        steps = iter(range(total))
        samples = take_blocks(bundles, file, plan, lambda what: progress(what, next(steps), total))
        alone: dict[str, dict[str, Json]] = {name: {} for name in bundles}
        for kind in kinds:
            for name, path in bundles.items():
                progress(f"{kind} of the {name}", next(steps), total)
                alone[name][kind] = answer_of(kind, path, file, plan.threads, plan.tokens)
    sides = {name: side_figures(path, samples[name], alone[name]) for name, path in bundles.items()}
    first = samples["bundle"][0]
    return {
        "schema": 1,
        "task": task,
        "taken_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(plan.threads, _engines(bundles)),
        "method": {
            "blocks": plan.blocks,
            "turns": plan.turns,
            **_method(first),
            "confidence": CONFIDENCE,
            "flag_above": FLAG_ABOVE,
        },
        "index": index_figures(samples["bundle"]),
        "bundle": sides["bundle"],
        "baseline": sides.get("baseline"),
        "ratios": ratios(samples["bundle"], samples["baseline"]) if "baseline" in samples else None,
        "since": None,
    }


def fitting(bundles: Mapping[str, Path], plan: Plan) -> Plan:
    """Return the plan with a prompt that all bundles have room for: a first token is compared with one after as many
    tokens.
    """
    if _task(bundles) not in GENERATION:
        return plan
    models = [read_manifest(path)["model"] for path in bundles.values()]
    prompt = shared_prompt(models, Lengths(prompt=plan.prompt, output=plan.output))
    return dataclasses.replace(plan, prompt=prompt)


def _engines(bundles: Mapping[str, Path]) -> set[str]:
    return {str(read_manifest(path)["engine"]) for path in bundles.values()}


def _task(bundles: Mapping[str, Path]) -> str:
    """Return the task of the bundle; ConfigError when another's figures are of another kind.

    A student that answers a source and a model that continues a prompt both have a first token and those after it.
    """
    tasks = {name: read_manifest(path)["task"] for name, path in bundles.items()}
    if len(set(tasks.values())) > 1 and not set(tasks.values()) <= set(GENERATION):
        raise ConfigError(f"bundles of one task can be compared, but these are for {' and '.join(tasks.values())}")
    return str(tasks["bundle"])


def _method(block: Json) -> Json:
    """Return what a turn was made of."""
    if "calls" in block:
        return {"calls": list(block["calls"]), "repeats": block["repeats"]}
    return {
        "bursts": len(block["index_ms"][0]),
        "counted_tokens": len(block["token_ms"][0]),
        "prompt_tokens": sorted(set(block["prompt_tokens"])),
    }


def take_blocks(
    bundles: Mapping[str, Path],
    file: Path,
    plan: Plan,
    say: Callable[[str], None],
    programs: Mapping[str, Sequence[str]] | None = None,
    called: Mapping[str, str] | None = None,
) -> dict[str, list[Json]]:
    """Return the raw samples of every bundle, one record per block.

    `called` says how messages name a bundle whose process fails; without it, by its directory.
    `programs` replaces the worker of a bundle by another one that speaks like it, for trials of the method itself.
    """
    programs, called = programs or {}, called or {}
    blocks: dict[str, list[Json]] = {name: [] for name in bundles}
    threads = str(plan.threads)
    lengths = (str(plan.prompt), str(plan.output))
    with Child("the index", ["index", str(bundles["bundle"]), str(file), threads]) as clock:
        for block in range(plan.blocks):
            with contextlib.ExitStack() as stack:
                children = {}
                for name in _order(list(bundles), block):
                    path = bundles[name]
                    arguments = ["speed", str(path), str(file), threads, *lengths]
                    child = Child(called.get(name, path.name), arguments, programs.get(name, WORKER))
                    children[name] = stack.enter_context(child)
                turns: dict[str, list[Json]] = {name: [] for name in bundles}
                for turn in range(plan.turns):
                    say(f"block {block + 1} of {plan.blocks}, turn {turn + 1} of {plan.turns}")
                    number = block * plan.turns + turn
                    take = _take_calls if _takes_calls(children) else _take_turn
                    for name, taken in take(children, clock, number, plan).items():
                        turns[name].append(taken)
                for name, child in children.items():
                    put = _call_block if _takes_calls(children) else _block
                    blocks[name].append(put(child.ready, turns[name]))
    return blocks


def _take_turn(children: Mapping[str, Child], clock: Child, number: int, plan: Plan) -> dict[str, Json]:
    """Let every bundle run its prompts, then bursts in turn, the index after each; return what each took."""
    names = list(children)
    taken: dict[str, Json] = {}
    for name in _order(names, number):
        answer = children[name].ask({"prompts": number, "of": plan.blocks * plan.turns})
        taken[name] = {**answer, "token_ms": [], "index_ms": []}
    prompt_index_ms = clock.ask({"sustained": True})["index_ms"]
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
    return {name: {**turn, "prompt_index_ms": prompt_index_ms} for name, turn in taken.items()}


def _takes_calls(children: Mapping[str, Child]) -> bool:
    return all("calls" in child.ready for child in children.values())


def _take_calls(children: Mapping[str, Child], clock: Child, number: int, plan: Plan) -> dict[str, Json]:
    """Let every bundle run calls of every shape in turn, the index after each pair; return what each took."""
    names = list(children)
    first = children[names[0]].ready
    shapes = [call_name(*shape) for shape in first["calls"]]
    taken: dict[str, Json] = {
        name: {shape: {"tokenize_ms": [], "run_ms": [], "index_ms": []} for shape in shapes} for name in names
    }
    for place, shape in enumerate(shapes):
        for repeat in range(first["repeats"]):
            asked = {
                "call": place,
                "number": number * first["repeats"] + repeat,
                "of": plan.blocks * plan.turns * first["repeats"],
            }
            for name in _order(names, repeat):
                answer = children[name].ask(asked)
                for part in ("tokenize_ms", "run_ms"):
                    taken[name][shape][part].append(answer[part])
                taken[name]["memory_peak_bytes"] = answer["memory_peak_bytes"]
            index_ms = clock.ask({})["index_ms"]
            for name in names:
                taken[name][shape]["index_ms"].append(index_ms)
    return taken


def _call_block(ready: Json, turns: list[Json]) -> Json:
    """Put a process's turns of calls beside what it said when it was ready: one list per kind of sample and shape."""
    shapes = [call_name(*shape) for shape in ready["calls"]]
    return {
        **ready,
        "shapes": ready["calls"],
        "calls": {
            shape: {part: [turn[shape][part] for turn in turns] for part in ("tokenize_ms", "run_ms")}
            for shape in shapes
        },
        "index_ms": {shape: [turn[shape]["index_ms"] for turn in turns] for shape in shapes},
        "memory_peak_bytes": turns[-1]["memory_peak_bytes"],
    }


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
        "prompt_index_ms": [turn["prompt_index_ms"] for turn in turns],
        "memory_peak_bytes": turns[-1]["memory_peak_bytes"],
    }


def describe_machine(threads: int, engines: Iterable[str] = ()) -> Json:
    """Return what the figures were taken on, and with which versions, those of further `engines` among them."""
    more = tuple(name for engine in sorted(engines) for name in _OF_ENGINE.get(engine, ()))
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
        "versions": {**{name: metadata.version(name) for name in _PACKAGES}, **versions(more)},
    }
