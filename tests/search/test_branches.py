"""One frontier over pruning and bits: `--prune 0.5 --max-drop 10%`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe.artifacts import Json
from edgepipe.compress import compress
from edgepipe.errors import ConfigError
from edgepipe.numerics.knapsack import frontier
from edgepipe.recipe import Recipe, resolve
from edgepipe.search.asked import Asked
from edgepipe.search.branches import unbeaten
from edgepipe.search.budget import most_asked
from edgepipe.students.config import StudentConfig, with_layers
from tests.listener import Silent
from tests.students.test_models import LLAMA
from tests.students.tiny import save_tiny_student

COLUMNS = ("columns=score=0,first=1,second=2",)
WORDS = ("river", "mill", "timber", "spring", "water", "board", "rose", "name", "never", "number", "turn", "high")
PAIRS = 120
CHANNELS = 192


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("branches")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    shape = with_layers({**LLAMA, "intermediate_size": CHANNELS, "hidden_size": 64}, [0])
    return save_tiny_student(folder / "encoder", StudentConfig(kind="encoder", encoder=shape))


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    """Pairs whose scores say how many words they share: any such encoder knows something of that."""
    random = np.random.default_rng(0)
    lines = []
    for _ in range(PAIRS):
        first, second = (set(random.choice(WORDS, random.integers(2, 7))) for _ in range(2))
        shared = len(first & second) / len(first | second)
        lines.append(f"{shared + random.normal(0, 0.05):.4f}\t{' '.join(sorted(first))}\t{' '.join(sorted(second))}")
    path = folder / "pairs.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def recipe_of(folder: Path, *settings: tuple[str, str, object]) -> Recipe:
    """Return a recipe that prunes by half, by weights alone."""
    file = folder / "recipe.toml"
    file.write_text('stages = ["prune", "quantize", "export", "compile"]\n', encoding="utf-8")
    own = [("prune", "importance", "magnitude"), ("prune", "ratio", 0.5), *settings]
    return resolve(target="cpu", file=file, settings=own)


def search(model: Path, folder: Path, data: Path, max_drop: str, *settings: tuple[str, str, object]) -> Json:
    """Search, and return the summary with what was kept of it."""
    asked = Asked(max_drop=max_drop, data=str(data), options=COLUMNS)
    recipe = recipe_of(folder, *settings)
    found = compress(str(model), recipe, listener=Silent(), runs=folder / "runs", asked=asked)
    kept = json.loads((Path(found["bundle"]).parent / "search" / "search.json").read_text(encoding="utf-8"))
    return {**found, "record": kept, "home": Path(found["bundle"]).parent}


def test_a_wide_budget_prunes_and_a_narrow_one_does_not(model: Path, folder: Path, data: Path) -> None:
    """All three models stand on one frontier, in the order of cost; the chosen one is the run's and is really small."""
    wide = search(model, folder, data, "0.9")
    points = wide["record"]["frontier"]
    assert {point["prune_ratio"] for point in points} == {0.0, 0.25, 0.5}
    for name, reverse in (("cost", True), ("loss", False)):
        assert [p[name] for p in points] == sorted((p[name] for p in points), reverse=reverse)
    assert points[-1]["prune_ratio"] == 0.5 and wide["record"]["chosen"] == len(points) - 1
    assert wide["search"]["prune_ratio"] == 0.5 and wide["search"]["bundles_tried"] <= most_asked(len(points))
    narrow = search(model, folder, data, "0.02")
    assert narrow["search"]["prune_ratio"] < 0.5 and narrow["search"]["limit"] <= 0.02
    assert wide["weight_bytes"] < narrow["weight_bytes"]


def test_what_was_pruned_is_handed_over_and_the_rest_cleared_away(model: Path, folder: Path, data: Path) -> None:
    """The run finds its first stage done; a recipe with what was chosen gives the same bytes without a search."""
    found = search(model, folder, data, "0.9")
    home: Path = found["home"]
    left = {str(p.relative_to(home / "search")) for p in (home / "search").glob("*/*/*") if p.is_dir()}
    assert left == {f"pruned-{ratio}/{home.name}/01-prune" for ratio in ("0.25", "0.5")}
    (key,), (lent,) = (
        {json.loads((folder / "key.json").read_text(encoding="utf-8"))["key"]}
        for folder in (home / "search" / "pruned-0.5" / home.name / "01-prune", home / "01-prune")
    )
    assert key == lent
    manifest = json.loads((Path(found["bundle"]) / "manifest.json").read_text(encoding="utf-8"))
    options = manifest["recipe"]["options"]
    assert options["prune"]["ratio"] == 0.5
    overrides = ("quantize", "overrides", options["quantize"]["overrides"])
    repeated = compress(str(model), recipe_of(folder, overrides), listener=Silent(), runs=folder / "repeated")
    for file in Path(found["bundle"]).iterdir():
        assert (Path(repeated["bundle"]) / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_second_search_prunes_and_measures_nothing_again(model: Path, folder: Path, data: Path) -> None:
    def seen(home: Path) -> dict[str, int]:
        files = [*(home / "search").glob("*.jsonl"), *(home / "search").glob("pruned-*/*/01-prune/*")]
        return {str(f): f.stat().st_mtime_ns if f.suffix != ".jsonl" else f.stat().st_size for f in files}

    home = search(model, folder, data, "0.9")["home"]
    before = seen(home)
    search(model, folder, data, "0.9")
    assert len(before) > 6 and seen(home) == before


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ([("prune", "layers", 1)], "of pruning it searches the ratio alone: leave prune.layers out"),
        ([("prune", "sparsity", 0.5)], "of pruning it searches the ratio alone: leave prune.sparsity out"),
        (
            [("prune", "recover_steps", 1), ("prune", "data", "{data}"), ("prune", "columns", "{columns}")],
            "on which the drop is measured",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused(
    model: Path, folder: Path, data: Path, settings: list[tuple[str, str, Any]], sentence: str
) -> None:
    filled = [(s, n, str(data) if v == "{data}" else "text=1" if v == "{columns}" else v) for s, n, v in settings]
    asked = Asked(max_drop="1%", data=str(data), options=COLUMNS)
    with pytest.raises(ConfigError, match=sentence):
        compress(str(model), recipe_of(folder, *filled), listener=Silent(), runs=folder / "refused", asked=asked)
    assert not (folder / "refused").exists()


def test_pruning_behind_quantize_is_refused(model: Path, folder: Path, data: Path) -> None:
    file = folder / "behind.toml"
    file.write_text('stages = ["quantize", "prune", "export", "compile"]\n', encoding="utf-8")
    asked = Asked(max_drop="1%", data=str(data), options=COLUMNS)
    with pytest.raises(ConfigError, match="put prune first in the recipe's stages"):
        compress(str(model), resolve(target="cpu", file=file), listener=Silent(), runs=folder / "no", asked=asked)


def test_no_plan_beats_another() -> None:
    """The frontier of two branches is that of all their plans, by asking every pair."""
    random = np.random.default_rng(0)
    plans: list[Any] = []
    for lost in (0.0, 0.7):
        costs, losses = random.random((4, 5)).tolist(), random.random((4, 5)).tolist()
        plans += [
            type("Plan", (), {"cost": point.cost * (1 - lost / 2), "loss": point.loss + lost})()
            for point in frontier(costs, losses)
        ]
    expected = [
        one for one in plans if not any(o.cost <= one.cost and o.loss <= one.loss and o is not one for o in plans)
    ]
    assert unbeaten(plans) == sorted(expected, key=lambda one: float(one.loss))
    assert 0 < len(expected) < len(plans)
