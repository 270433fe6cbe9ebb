"""The benchmark of training on the grid: its recipes resolve, and the page shows what is stored."""

from __future__ import annotations

import json

from benchmarks.qat import MODELS, NAME, PAGE, ROWS, page_section, settings_of
from benchmarks.stored import RESULTS, read_result, section
from edgepipe.recipe import resolve


def test_every_row_is_a_recipe() -> None:
    """Options of students and of quantize are known and fit together; rows have names of their own."""
    assert len({row.name for row in ROWS}) == len(ROWS)
    for name, options in MODELS.items():
        settings: list[tuple[str, str, object]] = [("distill", key, value) for key, value in options.items()]
        assert resolve(target="cpu", settings=settings, stages=["distill"]), name
    for row in ROWS:
        options = dict(row.options or {}) | ({"data": "texts.txt"} if row.data else {})
        assert resolve(target="cpu", settings=[("quantize", key, value) for key, value in options.items()]), row.name
        assert json.loads(json.dumps(settings_of(row))) == settings_of(row)


def test_the_page_shows_the_stored_run() -> None:
    """No figure of the page's table is typed by hand."""
    shown = section(PAGE, NAME)
    if not (RESULTS / f"{NAME}.json").is_file():
        assert shown.startswith("No run is stored yet")
        return
    result = read_result(NAME)
    assert shown == page_section(result).strip()
    known = {row.name: row for row in ROWS}
    for one in result["rows"]:
        assert one["settings"] == settings_of(known[one["row"]]), one["row"]


def test_what_was_trained_is_small() -> None:
    """Counted from the files: 4-bit rows at 4.2 bits a weight at most, ternary ones at 2.2, scales among them."""
    if not (RESULTS / f"{NAME}.json").is_file():
        return
    known = {row.name: row for row in ROWS}
    for one in read_result(NAME)["rows"]:
        options = known[one["row"]].options
        if options is not None:
            limit = 2.2 if options["bits"] == 1.58 else 4.2
            assert 8 * one["layers"]["bytes"] / one["layers"]["parameters"] <= limit
