"""The stored run on a GPU: what the page shows of it, and what was promised of it."""

from __future__ import annotations

from benchmarks.gpu import CASES, NAME, PAGE, page_section
from benchmarks.stored import read_result, section

RESULT = read_result(NAME)


def test_the_page_shows_the_stored_run() -> None:
    """No figure of the tables is typed by hand, and no case is left out."""
    assert section(PAGE, NAME) == page_section(RESULT).strip()
    assert [row["case"] for row in RESULT["rows"]] == [case.name for case in CASES]


def test_outputs_are_onnxruntimes() -> None:
    """1e-5 where nothing is rounded on the way, 1e-3 behind a cache of float16; every token is the same."""
    for row in RESULT["rows"]:
        assert row["largest_error"] < (1e-5 if row["same_token"] is None else 1e-3), row["case"]
        assert row["same_token"] in (None, 1.0), row["case"]


def test_a_token_is_faster_than_torchs() -> None:
    """Of a model in float16 whose kernels are launched as one too."""
    for row in RESULT["rows"]:
        if row["same_token"] is not None:
            (step,) = (found for of, found in row["times"].items() if of.startswith("token"))
            assert step["ratios"][-1]["most"] < 0.5, row["case"]
