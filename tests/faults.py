"""Faults at a chosen step of a run: the process is killed there, or from there on the disk is full or read-only.

A step is one change to the files of a folder: a file opened for writing, a directory made, something renamed or
removed. Python announces each to audit hooks before it happens. `python -m tests.faults` imports what a run needs once
and then forks a process per request, so that a run takes half a second and not five: most of five is torch.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

_MAKES = os.O_CREAT | os.O_TRUNC
_CHANGES = os.O_WRONLY | os.O_RDWR | _MAKES
_IMPORTED = (
    *("torch", "transformers.models.llama.modeling_llama", "onnxruntime", "edgepipe.runtime", "edgepipe.bundle"),
    *("edgepipe.engines.onnxruntime", "edgepipe.graph.evaluate", "edgepipe.graph.reference", "edgepipe.pipeline"),
    *("edgepipe.sources.huggingface", "edgepipe.report.progress", "edgepipe.report.terminal"),
)
_ERRORS = {"full": errno.ENOSPC, "read-only": errno.EROFS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Say how a run ended."""

    code: int  # -9: killed
    stdout: str
    stderr: str
    steps: int | None  # None: it was killed, nobody could count
    seconds: float


class Runs:
    """Run edgepipe in forked processes, each with a fault or without."""

    def __enter__(self) -> Self:
        """Start the process that forks."""
        root = Path(__file__).resolve().parents[1]
        env = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "tests.faults"]
        self._server = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        """End it; between two requests it has nothing to lose."""
        self._server.kill()
        self._server.communicate()

    def __call__(self, folder: Path, *arguments: str, fault: str | None = None, step: int = 1) -> Ended:
        """Run `edgepipe arguments` in a folder, with a fault ("kill", "full" or "read-only") at a step."""
        assert self._server.stdin is not None and self._server.stdout is not None
        asked = {"folder": str(folder.resolve()), "arguments": arguments, "fault": fault, "step": step}
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        return Ended(**json.loads(self._server.stdout.readline()))


def watch_steps(folder: str, fault: str | None, step: int) -> Callable[[], int]:
    """Bring on the fault at the step; return a function that says how many steps there were."""
    steps = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal steps
        if not _is_step(event, arguments, folder, makes=fault == "full"):
            return
        steps += 1
        if fault is None or steps < step:
            return
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(_ERRORS[fault], os.strerror(_ERRORS[fault]), str(arguments[0]))

    sys.addaudithook(hook)
    return lambda: steps


def _is_step(event: str, arguments: tuple[Any, ...], folder: str, makes: bool) -> bool:
    """Say whether something below the folder is about to change; with `makes` only what needs space on the disk."""
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, int) or not flags & (_MAKES if makes else _CHANGES):
            return False
    elif event == "os.mkdir" or (not makes and event in ("os.rename", "os.remove", "os.rmdir")):
        path = arguments[0]
        if arguments[-1] != -1:  # relative to an open directory: shutil.rmtree at work
            return True
    else:
        return False
    return os.path.abspath(os.fsdecode(path)).startswith(folder + os.sep)  # noqa: PTH100 (pathlib would be heard)


def _serve() -> None:
    """Fork a process for each line of stdin, and say on stdout how it ended."""
    for name in _IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_answer(**json.loads(line))) + "\n")
        sys.stdout.flush()


def _answer(folder: str, arguments: Sequence[str], fault: str | None, step: int) -> dict[str, Any]:
    names = [f"{folder}.{name}" for name in ("stdout", "stderr", "steps")]
    for name in names:
        Path(name).write_text("", encoding="utf-8")
    started = time.perf_counter()
    child = os.fork()
    if not child:
        _run(names, folder, arguments, fault, step)
    _, status = os.waitpid(child, 0)
    seconds = time.perf_counter() - started
    stdout, stderr, steps = (Path(name).read_text(encoding="utf-8") for name in names)
    for name in names:
        Path(name).unlink()
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "stdout": stdout, "stderr": stderr, "steps": int(steps or 0) or None, "seconds": seconds}


def _run(names: Sequence[str], folder: str, arguments: Sequence[str], fault: str | None, step: int) -> None:
    """Be the forked process."""
    from edgepipe.cli import main

    code = 70
    try:
        for descriptor, name in enumerate(names[:2], start=1):
            os.dup2(os.open(name, os.O_WRONLY), descriptor)
        os.chdir(folder)
        count = watch_steps(folder, fault, step)
        try:
            main(list(arguments))
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
        Path(names[2]).write_text(str(count()), encoding="utf-8")
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve()
