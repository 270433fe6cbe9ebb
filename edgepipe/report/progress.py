"""Tell people on stderr how a run goes: one line per stage, a moving line with an estimate on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TextIO

_REDRAW_S = 0.2  # often enough to look alive, seldom enough to cost nothing
_ESTIMATE_AFTER_S = 2.0  # an estimate from less work than this would jump about
_SILENT_STEP_S = 30.0  # without a terminal: say something this often, so that a log shows life


class Progress:
    """Print the progress of a run; one of pipeline.Listener."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._moving = self._stream.isatty()
        self._title = ""
        self._begun, self._drawn = time.monotonic(), 0.0
        self._work = (0, 0, 0)  # done when it began, done last, total: a stage does one after another

    def begin(self, stage: str, number: int, total: int) -> None:
        """Start a stage's line."""
        self._title = f"[{number}/{total}] {stage}"
        self._begun = self._drawn = time.monotonic()
        self._work = (0, 0, 0)
        if self._moving:
            self._draw(f"{self._title} …")

    def progress(self, what: str, done: int, total: int) -> None:
        """Redraw the stage's line with how far it is and about how long it will take."""
        now = time.monotonic()
        first, last, before = self._work
        if before and (total != before or done < last):  # another work, which may go on where a killed run left off
            first, self._begun = done, now
        self._work = (first, done, total)
        if now - self._drawn < (_REDRAW_S if self._moving else _SILENT_STEP_S):
            return
        self._drawn = now
        spent = now - self._begun
        left = ""
        if first < done < total and spent > _ESTIMATE_AFTER_S:
            left = f", about {spent / (done - first) * (total - done):.0f} s left"
        text = f"{self._title}: {what}, {done} of {total}{left}"
        if self._moving:
            self._draw(text)
        else:
            print(text, file=self._stream, flush=True)

    def end(self, stage: str, seconds: float, *, reused: bool, notes: Sequence[str]) -> None:
        """Finish the stage's line and print its notes."""
        if self._moving:
            self._draw("")
        how = "reused from an earlier run" if reused else f"{seconds:.1f} s"
        print(f"{self._title}: {how}", file=self._stream, flush=True)
        for note in notes:
            print(f"      {note}", file=self._stream, flush=True)

    def _draw(self, text: str) -> None:
        print(f"\r\x1b[2K{text[:160]}", end="", file=self._stream, flush=True)
