"""The stored run of 8-bit activations: what the page shows of it, what made it, and what was promised of it."""

from __future__ import annotations

from benchmarks.int8 import ARMS, NAME, OPENVINO, PAGE, PEER, TIMED, page_section
from benchmarks.stored import read_result, section


def test_the_page_shows_the_stored_run() -> None:
    """No figure of the page's table is typed by hand."""
    assert section(PAGE, NAME) == page_section(read_result(NAME)).strip()


def test_what_is_stored_is_what_the_command_runs() -> None:
    """Every row was made with the options its arm has now; no arm is left out."""
    rows = {row["arm"]: row for row in read_result(NAME)["rows"]}
    assert rows.keys() == {arm.name for arm in ARMS}
    for arm in ARMS:
        assert rows[arm.name]["options"] == arm.options


def test_every_layer_is_an_integer_product() -> None:
    """36 matrices of six layers, by the optimized graphs of what was scored; without activations none is."""
    for row in read_result(NAME)["rows"]:
        rounded = row["arm"] in (PEER, OPENVINO) or "activations" in (row["options"] or {})
        assert row["integer_products"] == (36 if rounded else 0), row["arm"]


def test_the_bars() -> None:
    """Static activations lose at most half a point; no timed form lies wholly below onnxruntime's own recipe."""
    result = read_result(NAME)
    value = {row["arm"]: row["spearman"]["value"] for row in result["rows"]}
    assert value["float32"] - value["static"] <= 0.005
    for name in ("dynamic", "static"):
        assert result["timing"]["beside_peer"][name]["high"] >= 1
    assert set(result["timing"]["seconds"]) == set(TIMED)
