"""The benchmark of budgets: what it searches on and judges on are apart, and what the page says is what is stored."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import budget
from benchmarks.stored import RESULTS, read_result, section
from edgepipe.search.asked import Asked, wanted_of

ROW: dict[str, Any] = {
    "arm": "minilm-l6-v2 1%",
    "settings": {"model": "minilm-l6-v2", "max_drop": "1%", "examples": 500},
    "provenance": {"commit": "0" * 40, "date": "2026-01-01"},
    "kept": False,
    "refused": None,
    "search": {
        "metric": "spearman",
        "data": {"name": "stsb-train.tsv", "examples": 500},
        "drop": 0.004,
        "limit": 0.009,
    },
    "drop_unseen": 0.012,
    "unseen": {"name": "stsb-dev.tsv", "count": 1500},
    "bundle_bytes": 14_000_000,
    "bits_per_weight": 3.25,
    "minutes": 12.0,
}


def test_a_broken_promise_is_said_as_plainly_as_a_kept_one() -> None:
    refused = {**ROW, "refused": "no bundle keeps it", "kept": True}
    said = budget.page_section({"rows": [ROW, refused]})
    cells = "| minilm-l6-v2 | 1% | 14.0 | 3.25 | +0.40 % | +0.90 % | +1.20 % | NO | 12 |"
    assert cells in said and "none: exit code 3" in said
    assert "spearman, searched on 500 examples of `stsb-train.tsv`, judged on 1,500 of `stsb-dev.tsv`" in said


@pytest.mark.parametrize("arm", budget.ARMS, ids=lambda arm: arm.name)
def test_what_is_judged_on_is_not_what_is_searched_on(
    arm: budget.Arm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(os.environ.get("EDGEPIPE_DATA", budget.ROOT.parent / "shared" / "data"))
    if not (data / "stsb-train.tsv").is_file():
        pytest.skip("the evaluation data isn't here: EDGEPIPE_DATA names its folder")
    monkeypatch.setattr(budget, "FOLDER", tmp_path)
    searched, unseen, options = budget.sources(arm, data, 100)
    first, second = (set(path.read_text(encoding="utf-8").splitlines()) for path in (searched, unseen))
    long = {line for line in first & second if len(line) > 80}
    assert len(long) <= 0.02 * len(second), "a few lines of a text may repeat"
    task = "feature-extraction" if arm.model == budget.MINILM else "text-generation"
    assert wanted_of(Asked(max_drop=arm.max_drop, data=str(searched), options=options), task).options.threads == 1


@pytest.mark.skipif(not (RESULTS / "budget.json").is_file(), reason="no run of benchmarks/budget.py is stored")
def test_the_page_shows_the_stored_run() -> None:
    assert section(budget.PAGE, budget.NAME) == budget.page_section(read_result(budget.NAME)).strip()
