"""Training: what a stage's figures say stands in the record, the tables and the curves; where none is, no section."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepipe.report.curves import loss_curves, ticks
from edgepipe.report.gather import gather
from edgepipe.report.markdown import render_markdown
from edgepipe.report.page import render_page
from edgepipe.report.record import Training
from edgepipe.report.sections import Section, bundle_sections
from tests.report.test_markdown import tables
from tests.report.test_page import parsed, spaced
from tests.report.test_record import errors
from tests.training.tiny import OPTIONS


def training_of(path: Path) -> Training:
    """Return what the report of a run says of training."""
    found = gather([path]).bundles[0].training
    assert found is not None
    return found


def section_of(path: Path) -> Section:
    """Return the section of a run's report."""
    return next(s for s in bundle_sections(gather([path]).bundles[0]) if s.key == "training")


def drawn_points(path: str) -> list[tuple[float, float]]:
    """Return the points of a path that was drawn."""
    return [(float(x), float(y)) for x, y in (point.split() for point in path.split("L"))]


def test_phases_are_what_the_loop_recorded(trained_run: Path, taught: dict[str, Any]) -> None:
    training = training_of(trained_run)
    assert [phase.phase for phase in training.phases] == ["contrast", "student"]
    assert training.data == taught["data"]
    contrast, student = training.phases
    for phase, record in zip(training.phases, taught["training"].values(), strict=True):
        assert [list(phase.train), list(phase.held_out)] == [record["train"], record["held_out"]]
        for name in ("steps", "tokens", "seconds", "precision", "processes", "stopped"):
            assert getattr(phase, name) == record[name]
        assert phase.tokens_per_second == pytest.approx(record["tokens"] / record["seconds"])
    assert (contrast.first_loss, contrast.best_loss, contrast.best_step) == (None, None, None)
    assert student.best_loss == min(row["loss"] for row in student.held_out)
    assert student.first_loss == student.held_out[0]["loss"] > student.best_loss
    assert student.held_out[0]["step"] == 0


def test_the_table_says_them(trained_run: Path) -> None:
    section, (_, student) = section_of(trained_run), training_of(trained_run).phases
    assert section.table is not None
    first, second = section.table.rows
    assert first[:2] == ("contrast", str(OPTIONS.steps))
    assert first[3:6] == ("–", "–", "–")
    assert second[2:7] == (
        "steps",
        f"{student.first_loss:.3f}",
        f"{student.best_loss:.3f}",
        f"{student.best_step}",
        f"{student.tokens:,}",
    )
    assert section.sentences[0] == "Data: pairs.jsonl (source-target), 200 examples to train with, 30 held out."
    assert section.sentences[1].startswith("Computed in float32 by 1 process;")


def test_markdown_json_and_page_have_it(trained_run: Path) -> None:
    report, section = gather([trained_run]), section_of(trained_run)
    assert errors(report.to_json()) == []
    text, html = render_markdown(report), render_page(report)
    assert "## Training" in text
    assert section.table is not None
    assert any(rows[0] == list(section.table.header) and len(rows) == 3 for rows in tables(text))
    said = parsed(html).said
    assert all(spaced(" ".join(row)) in said for row in section.table.rows)
    assert all(spaced(sentence) in said for sentence in section.sentences)
    assert re.findall(r'aria-label="Loss over steps, (\w+)"', html) == ["contrast", "student"]


def test_a_run_without_training_has_no_section(run: Path) -> None:
    report = gather([run])
    assert report.bundles[0].training is None
    assert report.to_json()["bundles"][0]["training"] is None
    assert "Loss over steps" not in render_page(report)


def test_curves_are_the_points_of_the_record(trained_run: Path) -> None:
    """Read back from the drawing with the numbers of its axes, every point is the one that was recorded."""
    training = training_of(trained_run)
    curves = loss_curves(training, 640, 240)
    assert [curve["phase"] for curve in curves] == ["contrast", "student"]
    assert curves[0]["held_out"] == curves[0]["best"] == ""
    for phase, curve in zip(training.phases, curves, strict=True):
        top, bottom = float(curve["rows"][-1]["said"]), float(curve["rows"][0]["said"])
        end = float(curve["columns"][-1]["said"])
        assert (curve["rows"][-1]["at"], curve["rows"][0]["at"], curve["columns"][-1]["at"]) == (0, 240, 640)
        for rows, path in ((phase.train, curve["train"]), (phase.held_out, curve["held_out"])):
            found = drawn_points(path) if path else []
            assert len(found) == len(rows)
            for row, (x, y) in zip(rows, found, strict=True):
                assert x / 640 * end == pytest.approx(row["step"], abs=end / 640)
                assert top - y / 240 * (top - bottom) == pytest.approx(row["loss"], abs=(top - bottom) / 240)
    assert curves[1]["best"] in curves[1]["held_out"].split("L")


@pytest.mark.parametrize(
    ("low", "high", "whole", "expected"),
    [
        (0, 40, True, [0, 10, 20, 30, 40]),
        (0, 1, True, [0, 1]),
        (0, 3, True, [0, 1, 2, 3]),
        (0, 12345, True, [0, 2500, 5000, 7500, 10000, 12500]),
        (2.31, 3.4, False, [2.25, 2.5, 2.75, 3.0, 3.25, 3.5]),
        (-0.02, 0.03, False, [-0.02, -0.01, 0, 0.01, 0.02, 0.03]),
        (2, 2, False, [2, 2.05, 2.1, 2.15, 2.2]),
    ],
)
def test_axes_have_few_round_numbers(low: float, high: float, whole: bool, expected: list[float]) -> None:
    assert ticks(low, high, whole=whole) == pytest.approx(expected)


def test_phases_follow_each_other_as_they_did(change_run: Callable[..., Path], taught: dict[str, Any]) -> None:
    """run.json sorts its keys, so their order says nothing."""
    names = ("another", "contrast", "masked", "student", "teacher")
    figures = {"training": dict.fromkeys(names, taught["training"]["student"])}
    path = change_run(lambda record: record["history"][0].update(figures=figures))
    training = training_of(path)
    assert [phase.phase for phase in training.phases] == ["teacher", "masked", "contrast", "student", "another"]
    assert training.data is None
    assert errors(gather([path]).to_json()) == []


def test_what_is_no_number_is_left_out(change_run: Callable[..., Path], taught: dict[str, Any]) -> None:
    """A held-out loss may overflow: the document stays JSON, and the curve goes on behind it."""
    broken = copy.deepcopy(taught)
    broken["training"]["student"]["held_out"][1]["loss"] = math.inf
    path = change_run(lambda record: record["history"][0].update(figures=broken))
    report = gather([path])
    assert errors(report.to_json()) == []
    json.dumps(report.to_json()["bundles"][0]["training"], allow_nan=False)
    training = training_of(path)
    curve = loss_curves(training, 640, 240)[1]
    assert len(drawn_points(curve["held_out"])) == len(training.phases[1].held_out) - 1
    assert "inf" not in curve["held_out"]


def test_a_name_of_data_is_text(change_run: Callable[..., Path], taught: dict[str, Any]) -> None:
    hostile = {"training": {"<b>x</b>": taught["training"]["student"]}, "data": {**taught["data"], "name": "<script>"}}
    path = change_run(lambda record: record["history"][0].update(figures=hostile))
    html = render_page(gather([path]))
    assert "<b>x" not in html
    assert "<script" not in html
    assert "<b>" not in re.sub(r"\\\\|\\<", "", render_markdown(gather([path])))
