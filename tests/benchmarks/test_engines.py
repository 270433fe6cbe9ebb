"""The stored run of both engines: what the page shows of it, what made it, and what was promised of it."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.engines import _FLOAT, ARMS, ENGINES, NAME, PAGE, THREADS, log_softmax, page_section, stored
from benchmarks.stored import ROOT, section

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
    """1e-3 where arithmetic is float: of largest values, and tokens part at no margin that counts."""
    for name, row in ROWS.items():
        if name in _FLOAT:
            continue
        assert row["parity"]["largest_error"] < 1e-3, name
        assert row["parity"].get("parted_margin", 0.0) < 0.1, name


@taken
@pytest.mark.parametrize("name", _FLOAT)
def test_rounded_activations_are_as_near_to_float_as_onnxruntimes(name: str) -> None:
    """Both engines round, each in its own way: a mean KL of 0.005 nats, and the same token beyond a margin of 0.25."""
    theirs, ours = (ROWS[name]["beside_float"][engine] for engine in ENGINES)
    if "kl_mean" not in ours:
        assert ours["least_cosine"] >= max(theirs["least_cosine"], 0.98)
        return
    assert ours["kl_mean"] <= min(theirs["kl_mean"], 0.005) and ours["kl_most"] < 0.03
    assert ours["parted_margin"] <= min(theirs["parted_margin"], 0.25)


@taken
def test_four_bits_ship_as_four_bits() -> None:
    """Library and weights: at most 4.6 bits a weight and 1 MB of code, at symmetric 4 bits."""
    row = ROWS["smollm2-4"]
    assert row["bits_per_weight"] <= 4.6
    assert row["bytes"]["code_bytes"] <= 1 << 20


@taken
@pytest.mark.parametrize("threads", THREADS)
def test_tokens_at_four_bits_are_not_slower_than_onnxruntimes(threads: int) -> None:
    """The whole interval, whatever the activations are."""
    for name in ("smollm2-4", "smollm2-4-int8", "student-4"):
        assert ROWS[name]["times"][str(threads)]["ratios"]["token_ms"]["high"] < 1, name


@taken
def test_the_readme_says_what_is_stored() -> None:
    """The two ratios of a token at 4 bits, on one thread and on two."""
    one, two = (ROWS["smollm2-4"]["times"][threads]["ratios"]["token_ms"]["value"] for threads in ("1", "2"))
    said = f"decodes SmolLM2's 4 bits in {one:.2f} of its time on one thread and {two:.2f} on two"
    assert said in (ROOT / "README.md").read_text(encoding="utf-8")
