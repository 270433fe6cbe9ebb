"""The benchmark of pruning on a tiny model: what a row says, and how the table reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import prune
from benchmarks.prune import Case, Row, multiply_adds, page_section, rows_of, score
from edgepipe.sources import open_model
from tests.encoders import save_encoder


def test_every_model_has_a_dense_row_first() -> None:
    rows = rows_of(400)
    assert [row.name for row in rows[:5]] == [
        *("minilm-l6-v2 0 0", "minilm-l6-v2 0.25 0", "minilm-l6-v2 0.25 400"),
        *("minilm-l6-v2 0.5 0", "minilm-l6-v2 0.5 400"),
    ]
    assert len({row.name for row in rows}) == len(rows)


def test_multiply_adds_are_those_of_matrices_and_attention(tmp_path: Path) -> None:
    """Two layers of width 64, FFN 96, 4 heads of 16; 10 tokens."""
    model = open_model(str(save_encoder(tmp_path / "bert", "bert")))
    assert multiply_adds(model, 10) == 2 * (10 * (4 * 64 * 64 + 2 * 64 * 96) + 2 * 10 * 10 * 64)


def test_a_tiny_row_goes_all_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "ROOT", tmp_path)
    model = str(save_encoder(tmp_path / "bert", "bert"))
    pairs = "".join(f"a\tb\tc\t{i}\t{i % 5}\tThe river {i}.\tThe mill {i * i}.\n" for i in range(12))
    (tmp_path / "pairs.tsv").write_text(pairs, encoding="utf-8")
    (tmp_path / "texts.txt").write_text("\n\n".join(f"The water rose {i} times." for i in range(20)), encoding="utf-8")
    case = Case(model=model, metric="spearman", scored="pairs.tsv", speed="8x128", teaching={"batch": 4})
    texts = {model: tmp_path / "texts.txt", "pairs.tsv": tmp_path / "pairs.tsv"}
    monkeypatch.setattr(Row, "name", property(lambda row: f"tiny {row.ratio:g} {row.steps}"))
    dense, taught = (score(Row(case=case, ratio=ratio, steps=steps), texts) for ratio, steps in ((0.0, 0), (0.5, 2)))
    assert taught["parameters"] < dense["parameters"]
    assert taught["bundle_bytes"] < dense["bundle_bytes"]
    assert taught["multiply_adds"] < dense["multiply_adds"]
    rows = [{"name": f"tiny {i}", "provenance": prune.provenance(), **row} for i, row in enumerate((dense, taught))]
    text = page_section({"rows": rows})
    assert "50%" in text
    assert f"{dense['multiply_adds'] / taught['multiply_adds']:.2f}" in text


def test_a_speed_up_is_set_beside_what_is_predicted() -> None:
    whole = {"name": "m 0 0", "model": "m", "ratio": 0.0, "steps": 0, "multiply_adds": 200, "metric": "perplexity"}
    shared = {
        "parameters": 2_000_000,
        "bundle_bytes": 8_000_000,
        "quality": {"value": 20.0, "interval": [19.0, 21.0], "count": 9},
        "machine": {"cpu": "a machine"},
        "provenance": {"date": "2026-11-27", "commit": "0" * 40, "load_average_1min": 1.0},
    }
    cut = {**whole, "name": "m 0.5 0", "ratio": 0.5, "multiply_adds": 100}
    cut["speed"] = {"ratio": {"value": 0.625, "low": 0.5, "high": 0.8}}
    text = page_section({"rows": [{**shared, **whole}, {**shared, **cut}]})
    assert "| 1.60 [1.25, 2.00] | 2.00 | 0.80 |" in text
    assert "× 1.00" in text
