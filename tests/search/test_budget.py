"""The whole search on a tiny sentence encoder: the budget holds on data it never saw, a recipe repeats the bundle."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edgepipe.artifacts import Json
from edgepipe.cli import main
from edgepipe.compress import compress
from edgepipe.errors import BudgetError, ConfigError, ContractError
from edgepipe.evaluate import evaluate
from edgepipe.measuring.metrics import Evaluation
from edgepipe.recipe import Recipe, resolve
from edgepipe.search.asked import Asked
from edgepipe.students.config import StudentConfig, with_layers
from tests.listener import Silent
from tests.report.test_record import errors
from tests.students.test_models import LLAMA
from tests.students.tiny import save_tiny_student

SPEARMAN = Evaluation(metric="spearman", columns="score=0,first=1,second=2")
COLUMNS = ("columns=score=0,first=1,second=2",)
WORDS = ("river", "mill", "timber", "spring", "water", "board", "rose", "name", "never", "number", "turn", "high")
PAIRS = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("budget")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """An encoder of one layer that edgepipe builds by itself: each bundle that is tried would be traced otherwise."""
    return save_tiny_student(folder / "encoder", StudentConfig(kind="encoder", encoder=with_layers(LLAMA, [0])))


def recipe_of(folder: Path, *settings: tuple[str, str, object]) -> Recipe:
    """Return a recipe without measure."""
    file = folder / "recipe.toml"
    file.write_text('stages = ["quantize", "export", "compile"]\n', encoding="utf-8")
    return resolve(target="cpu", file=file, settings=settings)


@pytest.fixture(scope="module")
def floats(model: Path, folder: Path) -> Path:
    """A bundle in 32-bit floats, as far as there is one: 16-bit weights."""
    recipe = recipe_of(folder, ("quantize", "bits", 16))
    return Path(compress(str(model), recipe, listener=Silent(), runs=folder / "float")["bundle"])


@pytest.fixture(scope="module")
def data(floats: Path, folder: Path) -> Callable[[int], Path]:
    """Return a function from a seed to a file of pairs, whose scores are the model's own and some noise."""
    from edgepipe.runtime import load

    loaded: Any = load(floats, threads=1, callers=1)

    def make(seed: int) -> Path:
        path = folder / f"pairs-{seed}.tsv"
        if not path.exists():
            random = np.random.default_rng(seed)
            texts = [" ".join(random.choice(WORDS, random.integers(2, 7))) for _ in range(2 * PAIRS)]
            vectors = loaded.embed(texts)
            cosine = (vectors[:PAIRS] * vectors[PAIRS:]).sum(1)
            scores = cosine + random.normal(0, 0.3 * cosine.std(), PAIRS)
            lines = [f"{s:.6f}\t{a}\t{b}" for s, a, b in zip(scores, texts[:PAIRS], texts[PAIRS:], strict=True)]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return make


def search(model: Path, folder: Path, data: Path, max_drop: str, name: str, **more: Any) -> tuple[Json, Silent]:
    """Search, and return the summary and what was heard."""
    listener = Silent()
    asked = Asked(max_drop=max_drop, data=str(data), options=COLUMNS, **more)
    found = compress(str(model), recipe_of(folder), listener=listener, runs=folder / name, asked=asked)
    return found, listener


def kept(found: Json) -> Json:
    """Return what the search left beside the bundle."""
    path = Path(found["bundle"]).parent / "search" / "search.json"
    return dict(json.loads(path.read_text(encoding="utf-8")))


def test_budgets_hold_on_data_it_never_saw(
    model: Path, floats: Path, folder: Path, data: Callable[[int], Path]
) -> None:
    """Two budgets: the larger one gives a smaller bundle, and each holds on two other files."""
    sizes = []
    for max_drop in ("2%", "10%"):
        found, _ = search(model, folder, data(0), max_drop, "runs")
        allowed = float(max_drop.rstrip("%")) / 100
        assert found["search"]["drop"] <= found["search"]["limit"] <= allowed
        for seed in (1, 2):
            seen = evaluate(Path(found["bundle"]), str(data(seed)), SPEARMAN, listener=Silent(), against=floats)
            assert 1 - seen["value"] / seen["against"]["value"] <= allowed, (max_drop, seed)
        sizes.append(found["weight_bytes"])
    assert sizes[0] > sizes[1]


def test_a_recipe_with_its_overrides_gives_the_same_bundle(
    model: Path, folder: Path, data: Callable[[int], Path]
) -> None:
    """Without a search, byte for byte, manifest included."""
    found, _ = search(model, folder, data(0), "2%", "runs")
    manifest = json.loads((Path(found["bundle"]) / "manifest.json").read_text(encoding="utf-8"))
    overrides = manifest["recipe"]["options"]["quantize"]["overrides"]
    assert len({re.split("=", one)[1] for one in overrides}) > 1, "a mixed plan has several grids"
    repeated = compress(
        str(model),
        recipe_of(folder, ("quantize", "overrides", overrides)),
        listener=Silent(),
        runs=folder / "repeated",
    )
    for file in Path(found["bundle"]).iterdir():
        assert (Path(repeated["bundle"]) / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_record_says_what_was_tried(model: Path, folder: Path, data: Callable[[int], Path]) -> None:
    found, _ = search(model, folder, data(0), "2%", "runs")
    record = kept(found)
    points = record["frontier"]
    assert [p["cost"] for p in points] == sorted((p["cost"] for p in points), reverse=True)
    assert [p["loss"] for p in points] == sorted(p["loss"] for p in points)
    tried = [(i, p) for i, p in enumerate(points) if p["value"] is not None]
    assert len(tried) == found["search"]["bundles_tried"] <= 7
    holding = [i for i, p in tried if p["limit"] <= 0.02]
    assert record["chosen"] == max(holding)
    chosen = points[record["chosen"]]
    norms = 4 * 3 * LLAMA["hidden_size"]  # float32: two of the layer, one behind it; no plan changes them
    assert sum(unit["bytes"] for unit in record["units"]) + norms == chosen["cost"] == chosen["bytes"]
    assert {point["prune_ratio"] for point in points} == {0.0}
    losses = {
        c["choice"]: c["loss"] for unit in record["units"] for c in unit["choices"] if unit["choice"] == c["choice"]
    }
    assert losses and record["float"]["value"] > 0.5 and record["data"]["examples"] == PAIRS


def test_a_second_search_measures_nothing_again(model: Path, folder: Path, data: Callable[[int], Path]) -> None:
    """Losses and scores are read back: after the first search its lines and scores stay as they are."""
    search(model, folder, data(0), "2%", "runs")
    place = next((folder / "runs").glob("*/search"))
    lines = (place / "sensitivity.jsonl").read_text(encoding="utf-8")
    scores = {p.name: (p / "record.json").stat().st_mtime_ns for p in (place / "scores").iterdir()}
    search(model, folder, data(0), "2%", "runs")
    assert (place / "sensitivity.jsonl").read_text(encoding="utf-8") == lines
    assert {p.name: (p / "record.json").stat().st_mtime_ns for p in (place / "scores").iterdir()} == scores


def test_a_search_that_was_stopped_goes_on(model: Path, folder: Path, data: Callable[[int], Path]) -> None:
    """Stopped amid the losses, a last line cut in the middle: what lacks is measured, and scores are read back."""
    found, _ = search(model, folder, data(0), "2%", "runs")
    earlier = Path(found["bundle"]).parent / "search"
    place = folder / "stopped" / earlier.parent.name / "search"
    shutil.copytree(earlier / "scores", place / "scores")
    lines = (earlier / "sensitivity.jsonl").read_text(encoding="utf-8").splitlines()
    half = len(lines) // 2
    text = "\n".join(lines[:half]) + "\n" + lines[half][:-4]
    (place / "sensitivity.jsonl").write_text(text, encoding="utf-8")
    again, _ = search(model, folder, data(0), "2%", "stopped")
    left = (place / "sensitivity.jsonl").read_text(encoding="utf-8").splitlines()
    assert left[:half] == lines[:half] and sorted(left) == sorted(lines)
    assert again["weight_bytes"] == found["weight_bytes"]


def test_no_bundle_within_the_budget_ships_nothing(model: Path, folder: Path, data: Callable[[int], Path]) -> None:
    """A drop of a ten-millionth: exit code 3, one sentence, and the bundle of an earlier run stays what it was."""
    before, _ = search(model, folder, data(0), "2%", "runs")
    bundle = Path(before["bundle"])
    manifest = (bundle / "manifest.json").read_bytes()
    with pytest.raises(BudgetError, match=r"no bundle keeps spearman within 1e-07 of .* Nothing was shipped") as caught:
        search(model, folder, data(0), "0.0000001", "runs")
    assert caught.value.exit_code == 3
    assert (bundle / "manifest.json").read_bytes() == manifest
    record = kept(before)
    assert record["chosen"] is None and record["frontier"][0]["limit"] > 1e-7


def test_a_bundle_that_was_not_scored_is_not_shipped(model: Path, folder: Path, data: Callable[[int], Path]) -> None:
    """Scores that speak of other weights, as a kept one may after a change: nothing is written."""
    found, _ = search(model, folder, data(0), "2%", "runs")
    run = Path(found["bundle"]).parent
    place = folder / "other" / run.name
    shutil.copytree(run / "search", place / "search")
    for path in (place / "search" / "scores").glob("*/record.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        record["files"]["weights.bin"] = "0" * 64
        path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ContractError, match=r"isn't the one that kept the budget \(weights.bin differ\), so it wasn't"):
        search(model, folder, data(0), "2%", "other")
    assert not (place / "bundle").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"overrides": ["*=8"]}, "the search decides what quantize.overrides would"),
        ({"agreement": 0.5}, "the search decides what quantize.agreement would"),
        ({"activations": "dynamic"}, "the search decides what quantize.activations would"),
        ({"bits": 1.58, "steps": 1, "data": "x"}, "trains nothing: leave quantize.bits=1.58 out"),
    ],
)
def test_what_a_search_would_overrule_is_refused(
    model: Path, folder: Path, options: dict[str, object], sentence: str
) -> None:
    """Before any work."""
    asked = Asked(data=str(folder / "pairs-0.tsv"), options=COLUMNS)
    recipe = recipe_of(folder, *(("quantize", name, value) for name, value in options.items()))
    with pytest.raises(ConfigError, match=sentence):
        compress(str(model), recipe, listener=Silent(), runs=folder / "refused", asked=asked)
    assert not (folder / "refused").exists()


def test_trimming_comes_before(model: Path, folder: Path, data: Callable[[int], Path]) -> None:
    recipe = resolve(target="cpu", settings=[("trim", "data", str(data(0)))], before=["trim"])
    with pytest.raises(ConfigError, match="the recipe has trim first: run that by itself"):
        compress(
            str(model),
            recipe,
            listener=Silent(),
            runs=folder / "refused",
            asked=Asked(data=str(data(0)), options=COLUMNS),
        )


def test_a_set_for_evaluation_steers_nothing(model: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="prose-eval is the evaluation set"):
        compress(
            str(model),
            recipe_of(folder),
            listener=Silent(),
            runs=folder / "refused",
            asked=Asked(data="prose-eval", options=COLUMNS),
        )


def command(model: Path, data: Path, *words: str) -> Result:
    """Run `edgepipe compress` with a budget as a user does, where the searches above have left what they measured."""
    return CliRunner().invoke(main, ["compress", str(model), "--data", data.name, "--eval", COLUMNS[0], *words])


def test_the_command_and_its_report(
    model: Path, folder: Path, data: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last line has the search, and the page of the run the frontier with the chosen point and the matrices."""
    search(model, folder, data(0), "2%", "runs")
    monkeypatch.chdir(folder)
    quick = [f"--set=measure.{setting}" for setting in ("blocks=1", "turns=2", "threads=1")]
    result = command(model, data(0), "--max-drop", "2%", *quick)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert found["search"]["limit"] <= 0.02 and found["search"]["metric"] == "spearman"
    record = json.loads(Path(found["report"]).with_name("run.json").read_text(encoding="utf-8"))
    assert record["search"]["chosen"] is not None
    report = json.loads(Path(found["report"]).with_suffix(".json").read_text(encoding="utf-8"))
    assert errors(report) == []
    (bundle,) = report["bundles"]
    assert bundle["search"]["points"][bundle["search"]["chosen"]]["limit"] == found["search"]["limit"]
    page = Path(found["report"]).read_text(encoding="utf-8")
    assert "Quality, bytes and time" in page and page.count('class="best"') == 1


def test_the_command_ends_with_3_when_nothing_holds(
    model: Path, folder: Path, data: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    search(model, folder, data(0), "2%", "runs")
    monkeypatch.chdir(folder)
    result = command(model, data(0), "--max-drop", "0.0000001", "--recipe", "recipe.toml", "--out", "nothing")
    assert result.exit_code == 3 and not Path("nothing").exists()
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("edgepipe:")]
    assert "no bundle keeps spearman within" in said and "Traceback" not in result.output


def test_the_fastest_plan_has_the_least_time_of_products(
    model: Path, folder: Path, data: Callable[[int], Path]
) -> None:
    """A wide budget lets every matrix take its fastest grid; 2 bits, the smallest, are slow over many rows."""
    found, _ = search(model, folder, data(0), "0.9", "fast", goal="fastest")
    record = kept(found)
    lines = (Path(found["bundle"]).parent / "search" / "times.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    times = {tuple(key): ms for *key, ms in map(json.loads, lines)}
    assert times and all(ms > 0 for ms in times.values())
    assert not any("gathered" in shape for shape, _ in times)
    costs = [point["cost"] for point in record["frontier"]]
    assert costs == sorted(costs, reverse=True) and record["chosen"] == len(costs) - 1
    assert record["goal"] == found["search"]["goal"] == "fastest"
