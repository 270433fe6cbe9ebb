"""Encoders in an app: embeddings, classes and arrays agree with torch; padding and batches change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edgepipe.cli import main
from edgepipe.errors import ConfigError
from edgepipe.runtime import Encoder, load
from edgepipe.sources import open_model
from edgepipe.verify import verify_bundle
from tests.families import tiny_family

TEXTS = ["The river carried the timber down.", "Mill", "Every spring the water rose, and every spring somebody said."]
ROUNDING = 1e-5
GRID = 2e-2  # 8 bits in groups of 32, on embeddings of length 1


@pytest.fixture(scope="module")
def bert(family_bundle: Callable[[str], Path]) -> Encoder:
    """Load the 8-bit encoder."""
    model = load(family_bundle("bert"), threads=1)
    assert isinstance(model, Encoder)
    return model


@pytest.fixture(scope="module")
def classifier(family_bundle: Callable[[str], Path]) -> Encoder:
    """Load the 8-bit classifier of texts."""
    model = load(family_bundle("bert as classifier"), threads=1)
    assert isinstance(model, Encoder)
    return model


@pytest.fixture(scope="module")
def vit(family_bundle: Callable[[str], Path]) -> Encoder:
    """Load the 8-bit classifier of pictures."""
    model = load(family_bundle("vit as classifier"), threads=1)
    assert isinstance(model, Encoder)
    return model


def test_embeddings_are_torch_s(bert: Encoder, family_dir: Callable[[str], Path]) -> None:
    """The mean over a text's own tokens, of length 1, from the original weights: 8 bits are all that differs."""
    import torch
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(family_dir("bert"))
    module = tiny_family("bert")
    got = bert.embed(TEXTS)
    assert got.shape == (3, 48) and got.dtype == np.float32
    for text, found in zip(TEXTS, got, strict=True):
        given = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            states = module(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state[0]
        expected = states.mean(0) / states.mean(0).norm()
        assert np.abs(found - expected.numpy()).max() < GRID
    assert np.linalg.norm(got, axis=1) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_neither_padding_nor_batches_change_an_embedding(bert: Encoder, batch_size: int) -> None:
    """Each text gets its own embedding back, whoever stands beside it and in whatever order."""
    alone = np.stack([bert.embed(text) for text in TEXTS])
    assert alone.shape == (3, 48)
    order = [2, 0, 1, 0]
    got = bert.embed([TEXTS[i] for i in order], batch_size=batch_size)
    assert np.abs(got - alone[order]).max() < ROUNDING


def test_a_long_text_is_cut_at_the_context(bert: Encoder) -> None:
    """As sentence encoders are used; the last token allowed is the separator."""
    assert bert.context == 128
    assert bert.embed("river " * 1000).shape == (48,)
    ids = bert.feeds(["river " * 1000])["input_ids"]
    assert ids.shape == (1, 128) and ids[0, -1] == 1


def test_the_second_text_of_a_pair_has_its_own_type(bert: Encoder) -> None:
    """Types 0 and 1, as the tokenizer's template says."""
    feeds = bert.feeds([("A river", "A mill")])
    types = feeds["token_type_ids"][0].tolist()
    first = len(bert.feeds(["A river"])["input_ids"][0])
    assert types == [0] * first + [1] * (len(types) - first) and 1 in types
    one, other = bert.embed([("A river", "A mill"), ("A mill", "A river")])
    assert np.abs(one - other).max() > ROUNDING
    assert np.abs(bert.embed(("A river", "A mill")) - one).max() < ROUNDING


def test_logits_are_torch_s(classifier: Encoder, family_dir: Callable[[str], Path]) -> None:
    """Through text and through arrays; labels as the config names them."""
    import torch

    module = tiny_family("bert as classifier")
    feeds = classifier.feeds(TEXTS)
    with torch.inference_mode():
        expected = module(**{name: torch.from_numpy(value) for name, value in feeds.items()}).logits.numpy()
    got = classifier.classify(TEXTS)
    assert np.abs(got - expected).max() < GRID * np.abs(expected).max() + GRID
    assert np.abs(classifier.run(feeds)["logits"] - got).max() < ROUNDING
    assert classifier.classify("Mill").shape == (3,)
    assert classifier.labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_pictures_go_in_as_arrays(vit: Encoder) -> None:
    """The config's size, any number of them."""
    import torch

    pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    with torch.inference_mode():
        expected = tiny_family("vit as classifier")(pixel_values=torch.from_numpy(pixels)).logits.numpy()
    got = vit.run({"pixel_values": pixels})["logits"]
    assert np.abs(got - expected).max() < 2 * GRID * np.abs(expected).max()
    assert vit.inputs == {"pixel_values": ("float32", ("batch", 3, 32, 32))}
    assert vit.context is None and vit.tokenizer is None
    assert vit.manifest["tokenizer"] is None and vit.manifest["preprocessor"] == "preprocessor_config.json"


PIXELS = np.zeros((1, 3, 32, 32), np.float32)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({}, "takes pixel_values; pixel_values is missing or one too many"),
        ({"pixel_values": PIXELS, "mask": PIXELS}, "mask is missing or one too many"),
        ({"pixel_values": PIXELS.astype(np.float64)}, r"should be float32 \[batch, 3, 32, 32\], but is float64"),
        ({"pixel_values": PIXELS[0]}, r"but is float32 \[3, 32, 32\]"),
        ({"pixel_values": PIXELS[:, :, :31]}, r"but is float32 \[1, 3, 31, 32\]"),
    ],
)
def test_wrong_arrays_are_refused(vit: Encoder, inputs: dict[str, np.ndarray], sentence: str) -> None:
    """By name, type and shape, before the engine sees them."""
    with pytest.raises(ConfigError, match=sentence):
        vit.run(inputs)


def test_axes_of_one_name_must_agree(classifier: Encoder) -> None:
    """Ids and mask of other lengths than each other."""
    feeds = classifier.feeds(TEXTS)
    with pytest.raises(ConfigError, match=r"should be int64 \[batch, sequence\]"):
        classifier.run({**feeds, "attention_mask": feeds["attention_mask"][:, 1:]})


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda one, _two, _three: one.classify("x"), "is for feature-extraction: it classifies no texts"),
        (lambda _one, two, _three: two.embed("x"), "is for text-classification: it gives no embeddings of texts"),
        (lambda _one, _two, three: three.embed("x"), "is for image-classification: it gives no embeddings of texts"),
        (lambda _one, _two, three: three.feeds(["x"]), "reads no text: give `run` its arrays, pixel_values"),
        (lambda one, _two, _three: one.embed([]), "expected a text or a list of them"),
        (lambda one, _two, _three: one.embed(7), "expected a text or a list of them, got int"),
        (lambda one, _two, _three: one.embed(["x", ("y", "z")]), "a list of texts, or a list of pairs"),
        (lambda one, _two, _three: one.embed("x", batch_size=0), "batch_size must be a whole number of at least 1"),
        (lambda one, _two, _three: one.embed("x \ud800"), "cannot be turned into tokens"),
    ],
)
def test_wrong_calls_are_refused(
    call: Callable[..., object], sentence: str, bert: Encoder, classifier: Encoder, vit: Encoder
) -> None:
    """One sentence each."""
    with pytest.raises(ConfigError, match=sentence):
        call(bert, classifier, vit)


def test_a_text_without_tokens_is_refused(family_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    """A tokenizer that adds no special tokens makes nothing of an empty text: there is no mean of no tokens."""
    import shutil

    bundle = Path(shutil.copytree(family_bundle("bert"), tmp_path / "bundle"))
    tokenizer = json.loads((bundle / "tokenizer.json").read_text(encoding="utf-8"))
    content = json.dumps({**tokenizer, "post_processor": None}).encode()
    (bundle / "tokenizer.json").write_bytes(content)
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"]["tokenizer.json"]["bytes"] = len(content)
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    encoder = load(bundle)
    assert isinstance(encoder, Encoder)
    with pytest.raises(ConfigError, match="text 2 of 2 has no tokens"):
        encoder.embed(["river", ""])


@pytest.mark.parametrize("name", ["bert", "bert as classifier", "vit as classifier"])
def test_every_kind_of_bundle_is_verified(name: str, family_bundle: Callable[[str], Path]) -> None:
    """Hashes, sizes and graphs, with a tokenizer or without; test_growing.py has those with a cache."""
    checks = verify_bundle(family_bundle(name))["checks"]
    assert [check for check in checks if check["ok"] is not True] == []


def run(*words: str | Path) -> Any:
    """Run the command line."""
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_command_prints_an_embedding(family_bundle: Callable[[str], Path], bert: Encoder) -> None:
    """As JSON on stdout."""
    result = run("run", family_bundle("bert"), TEXTS[0])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["embedding"] == pytest.approx(bert.embed(TEXTS[0]).tolist(), abs=ROUNDING)


def test_the_command_prints_probabilities(family_bundle: Callable[[str], Path], classifier: Encoder) -> None:
    """Of every label, summing to 1."""
    result = run("run", family_bundle("bert as classifier"), TEXTS[0])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["labels"]
    logits = classifier.classify(TEXTS[0]).astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum()
    assert list(found) == list(classifier.labels)
    assert list(found.values()) == pytest.approx(expected.tolist(), rel=1e-4)


def test_the_command_says_what_a_model_of_pictures_cannot(family_bundle: Callable[[str], Path]) -> None:
    """Exit code 2 and a sentence."""
    result = run("run", family_bundle("vit as classifier"), "a river")
    assert result.exit_code == 2
    assert "is for image-classification: it gives no embeddings of texts" in result.stderr


def test_a_bundle_s_facts_are_the_source_s(bert: Encoder, family_dir: Callable[[str], Path]) -> None:
    """Parameters that no graph reads (the pooler) are neither shipped nor counted."""
    source = open_model(str(family_dir("bert")))
    dropped = sum(source.weights[name].size for name in source.weights if name.startswith("pooler."))
    assert dropped > 0
    assert bert.manifest["weights"]["parameters"] == source.weights.parameters - dropped
