"""Children that die: each death is a finding about one thing, and the others still get tried."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgepipe.machine.children import DIES, WORKS, WRONG, Outcome, try_in_children

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the children import the tests."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def attempt(*names: str, timeout_s: float = 30) -> list[Outcome]:
    """Try names in tests/machine/dying.py."""
    return list(try_in_children("tests.machine.dying", names, timeout_s=timeout_s))


def test_deaths_are_findings_and_the_rest_goes_on() -> None:
    names = ("first", "SIGILL", "wrong", "SIGSEGV", "exit", "raise", "last")
    assert attempt(*names) == [
        Outcome(name="first", state=WORKS),
        Outcome(name="SIGILL", state=DIES, detail="dies with SIGILL"),
        Outcome(name="wrong", state=WRONG, detail="one off"),
        Outcome(name="SIGSEGV", state=DIES, detail="dies with SIGSEGV"),
        Outcome(name="exit", state=DIES, detail="ends with exit code 3: the last words"),
        Outcome(name="raise", state=WRONG, detail="ValueError: two lines"),
        Outcome(name="last", state=WORKS),
    ]


def test_what_hangs_is_stopped() -> None:
    first, hanging, last = attempt("first", "hang", "last", timeout_s=3)
    assert (first.state, last.state) == (WORKS, WORKS)
    assert (hanging.state, hanging.detail) == (DIES, "took longer than 3 s")


def test_a_child_that_cannot_start_is_started_once() -> None:
    assert [(o.name, o.state) for o in attempt("unable", "b", "c")] == [("unable", DIES), ("b", DIES), ("c", DIES)]
    assert attempt("unable")[0].detail == "ends with exit code 1: can't even start"


def test_nothing_to_try_starts_nothing() -> None:
    assert attempt() == []
