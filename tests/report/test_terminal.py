"""Tables: columns line up, figures stand right, and every figure is the one that was measured."""

from __future__ import annotations

from typing import Any

import pytest

from edgepipe.report.terminal import measured_table, megabytes, table


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


def figures(factor: float) -> dict[str, Any]:
    """Return the figures of a bundle, each one another number."""
    return {
        "bundle_bytes": 400_000_000 * factor,
        "bits_per_weight": 32.0 * factor,
        "ttft_ms": 160.0 * factor,
        "prompt_tokens": 128,
        "token_ms": 20.0 * factor,
        "tokens_per_second": 50.0 / factor,
        "load_ms": 1200.0 * factor,
        "memory_peak_bytes": 800e6 * factor,
        "cache_bytes": 40e6 * factor,
        "perplexity": 18.0 * factor,
        "perplexity_tokens": 8176,
    }


def rows_of(text: str) -> dict[str, list[str]]:
    """Return the cells after the title of every row."""
    found = {}
    for line in text.splitlines()[2:]:
        title, *cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
        found[title] = cells
    return found


def test_the_measured_table_sets_both_side_by_side() -> None:
    text = measured_table({"baseline": figures(1.0), "bundle": figures(0.25)})
    assert text.splitlines()[0].split() == ["float32", "bundle", "ratio"]
    assert rows_of(text) == {
        "bundle, MB": ["400.0", "100.0", "0.250"],
        "bits per weight": ["32.00", "8.00", "0.250"],
        "TTFT at 128 tokens, ms": ["160", "40", "0.250"],
        "time per output token, ms": ["20.0", "5.0", "0.250"],
        "tokens/s": ["50.0", "200.0", "4.000"],
        "load, ms": ["1,200", "300", "0.250"],
        "peak memory, MB": ["800", "200", "0.250"],
        "KV cache when full, MB": ["40.0", "10.0", "0.250"],
        "perplexity (8176 tokens)": ["18.000", "4.500", "0.250"],
    }
    assert len({len(line) for line in text.splitlines()}) == 1


def test_without_a_baseline_only_the_bundle_is_shown() -> None:
    rows = rows_of(measured_table({"baseline": None, "bundle": figures(0.25)}))
    assert len(rows) == 9
    assert rows["tokens/s"] == ["–", "200.0", "–"]
    assert rows["bundle, MB"] == ["–", "100.0", "–"]
