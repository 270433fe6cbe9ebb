"""The stored students of the E2E data: what the page shows of them, what they were made with, and what they show."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import mean

from benchmarks.e2e import ARMS, NAME, PAGE, by_arm, page_section, settings_of, split
from benchmarks.stored import ROOT, read_result, section

KD, ALONE, WRITTEN, SCRATCH = (
    "adapted, KD",
    "adapted, CE alone",
    "adapted, KD, targets by the teacher",
    "scratch, KD",
)


def test_the_page_shows_the_stored_run() -> None:
    """No figure of the page's table is typed by hand."""
    assert section(PAGE, NAME) == page_section(read_result(NAME)).strip()


def test_the_readme_says_what_is_stored() -> None:
    """Its two scores are those of the stored teacher and of the students that learnt its answers."""
    result = read_result(NAME)
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    written = by_arm(result)[WRITTEN]["bleu"]
    assert f"answers with a BLEU of {result['teacher']['bleu']['value']:.1f}" in text
    assert f"with {mean(written):.1f} ({min(written):.1f} to {max(written):.1f} over three seeds" in text


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


def test_what_the_teacher_is_worth() -> None:
    """In every seed its weights beat random ones, and its scores lower the loss; its own texts give the best answers.

    Three seeds each. Scores without its texts are a tie with cross-entropy alone in BLEU, so nothing is asked of that.
    """
    arms = by_arm(read_result(NAME))
    kd, alone, written, scratch = (arms[name] for name in (KD, ALONE, WRITTEN, SCRATCH))
    assert all(len(arm["bleu"]) == 3 for arm in (kd, alone, written, scratch))
    assert min(kd["bleu"]) > max(scratch["bleu"])
    assert min(kd["rougeL"]) > max(scratch["rougeL"])
    assert all(one < other for one, other in zip(kd["loss"], alone["loss"], strict=True))
    assert mean(written["bleu"]) > mean(alone["bleu"])
    assert all(one > other for one, other in zip(written["rougeL"], alone["rougeL"], strict=True))


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
