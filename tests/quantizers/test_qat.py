"""Training on the grid: what comes out lies on that grid, and the bundle computes what training saw."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgepipe.artifacts import CompiledModel, QuantizedTensor, TorchModel
from edgepipe.errors import ConfigError
from edgepipe.numerics.grids import dequantize, round_to_nearest
from edgepipe.numerics.ternary import round_to_ternary
from edgepipe.quantizers import qat
from edgepipe.quantizers.fake import fake_layers
from edgepipe.quantizers.modules import block_layers, module_of
from edgepipe.quantizers.qat import faked
from edgepipe.runtime.onnxruntime import open_graph
from edgepipe.sources import open_model
from edgepipe.stages.compile import Compile
from edgepipe.stages.export import Export
from edgepipe.stages.quantize import Quantize
from tests.decoders import context, opened
from tests.families import save_family
from tests.students.test_models import PAIR, PLAIN
from tests.students.tiny import save_tiny_student

W4A4: dict[str, Any] = {"bits": 4, "activations": "dynamic", "activation_bits": 4}
TERNARY: dict[str, Any] = {"bits": 1.58}
TRAINED: dict[str, Any] = {"steps": 12, "batch": 8, "learning_rate": 3e-4, "warmup": 2, "tokens": 24, "precision": "no"}
WORDS = [
    "the",
    "river",
    "was",
    "cold",
    "and",
    "we",
    "crossed",
    "it",
    "on",
    "foot",
    "before",
    "sun",
    "came",
    "over",
    "hills",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the tiny models of this file."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def data(folder: Path) -> str:
    """Write sources and targets; other models read both as texts."""
    rng = np.random.default_rng(0)
    path = folder / "texts.jsonl"
    texts = [" ".join(rng.choice(WORDS, rng.integers(4, 9))) for _ in range(48)]
    lines = [json.dumps({"source": a, "target": b}) for a, b in zip(texts[::2], texts[1::2], strict=True)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def model_of(folder: Path, kind: str) -> TorchModel:
    """Open a tiny model of a kind."""
    if kind in ("pair", "encoder"):
        path = folder / f"student-{kind}"
        return open_model(str(path if path.exists() else save_tiny_student(path, PAIR if kind == "pair" else PLAIN)))
    if kind.startswith("llama"):
        return opened(folder, kind)
    return open_model(str(save_family(folder / kind, kind)))


def trained(model: TorchModel, work: Path, data: str, notes: list[str], **options: Any) -> tuple[TorchModel, Any]:
    """Return what the stage gives, and its figures."""
    figures: list[Any] = []
    work.mkdir(parents=True, exist_ok=True)
    ctx = dataclasses.replace(context(work, notes), figures=figures.append)
    return Quantize(**{**TRAINED, "data": data, **options})(model, ctx), figures[0]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bert", W4A4),
        ("pair", W4A4),
        ("llama grouped", TERNARY),
        ("t5", TERNARY),
        ("encoder", {**TERNARY, "ternary": "mean", "normalize": False}),
    ],
    ids=str,
)
def test_layers_learn_on_the_grid_that_ships(
    folder: Path, tmp_path: Path, data: str, kind: str, options: dict[str, Any]
) -> None:
    model, notes = model_of(folder, kind), []
    result, figures = trained(model, tmp_path, data, notes, **options)
    record = figures["training"]["quantize"]
    assert record["steps"] == 12
    parts = {"logits", "hidden"} | ({"attention"} if kind in ("bert", "llama grouped", "t5") else set())
    assert parts < record["held_out"][0].keys(), "maps are compared where a module gives them"
    assert record["best"]["loss"] < record["held_out"][0]["loss"]
    layers = block_layers(model)
    assert result.activations is not None and result.activations.layers == layers
    moved = 0
    for name, weight in result.weights.items():
        value = weight.load()
        if name in layers:
            assert isinstance(value, QuantizedTensor) and value.has_rows
            assert value.nbytes == weight.nbytes
            ternary = options != W4A4
            assert (value.bits, value.source_grid) == ((2, "ternary") if ternary else (4, "rtn"))
            if ternary:
                assert len(np.unique(dequantize(value))) <= 3
            moved += not np.array_equal(dequantize(value), _untrained(model, name, options))
        elif isinstance(value, QuantizedTensor):
            assert value.bits == 8
    assert moved > len(layers) / 2
    assert any("encoder-decoders came out consistently worse" in note for note in notes) == (
        options != W4A4 and kind in ("t5", "pair")
    )


def _untrained(model: TorchModel, name: str, options: dict[str, Any]) -> np.ndarray:
    """Return a matrix on the same grid as the model came."""
    weight = model.weights.float32(name)
    if options == W4A4:
        return dequantize(round_to_nearest(weight, bits=4, group=0, symmetric=True))
    return dequantize(round_to_ternary(weight, options.get("ternary", "median")))


def bundle_of(model: TorchModel, work: Path, notes: list[str]) -> CompiledModel:
    """Export and compile a model."""
    work.mkdir(parents=True, exist_ok=True)
    ctx = context(work, notes)
    return Compile(cache_dtype="float32")(Export(context=32)(model, ctx), ctx)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bert", W4A4),
        ("bert", TERNARY),
        ("encoder", {**W4A4, "activation_symmetric": True}),
        ("encoder", TERNARY),
    ],
    ids=str,
)
def test_the_bundle_computes_what_training_saw(
    folder: Path, tmp_path: Path, data: str, kind: str, options: dict[str, Any]
) -> None:
    """Torch with fake layers over the weights that ship, and the bundle, which rounds by itself, agree."""
    model = model_of(folder, kind)
    stage = Quantize(**{**TRAINED, "data": data, **options})
    result, _ = trained(model, tmp_path / "q", data, [], **options)
    bundle = bundle_of(result, tmp_path / "b", notes := [])
    assert "as shipped" in notes[-1]
    module = module_of(result)
    fake_layers(module, result.activations.layers, faked(stage))  # type: ignore[union-attr]
    rng = np.random.default_rng(3)
    ids = rng.integers(2, 300, (3, 12))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if kind == "bert":
        feeds["token_type_ids"] = np.zeros_like(ids)
    with torch.no_grad():
        found = module(**{name: torch.from_numpy(value) for name, value in feeds.items()})
    if kind == "bert":
        states = found.last_hidden_state.mean(1)
        found = states / states.norm(dim=-1, keepdim=True)
    (name,) = bundle.manifest["graphs"].values()
    got = next(iter(open_graph(bundle.path / name, 1).run(feeds).values()))
    np.testing.assert_allclose(got, found.numpy(), atol=2e-2)
    assert np.abs(got - found.numpy()).mean() < 2e-3, "a level may fall to the other side of a tie, and rarely"


class _Stopped(Exception):
    """What stands for a Ctrl-C."""


def test_a_training_that_was_stopped_goes_on(
    folder: Path, tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights to the bit as in one go, and no step taken twice."""
    made = qat.loop_options
    monkeypatch.setattr(
        qat, "loop_options", lambda options, seed: dataclasses.replace(made(options, seed), save_every=2)
    )
    model = model_of(folder, "encoder")
    stage = Quantize(**{**TRAINED, "data": data, **W4A4, "strength_steps": 6})
    whole = stage(model, context(tmp_path / "whole", []))
    seen: list[int] = []

    def stop(what: str, done: int, _total: int) -> None:
        if what.startswith("loss"):
            seen.append(done)
            if done == 7 and seen.count(7) == 1:
                raise _Stopped

    work = dataclasses.replace(context(tmp_path / "work", []), keep_dir=tmp_path / "kept", progress=stop)
    with pytest.raises(_Stopped):
        stage(model, work)
    resumed = stage(model, work)
    assert seen == [1, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11, 12]
    for name in whole.weights:
        np.testing.assert_array_equal(whole.weights.float32(name), resumed.weights.float32(name))


def test_from_scratch_only_labels_count(folder: Path, tmp_path: Path) -> None:
    """Random weights, no teacher, rounding that grows: the classifier learns its labels, those of the model alone."""
    path = folder / "classifier"
    save_tiny_student(path, dataclasses.replace(PLAIN, labels=("no", "yes")))
    model = open_model(str(path))
    rng = np.random.default_rng(1)
    rows = [
        (" ".join(rng.choice(WORDS, 5)) + (" sun sun" if i % 2 else " cold cold"), "yes" if i % 2 else "no")
        for i in range(60)
    ]
    table = folder / "labels.tsv"
    table.write_text("\n".join(["text\tlabel", *("\t".join(row) for row in rows)]), encoding="utf-8")
    options = {
        **TERNARY,
        **{"scratch": True, "targets": 1.0, "logits": 0.0, "hidden": 0.0, "attention": 0.0},
        **{"steps": 40, "strength_steps": 20, "learning_rate": 3e-3, "batch": 16},
    }
    _, figures = trained(model, tmp_path, str(table), [], **options)
    record = figures["training"]["quantize"]
    assert record["best"]["loss"] < 0.8 * record["held_out"][0]["loss"]
    assert set(record["held_out"][0]) == {"step", "loss", "targets"}
    table.write_text("text\tlabel\nthe sun\tmaybe\nthe river\tno\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="the label 'maybe' is none of no, yes"):
        Quantize(**{**TRAINED, "data": str(table), **options}).check(model)


def test_data_of_which_nothing_can_be_held_out_are_refused(folder: Path) -> None:
    """Before any work: one text is not trained with and judged by."""
    path = folder / "one.jsonl"
    path.write_text(json.dumps({"text": "the river was cold"}), encoding="utf-8")
    with pytest.raises(ConfigError, match="none could be held out: give more data"):
        Quantize(**{**TRAINED, "data": str(path), **W4A4}).check(model_of(folder, "encoder"))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (
            "pair",
            {"data": "everyday"},
            "everyday: expected sources and targets, which .* learns from, but it holds text",
        ),
        ("encoder", {"targets": 1.0}, "the data hold no targets for feature-extraction, which .* is for: leave it out"),
        ("encoder", {"learning_rate": 2.0}, "quantize.learning_rate: expected a number above 0 and up to 1, got 2.0"),
        ("encoder", {"data": "prose-eval"}, "prose-eval is the evaluation set"),
        ("encoder", {"data": "nowhere.txt"}, "nowhere.txt can't be read"),
        ("gpt2", {}, "gpt2 has no linear layer whose activations could be rounded token by token"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    folder: Path, data: str, kind: str, options: dict[str, Any], words: str
) -> None:
    stage = Quantize(**{**TRAINED, "data": data, **W4A4, **options})
    with pytest.raises(ConfigError, match=words):
        stage.check(model_of(folder, kind))
