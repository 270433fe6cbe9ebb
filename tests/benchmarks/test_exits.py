"""The benchmark of exits on a tiny teacher: one training, every threshold, leaving at random beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import benchmarks.stored
from benchmarks import exits
from benchmarks.exits import Setting, page_section, take
from benchmarks.stored import RESULTS, read_result, section, write_result
from tests.decoders import saved


@pytest.mark.slow
def test_a_tiny_student_goes_all_the_way_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exits, "ROOT", tmp_path)
    for module in (exits, benchmarks.stored):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    for name, count in (("train", 40), ("dev", 20)):
        rows = "".join(f"the river {i} rose\t{i % 2}\n" for i in range(count))
        (tmp_path / f"{name}.tsv").write_text(f"sentence\tlabel\n{rows}", encoding="utf-8")
    options: dict[str, object] = {"student": "encoder", "encoder_layers": 2, "exits": [1], "batch": 4}
    setting = Setting(teacher=str(saved(tmp_path, "llama rope llama3")), options={**options, "precision": "no"})
    places = (tmp_path / "train.tsv", tmp_path / "dev.tsv", 2)
    take(setting, *places, times=False)
    result = read_result("exits")
    assert "times" not in result and "| threshold | mean layers" in page_section(result)
    result["rows"] = result["rows"][1:4]
    for number, row in enumerate(result["rows"]):
        row["operators"] = number  # as no run gives: what is there stays
    write_result("exits", result)
    take(setting, *places, times=True)
    again = read_result("exits")
    assert [row["operators"] for row in again["rows"][:3]] == [0, 1, 2]
    assert sorted(row["threshold"] for row in again["rows"]) == [0.3, 0.5, 0.7, 0.9, 1.0]
    write_result("exits", {**again, "bundle": "another", "times": None} | {"rows": again["rows"][:4]})
    take(setting, *places, times=True)
    result = read_result("exits")
    assert set(result["times"]["seconds"]) == {"0.3", "0.5", "0.7", "0.9", "1.0"}
    rows = result["rows"]
    assert [row["threshold"] for row in rows] == [0.3, 0.5, 0.7, 0.9, 1.0]
    layers = [row["mean_layers"] for row in rows]
    assert layers == sorted(layers)
    assert layers[-1] == 2
    assert rows[-1]["accuracy"] == pytest.approx(result["at_exits"]["2"]) == rows[-1]["by_chance"]
    operators = [row["operators"] for row in rows]
    assert operators == sorted(operators) and min(operators) > 2
    assert sum(rows[0]["texts_by_layers"].values()) == result["texts"] == 20

    def never(*_given: Any) -> Any:
        raise AssertionError("what is stored is run again")

    monkeypatch.setattr(exits, "bundle_of", never)
    take(setting, *places, times=True)
    text = page_section(result)
    assert "| 1 | 2.00 |" in text
    assert "20 phrases of SST-2, held out of 2 steps" in text


@pytest.mark.skipif(not (RESULTS / "exits.json").is_file(), reason="no run of benchmarks/exits.py is stored")
def test_the_page_shows_what_is_stored() -> None:
    result = json.loads((RESULTS / "exits.json").read_text(encoding="utf-8"))
    assert section(exits.PAGE, "exits") == page_section(result).strip()
