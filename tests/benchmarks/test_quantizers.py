"""The stored comparison of methods: what the page shows of it, and what it was made with."""

from __future__ import annotations

from benchmarks.quantizers import ARMS, GROUP, NAME, PAGE, page_section, settings_of
from benchmarks.stored import read_result, section


def test_the_page_shows_the_stored_run() -> None:
    """No figure of the page's table is typed by hand."""
    assert section(PAGE, NAME) == page_section(read_result(NAME)).strip()


def test_what_is_stored_is_what_the_command_runs() -> None:
    """Every row was made with the settings its arm has now, on the same pairs."""
    rows = read_result(NAME)["rows"]
    arms = {arm.name: arm for arm in ARMS}
    assert len({row["arm"] for row in rows}) == len(rows)
    assert len({row["data"]["sha256"] for row in rows}) == 1
    for row in rows:
        assert row["settings"] == settings_of(arms[row["arm"]]), row["arm"]
        low, high = row["spearman"]["interval"]
        assert low < row["spearman"]["value"] < high


def test_bits_are_counted_from_files() -> None:
    """Codes and scales of the layers in the file: b + 16 / g, or b + (16 + b) / g, and a few bytes of padding."""
    for row in read_result(NAME)["rows"]:
        bits = row["settings"].get("bits")
        if bits:
            offset = 0 if row["settings"]["symmetric"] else bits
            counted = 8 * row["layers"]["bytes"] / row["layers"]["parameters"]
            assert bits + (16 + offset) / GROUP <= counted <= bits + (16 + offset) / GROUP + 0.01


def test_the_best_method_keeps_its_bar() -> None:
    """At 4 bits within a point of float32 at 4.6 bits a weight at most; GPTQ no worse than rounding at 2 bits."""
    rows = {row["arm"]: row for row in read_result(NAME)["rows"]}
    whole = rows["float32"]["spearman"]["value"]
    four = [
        row["spearman"]["value"]
        for row in rows.values()
        if row["settings"].get("bits") == 4 and 8 * row["layers"]["bytes"] / row["layers"]["parameters"] <= 4.6
    ]
    assert max(four) >= whole - 0.01
    assert rows["gptq 2"]["spearman"]["value"] >= rows["rtn 2"]["spearman"]["value"]
