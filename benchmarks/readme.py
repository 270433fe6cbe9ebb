"""Measure what the README's table shows: the commands it names, run as a user would, on a machine left alone.

    python benchmarks/readme.py              run them, store benchmarks/results/readme.json, rewrite README.md's table
    python benchmarks/readme.py --page-only  rewrite the table from the stored run

Each command is a process of its own with --fresh, so nothing is reused; its wall time and peak memory are kept too.
The figures come from the `measure` stage (docs/measure.md says how each is taken), raw samples included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.stored import ROOT, markdown_table, provenance, read_result, replace_section, write_result

NAME = "readme"
PAGE = ROOT / "README.md"
COMMANDS = {
    "`--bits 4`": "compress smollm2-135m --target cpu --bits 4",
    "`--set compile.accuracy_level=4`": ("compress smollm2-135m --target cpu --bits 4 --set compile.accuracy_level=4"),
    "`--set quantize.import=false --embedding-bits 4`": (
        "compress smollm2-135m --target cpu --bits 4 --set quantize.import=false --embedding-bits 4"
    ),
}
HEADER = (
    "bundle",
    "MB",
    "bits/weight",
    "TTFT, ms",
    "ms/token",
    "tokens/s",
    "peak memory, MB",
    "perplexity",
)


def main(arguments: list[str]) -> None:
    """Run, store and show, as the arguments say."""
    parser = argparse.ArgumentParser(description="Measure the README's table and rewrite it.")
    parser.add_argument("--page-only", action="store_true", help="rewrite the table from the stored run")
    parser.add_argument("--blocks", type=int, default=4, help="processes per bundle (default: 4)")
    options = parser.parse_args(arguments)
    if not options.page_only:
        write_result(NAME, measure(options.blocks))
    result = read_result(NAME)
    replace_section(PAGE, NAME, page_section(result))
    print(json.dumps({"page": PAGE.name, "runs": {title: run["seconds"] for title, run in result["runs"].items()}}))


def measure(blocks: int) -> dict[str, Any]:
    """Run the commands one after another and return what each gave, with where and when."""
    came_from = provenance()
    runs = {title: run_command(command, blocks) for title, command in COMMANDS.items()}
    return {**came_from, "blocks": blocks, "runs": runs}


def run_command(command: str, blocks: int) -> dict[str, Any]:
    """Run one `edgepipe compress …` to its end; return its figures, wall time in seconds and peak memory in bytes."""
    with tempfile.TemporaryDirectory(prefix="edgepipe-readme-") as folder:
        work = Path(folder)
        words = [*command.split(), "--out", str(work / "bundle"), "--fresh", "--set", f"measure.blocks={blocks}"]
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "edgepipe", *words], cwd=work, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(f"edgepipe {command} ended with exit code {process.returncode}")
        (record,) = (work / "runs").glob("*/run.json")
        figures = json.loads(record.read_text(encoding="utf-8"))["figures"]
        bundle = json.loads(output.strip().splitlines()[-1])
    del bundle["bundle"]  # a temporary path
    return {
        "command": f"edgepipe {command}",
        "seconds": round(seconds, 1),
        # Linux gives kilobytes. Of edgepipe and of the processes it measured in, the larger one.
        "memory_peak_bytes": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "summary": bundle,
        "figures": figures,
    }


def page_section(result: dict[str, Any]) -> str:
    """Return the README's table and the sentence below it, from a stored run alone."""
    rows = []
    for title, run in result["runs"].items():
        rows.append(_row(f"float32, beside {title}", run["figures"]["baseline"]))
        rows.append(_row(title, run["figures"]["bundle"]))
    first = next(iter(result["runs"].values()))
    machine, after = first["figures"]["machine"], first["figures"]["bundle"]
    threads = machine["threads"] or "one per physical core"
    seconds = ", ".join(f"{run['seconds']:.0f}" for run in result["runs"].values())
    memory = ", ".join(f"{run['memory_peak_bytes'] / 1e9:.1f}" for run in result["runs"].values())
    return "\n\n".join(
        [
            markdown_table(HEADER, rows),
            f"SmolLM2-135M-Instruct; TTFT for a prompt of {after['prompt_tokens']} tokens; perplexity over "
            f"{after['perplexity_tokens']} tokens of the shipped text `{first['figures']['text']}`; medians of "
            f"{result['blocks']} processes per bundle, interleaved with the float32 model's. "
            f"{machine['cpu']}, {machine['cores']} cores seen, threads: {threads}, onnxruntime "
            f"{result['versions']['onnxruntime']}, Python {machine['python']}, commit `{result['commit'][:12]}`, "
            f"{result['date']}. The commands took {seconds} s, measuring included, and {memory} GB of memory at most.",
        ]
    )


def _row(title: str, figures: dict[str, Any]) -> list[str]:
    return [
        title,
        f"{figures['bundle_bytes'] / 1e6:.1f}",
        f"{figures['bits_per_weight']:.2f}",
        f"{figures['ttft_ms']:.0f}",
        f"{figures['token_ms']:.1f}",
        f"{figures['tokens_per_second']:.0f}",
        f"{figures['memory_peak_bytes'] / 1e6:.0f}",
        f"{figures['perplexity']:.2f}",
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
