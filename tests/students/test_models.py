"""The students as modules: the same numbers as transformers' family, caches, masks, sizes, files."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from edgepipe.errors import ConfigError
from edgepipe.graph.reference import framework_config
from edgepipe.students.config import (
    StudentConfig,
    parameters,
    read_student,
    student_weights,
    twin,
    with_layers,
    without_windows,
)
from edgepipe.students.files import load_student, make_student, save_student
from edgepipe.students.models import Decoder, Encoder, EncoderDecoder
from tests.decoders import DECODERS
from tests.tiny_models import BASE

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 200,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
SHALLOW = with_layers(LLAMA, [0])
PAIR = StudentConfig(kind="encoder-decoder", encoder=LLAMA, decoder=SHALLOW)
PLAIN = StudentConfig(kind="encoder", encoder=LLAMA)
# every way in which an encoder-decoder may differ
PAIRS: dict[str, StudentConfig] = {
    "shared": PAIR,
    "untied": dataclasses.replace(PAIR, tie_embeddings=False),
    "plain gelu": dataclasses.replace(
        PAIR,
        gated=False,
        encoder={**LLAMA, "hidden_act": "gelu", "mlp_bias": True, "attention_bias": True},
        decoder={**SHALLOW, "hidden_act": "gelu", "mlp_bias": True, "attention_bias": True},
    ),
    "causal encoder": dataclasses.replace(PAIR, causal_encoder=True),
    "centred": dataclasses.replace(PAIR, centred_positions=True),
    "narrow decoder": dataclasses.replace(
        PAIR, decoder={**SHALLOW, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    ),
    "narrow untied": dataclasses.replace(PAIR, decoder={**SHALLOW, "hidden_size": 32}, tie_embeddings=False),
    "qwen3": dataclasses.replace(
        PAIR, encoder={**LLAMA, "model_type": "qwen3"}, decoder={**SHALLOW, "model_type": "qwen3"}
    ),
    "gemma": dataclasses.replace(
        PAIR,
        encoder={**LLAMA, "model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"},
        decoder={**SHALLOW, "model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"},
    ),
}


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return seeded token ids."""
    return torch.randint(0, LLAMA["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def padded(lengths: list[int], longest: int) -> torch.Tensor:
    """Return a mask [rows, longest] of right-padded rows."""
    return (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()


def pair(config: StudentConfig, seed: int = 0) -> EncoderDecoder:
    """Return a seeded encoder-decoder whose norms and biases are no neutral elements."""
    student = make_student(config, seed=seed)
    assert isinstance(student, EncoderDecoder)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for value in student.parameters():
            value.add_(torch.randn(value.shape, generator=generator) * 0.1)
    return student.eval()


@pytest.mark.parametrize("kind", [k for k in DECODERS if "windows" not in k and "window" not in k])
def test_decoder_is_transformers(kind: str) -> None:
    """The blocks compute what transformers' own classes compute from the same weights, for the whole family."""
    import transformers

    model_type, changes = DECODERS[kind]
    config = {"model_type": model_type, "vocab_size": 97, **BASE, **changes}
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(framework_config(config)).eval()
    with torch.no_grad():
        for value in theirs.parameters():
            value.add_(torch.randn_like(value) * 0.05)
    ours = Decoder({**config, "tie_word_embeddings": theirs.config.tie_word_embeddings}).eval()
    given = {n: v for n, v in theirs.state_dict().items() if n != "lm_head.weight" or not ours.tied}
    ours.load_state_dict(given)
    tokens = torch.randint(0, config["vocab_size"], (2, 9))
    with torch.inference_mode():
        expected = theirs(tokens, use_cache=False).logits
        got = ours(tokens)[0].logits
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", PAIRS)
def test_cached_is_uncached(kind: str) -> None:
    """Decoding in pieces over a cache gives the logits of one run over the whole target, padded sources included."""
    student = pair(PAIRS[kind])
    source, mask, target = ids(2, 11), padded([11, 7], 11), ids(2, 6, seed=1)
    with torch.inference_mode():
        whole = student(source, mask, target).logits
        state = student.start(source, mask)
        pieces = [student.step(state, target[:, a:b])[0] for a, b in ((0, 2), (2, 5), (5, 6))]
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", PAIRS)
def test_padding_changes_nothing(kind: str) -> None:
    """A source gives the same logits alone and padded in a batch."""
    student = pair(PAIRS[kind])
    source, target = ids(2, 11), ids(2, 4, seed=1)
    with torch.inference_mode():
        batch = student(source, padded([11, 7], 11), target).logits
        alone = student(source[1:, :7], padded([7], 7), target[1:]).logits
    assert torch.allclose(batch[1:], alone, atol=1e-5, rtol=1e-5)


def test_encoder_sees_both_ways() -> None:
    """A token at the end changes the first state, unless the encoder keeps its causal mask."""
    for causal in (False, True):
        student = pair(dataclasses.replace(PAIR, causal_encoder=causal))
        source = ids(1, 8)
        other = source.clone()
        other[0, -1] = (other[0, -1] + 1) % 200
        with torch.inference_mode():
            first, second = (student.encode(s, padded([8], 8))[0][0, 0] for s in (source, other))
        assert torch.equal(first, second) == causal


def test_centred_positions_rotate_alike() -> None:
    """Rotary attention sees distances only: centred positions give the same states, to rounding."""
    usual, centred = pair(PAIR), pair(PAIRS["centred"])
    source, mask = ids(2, 9), padded([9, 5], 9)
    with torch.inference_mode():
        states = [s.encode(source, mask)[0] * mask[..., None] for s in (usual, centred)]
    assert torch.allclose(*states, atol=1e-5)
    assert centred.config.centred_positions


@pytest.mark.parametrize("kind", PAIRS)
def test_weights_are_listed(kind: str) -> None:
    """The list of names and shapes is the module's own, so that parameters can be counted without one."""
    student = pair(PAIRS[kind])
    assert {n: tuple(v.shape) for n, v in student.state_dict().items()} == student_weights(PAIRS[kind])
    assert parameters(PAIRS[kind]) == sum(p.numel() for p in student.parameters())


@pytest.mark.parametrize("changes", [{}, {"labels": ("no", "yes")}, {"pooling": "latent", "latents": 6}])
def test_encoder_weights_are_listed(changes: dict[str, Any]) -> None:
    """The same for encoders and their heads."""
    config = dataclasses.replace(PLAIN, latent_heads=4, **changes)
    student = make_student(config)
    assert {n: tuple(v.shape) for n, v in student.state_dict().items()} == student_weights(config)


@pytest.mark.parametrize("pooling", ["mean", "last", "cls", "max", "latent"])
@pytest.mark.parametrize("labels", [(), ("no", "maybe", "yes")])
def test_encoder_heads(pooling: str, labels: tuple[str, ...]) -> None:
    """An embedding has length 1, classes have a logit each, and padding moves neither."""
    config = dataclasses.replace(PLAIN, pooling=pooling, labels=labels, latents=5, latent_heads=4)
    student = make_student(config).eval()
    assert isinstance(student, Encoder)
    source = ids(3, 9)
    with torch.inference_mode():
        batch = student(source, padded([9, 4, 9], 9))
        alone = student(source[1:2, :4], padded([4], 4))
    assert batch.shape == (3, len(labels) or LLAMA["hidden_size"])
    assert torch.allclose(batch[1:2], alone, atol=1e-5)
    if not labels:
        assert torch.allclose(batch.norm(dim=-1), torch.ones(3), atol=1e-5)


@pytest.mark.parametrize("kind", PAIRS)
def test_files(kind: str, tmp_path: Path) -> None:
    """A saved student comes back with the same config, weights and numbers."""
    student = pair(PAIRS[kind])
    save_student(student, tmp_path, {"tokenizer.json": b"{}"})
    back = load_student(tmp_path)
    assert isinstance(back, EncoderDecoder)
    assert back.config == student.config == read_student(student.config.to_json())
    for name, value in student.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


def test_files_of_a_decoder(tmp_path: Path) -> None:
    """A decoder student is read by transformers as it is."""
    import transformers

    student = make_student(LLAMA, seed=3).eval()
    assert isinstance(student, Decoder)
    save_student(student, tmp_path, {})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = ids(1, 7)
    with torch.inference_mode():
        assert torch.allclose(theirs(tokens).logits, student(tokens)[0].logits, atol=1e-5)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    """A config that speaks of other weights is refused by the weight's name."""
    from edgepipe.store import read_json, write_json

    save_student(pair(PAIR), tmp_path, {})
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", {**config, "tie_embeddings": False})
    with pytest.raises(ConfigError, match=r"disagree about lm_head\.weight"):
        load_student(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_twin_has_as_many_parameters(tied: bool) -> None:
    """A decoder-only twin comes as close as whole layers allow."""
    wide = {**LLAMA, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    wide |= {"head_dim": 64, "vocab_size": 8192}
    config = StudentConfig(
        kind="encoder-decoder",
        encoder=with_layers(wide, range(8)),
        decoder=with_layers(wide, range(4)),
        tie_embeddings=tied,
    )
    other = twin(config)
    count = sum(p.numel() for p in make_student(other).parameters())
    assert math.isclose(count, parameters(config), rel_tol=0.05)
    assert other["num_hidden_layers"] == 13


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"decoder": None}, "without a decoder"),
        ({"pooling": "middle"}, "pooling: expected one of mean, last"),
        ({"labels": ("one",)}, "at least two labels"),
        ({"pooling": "latent", "latent_heads": 7}, "7 latent heads don't divide the hidden size of 48"),
        ({"decoder": {**SHALLOW, "vocab_size": 100}}, "one vocabulary, not 200 and 100 tokens"),
    ],
)
def test_configs_that_contradict_themselves(changes: dict[str, Any], sentence: str) -> None:
    """Each is one sentence."""
    with pytest.raises(ConfigError, match=sentence):
        dataclasses.replace(PAIR, **changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "llama"}, "expected a student"),
        ({"encoder": None}, "a table 'encoder', but this one has None"),
        ({"causal_encoder": "yes"}, "causal_encoder is 'yes'; expected bool"),
    ],
)
def test_damaged_configs(changes: dict[str, Any], sentence: str) -> None:
    """What a config.json may say wrongly is named."""
    with pytest.raises(ConfigError, match=sentence):
        read_student({**PAIR.to_json(), **changes})


def test_windows_go() -> None:
    """A student of a model with sliding windows attends to everything."""
    stack = without_windows({**LLAMA, "model_type": "mistral", "sliding_window": 4})
    shape = dataclasses.replace(PAIR, encoder=stack, decoder=with_layers(stack, [1])).encoder_shape()
    assert shape.windows == (None, None)
