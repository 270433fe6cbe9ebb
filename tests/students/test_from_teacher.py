"""Students made of a teacher: which layers and channels, exact where nothing is lost, shapes where something is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgepipe.artifacts import TorchModel
from edgepipe.errors import ConfigError
from edgepipe.graph.reference import torch_logits
from edgepipe.graph.shape import read_shape
from edgepipe.students.config import StudentConfig, student_weights
from edgepipe.students.files import bare_student, make_student
from edgepipe.students.from_teacher import (
    StudentPlan,
    choose_channels,
    config_of,
    plan_student,
    spread,
    student_values,
)
from edgepipe.students.models import Decoder, EncoderDecoder, Student
from tests.decoders import DECODERS, all_on, opened, stored


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the tiny models of this file."""
    return tmp_path_factory.mktemp("decoders")


FULL = {"encoder_from": (0, 1), "decoder_from": (0, 1)}
WHOLE = [k for k in DECODERS if "window" not in k]


def made(teacher: TorchModel, plan: StudentPlan) -> Student:
    """Return the student a plan makes, in evaluation mode; what the teacher doesn't give stays random."""
    config = plan_student(config_of(teacher), plan)
    student = make_student(config)
    values = student_values(teacher, plan, config)
    missing, extra = student.load_state_dict({n: torch.from_numpy(v) for n, v in values.items()}, strict=False)
    assert not extra
    assert plan.cross == "random" or not missing
    return student.eval()


@pytest.mark.parametrize(
    ("count", "layers", "expected"),
    [(1, 30, (0,)), (2, 30, (0, 29)), (4, 30, (0, 10, 19, 29)), (3, 3, (0, 1, 2)), (3, 5, (0, 2, 4))],
)
def test_layers_are_spread_evenly(count: int, layers: int, expected: tuple[int, ...]) -> None:
    """First and last layer are always among them."""
    assert spread(count, layers) == expected


def test_default_depths() -> None:
    """A teacher of 30 layers gives 8 + 4, an encoder or decoder 12."""
    config = {"model_type": "llama", "num_hidden_layers": 30, "tie_word_embeddings": True}
    pair = plan_student(config, StudentPlan(kind="encoder-decoder"))
    assert isinstance(pair, StudentConfig)
    assert pair.decoder is not None
    assert (pair.encoder["num_hidden_layers"], pair.decoder["num_hidden_layers"]) == (8, 4)
    encoder = plan_student(config, StudentPlan(kind="encoder"))
    assert isinstance(encoder, StudentConfig)
    assert encoder.encoder["num_hidden_layers"] == 12
    decoder = plan_student(config, StudentPlan(kind="decoder"))
    assert not isinstance(decoder, StudentConfig)
    assert decoder["num_hidden_layers"] == 12


@pytest.mark.parametrize("kind", WHOLE)
def test_all_layers_are_the_teacher(kind: str, folder: Path) -> None:
    """A decoder student with all of the teacher's layers and channels is the teacher."""
    teacher = opened(folder, kind)
    student = made(teacher, StudentPlan(kind="decoder", **FULL))
    assert isinstance(student, Decoder)
    tokens = np.random.default_rng(0).integers(0, 300, (1, 9))
    with torch.inference_mode():
        got = student(torch.from_numpy(tokens))[0].logits.numpy()
    expected = torch_logits(teacher, tokens)
    assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "granite biases", "smollm3"])
def test_causal_encoder_is_the_teacher(kind: str, folder: Path) -> None:
    """An encoder with the teacher's layers and its mask gives the teacher's states; without the mask, others."""
    teacher = opened(folder, kind)
    states = []
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 300, (1, 9)))
    decoder = made(teacher, StudentPlan(kind="decoder", **FULL))
    assert isinstance(decoder, Decoder)
    with torch.inference_mode():
        expected = decoder(tokens)[0].decoder_states[-1]
        for causal in (True, False):
            pair = made(teacher, StudentPlan(kind="encoder-decoder", causal_encoder=causal, **FULL))
            assert isinstance(pair, EncoderDecoder)
            states.append(pair.encode(tokens, torch.ones_like(tokens))[1][-1])
    assert torch.allclose(states[0], expected, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(states[1], expected, atol=0.01 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["llama tied", "qwen2", "qwen3", "gemma"])
def test_cross_attention_is_copied_or_random(kind: str, folder: Path) -> None:
    """It starts as the layer's self-attention, norm included, or as what the student was made with."""
    teacher = opened(folder, kind)
    plan = StudentPlan(kind="encoder-decoder", encoder_from=(0,), decoder_from=(1,))
    state = made(teacher, plan).state_dict()
    crossed = {n: v for n, v in state.items() if "cross_attn" in n}
    assert len(crossed) >= 4
    for name, value in crossed.items():
        own = name.replace("cross_attn", "self_attn")
        assert torch.equal(value, state[own])
        source = own.replace("decoder.layers.0", "model.layers.1")
        assert np.array_equal(value.numpy(), teacher.weights.float32(source))
    layer = "decoder.layers.0."
    assert torch.equal(state[layer + "cross_attention_layernorm.weight"], state[layer + "input_layernorm.weight"])
    values = student_values(teacher, dataclasses.replace(plan, cross="random"), plan_student(config_of(teacher), plan))
    assert not any("cross" in name for name in values)


@pytest.mark.parametrize("kind", ["llama grouped", "llama biases", "qwen3", "gemma", "granite"])
def test_narrow_student_has_the_shapes_it_says(kind: str, folder: Path) -> None:
    """Every tensor of a narrower student fits, and runs."""
    teacher = opened(folder, kind)
    shape = read_shape(teacher.info.config, None)
    kv_heads = max(1, shape.kv_heads // 2)
    plan = StudentPlan(kind="encoder-decoder", hidden=48, ffn=40, kv_heads=kv_heads, encoder_layers=2, decoder_layers=1)
    config = plan_student(config_of(teacher), plan)
    assert isinstance(config, StudentConfig)
    values = student_values(teacher, plan, config)
    assert {n: v.shape for n, v in values.items()} == student_weights(config)
    student = bare_student(config)
    student.load_state_dict({n: torch.from_numpy(v) for n, v in values.items()})
    tokens = torch.randint(0, 300, (2, 5))
    assert isinstance(student, EncoderDecoder)
    assert torch.isfinite(student(tokens, torch.ones_like(tokens), tokens).logits).all()


def test_dead_channels_go_first(folder: Path) -> None:
    """Neurons, heads and residual channels that do nothing are the ones left out: the numbers stay the same."""
    teacher = opened(folder, "llama grouped")  # 6 heads of 16 over 2 key/value heads, width 96, FFN 100
    shape = read_shape(teacher.info.config, None)
    dead_neurons, dead_channels = [3, 50, 99], [0, 17, 95]
    for name in list(teacher.weights):
        value = teacher.weights.float32(name).copy()
        if name.endswith("down_proj.weight"):
            value[:, dead_neurons] = 0
        if name.endswith("o_proj.weight"):
            value[:, :48] = 0  # the first key/value head's three queries
        if name.endswith(("down_proj.weight", "o_proj.weight")):
            value[dead_channels] = 0
        elif value.ndim == 2:
            value[:, dead_channels] = 0 if value.shape[1] == 96 else value[:, dead_channels]
        if name.endswith(("q_proj.weight",)):
            value[:48] = 0
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            value[:16] = 0
        teacher = dataclasses.replace(teacher, weights=teacher.weights.replace({name: stored(name, value)}))
    plan = StudentPlan(kind="decoder", hidden=93, ffn=97, kv_heads=1, decoder_from=(0, 1))
    kept = choose_channels(teacher.weights, shape, plan, [0, 1])
    assert set(range(96)) - set(kept.hidden) == set(dead_channels)
    for layer in (0, 1):
        assert set(range(100)) - set(kept.ffn[layer]) == set(dead_neurons)
        assert list(kept.groups[layer]) == [1]
    tokens = np.random.default_rng(0).integers(0, 300, (1, 9))
    expected = torch_logits(teacher, tokens)
    narrow = dataclasses.replace(plan, hidden=0)  # a norm over fewer channels divides by another mean
    student = made(teacher, narrow)
    assert isinstance(student, Decoder)
    with torch.inference_mode():
        got = student(torch.from_numpy(tokens))[0].logits.numpy()
    assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()


def test_grids_are_read(folder: Path) -> None:
    """A teacher on a 4-bit grid, as a GGUF gives it, is decoded on the way."""
    teacher = all_on(opened(folder, "llama tied"), "4 bits minima")
    student = made(teacher, StudentPlan(kind="encoder-decoder", **FULL))
    name = "layers.0.mlp.up_proj.weight"
    assert np.array_equal(student.state_dict()[f"encoder.{name}"].numpy(), teacher.weights.float32(f"model.{name}"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"encoder_layers": 3}, "3 layers can't be made of a teacher's 2"),
        ({"encoder_from": (0, 2)}, "the encoder's layer 2 is none of the teacher's 0 to 1"),
        ({"encoder_from": (0, 1), "encoder_layers": 1}, "2 layers are named for the encoder, but it is to have 1"),
        ({"hidden": 113}, "hidden: a student of width 113 can't be made of a teacher's 112"),
    ],
)
def test_more_than_the_teacher_has(changes: dict[str, Any], sentence: str, folder: Path) -> None:
    """Each is one sentence."""
    with pytest.raises(ConfigError, match=sentence):
        plan_student(opened(folder, "llama").info.config, StudentPlan(kind="encoder-decoder", **changes))


def test_other_families_have_no_students() -> None:
    """The sentence names those that do."""
    with pytest.raises(ConfigError, match=r"a Llama-family teacher .*'gpt2'"):
        plan_student({"model_type": "gpt2"}, StudentPlan(kind="encoder"))
