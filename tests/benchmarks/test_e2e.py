"""The stored students of the E2E data: what the page shows of them, what they were made with, and what they show."""

from __future__ import annotations

import csv
from pathlib import Path

from benchmarks.e2e import ARMS, NAME, PAGE, page_section, settings_of, split
from benchmarks.stored import read_result, section


def test_the_page_shows_the_stored_run() -> None:
    """No figure of the page's table is typed by hand."""
    assert section(PAGE, NAME) == page_section(read_result(NAME)).strip()


def test_what_is_stored_is_what_the_command_runs() -> None:
    """Every row was made with the settings its arm has now, once a seed, by the same teacher on the same data."""
    result = read_result(NAME)
    arms = {arm.name: arm for arm in ARMS}
    assert len({(row["arm"], row["seed"]) for row in result["rows"]}) == len(result["rows"])
    for row in result["rows"]:
        arm = arms[row["arm"]]
        assert row["settings"] == settings_of(arm, 200, result["teacher"]["settings"]), row["arm"]
        assert row["seed"] < arm.seeds
        assert row["bleu"]["count"] == row["settings"]["teacher"]["data"]["test_meanings"]


def test_students_are_small() -> None:
    """A student has at most 45 % of its teacher's parameters."""
    result = read_result(NAME)
    assert max(row["parameters"] for row in result["rows"]) <= 0.45 * result["teacher"]["parameters"]


def test_no_meaning_is_in_both_parts(tmp_path: Path) -> None:
    """Texts of one meaning are learnt from or tested on, never both."""
    source = tmp_path / "e2e.csv"
    with source.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mr", "ref"])
        writer.writerows((f"name[{i % 50}]", f"text {i}") for i in range(200))
    train, test, counts = split(source, tmp_path)
    meanings = [{row["mr"] for row in csv.DictReader(path.open(encoding="utf-8"))} for path in (train, test)]
    assert not meanings[0] & meanings[1]
    assert (len(meanings[0]), len(meanings[1])) == (40, 10)
    assert (counts["meanings"], counts["test_meanings"], counts["test_references"]) == (50, 10, 40)
