"""Searches and guards in the report: what a run recorded stands in the tables, the sentences and the drawing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepipe.report.gather import gather
from edgepipe.report.markdown import render_markdown
from edgepipe.report.page import render_page
from edgepipe.report.plans import common_choice, frontier_drawing, more_bits
from edgepipe.report.record import Search
from edgepipe.report.sections import Section, bundle_sections
from tests.report.test_record import errors

UNTRIED = dict.fromkeys(("value", "drop", "limit", "bundle_bytes", "seconds"))


def tried(cost: int, loss: float, drop: float, limit: float) -> dict[str, Any]:
    """Return a point whose bundle was scored, as search/budget.py records it."""
    return {
        "cost": cost,
        "bytes": cost + 500_000,
        "loss": loss,
        "value": 0.8 * (1 - drop),
        "drop": drop,
        "limit": limit,
        "bundle_bytes": cost + 900_000,
        "seconds": 2.0,
    }


def unit(name: str, choice: str, losses: tuple[float, float, float], size: int = 1_000_000) -> dict[str, Any]:
    """Return a matrix with three choices."""
    grids = zip(("16", "4/32", "2/32"), (2 * size, size * 9 // 16, size * 5 // 16), losses, strict=True)
    choices = [{"choice": c, "bytes": n, "loss": loss} for c, n, loss in grids]
    nbytes = next(one["bytes"] for one in choices if one["choice"] == choice)
    return {"name": name, "tensors": [name], "choice": choice, "bytes": nbytes, "choices": choices}


SEARCH: dict[str, Any] = {
    "max_drop": 0.01,
    "relative": True,
    "goal": "smallest",
    "metric": "spearman",
    "better": "higher",
    "data": {"name": "pairs|.tsv", "sha256": "0" * 64, "examples": 500},
    "loss_unit": "1 − cosine",
    "float": {"value": 0.8, "bundle_bytes": 9_000_000, "seconds": 4.0},
    "frontier": [
        tried(6_000_000, 0.0, 0.0, 0.0001),
        {"cost": 4_000_000, "bytes": 4_500_000, "loss": 0.001, **UNTRIED},
        tried(2_000_000, 0.002, 0.004, 0.008),
        tried(1_000_000, 0.5, 0.2, 0.3),
    ],
    "chosen": 2,
    "units": [
        unit("layer.0.weight", "4/32", (0, 0.02, 0.5)),
        unit("layer.1.weight", "2/32", (0, 0.001, 0.002)),
        unit("layer.2.weight", "2/32", (0, 0.001, 0.003)),
        unit("layer.3.weight", "16", (0, 0.1, 0.9), 10_000),
    ],
}
ALIKE = {"share": 0.75, "parts_at": [None, 3, 5], "kl": 0.4, "kl_by_token": [0.1, 0.7]}
BETTER = {"share": 0.97, "parts_at": [None, None, 30], "kl": 0.02, "kl_by_token": [0.01, 0.03]}
AGREEMENT: dict[str, Any] = {
    "floor": 0.95,
    "before": ALIKE,
    "after": BETTER,
    "blamed": [
        {"unit": ["a.weight", "b.weight"], "kl": 0.03, "share": 0.95},
        {"unit": ["c"], "kl": 0.39, "share": 0.76},
    ],
    "raised": [
        {"unit": ["a.weight", "b.weight"], "before": "q4", "after": "q8", "kl_in_float": 0.03, "agreement": BETTER}
    ],
    "unaffordable": [],
}
RATIO = {"value": 1.8, "low": 1.7, "high": 1.9, "verdict": "worse"}
PRODUCTS: list[dict[str, Any]] = [
    {
        "shape": [256, 512],
        "stored": "q2",
        "bits_per_weight": 3.0,
        "tensors": ["x.weight", "y.weight"],
        "races": [{"rows": 1, "ms": 1.8, "float_ms": 1.0, "ratio": RATIO}],
        "undone": True,
        "why": "undone, since it takes 1.80 times the float one's time for a token",
    }
]


@pytest.fixture
def searched(change_run: Callable[..., Path]) -> Path:
    """A run whose record has a search, products, and a guard's figures."""

    def edit(record: dict[str, Any]) -> None:
        record |= {"search": SEARCH, "products": PRODUCTS}
        record["history"][0]["figures"] = {"agreement": AGREEMENT}

    return change_run(edit)


def section(path: Path, key: str) -> Section:
    """Return a section of a run's report."""
    (found,) = [one for one in bundle_sections(gather([path]).bundles[0]) if one.key == key]
    return found


def search_of(path: Path) -> Search:
    """Return what the record has of the search."""
    found = gather([path]).bundles[0].search
    assert found is not None
    return found


def test_the_bundles_that_were_tried(searched: Path) -> None:
    found = section(searched, "search")
    assert found.table is not None
    assert [row[:6] for row in found.table.rows] == [
        ("6.50", "6.9", "0", "0.8", "0.00 %", "0.01 %"),
        ("2.50", "2.9", "0.002", "0.7968", "0.40 %", "0.80 %"),
        ("1.50", "1.9", "0.5", "0.64", "20.00 %", "30.00 %"),
    ]
    assert [row[6:] for row in found.table.rows] == [("4.0", "within the budget"), ("4.0", "chosen"), ("4.0", "over")]
    assert found.sentences[0] == (
        "Asked for: the smallest bundle whose spearman drops by 1.00 % at most from the float model's 0.8, on 500 "
        "examples of pairs|.tsv."
    )
    assert found.sentences[-1].startswith("1 more plans of the frontier weren't built")


def test_models_that_were_pruned_have_a_column(change_run: Callable[..., Path]) -> None:
    ratios = (0.0, 0.0, 0.25, 0.5)
    pruned = [{**one, "prune_ratio": ratio} for one, ratio in zip(SEARCH["frontier"], ratios, strict=True)]
    found = section(change_run(lambda record: record.update(search={**SEARCH, "frontier": pruned})), "search")
    assert found.table is not None and found.table.header[:2] == ("pruned", "matrices, MB")
    assert [(row[0], row[-1]) for row in found.table.rows] == [
        ("0 %", "within the budget"),
        ("25 %", "chosen"),
        ("50 %", "over"),
    ]
    assert any(sentence.startswith("Pruned: the share of") for sentence in found.sentences)


def test_who_got_more_bits_and_why(searched: Path) -> None:
    """Most parameters lie on 2 bits; the dearer of the two others stands first."""
    assert common_choice(SEARCH["units"]) == "2/32"
    rows, sentence = more_bits(search_of(searched))
    assert rows == [
        ("layer.3.weight", "16", "0.02", "0.02", "0", "0.9"),
        ("layer.0.weight", "4/32", "0.56", "0.25", "0.02", "0.5"),
    ]
    assert sentence.startswith("Most matrices lie on 2/32 (bits/group). These got more")


def test_a_uniform_plan_says_so() -> None:
    found = {**SEARCH, "units": [unit("a", "4/32", (0, 1, 2)), unit("b", "4/32", (0, 1, 2))]}
    from edgepipe.report.plans import search_of

    assert more_bits(search_of(found)) == ([], "None: most matrices lie on 4/32, and no other on more bits.")


def test_the_drawing(searched: Path) -> None:
    """Bytes from left to right, drops upwards; what is far over the budget stops at the upper edge."""
    drawn = frontier_drawing(search_of(searched), 640, 240)
    assert [point["x"] for point in drawn["points"]] == sorted((p["x"] for p in drawn["points"]), reverse=True)
    first, chosen, last = drawn["points"]
    assert first["y"] > chosen["y"] > last["y"] and (last["y"], last["to"]) == (0, 0)
    assert chosen["to"] > drawn["budget"] or chosen["to"] < chosen["y"]
    assert chosen["y"] > chosen["to"] > drawn["budget"], "the chosen one's limit lies below the budget's line"
    assert drawn["chosen"] == f"{chosen['x']} {chosen['y']}"


def test_the_guards(searched: Path) -> None:
    agreement = section(searched, "agreement")
    assert agreement.table is not None
    assert agreement.table.rows == (
        ("a.weight and 1 more", "0.03", "95.0%", "q4 became q8"),
        ("c", "0.39", "76.0%", "kept"),
    )
    assert agreement.sentences[0] == (
        "Greedy answers of the float model, 3 of them: 75.0% of the tokens are the same, 2 of them part, the first "
        "after 3 tokens, KL 0.4 a token (0.1 at the first, 0.7 at the last)."
    )
    assert agreement.sentences[2] == "The floor of 95.0% holds."
    products = section(searched, "products")
    assert products.table is not None
    assert products.table.rows == (
        ("2 of 256 × 512", "q2, 3.00 bits", "1", "1.800", "1.000", "1.80 [1.70, 1.90]", "undone"),
    )
    assert products.sentences[0].startswith("x.weight and 1 more (256 × 512): undone, since it takes 1.80 times")


def test_json_markdown_and_page_have_them(searched: Path) -> None:
    report = gather([searched])
    assert errors(report.to_json()) == []
    text, html = render_markdown(report), render_page(report)
    for title in ("Quality, bytes and time", "Matrices that got more bits", "Token agreement", "Never slower"):
        assert f"## {title}" in text and f">{title}</h2>" in html
    assert html.count('class="best"') == 1 and "pairs|.tsv" in html and "pairs\\|.tsv" in text


def test_a_run_without_them_has_no_section(run: Path) -> None:
    keys = {one.key for one in bundle_sections(gather([run]).bundles[0])}
    assert not keys & {"search", "plan", "agreement", "products"}
