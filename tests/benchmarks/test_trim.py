"""The stored run of trimmed vocabularies: what the page shows of it, and what was promised of it."""

from __future__ import annotations

from benchmarks.stored import read_result, section
from benchmarks.trim import NAME, PAGE, page_section

RESULT = read_result(NAME)


def test_the_page_shows_the_stored_run() -> None:
    assert section(PAGE, NAME) == page_section(RESULT).strip()


def test_kept_tokens_have_the_logits_they_had() -> None:
    """On texts that the vocabulary wasn't trimmed to."""
    held = RESULT["held_out"]
    assert held["inside"] > 50 and held["same_token"] == held["tokens"] and held["largest_error"] < 1e-6


def test_a_smaller_head_is_a_faster_token() -> None:
    """The whole interval, of the vocabulary trimmed to all of E2E."""
    row = next(row for row in RESULT["rows"] if row["data"] == "E2E" and not row["size"])
    assert row["ratio"]["high"] < 1 and row["coverage"] == 1
