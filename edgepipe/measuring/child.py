"""Run a worker as a child process and take turns with it, one line of JSON each way."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from edgepipe.artifacts import Json
from edgepipe.errors import StageError

# -P: a json.py in the directory the user happens to work in must not be taken for Python's
WORKER = ("-P", "-m", "edgepipe.measuring.worker")
_TIMEOUT_S = 1800  # for one answer
# onnxruntime's threads wait for more work by spinning: 40 ms of a core after every answer, none 50 ms later. Without
# this pause a bundle's tokens took half as long again as alone (16.2 ms, 11.0 alone).
_QUIET_S = 0.08


class Child:
    """Hold a worker at work; `ready` is the first thing it said. Use as a context: it ends with the block."""

    def __init__(self, name: str, arguments: Sequence[str], program: Sequence[str] = WORKER) -> None:
        """Start `python PROGRAM ARGUMENTS` and wait until it is ready; `name` is how messages call it."""
        self._name = name
        # a file, since a pipe that nobody reads would fill up; close() closes it
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, *program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
        )
        try:
            self.ready = self._quiet_answer()
        except BaseException:
            self.close()
            raise

    def ask(self, question: Json) -> Json:
        """Send one line and return the line that answers it; StageError when the worker fails or takes too long."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a dead one is noticed when it doesn't answer
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        return self._quiet_answer()

    def close(self) -> None:
        """End the worker."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._process.kill()
        self.close()

    def _quiet_answer(self) -> Json:
        """Return an answer once the worker has gone quiet: its engine's threads still spin, and would slow the next."""
        answer = self._answer()
        time.sleep(_QUIET_S)
        return answer

    def _answer(self) -> Json:
        assert self._process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(_TIMEOUT_S, stop)
        timer.daemon = True
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line and late.is_set():
            raise StageError(f"measuring {self._name} took longer than {_TIMEOUT_S} s: it was stopped")
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().decode("utf-8", "replace").strip().splitlines() or ["no message"]
            raise StageError(f"measuring {self._name} ended with exit code {code}: {said[-1]}")
        answer: Json = json.loads(line)
        return answer


def answer_of(kind: str, bundle: Path, text_file: Path, threads: int, tokens: int = 0) -> Json:
    """Run a worker that has one thing to say, to its end, and return that."""
    with Child(bundle.name, [kind, str(bundle), str(text_file), str(threads), str(tokens)]) as child:
        return child.ready
