"""The benchmark of pruning on a tiny model: what a row says, that it is stored once, and how the tables read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import benchmarks.stored
from benchmarks import prune
from benchmarks.prune import (
    DENSE,
    FOUR_BITS,
    HALF,
    MINILM,
    PRUNED_FIRST,
    QUANTIZED_FIRST,
    Case,
    Row,
    multiply_adds,
    page_sections,
    rows_of,
    take,
)
from benchmarks.stored import RESULTS, read_result, section
from edgepipe.sources import open_model
from tests.encoders import save_encoder
from tests.stages.test_prune import STUDENTS
from tests.students.tiny import save_tiny_student

MODELS = ("minilm-l6-v2", "smollm2-135m")


def test_every_model_has_a_dense_row_first() -> None:
    rows = rows_of()
    assert [row.name for row in rows[:5]] == [
        *("minilm-l6-v2 dense 0 0", "minilm-l6-v2 0.25 0 0", "minilm-l6-v2 0.25 400 0"),
        *("minilm-l6-v2 0.5 0 0", "minilm-l6-v2 0.5 400 0"),
    ]
    assert len({row.name for row in rows}) == len(rows)
    for arm in (PRUNED_FIRST, QUANTIZED_FIRST):
        assert [row.seed for row in rows if row.arm is arm and row.steps == 100] == [0, 1, 2]


def test_multiply_adds_are_those_of_matrices_and_attention(tmp_path: Path) -> None:
    """Two layers of width 64, FFN 96, 4 heads of 16; 10 tokens."""
    model = open_model(str(save_encoder(tmp_path / "bert", "bert")))
    assert multiply_adds(model, 10) == 2 * (10 * (4 * 64 * 64 + 2 * 64 * 96) + 2 * 10 * 10 * 64)


@pytest.mark.slow
def test_tiny_rows_go_all_the_way_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut, masked and quantized in both orders, taught for two steps, scored, stored, and not run again."""
    monkeypatch.setattr(prune, "ROOT", tmp_path)
    for module in (prune, benchmarks.stored):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    model = str(save_tiny_student(tmp_path / "model", STUDENTS["encoder"]))
    pairs = "".join(f"a\tb\tc\t{i}\t{i % 5}\tThe river {i}.\tThe mill {i * i}.\n" for i in range(12))
    (tmp_path / "pairs.tsv").write_text(pairs, encoding="utf-8")
    (tmp_path / "texts.txt").write_text("\n\n".join(f"The water rose {i} times." for i in range(20)), encoding="utf-8")
    case = Case(model=model, metric="spearman", scored="pairs.tsv", speed="8x128", steps=2, teaching={"batch": 4})
    texts = {model: tmp_path / "texts.txt", "pairs.tsv": tmp_path / "pairs.tsv"}
    rows = [Row(case=case, arm=DENSE), Row(case=case, arm=HALF, steps=2), Row(case=case, arm=FOUR_BITS)]
    rows += [Row(case=case, arm=arm, steps=2, seed=seed) for arm in (PRUNED_FIRST, QUANTIZED_FIRST) for seed in (0, 1)]
    monkeypatch.setattr(Row, "name", property(lambda row: f"tiny {row.arm.name} {row.steps} {row.seed}"))
    take(rows, texts)
    stored = {row["name"]: row for row in read_result("prune")["rows"]}
    dense, taught, four = (stored[f"tiny {name} 0"] for name in ("dense 0", "0.5 2", "4 bits 0"))
    for name in ("parameters", "bundle_bytes", "multiply_adds"):
        assert taught[name] < dense[name]
    orders = [stored[f"tiny {arm.name} 2 {seed}"] for arm in (PRUNED_FIRST, QUANTIZED_FIRST) for seed in (0, 1)]
    assert all(row["bundle_bytes"] < four["bundle_bytes"] for row in orders), "zeros are stored deflated"
    assert len({row["quality"]["value"] for row in orders}) > 1

    def never(*_given: Any) -> Any:
        raise AssertionError("a stored row is run again")

    monkeypatch.setattr(prune, "score", never)
    take(rows, texts)
    with pytest.raises(AssertionError, match="run again"):
        take([dataclasses.replace(rows[0], case=dataclasses.replace(case, context=16))], texts)
    text = page_sections(read_result("prune"))
    assert f"{dense['multiply_adds'] / taught['multiply_adds']:.2f}" in text["prune"]
    assert "| 2:4, then 4 bits | 2 steps | 2 |" in text["prune masks"]


def stored_row(**facts: Any) -> dict[str, Any]:
    """Return a row as it is stored, with round figures."""
    return {
        "model": "m",
        "arm": "dense",
        "ratio": 0.0,
        "steps": 0,
        "seed": 0,
        "multiply_adds": 200,
        "metric": "perplexity",
        "parameters": 2_000_000,
        "bundle_bytes": 8_000_000,
        "quality": {"value": 20.0, "interval": [19.0, 21.0], "count": 9},
        "machine": {"cpu": "a machine"},
        "provenance": {"date": "2026-11-27", "commit": "0" * 40, "load_average_1min": 1.0},
        **facts,
    }


def test_a_speed_up_is_set_beside_what_is_predicted() -> None:
    speed = {"ratio": {"value": 0.625, "low": 0.5, "high": 0.8}}
    cut = stored_row(arm="0.5", ratio=0.5, multiply_adds=100, speed=speed)
    text = page_sections({"rows": [stored_row(), cut]})
    assert "| 1.60 [1.25, 2.00] | 2.00 | 0.80 |" in text["prune"]
    assert "× 1.00" in text["prune"]
    assert text["prune masks"] == "Not measured yet."


def test_zeros_are_set_beside_4_bits_alone() -> None:
    def scored(arm: str, value: float, **facts: Any) -> dict[str, Any]:
        return stored_row(arm=arm, metric="spearman", quality={"value": value}, **facts)

    rows = [scored(FOUR_BITS.name, 0.85), scored(PRUNED_FIRST.name, 0.845, steps=MINILM.steps)]
    rows += [scored(QUANTIZED_FIRST.name, 0.8 + 0.01 * seed, steps=100, seed=seed) for seed in range(3)]
    text = page_sections({"rows": rows})["prune masks"]
    assert "| 2:4, then 4 bits | 400 steps | 1 | 8.0 | 84.50 | -0.50 points |" in text
    assert "| 4 bits, then 2:4 | 100 steps | 3 | 8.0 | 81.00 (80.00 to 82.00) | -4.00 points |" in text


@pytest.mark.skipif(not (RESULTS / "prune.json").is_file(), reason="no run of benchmarks/prune.py is stored")
def test_the_page_shows_what_is_stored() -> None:
    result = json.loads((RESULTS / "prune.json").read_text(encoding="utf-8"))
    for name, text in page_sections(result).items():
        assert section(prune.PAGE, name) == text.strip()


stored = pytest.mark.skipif(not (RESULTS / "prune.json").is_file(), reason="no run of benchmarks/prune.py is stored")


def rows(**facts: Any) -> list[dict[str, Any]]:
    """Return the stored rows that say this of themselves."""
    result = json.loads((RESULTS / "prune.json").read_text(encoding="utf-8"))
    return [row for row in result["rows"] if all(row[name] == value for name, value in facts.items())]


@stored
def test_what_is_cut_off_is_time_saved() -> None:
    """At least 0.8 of what the multiply-adds predict, of both models at both ratios."""
    cut = [row for row in rows() if "speed" in row]
    assert {(row["model"], row["ratio"]) for row in cut} == {(m, r) for m in MODELS for r in (0.25, 0.5)}
    for row in cut:
        (dense,) = rows(model=row["model"], arm="dense")
        predicted = dense["multiply_adds"] / row["multiply_adds"]
        assert 1 / row["speed"]["ratio"]["value"] > 0.8 * predicted, row["name"]


@stored
def test_recovery_brings_the_model_closer() -> None:
    for model in MODELS:
        better = max if model == MODELS[0] else min
        for ratio in (0.25, 0.5):
            (untaught, taught) = sorted(rows(model=model, ratio=ratio), key=lambda row: row["steps"])
            values = [row["quality"]["value"] for row in (untaught, taught)]
            assert better(values) == values[1], (model, ratio)


@stored
def test_zeros_cost_little_and_go_before_the_grid() -> None:
    """2:4 and 4 bits are within a point of 4 bits alone, and pruning first is as good with every seed."""
    (plain,) = rows(arm=FOUR_BITS.name)
    (recovered,) = rows(arm=PRUNED_FIRST.name, steps=MINILM.steps)
    assert recovered["quality"]["value"] > plain["quality"]["value"] - 0.01
    for seed in range(3):
        (first,), (last,) = (rows(arm=arm.name, steps=100, seed=seed) for arm in (PRUNED_FIRST, QUANTIZED_FIRST))
        assert first["quality"]["value"] >= last["quality"]["value"], seed
