"""Encoders with exits through their bundles: layers that are skipped aren't run, and 1 as a threshold is the whole."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.exits import executed
from edgepipe.artifacts import TorchModel
from edgepipe.compress import compress
from edgepipe.errors import ConfigError, ContractError
from edgepipe.measuring.metrics import Evaluation
from edgepipe.recipe import resolve
from edgepipe.runtime import Encoder, load
from edgepipe.runtime.onnxruntime import open_graph
from edgepipe.sources import open_model
from edgepipe.stages.distill import Distill
from edgepipe.stages.prune import Prune
from edgepipe.stages.quantize import Quantize
from edgepipe.students.config import StudentConfig, read_student
from edgepipe.students.reference import encoded_at_exits, filled_student
from edgepipe.verify import verify_bundle
from tests.listener import Silent
from tests.runtime.damages import own_up, read, write
from tests.stages.test_prune import STACK
from tests.students.tiny import save_tiny_student

TEXTS = [f"The river rose {i} times and {'fell' * (i % 4)}." for i in range(11)]
KINDS: dict[str, dict[str, Any]] = {"embeds": {}, "classifies": {"labels": ("no", "yes", "perhaps"), "pooling": "cls"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold models and bundles."""
    return tmp_path_factory.mktemp("exits")


def source(folder: Path, kind: str) -> TorchModel:
    """Return a student of 3 layers with exits after each of the first two; its gates are as random as the rest."""
    path = folder / kind
    if not path.exists():
        save_tiny_student(path, StudentConfig(kind="encoder", encoder=STACK, exits=(1, 2), **KINDS[kind]))
    return open_model(str(path))


def bundled(folder: Path, kind: str, bits: int = 16, activations: str = "none") -> Path:
    """Return its bundle, made once."""
    out = folder / f"{kind}-{bits}-{activations}"
    if not out.exists():
        source(folder, kind)
        file = folder / "recipe.toml"
        file.write_text('stages = ["quantize", "export", "compile"]', encoding="utf-8")
        settings: list[tuple[str, str, object]] = [("quantize", "bits", bits), ("export", "context", 48)]
        settings += [("quantize", "embedding_bits", min(2 * bits, 16)), ("quantize", "activations", activations)]
        recipe = resolve(target="cpu", file=file, settings=settings)
        compress(str(folder / kind), recipe, listener=Silent(), out=out, runs=folder / "runs")
    return out


def plain_bundle(folder: Path) -> Path:
    """Return the bundle of an encoder without exits, made once."""
    out = folder / "plain-bundle"
    if not out.exists():
        bundled(folder, "embeds")  # and the recipe with it
        save_tiny_student(folder / "plain", StudentConfig(kind="encoder", encoder=STACK))
        recipe = resolve(target="cpu", file=folder / "recipe.toml", settings=[("export", "context", 48)])
        compress(str(folder / "plain"), recipe, listener=Silent(), out=out, runs=folder / "runs")
    return out


def answers(model: Encoder, kind: str, **options: Any) -> np.ndarray:
    """Embed or classify the texts."""
    return model.classify(TEXTS, **options) if kind == "classifies" else model.embed(TEXTS, **options)


def opened(path: Path, threshold: float | None = None) -> Encoder:
    """Load a bundle."""
    model = load(path, threads=1, exit_threshold=threshold)
    assert isinstance(model, Encoder)
    return model


@pytest.mark.parametrize(("bits", "activations"), [(16, "none"), (4, "none"), (8, "dynamic")])
@pytest.mark.parametrize("kind", KINDS)
def test_at_1_the_answers_are_exactly_those_of_the_whole_graph(
    kind: str, bits: int, activations: str, folder: Path
) -> None:
    path = bundled(folder, kind, bits, activations)
    model = opened(path, 1.0)
    whole = open_graph(path / "model.onnx", 1)
    feeds = {name: np.pad(rows, [(0, 0), (0, 7)]) for name, rows in model.feeds(TEXTS).items()}  # more than any needs
    expected = whole.run(feeds)
    got = model.run(feeds)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(got[name], value)
    assert model.texts_by_depth == {1: 0, 2: 0, 3: len(TEXTS)}


@pytest.mark.parametrize("kind", KINDS)
def test_each_text_gets_the_answer_from_where_its_gate_lets_it_leave(kind: str, folder: Path) -> None:
    """Rows leave at different exits, beside each other; torch says what each should get."""
    model = source(folder, kind)
    path = bundled(folder, kind)
    at_half = opened(path)
    feeds = at_half.feeds(TEXTS)
    student: Any = filled_student(read_student(model.info.config), model.weights, None)
    by_exit = encoded_at_exits(student, feeds["input_ids"], feeds["attention_mask"])
    gates = np.stack([gate for _, gate in by_exit if gate is not None], 1)
    ordered = np.sort(gates, axis=None)
    ways = []  # between every two of the gates: how far they are apart, and where texts leave
    for low, high in itertools.pairwise(ordered):
        least = (low + high) / 2
        left = np.where(gates[:, 0] > least, 0, np.where(gates[:, 1] > least, 1, 2))
        ways.append((len({*left}), high - low, least, left))
    kinds, apart, least, left = max(ways, key=lambda way: way[:2])
    assert kinds == 3 and apart > 0.01, "the test wants texts to leave everywhere"
    model_between = opened(path, float(1 / (1 + np.exp(-least))))
    got = next(iter(model_between.run(feeds).values()))
    expected = np.stack([by_exit[exit_][0][row] for row, exit_ in enumerate(left)])
    np.testing.assert_allclose(got, expected, atol=5e-3)  # weights of the bundle are float16
    counts = np.bincount(left, minlength=3)
    assert model_between.texts_by_depth == dict(zip((1, 2, 3), counts.tolist(), strict=True))


def test_later_parts_run_on_the_rows_that_stayed_and_not_at_all_without(folder: Path, monkeypatch: Any) -> None:
    from edgepipe.runtime.onnxruntime import Graph

    path = bundled(folder, "embeds")
    seen: list[int] = []
    run = Graph.run

    def watched(self: Graph, feeds: Any) -> Any:
        seen.append(len(feeds["attention_mask"]))
        return run(self, feeds)

    monkeypatch.setattr(Graph, "run", watched)
    for threshold in (0.0, 0.4, 0.6, 1.0):
        model = opened(path, threshold)
        seen.clear()
        model.run(model.feeds(TEXTS))
        left = model.texts_by_depth
        expected = [len(TEXTS), len(TEXTS) - left[1], left[3]]
        assert seen == [rows for rows in expected if rows]
    assert opened(path, 0.0).texts_by_depth == {1: 0, 2: 0, 3: 0}


def test_the_engine_runs_as_many_attentions_as_texts_have_layers(folder: Path) -> None:
    """What executed is the engine's own count: one attention a layer, so those of the layers that were skipped lack."""
    path = bundled(folder, "embeds")
    counts, layers = zip(*(executed(path, threshold, TEXTS) for threshold in (0.0, 0.5, 1.0)), strict=True)
    (attention,) = {name for found in counts for name in found if "Attention" in name}
    assert [found[attention] for found in counts] == list(layers)
    assert [layers[0], layers[-1]] == [len(TEXTS), 3 * len(TEXTS)]
    assert layers[0] < layers[1] < layers[2], "the test wants texts to leave at several exits"
    totals = [found.total() for found in counts]
    assert totals == sorted(set(totals))


def test_texts_leave_later_where_more_is_asked_of_gates(folder: Path) -> None:
    path = bundled(folder, "classifies")
    layers = []
    for threshold in (0.0, 0.2, 0.5, 0.8, 1.0):
        model = opened(path, threshold)
        answers(model, "classifies", batch_size=3)
        left = model.texts_by_depth
        assert sum(left.values()) == len(TEXTS)
        layers.append(sum(depth * count for depth, count in left.items()))
    assert layers == sorted(layers)
    assert (layers[0], layers[-1]) == (len(TEXTS), 3 * len(TEXTS))


def test_eval_says_how_many_layers_texts_went_through(folder: Path) -> None:
    from edgepipe.evaluate import evaluate

    data = folder / "pairs.tsv"
    data.write_text("".join(f"a\tb\tc\td\t{i % 4}\tOne {i}.\tTwo {i}.\n" for i in range(9)), encoding="utf-8")
    how = Evaluation(metric="spearman", exit_threshold=0.0, threads=1)
    details = evaluate(bundled(folder, "embeds"), str(data), how, listener=Silent())["details"]
    assert details == {"mean_layers": 1.0, "texts_by_layers": {"1": 18, "2": 0, "3": 0}}
    plain = plain_bundle(folder)
    found = evaluate(bundled(folder, "embeds"), str(data), how, listener=Silent(), against=plain)
    assert found["details"] == details, "the other bundle has no exits, and runs as it does"
    with pytest.raises(ConfigError, match="has no exits"):
        evaluate(plain, str(data), how, listener=Silent())


def test_the_manifest_is_one_that_readers_without_exits_take(folder: Path) -> None:
    """The whole graph is there under its usual name, and `ends` describe it alone: schema 2 as ever."""
    path = bundled(folder, "embeds")
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["schema"], list(manifest["ends"])) == (2, ["model"])
    assert sorted(manifest["graphs"]) == ["model", "part_0", "part_1", "part_2"]
    assert manifest["model"]["exits"] == [1, 2]
    assert all(check["ok"] for check in verify_bundle(path)["checks"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"exits": [2, 1]}, "model.exits must be growing numbers from 1 to below model.layers"),
        ({"exits": [1, 3]}, "model.exits must be growing numbers"),
        ({"exits": [1, True]}, "model.exits must be growing numbers"),
        ({"exits": "12"}, "model.exits must be growing numbers"),
        ({"exits": [1, 2], "layers": 9}, ""),
        ({"hidden_size": None}, "model.hidden_size must be a whole number"),
        ({"hidden_size": 47}, r"'next_states' should be tensor\(float\) \[\*, \*, 47\]"),
        ({"exits": [1]}, "output 'gate' is one too many"),
        ({"exits": []}, "model.exits must be growing numbers"),
        ({"exits": [1, 2, 3], "layers": 4}, "graphs must name part_3 for model.exits, but does not"),
        ({"inputs/attention_mask": None}, "ends.model.inputs: 'attention_mask' is missing"),
        ({"outputs/embedding": [11, 64]}, "ends.model.outputs.embedding must have a row for each text"),
        ({"outputs/embedding": []}, "ends.model.outputs.embedding must have a row for each text"),
    ],
)
def test_a_manifest_that_lies_is_refused(change: dict[str, Any], sentence: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(bundled(folder, "embeds"), path)
    manifest = read(path)
    for name, value in change.items():
        kind, _, end = name.partition("/")
        if not end:
            manifest["model"][name] = value
        elif value is None:
            del manifest["ends"]["model"][kind][end]
        else:
            manifest["ends"]["model"][kind][end]["shape"] = value
    write(path, manifest)
    if not sentence:
        load(path)  # more layers than there are: a number for tables
        return
    with pytest.raises((ConfigError, ContractError), match=sentence):
        load(path)


@pytest.mark.parametrize("name", ["model", "part_0", "part_1", "part_2"])
def test_verify_opens_every_graph(name: str, folder: Path, tmp_path: Path) -> None:
    """The graph of all layers too, which `load` leaves alone: whoever knows of no parts runs it."""
    path = tmp_path / "bundle"
    shutil.copytree(bundled(folder, "embeds"), path)
    (path / f"{name}.onnx").write_bytes(b"no graph")
    own_up(path)
    outcome = {check["name"]: check for check in verify_bundle(path)["checks"]}
    assert outcome["hashes"]["ok"] and not outcome["graph"]["ok"]
    assert "could not load" in outcome["graph"]["problem"]


def test_measured_calls_go_through_all_layers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the gates say of a text that was cut anywhere: a call is as long as it can be."""
    from edgepipe.measuring.calls import open_calls
    from edgepipe.runtime.onnxruntime import Graph

    seen: list[int] = []
    run = Graph.run
    monkeypatch.setattr(Graph, "run", lambda self, feeds: seen.append(len(feeds["attention_mask"])) or run(self, feeds))
    ready, turn = open_calls(bundled(folder, "embeds"), " ".join(TEXTS) * 40, 1, 0.0)
    for shape, (batch, _) in enumerate(ready["calls"]):
        seen.clear()
        turn({"call": shape, "number": 0, "of": 1})
        assert seen == [batch] * 3


def test_thresholds_that_cannot_be(folder: Path) -> None:
    path = bundled(folder, "embeds")
    for wrong in (1.5, -0.1, "0.5", True, float("nan")):
        with pytest.raises(ConfigError, match="exit_threshold must be a number from 0 to 1"):
            load(path, exit_threshold=wrong)  # type: ignore[arg-type]
    plain = plain_bundle(folder)
    with pytest.raises(ConfigError, match="has no exits"):
        load(plain, exit_threshold=0.5)
    assert opened(plain).texts_by_depth == {}


def test_stages_that_exits_stand_in_the_way_of(folder: Path) -> None:
    model = source(folder, "embeds")
    with pytest.raises(ConfigError, match="prune: embeds has exits"):
        Prune().check(model)
    with pytest.raises(ConfigError, match="activations=static: embeds has exits"):
        Quantize(bits=8, activations="static").check(model)
    data = folder / "texts.txt"
    data.write_text("\n\n".join(TEXTS), encoding="utf-8")
    with pytest.raises(ConfigError, match="steps: embeds has exits"):
        Quantize(bits=1.58, ternary="mean", steps=2, data=str(data)).check(model)
    with pytest.raises(ConfigError, match=r"distill\.data: embeds has exits, whose gates are fitted to texts"):
        Distill(student="encoder", untaught=True, gate_beta=1.0).check(model)
    with pytest.raises(ConfigError, match="exits: expected growing numbers of layers from 1 to below all 3"):
        StudentConfig(kind="encoder", encoder=STACK, exits=(2, 3))
    with pytest.raises(ConfigError, match=r"exits and distill\.nested"):
        Distill(student="encoder", exits=(1,), nested=(8,))
    with pytest.raises(ConfigError, match=r"distill\.exits means something to a student of kind encoder alone"):
        Distill(student="decoder", exits=(1,))


@pytest.mark.parametrize(
    ("stages", "settings", "sentence"),
    [
        ("prune", [], "prune: the student has exits"),
        ("quantize", [("quantize", "activations", "static"), ("quantize", "bits", 8)], "static: the student has exits"),
        ("quantize", [("quantize", "bits", 1.58), ("quantize", "steps", 2)], "steps: the student has exits"),
    ],
)
def test_stages_behind_are_refused_before_a_student_is_trained(
    stages: str, settings: list[tuple[str, str, object]], sentence: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    data, file = tmp_path / "texts.txt", tmp_path / "recipe.toml"
    data.write_text("\n\n".join(TEXTS), encoding="utf-8")
    file.write_text(f'stages = ["distill", "{stages}", "export", "compile"]', encoding="utf-8")
    given: list[tuple[str, str, object]] = [("distill", "student", "encoder"), ("distill", "data", str(data))]
    given += [("distill", "exits", [1]), ("distill", "max_source", 64), *settings]
    given += [("quantize", "data", str(data))] if ("quantize", "steps", 2) in settings else []
    recipe = resolve(target="cpu", file=file, settings=given)
    with pytest.raises(ConfigError, match=sentence):
        compress(str(tiny_model_dir), recipe, listener=Silent(), runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_gate_as_it_is_made_lets_nobody_leave(folder: Path) -> None:
    """Half is not more than half: a student whose gates were never fitted runs whole."""
    from edgepipe.students.files import make_student

    config = StudentConfig(kind="encoder", encoder=STACK, exits=(1,))
    student: Any = make_student(config, seed=0)
    ids = torch.arange(6)[None]
    _, features = student.at_depths(ids, torch.ones_like(ids))
    assert not student.gates[0](features[0]).any()
