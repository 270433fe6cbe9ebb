"""The stored run of both engines: what the page shows of it, what made it, and what was promised of it."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.engines import ARMS, NAME, PAGE, THREADS, log_softmax, page_section, stored
from benchmarks.stored import section

ROWS = {row["arm"]: row for row in stored()["rows"]}
taken = pytest.mark.skipif(not ROWS, reason="no run is stored: python benchmarks/engines.py takes one")


def test_the_page_shows_the_stored_run() -> None:
    """No figure of the page's tables is typed by hand, and where nothing is stored it says so."""
    assert section(PAGE, NAME) == page_section(stored()).strip()


def test_log_softmax_is_that_of_probabilities() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32) * 30
    expected = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True)
    assert np.allclose(np.exp(log_softmax(logits)), expected, rtol=1e-9)


@taken
def test_what_is_stored_is_what_the_command_runs() -> None:
    """Every row was made with the options its arm has now; no arm is left out."""
    assert ROWS.keys() == {arm.name for arm in ARMS}
    for arm in ARMS:
        assert ROWS[arm.name]["asked"]["options"] == [list(one) for one in arm.options]
        assert set(ROWS[arm.name]["times"]) == {str(threads) for threads in THREADS}


@taken
def test_outputs_are_onnxruntimes() -> None:
    """1e-3 where arithmetic is float32 and nothing is rounded; where codes are, tokens part only at near ties."""
    for name, row in ROWS.items():
        if name.endswith("float32"):
            assert row["parity"]["largest_error"] < 1e-3, name
        elif "kl_most" in row["parity"]:
            assert row["parity"]["parted_margin"] < 0.1, name


@taken
def test_four_bits_ship_as_four_bits() -> None:
    """Library and weights: at most 4.6 bits a weight and 1 MB of code, at symmetric 4 bits."""
    row = ROWS["smollm2-4"]
    assert row["bits_per_weight"] <= 4.6
    assert row["bytes"]["code_bytes"] <= 1 << 20
