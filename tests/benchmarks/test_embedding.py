"""The stored steps from decoder to encoder: what the page shows of them, and what they were made with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.embedding import ARMS, NAME, PAGE, named, page_section, rows_of, settings_of, training_files, values
from benchmarks.stored import read_result, section


def test_the_page_shows_the_stored_run() -> None:
    """No figure of the page's tables is typed by hand."""
    assert section(PAGE, NAME) == page_section(read_result(NAME)).strip()


def test_what_is_stored_is_what_the_command_runs() -> None:
    """Every row was made with the settings its arm has now, once a seed, and nothing of a finished arm is left out."""
    rows = read_result(NAME)["rows"]
    assert rows
    assert len({(row["arm"], row["seed"]) for row in rows}) == len(rows)
    for row in rows:
        arm = named(row["arm"])
        assert row["settings"] == settings_of(arm), row["arm"]
        low, high = row[arm.metric]["interval"]
        assert low < row[arm.metric]["value"] < high
        assert bool(row["training"]) == arm.trained


def test_the_contrast_pays() -> None:
    """With every seed, 15 points of Spearman and more above causal mean pooling of the same layers."""
    result = read_result(NAME)
    (first,) = values(result, "whole-causal")
    assert len(values(result, "whole-contrast")) == 3
    assert min(values(result, "whole-contrast")) >= first + 0.15


def test_arms_follow_each_other() -> None:
    """An arm comes behind the one whose student it teaches further, and its settings hold all of that one's."""
    names = [arm.name for arm in ARMS]
    for arm in ARMS:
        if arm.after:
            assert names.index(arm.after) < names.index(arm.name)
            assert settings_of(arm)[:-1] == settings_of(named(arm.after))


def test_students_had_the_same_layers_and_data() -> None:
    """Between two rows of the first layers, the steps differ and nothing else: parameters, pairs, seeds."""
    result = read_result(NAME)
    few = [row for row in result["rows"] if row["settings"][0].get("encoder_from") and "spearman" in row]
    assert len({row["parameters"] for row in few}) == 1
    assert len({row["spearman"]["count"] for row in few}) == 1
    assert len({row["spearman"]["data"]["sha256"] for row in few}) == 1
    assert [row["seed"] for row in rows_of(result, "masked")] == list(range(len(rows_of(result, "masked"))))


def test_nothing_of_a_dev_set_is_trained_on(tmp_path: Path) -> None:
    """What is trained with is written from the train files: the dev files needn't be there."""
    pair = "a\tb\tc\td\t{}\tA man runs.\t{}\n"
    (tmp_path / "stsb-train.tsv").write_text(
        pair.format(5.0, "A man is running.") + pair.format(1.0, "A cat sleeps."), encoding="utf-8"
    )
    (tmp_path / "sst2-train.tsv").write_text("sentence\tlabel\nso good\t1\nso bad\t0\n", encoding="utf-8")
    (tmp_path / "wikitext2-valid.txt").write_text(f"\n = Title = \n\n {'A long passage. ' * 9}\n", encoding="utf-8")
    (tmp_path / "made").mkdir()
    files, counts = training_files(tmp_path, tmp_path / "made")
    assert counts == {"sentences": 3, "passages": 1, "pairs": 2, "phrases": 2}
    texts = [json.loads(line)["text"] for line in files["trim"].read_text(encoding="utf-8").splitlines()]
    assert texts[:3] == ["A cat sleeps.", "A man is running.", "A man runs."]
    assert texts[3].startswith("A long passage.") and texts[4:] == ["so good", "so bad"]
    with pytest.raises(StopIteration):
        named("no such arm")
