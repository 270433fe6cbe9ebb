"""Measure a bundle beside its uncompressed baseline: interleaved blocks, each in a fresh process, raw samples kept."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import numpy as np

from edgepipe.artifacts import Json
from edgepipe.errors import StageError
from edgepipe.measuring.parent import held_stdin

_BLOCK_TIMEOUT_S = 1800


def measure_bundles(
    bundles: Mapping[str, Path],
    text: str,
    *,
    threads: int,
    blocks: int,
    tokens: int,
    progress: Callable[[str, int, int], None],
    work_dir: Path | None = None,
) -> dict[str, Json]:
    """Return figures for every bundle by its name; blocks of the bundles alternate, so drift meets all alike.

    `threads` 0 leaves the number to the engine, `tokens` 0 scores the whole text. `work_dir` is where
    temporary files go (None: the system's folder for them). Raises StageError when a block fails.
    """
    samples: dict[str, list[Json]] = {name: [] for name in bundles}
    perplexity: dict[str, Json] = {}
    total = len(bundles) * (blocks + 1)
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        file = Path(folder) / "text.txt"
        file.write_text(text, encoding="utf-8")
        for block in range(blocks):
            for position, (name, path) in enumerate(bundles.items()):
                progress(f"speed of the {name}", block * len(bundles) + position, total)
                samples[name].append(_work("speed", path, file, threads, "3"))
        for position, (name, path) in enumerate(bundles.items()):
            progress(f"perplexity of the {name}", blocks * len(bundles) + position, total)
            perplexity[name] = _work("perplexity", path, file, threads, str(tokens))
    return {name: _figures(path, samples[name], perplexity[name]) for name, path in bundles.items()}


def describe_machine(threads: int) -> Json:
    """Return what the figures were taken on."""
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
    }


def _work(kind: str, bundle: Path, file: Path, threads: int, *more: str) -> Json:
    # -P: a json.py in the directory the user happens to work in must not be taken for Python's
    python = [sys.executable, "-P", "-m", "edgepipe.measuring.worker"]
    command = [*python, kind, str(bundle), str(file), str(threads), *more]
    try:
        with held_stdin() as stdin:
            done = subprocess.run(
                command, stdin=stdin, capture_output=True, text=True, timeout=_BLOCK_TIMEOUT_S, check=False
            )
    except subprocess.TimeoutExpired as error:
        raise StageError(f"measuring {bundle.name} took longer than {_BLOCK_TIMEOUT_S} s: it was stopped") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise StageError(f"measuring {bundle.name} ended with exit code {done.returncode}: {last}")
    result: Json = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _figures(bundle: Path, blocks: list[Json], perplexity: Json) -> Json:
    """Summarise a bundle's blocks; the raw samples stay beside the medians."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    token_ms = np.concatenate([times for block in blocks for times in block["token_ms"]])
    per_token = float(np.median(token_ms))
    weights = manifest["weights"]
    return {
        "bundle_bytes": sum(f.stat().st_size for f in bundle.iterdir()),
        "weight_bytes": weights["bytes"],
        "bits_per_weight": weights["bits_per_weight"],
        "cache_bytes": manifest["cache"]["bytes"],
        "load_ms": median(b["load_ms"] for b in blocks),
        "ttft_ms": median(t for b in blocks for t in b["ttft_ms"]),
        "token_ms": per_token,
        "token_ms_p95": float(np.percentile(token_ms, 95)),
        "tokens_per_second": 1e3 / per_token,
        "prompt_tokens": blocks[0]["prompt_tokens"],
        "memory_peak_bytes": max(b["memory_peak_bytes"] for b in blocks),
        "perplexity": perplexity["perplexity"],
        "perplexity_tokens": perplexity["tokens"],
        "samples": blocks,
    }
