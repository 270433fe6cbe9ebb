"""The benchmark of a decoder's exits on a tiny bundle, and what its page shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import benchmarks.stored
from benchmarks import decoder_exits
from benchmarks.decoder_exits import page_section, rows_of, take
from benchmarks.stored import RESULTS, section
from edgepipe.store import file_sha256
from tests.leaving import bundled, decoder, with_exits
from tests.tiny_models import TINY_TEXT


def test_windows_rows_and_times_of_a_tiny_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundled(with_exits(decoder(tmp_path, "llama")), tmp_path / "bundle")[0].path
    for name, value in {"BUNDLE": bundle, "WINDOW": 12, "WINDOWS": 2, "COUNTED": 6, "TURNS": 1}.items():
        monkeypatch.setattr(decoder_exits, name, value)
    for module in (decoder_exits, benchmarks.stored):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    exits = [{"layers": depth, "agrees": 0.5, "told": 0.5, "losses": []} for depth in (1, 3)]
    result: dict[str, Any] = {
        "bundle": file_sha256(bundle / "manifest.json"),
        "options": decoder_exits.OPTIONS,
        "exits": {"exits": exits, "train_tokens": 1, "gate_tokens": 1},
        "windows": [],
        "operators": {},
    }
    take(result, TINY_TEXT, times=False)
    assert "times" not in result
    assert "of the processor" not in page_section(result)
    assert decoder_exits.built(tmp_path / "no text is read") == json.loads(
        (tmp_path / "decoder-exits.json").read_text()
    )
    rows = rows_of(result)
    layers = [row["mean_layers"] for row in rows]
    assert layers == sorted(layers)
    assert layers[-1] == 4
    assert rows[-1]["agrees"] == 1
    for row in rows[:-1]:
        assert row["mean_layers_at_random"] == row["mean_layers"]
    assert rows[0]["perplexity"] != rows[0]["perplexity_at_random"]
    result["windows"].pop()
    kept = result["windows"][0]
    take(result, TINY_TEXT, times=True)
    assert result["windows"][0] is kept
    assert len(result["windows"]) == 2
    assert {len(turns) for turns in result["times"]["seconds"].values()} == {1}
    assert "| 1 | 4.0 |" in page_section(result)


@pytest.fixture
def stored() -> dict[str, Any]:
    """Return the stored run."""
    if not (RESULTS / "decoder-exits.json").is_file():
        pytest.skip("no run of benchmarks/decoder_exits.py is stored")
    found: dict[str, Any] = json.loads((RESULTS / "decoder-exits.json").read_text(encoding="utf-8"))
    return found


def test_the_page_shows_what_is_stored(stored: dict[str, Any]) -> None:
    assert section(decoder_exits.PAGE, "decoder-exits") == page_section(stored).strip()


def test_quality_rises_with_layers_and_gates_are_better_than_chance(stored: dict[str, Any]) -> None:
    rows = rows_of(stored)
    assert [row["threshold"] for row in rows] == sorted(row["threshold"] for row in rows)
    for name, sign in (("mean_layers", 1), ("agrees", 1), ("perplexity", -1)):
        values = [sign * row[name] for row in rows]
        assert values == sorted(values), name
    for row in rows[:-1]:
        assert row["perplexity"] < row["perplexity_at_random"]
        assert row["agrees"] > row["agrees_at_random"]
