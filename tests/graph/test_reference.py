"""The streamed reference: transformers' own model, one module's weights at a time, gives what it gives when loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe.errors import ConfigError, ContractError
from edgepipe.graph.reference import framework_config, torch_logits
from edgepipe.weights import WeightStore
from tests.decoders import DECODERS, all_on, difference, module_logits, opened, random_ids, saved, watched


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the tiny models of this file."""
    return tmp_path_factory.mktemp("decoders")


@pytest.mark.parametrize("kind", DECODERS)
def test_streamed_equals_loaded(folder: Path, kind: str) -> None:
    model = opened(folder, kind)
    ids = random_ids(model, batch=2)
    expected = module_logits(saved(folder, kind), model.weights, ids)
    assert difference(torch_logits(model, ids), expected) < 1e-5


@pytest.mark.parametrize("grid", ["bfloat16", "4 bits", "8 bits minima"])
def test_stored_weights_are_decoded(folder: Path, grid: str) -> None:
    model = all_on(opened(folder, "llama tied"), grid)
    ids = random_ids(model)
    expected = module_logits(saved(folder, "llama tied"), model.weights, ids)
    assert difference(torch_logits(model, ids), expected) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "llama biases", "gemma"])
def test_no_more_than_one_module_has_weights(folder: Path, kind: str) -> None:
    """A matrix and its bias at most; every use reads anew, and nothing is left when it is over."""
    model = opened(folder, kind)
    store, held = watched(model.weights)
    logits = torch_logits(dataclasses.replace(model, weights=store), random_ids(model))
    assert held.most == (2 if "biases" in kind else 1)
    assert held.in_all == len(model.weights) + len(model.weights.aliases)
    assert held.now == 0
    assert np.isfinite(logits).all()


def test_a_weight_that_is_missing_is_named(folder: Path) -> None:
    model = opened(folder, "llama")
    without = {name: weight for name, weight in model.weights.items() if "layers.1.mlp.up_proj" not in name}
    lost = dataclasses.replace(model, weights=WeightStore(without))
    with pytest.raises(ContractError, match=r"no tensor named 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        torch_logits(lost, random_ids(model))


def test_defaults_are_filled_in() -> None:
    config = framework_config({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4})
    assert (config.head_dim, config.num_key_value_heads, config.rope_parameters["rope_type"]) == (16, 4, "default")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "no_such_model"},
        {"hidden_size": "wide"},
        {"hidden_size": 100, "num_attention_heads": 7},
        {"rms_norm_eps": [1]},
        {"rope_parameters": {"rope_type": "linear"}},
    ],
    ids=str,
)
def test_what_transformers_refuses_is_one_sentence(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^config.json was refused by transformers: \S") as caught:
        framework_config({"model_type": "llama", **changes})
    assert "\n" not in str(caught.value)
