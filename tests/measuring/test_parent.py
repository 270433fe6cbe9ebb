"""A measuring process ends with the one that started it, however that one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgepipe.measuring.parent import held_stdin

CHILD = """
import os, sys, time
from edgepipe.measuring.parent import end_with_parent
end_with_parent()
print(os.getpid(), flush=True)
time.sleep(float(sys.argv[1]))
"""
STARTER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1], "60"], stdin=subprocess.PIPE).wait()
"""
ROOT = Path(__file__).resolve().parents[2]


def alive(pid: int) -> bool:
    """Say whether a process runs; one that ended and whose parent hasn't asked is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for the process in /proc")
def test_the_child_of_a_killed_process_ends() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, CHILD], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdout is not None
        child = int(starter.stdout.readline())
        assert alive(child)
        os.kill(starter.pid, signal.SIGKILL)
        starter.wait()
        until = time.monotonic() + 20
        while alive(child) and time.monotonic() < until:
            time.sleep(0.02)
        assert not alive(child)


def test_the_child_of_a_living_process_runs_to_its_end() -> None:
    with held_stdin() as stdin:
        subprocess.run([sys.executable, "-c", CHILD, "0.5"], cwd=ROOT, stdin=stdin, check=True, capture_output=True)


def test_a_process_that_nobody_holds_runs_to_its_end() -> None:
    """Started by hand, or with nothing to read."""
    command = [sys.executable, "-c", CHILD, "0.5"]
    subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=True, capture_output=True)
