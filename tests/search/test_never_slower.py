"""Never slower, with real kernels: a layer on a grid that has no fast kernel is caught, fast ones stay."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from edgepipe.artifacts import Json
from edgepipe.compress import compress
from edgepipe.errors import ConfigError
from edgepipe.measuring.intervals import Ratio
from edgepipe.measuring.kernel_times import MOST_TURNS, STEP, TEXT, TURNS, Kind, Raced, _race, race
from edgepipe.recipe import Recipe, resolve
from edgepipe.search.asked import Asked
from edgepipe.search.never_slower import Judged, _judged, _within_size, never_slower
from edgepipe.search.units import grid_of
from edgepipe.sources import open_model
from edgepipe.stages.quantize import Quantize
from edgepipe.target import Budgets
from edgepipe.weights import held_weight
from tests.encoders import save_encoder
from tests.listener import Silent

PLANTED = "encoder.layer.1.output.dense.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slow")


@pytest.fixture(scope="module")
def path(folder: Path) -> Path:
    """A BERT wide enough that its products take longer than the call."""
    return save_encoder(folder / "bert", "bert", hidden_size=256, intermediate_size=512)


def recipe_of(folder: Path, ratio: float | None = None) -> Recipe:
    """Return 8 bits, and one layer at 2 bits in groups of 16, whose kernel decodes the weight at each call."""
    file = folder / "recipe.toml"
    file.write_text('stages = ["quantize", "export", "compile"]\n', encoding="utf-8")
    settings = [("quantize", "bits", 8), ("quantize", "overrides", [f"{PLANTED}=2/16"])]
    recipe = resolve(target="cpu", file=file, settings=settings)
    engine = dataclasses.replace(
        recipe.target.onnxruntime, threads=1
    )  # two would wait for each other beside other work
    target = dataclasses.replace(recipe.target, budgets=Budgets(shipped_ratio=ratio), onnxruntime=engine)
    return dataclasses.replace(recipe, target=target)


def found(path: Path, recipe: Recipe) -> tuple[Recipe, dict[str, Json], list[str]]:
    """Let the guard work; return its recipe, what it found by the first matrix of each kind, and its notes."""
    listener = Silent()
    changed, products = never_slower(open_model(str(path)), recipe, listener=listener)
    return changed, {name: one for one in products for name in one["tensors"]}, listener.notes


def test_a_planted_slow_layer_is_caught(path: Path, folder: Path) -> None:
    """It alone goes back to floats, by an override; what encoders decode once when they load is no slower."""
    recipe = recipe_of(folder)
    changed, products, notes = found(path, recipe)
    planted = products.pop(PLANTED)
    assert planted["undone"] and planted["tensors"] == [PLANTED] and planted["stored"] == "q2"
    assert planted["races"][0]["ratio"]["low"] > 1.05 and planted["races"][0]["rows"] == TEXT
    assert len(products) >= 11 and not any(one["undone"] for one in products.values())
    before, after = (dict(one.stages)["quantize"].overrides for one in (recipe, changed))
    assert after == (*before, f"{PLANTED}=16")
    assert any(note.startswith("1 of 256 × 512 in q2: undone, since it takes ") for note in notes)


def test_turns_that_met_other_work_undo_nothing() -> None:
    """Equal products, of which the first seems slower for as long as a race takes when nothing disturbs it."""
    calls = 0

    def disturbed(_: Mapping[str, np.ndarray]) -> None:
        nonlocal calls
        calls += 1
        time.sleep(4e-3 if calls <= 1 + 5 * TURNS else 1e-3)

    found = _race([disturbed, lambda _: time.sleep(1e-3)], [np.zeros(1), np.zeros(1)], 8, STEP)
    assert not found.slower
    assert 1 + 5 * 2 * TURNS < calls <= 1 + 5 * MOST_TURNS, "the first turns and as many again don't settle it"
    always = _race([lambda _: time.sleep(4e-3), lambda _: time.sleep(1e-3)], [np.zeros(1), np.zeros(1)], 8, STEP)
    assert always.slower


def test_the_size_goal_keeps_it(path: Path, folder: Path) -> None:
    recipe = recipe_of(folder, ratio=0.2)
    changed, products, _ = found(path, recipe)
    assert changed == recipe and not products[PLANTED]["undone"]
    assert products[PLANTED]["why"].startswith("kept, since the size goal needs it, though it takes ")


def test_the_bundle_has_it_in_floats_and_the_report_says_why(path: Path, folder: Path) -> None:
    """Through compress; the record of the products is the run's, for its report."""
    summary = compress(str(path), recipe_of(folder), listener=Silent(), runs=folder / "runs", without_slower=True)
    assert summary["undone"] == [PLANTED]
    manifest = json.loads((Path(summary["bundle"]) / "manifest.json").read_text(encoding="utf-8"))
    stored = {(part["part"], part["storage"]) for part in manifest["weights"]["parts"]}
    assert ("mlp", "float16") in stored and not any("q2" in storage for _, storage in stored)
    assert f"{PLANTED}=16" in manifest["recipe"]["options"]["quantize"]["overrides"]


def test_both_sides_of_a_race_compute_the_same_product(tmp_path: Path) -> None:
    """Otherwise their times would say nothing: codes are exact in 16-bit floats here."""
    from edgepipe.runtime.onnxruntime import open_graph

    values = np.random.default_rng(0).integers(-8, 8, (256, 512)).astype(np.float32)
    values[:, ::32] = -8  # the extreme of every group: its scale is 1
    weight, stage = held_weight("matrix", values), Quantize()
    stored, floats = (stage.stored(weight, grid_of(choice, symmetric=True)) for choice in ("4/32", "16"))
    races = race(
        stored,
        floats,
        rows=(STEP, TEXT),
        rest=(1 << 20, 8 << 20),
        accuracy_level=0,
        many_rows=False,
        threads=1,
        folder=tmp_path,
    )
    assert [one.rows for one in races] == [STEP, TEXT]
    assert all(0 < one.ratio.low <= one.ratio.value <= one.ratio.high for one in races)
    assert races[1].float_ms > races[0].float_ms
    x = np.random.default_rng(1).normal(size=(1, 5, 512)).astype(np.float32)
    for side in ("quantized", "float"):
        y = open_graph(tmp_path / side / "product.onnx", 1).run({"x": x})["y"]
        np.testing.assert_allclose(y, x @ values.T, rtol=1e-4, atol=1e-3)


def raced(rows: int, low: float) -> Raced:
    """Return a race with an interval of a tenth."""
    return Raced(rows=rows, ms=low + 0.05, float_ms=1.0, ratio=Ratio(value=low + 0.05, low=low, high=low + 0.1))


def judged(rows: tuple[int, ...], lows: tuple[float, ...], *, extra: int = 100, width: int = 64) -> Judged:
    """Judge one kind of matrix of some width."""
    kind = Kind(shape=(64, width), dtype="q4", nbytes=100, grid="rtn")
    return _judged(kind, ("a", "b"), tuple(map(raced, rows, lows)), extra)


def test_a_step_and_a_prompt_are_judged_apart() -> None:
    """A decoder's step decides; what prompts lose is said. An encoder has texts only."""
    assert judged((STEP, TEXT), (1.2, 0.8)).undone
    slow_prompt = judged((STEP, TEXT), (0.5, 1.5))
    assert not slow_prompt.undone and "1.55 times the float one's time for 128, and a token" in slow_prompt.why
    assert judged((TEXT,), (1.2,)).undone
    assert not judged((TEXT,), (1.01,)).undone, "within 5 % nobody sees it"


def test_the_most_wasteful_for_its_bytes_goes_first() -> None:
    """With bytes for one of two, the one that wastes more time a byte."""
    kinds = [judged((TEXT,), (1.2,), width=64), judged((TEXT,), (2.0,), width=128), judged((TEXT,), (0.9,), width=256)]
    assert [one.undone for one in _within_size(kinds, 150)] == [False, True, False]
    assert [one.undone for one in _within_size(kinds, 200)] == [True, True, False]


def test_what_does_not_go_together_is_refused(path: Path, folder: Path) -> None:
    for settings in (
        [("quantize", "bits", 8), ("quantize", "activations", "dynamic")],
        [("quantize", "bits", 4), ("quantize", "activations", "dynamic")],
        [("quantize", "bits", 1.58), ("quantize", "steps", 1), ("quantize", "data", "x")],
    ):
        with pytest.raises(ConfigError, match="--never-slower times the products of weight-only grids"):
            never_slower(open_model(str(path)), resolve(target="cpu", settings=settings), listener=Silent())
    with pytest.raises(ConfigError, match="--goal fastest searches by time"):
        compress(
            str(path),
            recipe_of(folder),
            listener=Silent(),
            runs=folder / "refused",
            asked=Asked(data="x"),
            without_slower=True,
        )
