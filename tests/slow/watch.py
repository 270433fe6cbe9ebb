"""Run a command and watch the memory of it and all its children."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_EVERY_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """Hold what a finished command did and took."""

    stdout: str
    stderr: str
    code: int
    seconds: float
    peak_bytes: int  # largest sum of resident bytes over the process tree; pages that are shared count once each


def watch(command: Sequence[str | Path], *, cwd: Path, env: Mapping[str, str] | None = None) -> Watched:
    """Run a command to its end, its output kept."""
    begun = time.perf_counter()
    out, err = cwd / ".stdout", cwd / ".stderr"
    peak = 0
    with out.open("wb") as stdout, err.open("wb") as stderr:
        child = subprocess.Popen(command, cwd=cwd, env=env, stdout=stdout, stderr=stderr)
        while child.poll() is None:
            peak = max(peak, _tree_bytes(child.pid))
            time.sleep(_EVERY_S)
    return Watched(
        stdout=out.read_text(encoding="utf-8"),
        stderr=err.read_text(encoding="utf-8"),
        code=child.returncode,
        seconds=time.perf_counter() - begun,
        peak_bytes=peak,
    )


def _tree_bytes(pid: int) -> int:
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.Error:  # one ended while we looked: what the others hold counts at the next look
        pass
    return total
