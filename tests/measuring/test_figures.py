"""Figures: medians, percentiles, spreads and ratios are those of the raw samples, worked out by hand."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from edgepipe.artifacts import Json
from edgepipe.measuring.figures import fastest_of_bursts, index_figures, per_index, ratios, side_figures


def block(scale: float = 1.0, load_ms: float = 30.0, peak: int = 1000) -> Json:
    """Return one process's samples: two turns, two bursts of two counted tokens each."""
    return {
        "import_ms": 100.0,
        "load_ms": load_ms,
        "first_token_ms": 70.0,
        "prompt_tokens": [32, 128],
        "bursts": 2,
        "burst_tokens": 3,
        "ttft_ms": [100.0 * scale, 110.0 * scale],
        "ttft": {
            "32": {"tokenize_ms": [1.0, 2.0], "first_step_ms": [20.0 * scale, 22.0 * scale]},
            "128": {"tokenize_ms": [4.0, 4.0], "first_step_ms": [96.0 * scale, 106.0 * scale]},
        },
        "token_ms": [[5.0 * scale, 7.0 * scale, 6.0 * scale, 60.0 * scale], [4.0 * scale, 6.0 * scale, 5.0, 9.0]],
        "index_ms": [[2.0, 3.0], [2.0, 2.5]],
        "prompt_index_ms": [4.0, 5.0],
        "memory_after_load_bytes": peak - 5,
        "memory_peak_bytes": peak,
    }


PEAKS = {"threads": 2, "read_bytes_per_second": 1e9, "multiply_adds_per_second": {"float32": 1e9, "int8": 4e9}}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Make a directory with what the figures are read from."""
    parts = [
        {"part": "attention", "parameters": 4000, "bytes": 2000},
        {"part": "embedding and head", "parameters": 64 * 8, "bytes": 500},
    ]
    manifest = {
        "task": "text-generation",
        "engine": "onnxruntime",
        "weights": {"bytes": 2500, "bits_per_weight": 4.5, "parts": parts},
        "cache": {"bytes": 64, "dtype": "float16"},
        "model": {"layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 4, "hidden_size": 8, "vocab_size": 64},
        "graphs": {"decoder": "decoder.onnx"},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (tmp_path / "decoder.onnx").write_bytes(b"\x0eaccuracy_level\x18\x04")
    return tmp_path


ALONE = {"memory": {"memory_bytes": 77}, "limits": PEAKS, "perplexity": {"perplexity": 12.5, "tokens": 99}}


def figures_of(bundle: Path, blocks: list[Json]) -> dict[str, Any]:
    """Sum up blocks beside what the other processes found."""
    return side_figures(bundle, blocks, ALONE)


def test_figures_are_those_of_the_samples(bundle: Path) -> None:
    blocks = [block(), block(2.0, 50.0, 3000), block(1.5, 10.0, 2000)]
    found = figures_of(bundle, blocks)
    tokens = [time for one in blocks for times in one["token_ms"] for time in times]
    percentiles = statistics.quantiles(tokens, n=100, method="inclusive")
    assert found["token_ms"] == pytest.approx(statistics.median(tokens))
    assert found["token_ms_p95"] == pytest.approx(percentiles[94])
    assert found["token_ms_p99"] == pytest.approx(percentiles[98])
    assert found["tokens_per_second"] == pytest.approx(1e3 / found["token_ms"])
    assert found["ttft_ms"] == statistics.median([100, 110, 200, 220, 150, 165])
    assert (found["import_ms"], found["load_ms"], found["first_token_ms"]) == (100.0, 30.0, 70.0)
    assert found["cold_start_ms"] == 200.0
    assert (found["memory_after_load_bytes"], found["memory_peak_bytes"]) == (2995, 3000)
    assert found["memory_without_model_bytes"] == 77
    assert (found["perplexity"], found["perplexity_tokens"], found["prompt_tokens"]) == (12.5, 99, 128)
    assert (found["weight_bytes"], found["bits_per_weight"], found["cache_bytes"]) == (2500, 4.5, 64)
    assert found["bundle_bytes"] == sum(f.stat().st_size for f in bundle.iterdir())
    assert found["samples"] == blocks


def test_ttft_is_split_at_every_length(bundle: Path) -> None:
    short, long = figures_of(bundle, [block()])["ttft"]
    assert (short["prompt_tokens"], short["tokenize_ms"], short["first_step_ms"]) == (32, 1.5, 21.0)
    assert short["ttft_ms"] == statistics.median([21.0, 24.0])
    assert (long["prompt_tokens"], long["ttft_ms"]) == (128, 105.0)
    assert long["low"] <= long["ttft_ms"] <= long["high"]


def test_a_wide_spread_is_flagged(bundle: Path) -> None:
    quiet = block() | {"token_ms": [[5.0, 5.1, 5.0, 5.1], [5.0, 5.1, 5.1, 5.0]]}
    found = figures_of(bundle, [quiet, quiet])
    assert found["flagged"] == []
    assert found["spread"]["ttft_ms"] == pytest.approx(10 / 105, abs=0.01)
    assert figures_of(bundle, [quiet, block(2.0)])["flagged"] == ["token_ms", "ttft_ms"]


@pytest.mark.parametrize(
    "elsewhere", [{"engine": "qnn"}, {"engine": "tvm", "library": {"gpu": {}, "arithmetic": "int8"}}]
)
def test_what_runs_elsewhere_has_no_limits(bundle: Path, elsewhere: Json) -> None:
    """Bandwidth and peaks are measured of the processor."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    (bundle / "manifest.json").write_text(json.dumps(manifest | elsewhere), encoding="utf-8")
    found = figures_of(bundle, [block()])
    assert "limits" not in found and found["token_ms"]


def test_limits_stand_beside_the_figures(bundle: Path) -> None:
    limits = figures_of(bundle, [block()])["limits"]
    assert (limits["precision"], limits["multiply_adds_per_second"]) == ("int8", 4e9)
    assert limits["token"]["tokens"] == 128 + 3
    assert limits["token"]["measured_ms"] == statistics.median([5, 7, 6, 60, 4, 6, 5, 9])
    assert limits["prefill"]["measured_ms"] == 101.0  # the first step alone: tokenizing has no such limit
    assert limits["prefill"]["limited_by"] == "overhead"


def test_a_burst_counts_by_its_fastest_token() -> None:
    assert fastest_of_bursts(block()) == [5.0, 6.0, 4.0, 5.0]


def test_times_are_divided_by_the_index_beside_them() -> None:
    found = per_index([block()])
    assert found["token_ms"]["value"] == statistics.median([5 / 2, 6 / 3, 4 / 2, 5 / 2.5])
    assert found["ttft_ms"]["value"] == statistics.median([100 / 4, 110 / 5])


def test_a_machine_at_half_speed_changes_no_figure_per_index() -> None:
    slow = block(2.0) | {"index_ms": [[4.0, 6.0], [4.0, 5.0]], "prompt_index_ms": [8.0, 10.0]}
    slow["token_ms"][1][2:] = [10.0, 18.0]
    assert per_index([slow]) == per_index([block()])


def test_ratios_pair_what_stood_side_by_side() -> None:
    ours, theirs = [block(1.2)] * 2, [block()] * 2
    found = ratios(ours, theirs)
    assert found["ttft_ms"]["value"] == pytest.approx(1.2)
    assert found["ttft_ms"]["verdict"] == "worse"
    assert found["token_ms"]["value"] == pytest.approx(statistics.median([1.2, 1.2, 1.2, 1.0]))
    assert ratios(theirs, theirs)["token_ms"]["verdict"] == "tie"


def test_the_index_is_summed_up() -> None:
    found = index_figures([block(), block()])
    assert found["ms"] == statistics.median([2.5, 2.25])
    assert found["samples"] == 8
