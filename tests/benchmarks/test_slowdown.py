"""Stored trials of the method: a planted slowdown, two measurements an hour apart; what the page says of them."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from benchmarks.stored import read_result
from edgepipe.measuring.agreement import compare

PAGE = Path(__file__).resolve().parents[2] / "docs" / "measure.md"


def test_a_slowdown_of_ten_percent_was_told_from_none() -> None:
    """At least 18 of 20 verdicts were right, half of the trials slowed or near it, and the page says how many."""
    found = read_result("slowdown")
    trials = found["trials"]
    slowed = [trial for trial in trials if trial["planted"]]
    assert found["share"] == 0.1
    assert len(trials) == 20
    assert 8 <= len(slowed) <= 12
    assert found["right"] == sum(trial["right"] for trial in trials) >= 18
    assert f"{found['right']} of {len(trials)} verdicts were right" in " ".join(
        PAGE.read_text(encoding="utf-8").split()
    )


def test_two_measurements_an_hour_apart_were_judged_by_their_intervals() -> None:
    """The verdict follows again from what both stored, and the page has its figures."""
    found = read_result("hour-apart")
    earlier, now = found["earlier"], found["now"]
    taken = [datetime.fromisoformat(one["taken_at"]) for one in (earlier, now)]
    assert 3600 <= (taken[1] - taken[0]).total_seconds() < 7200
    judged = compare(now, earlier)
    assert {key: judged[key] for key in ("agrees", "figures")} == {
        key: now["since"][key] for key in ("agrees", "figures")
    }
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    for one in judged["figures"].values():
        assert f"{one['ratio']:.2f} [{one['low']:.2f}, {one['high']:.2f}]" in page
