"""The family's builder: each member's graph computes transformers' logits; what it cannot express is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers

from edgepipe.artifacts import TorchModel
from edgepipe.errors import ConfigError
from edgepipe.graph.evaluate import prompt_logits
from edgepipe.graph.llama import check_weights, expected_weights
from edgepipe.graph.shape import VARIANTS, read_shape, rotary_frequencies
from edgepipe.stages.export import Export
from edgepipe.weights import WeightStore
from tests.decoders import (
    DECODERS,
    all_on,
    difference,
    exported,
    mixed,
    module_logits,
    opened,
    random_ids,
    saved,
    stored,
)
from tests.tiny_models import tiny_config

TOLERANCE = 1e-5  # of the largest logit: float32 rounding through two layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the tiny models of this file."""
    return tmp_path_factory.mktemp("decoders")


def test_the_table_of_models_has_every_variant() -> None:
    assert {model_type for model_type, _ in DECODERS.values()} == set(VARIANTS)


@pytest.mark.parametrize("kind", DECODERS)
def test_logits_are_transformers(folder: Path, kind: str) -> None:
    model = opened(folder, kind)
    ids = random_ids(model, batch=2)
    expected = module_logits(saved(folder, kind), model.weights, ids)
    got = prompt_logits(exported(model), ids)
    assert np.std(expected, axis=1).min() > 0.01  # the logits depend on the tokens before
    assert difference(got, expected) < TOLERANCE


@pytest.mark.parametrize("kind", DECODERS)
def test_expected_weights_are_transformers_parameters(kind: str) -> None:
    model_type, changes = DECODERS[kind]
    config = tiny_config(model_type, **changes)
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(config)
    theirs = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    tied = bool(config.tie_word_embeddings)
    shape = read_shape(config.to_dict(), 64)
    assert expected_weights(shape, tied=tied) == theirs


@pytest.mark.parametrize("kind", ["llama biases", "qwen2 tied", "qwen3 windows", "gemma"])
@pytest.mark.parametrize("grid", ["4 bits", "8 bits zero points", "mixed"])
def test_quantized_weights(folder: Path, kind: str, grid: str) -> None:
    """The graph multiplies by what the codes mean, whatever grid each weight lies on."""
    original = opened(folder, kind)
    model = mixed(original) if grid == "mixed" else all_on(original, grid)
    ids = random_ids(model)
    expected = module_logits(saved(folder, kind), model.weights, ids)
    assert difference(expected, module_logits(saved(folder, kind), original.weights, ids)) > 100 * TOLERANCE
    assert difference(prompt_logits(exported(model), ids), expected) < TOLERANCE


@pytest.mark.parametrize("kind", ["mistral window", "qwen2 windows", "smollm3 windows"])
def test_a_window_hides_what_lies_before_it(folder: Path, kind: str) -> None:
    """Without the window the same weights give other logits, from the first token that the window leaves out."""
    model = opened(folder, kind)
    ids = random_ids(model)
    window = model.info.config["sliding_window"]
    got = prompt_logits(exported(model), ids)
    open_config = {**model.info.config, "sliding_window": 256}
    whole = prompt_logits(exported(with_config(model, open_config)), ids)
    np.testing.assert_allclose(got[:, :window], whole[:, :window], atol=1e-5)
    assert np.abs(got[:, window] - whole[:, window]).max() > 0.01


def test_a_window_as_long_as_the_context_is_none(folder: Path) -> None:
    config = opened(folder, "mistral window").info.config
    assert read_shape({**config, "sliding_window": 64}, 64).windows == (None, None)
    assert read_shape({**config, "sliding_window": 63}, 64).windows == (63, 63)
    assert read_shape(opened(folder, "qwen2 windows").info.config, 64).windows == (None, 5)


def test_no_rope_layers_are_followed(folder: Path) -> None:
    config = opened(folder, "smollm3").info.config
    assert read_shape(config, 64).ropes == (True, False)
    assert read_shape({**config, "no_rope_layers": [1, 1]}, 64).ropes == (True, True)


def test_the_graph_is_as_its_docstring_says(folder: Path) -> None:
    model = exported(opened(folder, "llama grouped"))
    graph = onnx.load_model_from_string(model.graphs["decoder"]).graph
    inputs = {value.name: dims(value) for value in graph.input if not value.name.startswith("weight/")}
    assert inputs == {
        "input_ids": ["batch", "sequence"],
        "position_ids": ["batch", "sequence"],
        "logits_positions": ["batch", "wanted"],
        **{f"past_{kind}.{i}": ["batch", 2, "past", 16] for kind in ("key", "value") for i in range(2)},
    }
    outputs = {value.name: dims(value) for value in graph.output}
    assert outputs == {
        "logits": ["batch", "wanted", 384],
        **{f"present_{kind}.{i}": ["batch", 2, "total", 16] for kind in ("key", "value") for i in range(2)},
    }
    embedded = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer]
    assert max(array.size for array in embedded) <= 16 // 2  # the inverse frequencies of one head


def dims(value: onnx.ValueInfoProto) -> list[str | int]:
    """Return the dimensions of a graph's input or output."""
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("kind", ["llama", "llama rope linear", "llama rope llama3", "llama rope yarn", "gemma"])
def test_rotary_frequencies_are_the_modules(kind: str) -> None:
    model_type, changes = DECODERS[kind]
    config = tiny_config(model_type, **changes)
    module = transformers.AutoModelForCausalLM.from_config(config).model.rotary_emb
    inverse, factor = rotary_frequencies(config.to_dict(), read_shape(config.to_dict(), 64))
    np.testing.assert_array_equal(inverse, module.inv_freq.numpy())
    assert inverse.dtype == np.float32
    assert factor == module.attention_scaling


def with_config(model: TorchModel, config: dict[str, Any]) -> TorchModel:
    """Return a model whose config.json says something else."""
    return dataclasses.replace(model, info=dataclasses.replace(model.info, config=config))


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("llama", {"model_type": "nothing"}, "Unrecognized model identifier"),
        ("llama", {"model_type": "vit"}, "no class for text-generation of model_type 'vit'"),
        ("llama", {"model_type": ["llama"]}, r"model_type is \['llama'\]; expected the name of a family"),
        ("llama", {"model_type": None}, "model_type is None; expected the name of a family"),
        ("llama", {"max_position_embeddings": 63}, "--context 64 is more than the 63 positions"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic' is not"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
                                 "long_factor": [1.0] * 8, "original_max_position_embeddings": 64}},
            "'longrope' is not supported",
        ),
        ("llama", {"hidden_act": "relu"}, "activation 'relu' is not supported; known: silu"),
        ("llama", {"num_key_value_heads": 3}, "7 attention heads cannot share 3 key/value heads"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads is 0; expected a whole number"),
        ("llama", {"num_key_value_heads": -1}, "num_key_value_heads is -1; expected"),
        ("llama", {"hidden_size": "112"}, "hidden_size is '112'; expected"),
        ("llama", {"hidden_size": 112.0}, "hidden_size is 112.0; expected"),
        ("llama", {"head_dim": 0}, "head_dim is 0; expected"),
        ("llama", {"vocab_size": True}, "vocab_size is True; expected"),
        ("llama", {"num_hidden_layers": 10**9}, "from 1 to 10,000"),
        ("llama", {"rms_norm_eps": "small"}, "was refused by transformers: "),
        ("qwen2", {"hidden_size": 3}, "7 attention heads are more than the hidden size of 3"),
        ("granite", {"logits_scaling": 0}, "logits_scaling is 0"),
        ("smollm3", {"no_rope_layers": [1]}, "2 layers, but its no_rope_layers speaks of 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_configs_that_are_refused(folder: Path, kind: str, changes: dict[str, Any], words: str) -> None:
    """One sentence, before any work: the check reads no weight."""
    model = opened(folder, kind)
    with pytest.raises(ConfigError, match=words) as caught:
        Export(context=64).check(with_config(model, {**model.info.config, **changes}))
    assert "\n" not in str(caught.value)


def test_the_context_without_a_wish(folder: Path) -> None:
    config = opened(folder, "llama").info.config
    assert read_shape(config, None).context == 256
    assert read_shape(config, None, usual_context=100).context == 100
    assert read_shape(config, 256).context == 256


def edited(model: TorchModel, *, without: str = "", **more: np.ndarray) -> WeightStore:
    """Return a model's weights without one, and with others (two underscores stand for a dot)."""
    added = {name.replace("__", "."): value for name, value in more.items()}
    kept = {name: weight for name, weight in model.weights.items() if name != without}
    return WeightStore({**kept, **{n: stored(n, v) for n, v in added.items()}}, model.weights.aliases)


def test_weights_that_contradict_the_config(folder: Path) -> None:
    model = opened(folder, "llama")
    shape = read_shape(model.info.config, 64)
    check_weights(model.weights, shape)
    missing = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ConfigError, match=r"promises model\.layers\.1\.mlp\.up_proj\.weight \[100, 112\], but the wei"):
        check_weights(edited(model, without=missing), shape)
    misshapen = edited(model, lm_head__weight=np.zeros((384, 100), np.float32))
    with pytest.raises(ConfigError, match=r"lm_head\.weight \[384, 112\], but the weights hold \[384, 100\]"):
        check_weights(misshapen, shape)
    bias = {"model__layers__0__self_attn__q_proj__bias": np.zeros(112, np.float32)}
    with pytest.raises(ConfigError, match=r"hold model\.layers\.0\.self_attn\.q_proj\.bias, which a model of type 'll"):
        check_weights(edited(model, **bias), shape)
    two = edited(model, **bias, another=np.zeros(1, np.float32))
    with pytest.raises(ConfigError, match="hold another and others, which"):
        check_weights(two, shape)


def test_an_untied_head_must_be_there(folder: Path) -> None:
    tied, untied = opened(folder, "llama tied"), opened(folder, "llama")
    shape = read_shape(tied.info.config, 64)
    check_weights(tied.weights, shape)
    assert tied.weights.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    with pytest.raises(ConfigError, match=r"promises lm_head\.weight"):
        check_weights(edited(untied, without="lm_head.weight"), shape)
