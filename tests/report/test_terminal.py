"""Tables: columns line up, figures stand right, and every figure is the one that was measured."""

from __future__ import annotations

from typing import Any

import pytest

from edgepipe.report.terminal import measured_notes, measured_table, megabytes, table


def test_figures_stand_right_and_words_left() -> None:
    text = table(["part", "stored as", "MB"], [["attention", "q4 rtn", "1.5"], ["mlp", "q8", "1,024.0"]])
    assert text.splitlines() == [
        "part       stored as       MB",
        "─────────  ─────────  ───────",
        "attention  q4 rtn         1.5",
        "mlp        q8         1,024.0",
    ]


def test_the_first_column_stands_left_even_with_figures() -> None:
    lines = table(["n", "value"], [["1", "-2"], ["100", "−3"]]).splitlines()
    assert lines == ["n    value", "───  ─────", "1       -2", "100     −3"]


def test_a_column_with_one_word_stands_left() -> None:
    assert table(["a", "b"], [["x", "1"], ["y", "none"]]).splitlines()[2:] == ["x  1", "y  none"]


@pytest.mark.parametrize("missing", ["–", ""])
def test_a_missing_figure_keeps_its_column_right(missing: str) -> None:
    lines = table(["a", "figures"], [["x", "12.5"], ["y", missing]]).splitlines()
    assert lines[2] == "x     12.5"
    assert lines[3] == f"y        {missing}".rstrip()


def test_a_table_without_rows() -> None:
    assert table(["target", "engines"], []).splitlines() == ["target  engines", "──────  ───────"]


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises((ValueError, IndexError)):
        table(["a", "b"], [["1"]])


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0.0"), (49_999, "0.0"), (50_001, "0.1"), (98_500_000, "98.5"), (1.5e9, "1,500.0")]
)
def test_megabytes_are_millions_of_bytes(nbytes: float, text: str) -> None:
    assert megabytes(nbytes) == text


def limit(factor: float, by: str) -> dict[str, Any]:
    """Return what stands beside a figure."""
    return {
        "bytes": 100e6 * factor,
        "multiply_adds": 135e6,
        "read_ms": 10.0 * factor,
        "compute_ms": 1.5,
        "share": 0.5,
        "limited_by": by,
    }


def figures(factor: float) -> dict[str, Any]:
    """Return the figures of a bundle, each one another number."""
    return {
        "bundle_bytes": 400_000_000 * factor,
        "bits_per_weight": 32.0 * factor,
        "ttft": [{"prompt_tokens": 32, "ttft_ms": 48.0 * factor}, {"prompt_tokens": 128, "ttft_ms": 160.0 * factor}],
        "ttft_ms": 160.0 * factor,
        "prompt_tokens": 128,
        "token_ms": 20.0 * factor,
        "token_ms_p95": 24.0 * factor,
        "token_ms_p99": 32.0 * factor,
        "tokens_per_second": 50.0 / factor,
        "cold_start_ms": 2000.0 * factor,
        "load_ms": 1200.0 * factor,
        "memory_after_load_bytes": 700e6 * factor,
        "memory_peak_bytes": 800e6 * factor,
        "memory_without_model_bytes": 100e6 * factor,
        "cache_bytes": 40e6 * factor,
        "perplexity": 18.0 * factor,
        "perplexity_tokens": 8176,
        "intervals": {"token_ms": {"low": 19.0, "high": 21.5}, "ttft_ms": {"low": 150.0, "high": 170.0}},
        "flagged": [],
        "limits": {
            "precision": "float32",
            "read_bytes_per_second": 10e9,
            "multiply_adds_per_second": 90e9,
            "token": limit(factor, "reading"),
            "prefill": limit(factor, "overhead"),
        },
    }


RATIOS = {
    "token_ms": {"value": 0.251, "low": 0.24, "high": 0.26, "verdict": "better"},
    "ttft_ms": {"value": 0.98, "low": 0.9, "high": 1.1, "verdict": "tie"},
}


def rows_of(text: str) -> dict[str, list[str]]:
    """Return the cells after the title of every row."""
    found = {}
    for line in text.splitlines()[2:17]:
        title, *cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
        found[title] = cells
    return found


def test_the_measured_table_sets_both_side_by_side() -> None:
    text = measured_table({"baseline": figures(1.0), "bundle": figures(0.25), "ratios": RATIOS})
    assert text.splitlines()[0].split() == ["float32", "bundle", "ratio"]
    assert rows_of(text) == {
        "bundle, MB": ["400.0", "100.0", "0.250"],
        "bits per weight": ["32.00", "8.00", "0.250"],
        "TTFT at 32 tokens, ms": ["48", "12", "0.250"],
        "TTFT at 128 tokens, ms": ["160", "40", "0.980 [0.900, 1.100], a tie"],
        "time per output token, ms": ["20.0", "5.0", "0.251 [0.240, 0.260]"],
        "95th percentile, ms": ["24.0", "6.0", "0.250"],
        "99th percentile, ms": ["32.0", "8.0", "0.250"],
        "tokens/s": ["50.0", "200.0", "4.000"],
        "cold start to first token, ms": ["2,000", "500", "0.250"],
        "load, ms": ["1,200", "300", "0.250"],
        "peak memory, MB": ["800", "200", "0.250"],
        "after loading, MB": ["700", "175", "0.250"],
        "without the model, MB": ["100", "25", "0.250"],
        "KV cache when full, MB": ["40.0", "10.0", "0.250"],
        "perplexity (8176 tokens)": ["18.000", "4.500", "0.250"],
    }


def test_what_limits_is_said_below() -> None:
    notes = measured_notes({"baseline": None, "bundle": figures(1.0), "ratios": None})
    assert notes == [
        "95 % intervals: time per output token 19.0 to 21.5 ms, TTFT 150.0 to 170.0 ms.",
        "An output token reads 100.0 MB, 10.0 ms at 10 GB/s, and has 135 M multiply-adds, 1.5 ms at 90 G/s (float32): "
        "50% of the time it took; reading limits it.",
        "The prompt's first step reads 100.0 MB, 10.0 ms at 10 GB/s, and has 135 M multiply-adds, 1.5 ms at 90 G/s "
        "(float32): 50% of the time it took; overhead limits it.",
    ]


def test_a_wide_spread_has_a_star() -> None:
    restless = figures(1.0) | {"flagged": ["token_ms"]}
    text = measured_table({"baseline": restless, "bundle": figures(0.25), "ratios": RATIOS})
    assert "time per output token, ms *" in text
    assert "TTFT at 128 tokens, ms *" not in text
    assert text.splitlines()[-1].startswith("* spread over more than 10 %")
    assert "*" not in measured_table({"baseline": None, "bundle": figures(0.25), "ratios": None})


def test_without_a_baseline_only_the_bundle_is_shown() -> None:
    rows = rows_of(measured_table({"baseline": None, "bundle": figures(0.25), "ratios": None}))
    assert len(rows) == 15
    assert rows["tokens/s"] == ["–", "200.0", "–"]
    assert rows["bundle, MB"] == ["–", "100.0", "–"]
