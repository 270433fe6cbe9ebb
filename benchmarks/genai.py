"""Run edgepipe beside onnxruntime-genai on the same 4-bit weights, interleaved. Linux only.

    python benchmarks/genai.py [--rounds 7] [--seed 0]  build both, run, store results/genai-CPU.json, rewrite README.md
    python benchmarks/genai.py --table                  print the table of the stored runs

A round gives every engine one fresh process per number of threads, in an order drawn anew. Around each process a fixed
piece of work is timed (`machine_index_ms`), so a reader sees what the machine did meanwhile. benchmarks/README.md says
how to read the result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.genai_block import CONTEXT, NEW_TOKENS, PROMPT_TOKENS, PROMPTS
from benchmarks.genai_models import (
    BUILDS,
    COMPRESS,
    build_ours,
    build_theirs,
    compare_codes,
    describe,
    quantized_folder,
    write_huggingface,
)
from benchmarks.stored import RESULTS, ROOT, markdown_table, provenance, replace_section, write_result
from edgepipe.measuring.intervals import ratio_over_rounds
from edgepipe.measuring.run import describe_machine
from edgepipe.report.terminal import table

NAME = "genai"
PAGE = ROOT / "benchmarks" / "README.md"
OURS = "edgepipe"
THREADS = (1, 2)
MOVED = 1.15  # a round in which the machine's speed changed by more is flagged
HEADER = (
    "threads",
    "engine",
    "tokens/s",
    "TTFT, ms",
    "peak memory, MB",
    "on disk, MB",
    "weights per token, MB",
    "decode: edgepipe ÷ it",
    "TTFT: edgepipe ÷ it",
)


def main(arguments: list[str]) -> None:
    """Run, store and show, as the arguments say."""
    parser = argparse.ArgumentParser(description="Run edgepipe beside onnxruntime-genai.")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of all engines (default: 7)")
    parser.add_argument("--seed", type=int, default=0, help="seed of order, prompts and bootstrap (default: 0)")
    parser.add_argument("--table", action="store_true", help="print the table of the stored runs")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.seed < 0:
        parser.error("--rounds must be at least 1 and --seed at least 0")
    if options.table:
        show(sorted(RESULTS.glob(f"{NAME}-*.json")))
        return
    result = run(options.rounds, options.seed)
    name = f"{NAME}-{slug(result['machine']['cpu'])}"
    stored = write_result(name, result)
    replace_section(PAGE, NAME, page_section(sorted(RESULTS.glob(f"{NAME}-*.json"))))
    show([stored])


def run(rounds: int, seed: int) -> dict[str, Any]:
    """Build all sides, measure them in turns, and return everything a reader needs to check the figures."""
    came_from = provenance()
    for package in ("onnxruntime-genai", "onnx"):
        came_from["versions"][package] = metadata.version(package)
    folder = ROOT / "runs" / NAME
    say("building edgepipe's bundle")
    paths = {OURS: build_ours(folder)}
    write_huggingface(quantized_folder(folder), folder / "float32")
    built = {OURS: {"command": ["edgepipe", *COMPRESS]} | describe(paths[OURS], "decoder.onnx")}
    for engine, options in BUILDS.items():
        say(f"building {engine}")
        path = folder / engine.replace(" ", "-")
        command = build_theirs(folder / "float32", path, options)
        paths[engine] = path
        built[engine] = {
            "command": command,
            "codes": compare_codes(quantized_folder(folder), path / "model.onnx"),
            **describe(path, "model.onnx"),
        }
    taken = take_rounds(paths, rounds, seed)
    return {
        **came_from,
        "command": ["python", "benchmarks/genai.py", "--rounds", str(rounds), "--seed", str(seed)],
        "machine": describe_machine(0) | {"threads": list(THREADS)},
        "workload": {
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": NEW_TOKENS,
            "prompts": PROMPTS,
            "context": CONTEXT,
        },
        "seed": seed,
        "builds": built,
        "rounds": taken,
        "summary": summarise(taken, list(paths), seed),
    }


def take_rounds(paths: dict[str, Path], rounds: int, seed: int) -> list[list[dict[str, Any]]]:
    """Measure every engine at every number of threads once a round, in a fresh order each time."""
    order = random.Random(seed)
    taken = []
    for number in range(rounds):
        blocks = []
        for threads in order.sample(THREADS, len(THREADS)):
            for engine in order.sample(list(paths), len(paths)):
                say(f"round {number + 1} of {rounds}: {engine}, threads: {threads}")
                blocks.append(take_block(engine, paths[engine], threads, seed + number))
        taken.append(blocks)
    return taken


def take_block(engine: str, path: Path, threads: int, seed: int) -> dict[str, Any]:
    """Run one engine in a process of its own; all engines of a round get the same seed, hence the same prompts."""
    kind = OURS if engine == OURS else "genai"
    command = [
        sys.executable,
        str(Path(__file__).with_name("genai_block.py")),
        kind,
        str(path),
        str(threads),
        str(seed),
    ]
    before = machine_index_ms()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = machine_index_ms()
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(f"{engine} ended with exit code {done.returncode}: {last}")
    sample: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    for key in ("ttft_ms", "load_ms"):
        sample[key] = np.round(sample[key], 3).tolist()
    sample["token_ms"] = [np.round(times, 3).tolist() for times in sample["token_ms"]]
    return sample | {"engine": engine, "threads": threads, "machine_index_ms": [round(before, 2), round(after, 2)]}


def machine_index_ms() -> float:
    """Time a fixed piece of one-core work (hashing, and adding arrays that no small cache holds), about 50 ms in all.

    The quickest of five goes: what is asked is how fast the machine can run now, not what else woke up meanwhile.
    """
    text = bytes(1 << 22)
    data = np.ones(1 << 21, np.float32)
    target = np.ones_like(data)  # written once before the clock starts: no page is new
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        hashlib.sha256(text).digest()
        for _ in range(3):
            np.add(data, data, out=target)
        times.append(time.perf_counter() - begun)
    return 1e3 * min(times)


def summarise(rounds: list[list[dict[str, Any]]], engines: list[str], seed: int) -> dict[str, Any]:
    """Reduce the samples: one median per round, the ratios of ours to each other engine, and the verdicts."""
    found: dict[str, Any] = {"flagged_rounds": [i for i, blocks in enumerate(rounds) if _moved(blocks)], "threads": {}}
    for threads in THREADS:
        per_engine = {}
        for engine in engines:
            mine = [b for blocks in rounds for b in blocks if (b["engine"], b["threads"]) == (engine, threads)]
            per_engine[engine] = {
                "ttft_ms": [median(b["ttft_ms"]) for b in mine],
                "tokens_per_second": [1e3 / median(t for times in b["token_ms"] for t in times) for b in mine],
                "memory_peak_bytes": max(b["memory_peak_bytes"] for b in mine),
                "load_ms": median(b["load_ms"] for b in mine),
                "same_tokens_as_ours": _agreement(rounds, engine, threads),
            }
        ours = per_engine[OURS]
        for engine, figures in per_engine.items():
            if engine == OURS:
                continue
            decode = ratio_over_rounds(ours["tokens_per_second"], figures["tokens_per_second"], seed=seed)
            ttft = ratio_over_rounds(ours["ttft_ms"], figures["ttft_ms"], seed=seed)
            figures["decode_ratio"] = decode.to_json(bigger_is_better=True)
            figures["ttft_ratio"] = ttft.to_json(bigger_is_better=False)
        found["threads"][str(threads)] = per_engine
    return found


def rows(result: dict[str, Any]) -> list[list[str]]:
    """Return the table's rows from a stored run alone."""
    lines = []
    for threads, engines in result["summary"]["threads"].items():
        for engine, figures in engines.items():
            build = result["builds"][engine]
            lines.append(
                [
                    threads,
                    engine,
                    f"{median(figures['tokens_per_second']):.1f}",
                    f"{median(figures['ttft_ms']):.0f}",
                    f"{figures['memory_peak_bytes'] / 1e6:.0f}",
                    f"{build['disk_bytes'] / 1e6:.1f}",
                    f"{build['weight_bytes_per_token'] / 1e6:.1f}",
                    _ratio(figures.get("decode_ratio")),
                    _ratio(figures.get("ttft_ratio")),
                ]
            )
    return lines


def page_section(files: list[Path]) -> str:
    """Return the page's tables: one per stored run, and below each where it comes from."""
    parts = []
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        parts += [markdown_table(HEADER, rows(result)), provenance_sentence(result)]
    return "\n\n".join(parts)


def provenance_sentence(result: dict[str, Any]) -> str:
    """Say in a few lines where a run's figures come from and how alike the weights are."""
    work, versions, machine = result["workload"], result["versions"], result["machine"]
    differ = ", ".join(
        f"{engine}: {build['codes']['codes_that_differ']:,} of {build['codes']['codes']:,}"
        for engine, build in result["builds"].items()
        if "codes" in build
    )
    flagged = len(result["summary"]["flagged_rounds"])
    return (
        f"{machine['cpu']}, {machine['cores']} cores seen, {len(result['rounds'])} rounds ({flagged} in which the "
        f"machine's speed moved by more than {MOVED - 1:.0%}), {work['prompt_tokens']} prompt tokens, "
        f"{work['new_tokens']} new ones. Codes that differ from edgepipe's: {differ}. onnxruntime "
        f"{versions['onnxruntime']}, onnxruntime-genai {versions['onnxruntime-genai']}, Python {machine['python']}, "
        f"commit `{result['commit'][:12]}`, {result['date']}."
    )


def show(files: list[Path]) -> None:
    """Print the tables of stored runs to stderr and their ratios as JSON to stdout."""
    if not files:
        raise SystemExit("no run is stored yet: run `python benchmarks/genai.py` first")
    ratios = {}
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        say(f"\n{table(HEADER, rows(result))}\n\n{provenance_sentence(result)}")
        ratios[file.stem] = {
            f"{engine}, threads: {threads}": {key: figures[key] for key in ("decode_ratio", "ttft_ratio")}
            for threads, engines in result["summary"]["threads"].items()
            for engine, figures in engines.items()
            if engine != OURS
        }
    print(json.dumps(ratios))


def slug(cpu: str) -> str:
    """Turn a processor's name into a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-")


def say(text: str) -> None:
    """Tell a person something, on stderr."""
    print(text, file=sys.stderr, flush=True)


def _moved(blocks: list[dict[str, Any]]) -> bool:
    """Tell whether the machine's speed changed notably within a round."""
    index: list[float] = [value for block in blocks for value in block["machine_index_ms"]]
    return max(index) > MOVED * min(index)


def _agreement(rounds: list[list[dict[str, Any]]], engine: str, threads: int) -> float:
    """Return the share of prompts to which an engine gave the very ids that ours gave."""
    same: list[bool] = []
    for blocks in rounds:
        by_engine = {b["engine"]: b["tokens"] for b in blocks if b["threads"] == threads}
        same += [a == b for a, b in zip(by_engine[OURS], by_engine[engine], strict=True)]
    return sum(same) / len(same)


def _ratio(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}] {found['verdict']}"


if __name__ == "__main__":
    main(sys.argv[1:])
