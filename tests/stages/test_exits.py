"""The stage `exits`: what it trains, what it leaves alone, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgepipe.compress import compress
from edgepipe.errors import ConfigError, TargetError
from edgepipe.evaluate import evaluate
from edgepipe.graph.exits import exit_weights
from edgepipe.graph.shape import read_shape
from edgepipe.measuring.metrics import Evaluation
from edgepipe.recipe import resolve
from edgepipe.sources import open_model
from edgepipe.stages.exits import Exits
from edgepipe.training.decoder_exits import _gate, _least_squares
from tests.decoders import context
from tests.leaving import LAYERS, decoder, with_exits
from tests.listener import Silent

SMALL: dict[str, Any] = {"layers": (1, 3), "samples": 60, "tokens": 32, "batch": 64}


def test_it_adds_exits_and_leaves_the_model_alone(tmp_path: Path) -> None:
    """And the same seed gives the same exits."""
    model, notes = decoder(tmp_path, "llama grouped"), []
    made = Exits(**SMALL, steps=10)(model, context(tmp_path, notes))
    assert made.info.config == {**model.info.config, "exits": [1, 3]}
    own = {name: weight for name, weight in made.weights.items() if name.startswith("exits.")}
    wanted = exit_weights(read_shape(model.info.config, None), (1, 3))
    assert {name: weight.shape for name, weight in own.items()} == wanted
    assert set(made.weights) == {*model.weights, *wanted}
    for name in model.weights:
        assert np.array_equal(made.weights.float32(name), model.weights.float32(name))
    assert len([note for note in notes if "layers the likeliest token is that of all in" in note]) == 2
    again = Exits(**SMALL, steps=10)(model, context(tmp_path))
    for name in wanted:
        assert np.array_equal(made.weights.float32(name), again.weights.float32(name))


def test_training_brings_an_exit_nearer_to_all_layers(tmp_path: Path) -> None:
    figures: list[Any] = []
    ctx = dataclasses.replace(context(tmp_path), figures=figures.append)
    Exits(**SMALL, steps=200)(decoder(tmp_path, "llama grouped"), ctx)
    (record,) = (one["exits"] for one in figures)
    assert record["train_tokens"] + record["gate_tokens"] == 60 * 32
    for one in record["exits"]:
        assert one["losses"][-1] < 0.9 * one["losses"][0]
        assert one["told"] >= max(one["agrees"], 1 - one["agrees"]) - 0.02, "no worse than always saying the same"


def test_a_translator_finds_a_linear_change() -> None:
    rng = torch.Generator().manual_seed(0)
    states = torch.randn(400, 12, generator=rng)
    change, shift = torch.randn(12, 12, generator=rng), torch.randn(12, generator=rng)
    layer = _least_squares(states, states + states @ change.T + shift)
    assert torch.allclose(layer.weight, change, atol=0.1)
    assert torch.allclose(layer.bias, shift, atol=0.1)


def test_a_gate_learns_what_states_say() -> None:
    torch.manual_seed(0)
    states = torch.randn(6000, 12) * torch.linspace(0.1, 3, 12)
    right = states[:, 0] > 0.02  # the smallest of them says it
    gate = _gate(states, right)
    told = ((gate(states) > 0) == right).float().mean()
    assert told > 0.85


def test_down_the_river_and_scored(tmp_path: Path, tiny_model_dir: Path) -> None:
    """In 4 bits; `eval` says how many layers tokens went through, and 1 is what nothing said is."""
    options: dict[str, object] = {**SMALL, "layers": [1], "steps": 5}
    settings = [("exits", name, value) for name, value in options.items()]
    recipe = resolve(target="cpu", settings=[*settings, ("export", "context", 128)], before=["exits"])
    assert [name for name, _ in recipe.stages] == ["exits", "quantize", "export", "compile", "measure"]
    recipe = dataclasses.replace(recipe, stages=recipe.stages[:-1])
    made = compress(str(tiny_model_dir), recipe, listener=Silent(), out=tmp_path / "bundle", runs=tmp_path / "runs")

    def scored(threshold: float | None) -> Any:
        options = Evaluation(metric="perplexity", tokens=60, window=30, exit_threshold=threshold)
        return evaluate(Path(made["bundle"]), "prose-eval", options, listener=Silent())

    early, whole, unsaid = scored(0), scored(1), scored(None)
    assert early["details"]["tokens_by_layers"] == {"1": 56, "2": 2}, "the first token of a window stays"
    assert early["details"]["mean_layers"] == (56 + 2 * 2) / 58
    assert whole["value"] == unsaid["value"] != early["value"]
    assert "mean_layers" not in whole["details"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"samples": 1}, "exits.samples: expected at least 2, got 1"),
        ({"steps": -1}, "exits.steps: expected at least 0, got -1"),
        ({"gate_data": 1.0}, "exits.gate_data: expected a share above 0 and below 1, got 1.0"),
        ({"learning_rate": 0.0}, "exits.learning_rate: expected above 0 and up to 1, got 0.0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Exits(**{"layers": (1,), **options})


@pytest.mark.parametrize("layers", [(0, 1), (2, 1), (1, 1), (LAYERS,)])
def test_exits_that_are_not_between_layers_are_refused(tmp_path: Path, layers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="exits: expected growing numbers of layers from 1 to below all 4"):
        Exits(layers=layers).check(decoder(tmp_path, "llama"))


def test_models_that_cannot_have_exits_are_refused(tmp_path: Path, family_dir: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"exits\.layers: expected layers after which tokens may leave, got none"):
        Exits().check(decoder(tmp_path, "llama"))
    with pytest.raises(ConfigError, match="has exits already: leave the stage out"):
        Exits(layers=(1,)).check(with_exits(decoder(tmp_path, "llama")))
    for family in ("gpt2", "bert"):
        with pytest.raises(ConfigError, match="expected a decoder of the Llama family"):
            Exits(layers=(1,)).check(open_model(str(family_dir(family))))


@pytest.mark.parametrize(
    ("stages", "settings", "sentence"),
    [
        ("exits export compile", [("compile", "engine", "tvm")], "runs on onnxruntime, and the recipe asks for tvm"),
        ("exits export compile", [("compile", "cache_dtype", "int8")], "fills in keys and values as floats"),
        ("exits prune export compile", [], "prune: the model has exits"),
        (
            "exits quantize export compile",
            [("quantize", "bits", 8), ("quantize", "activations", "static")],
            "quantize.activations=static: the model has exits",
        ),
    ],
)
def test_what_does_not_go_with_exits_is_refused_before_any_work(
    tmp_path: Path, tiny_model_dir: Path, stages: str, settings: list[Any], sentence: str
) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(f"stages = {stages.split()}\n", encoding="utf-8")
    recipe = resolve(target="cpu", file=file, settings=[("exits", "layers", [1]), *settings])
    with pytest.raises((ConfigError, TargetError), match=sentence):
        compress(str(tiny_model_dir), recipe, listener=Silent(), out=tmp_path / "bundle", runs=tmp_path / "runs")
    assert not any((tmp_path / "runs").rglob("*-exits"))
