"""Progress: one line per stage in a log, a moving line on a terminal, and an estimate that is arithmetic."""

from __future__ import annotations

import io

import pytest

from edgepipe.report.progress import Progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Put a clock under the progress that tests move."""
    clock = Clock()
    monkeypatch.setattr("edgepipe.report.progress.time.monotonic", clock)
    return clock


def test_a_log_has_one_line_per_stage_and_its_notes(clock: Clock) -> None:
    log = io.StringIO()
    progress = Progress(log)
    progress.begin("quantize", 1, 2)
    clock.now += 5
    progress.progress("model.layers.0.mlp.up_proj.weight", 3, 9)
    progress.end("quantize", 12.34, reused=False, notes=["3 tensors kept their grid", "and more"])
    progress.begin("export", 2, 2)
    progress.end("export", 0.0, reused=True, notes=[])
    assert log.getvalue() == (
        "[1/2] quantize: 12.3 s\n"
        "      3 tensors kept their grid\n"
        "      and more\n"
        "[2/2] export: reused from an earlier run\n"
    )


def test_a_log_shows_life_every_half_minute(clock: Clock) -> None:
    log = io.StringIO()
    progress = Progress(log)
    progress.begin("measure", 4, 4)
    for second in range(1, 71):
        clock.now = 1000.0 + second
        progress.progress("speed of the bundle", second, 100)
    assert log.getvalue().splitlines() == [
        "[4/4] measure: speed of the bundle, 30 of 100, about 70 s left",
        "[4/4] measure: speed of the bundle, 60 of 100, about 40 s left",
    ]


def test_a_terminal_shows_one_moving_line(clock: Clock) -> None:
    terminal = Terminal()
    progress = Progress(terminal)
    progress.begin("quantize", 1, 3)
    clock.now += 1
    progress.progress("a.weight", 1, 4)
    clock.now += 0.1
    progress.progress("too soon to draw", 1, 4)
    clock.now += 8.9
    progress.progress("b.weight", 2, 4)
    progress.end("quantize", 10.0, reused=False, notes=[])
    drawn = terminal.getvalue().split("\r\x1b[2K")
    assert drawn == [
        "",
        "[1/3] quantize …",
        "[1/3] quantize: a.weight, 1 of 4",
        "[1/3] quantize: b.weight, 2 of 4, about 10 s left",
        "[1/3] quantize: 10.0 s\n",
    ]


@pytest.mark.parametrize(("done", "total"), [(0, 5), (5, 5)])
def test_there_is_no_estimate_at_either_end(clock: Clock, done: int, total: int) -> None:
    terminal = Terminal()
    progress = Progress(terminal)
    progress.begin("export", 1, 1)
    clock.now += 60
    progress.progress("torch's logits", done, total)
    assert terminal.getvalue().endswith(f"torch's logits, {done} of {total}")


def test_a_long_line_does_not_wrap_the_terminal(clock: Clock) -> None:
    terminal = Terminal()
    progress = Progress(terminal)
    progress.begin("quantize", 1, 1)
    clock.now += 1
    progress.progress("x" * 500, 1, 2)
    assert len(terminal.getvalue().split("\r\x1b[2K")[-1]) == 160


def test_the_estimate_begins_anew_with_every_stage(clock: Clock) -> None:
    terminal = Terminal()
    progress = Progress(terminal)
    progress.begin("quantize", 1, 2)
    clock.now += 1000
    progress.end("quantize", 1000.0, reused=False, notes=[])
    progress.begin("export", 2, 2)
    clock.now += 3
    progress.progress("weights", 1, 2)
    assert terminal.getvalue().endswith("weights, 1 of 2, about 3 s left")


def test_the_estimate_begins_anew_with_every_work(clock: Clock) -> None:
    """A stage scores, then trains; a training that goes on at step 500 didn't take its first 500 in no time."""
    terminal = Terminal()
    progress = Progress(terminal)
    progress.begin("distil", 1, 2)
    for second in range(100):
        clock.now += 1
        progress.progress("the teacher scores", second, 100)
    progress.progress("loss 3.1", 500, 1000)
    for step in range(501, 511):
        clock.now += 1
        progress.progress("loss 3.1", step, 1000)
    assert terminal.getvalue().endswith("loss 3.1, 510 of 1000, about 490 s left")


def test_people_are_told_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.begin("export", 1, 1)
    progress.end("export", 1.0, reused=False, notes=["fine"])
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "[1/1] export: 1.0 s\n      fine\n"
