"""A student's graphs as exported: torch's numbers for every kind of student; what contradicts itself is refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgepipe.artifacts import TorchModel
from edgepipe.errors import ConfigError, ContractError
from edgepipe.graph import students
from edgepipe.graph.evaluate import evaluate, logits_in_pieces
from edgepipe.graph.parts import padding
from edgepipe.inspect import inspect_model
from edgepipe.sources import open_model
from edgepipe.stages.export import Export
from edgepipe.students.config import StudentConfig, parameters
from tests.decoders import context, stored
from tests.students.test_models import PAIR, PAIRS, PLAIN
from tests.students.tiny import VOCABULARY, save_tiny_student, with_vocabulary

TOLERANCE = 1e-5  # of the largest output: float32 rounding
# every way in which an encoder student may differ
ENCODERS: dict[str, StudentConfig] = {
    **{name: dataclasses.replace(PLAIN, pooling=name) for name in ("mean", "last", "cls", "max")},
    "latent": dataclasses.replace(PLAIN, pooling="latent", latents=5, latent_heads=4),
    "any length": dataclasses.replace(PLAIN, normalize=False),
    "causal": dataclasses.replace(PLAIN, causal_encoder=True, pooling="last"),
    "encoder centred": dataclasses.replace(PLAIN, centred_positions=True),
    "classes": dataclasses.replace(PLAIN, labels=("no", "maybe", "yes")),
    "classes over latents": dataclasses.replace(
        PLAIN, labels=("no", "yes"), pooling="latent", latents=7, latent_heads=2
    ),
    "gelu": dataclasses.replace(PLAIN, gated=False, encoder={**PLAIN.encoder, "hidden_act": "gelu", "mlp_bias": True}),
    "encoder qwen3": dataclasses.replace(PLAIN, encoder={**PLAIN.encoder, "model_type": "qwen3"}),
}


def opened(path: Path, config: StudentConfig, **changes: Any) -> TorchModel:
    """Save a tiny student and open it."""
    return open_model(str(save_tiny_student(path / "student", config, **changes)))


@pytest.mark.parametrize("config", [*PAIRS.values(), *ENCODERS.values()], ids=[*PAIRS, *ENCODERS])
def test_graphs_are_torch_s(config: StudentConfig, tmp_path: Path) -> None:
    """Padded sources, a cache, the scorer: every output, by the check that ends the stage."""
    notes: list[str] = []
    Export(tolerance=TOLERANCE)(opened(tmp_path, config), context(tmp_path, notes))
    (note,) = notes
    assert re.fullmatch(r"agrees with torch to \d\.\de-0\d of the largest output(, with a cache and without)?", note)
    assert note.endswith("without") == (config.decoder is not None)


def test_a_directory_is_opened(tmp_path: Path) -> None:
    """Lazily, under its own names; a tied head is an alias, and embeddings have a dial of their own."""
    tied, untied = (opened(tmp_path / name, PAIRS[name]) for name in ("narrow decoder", "narrow untied"))
    assert tied.info.task == "text2text-generation"
    assert tied.weights.aliases == {"lm_head.weight": "decoder.embed_tokens.weight"}
    assert tied.info.embeddings == ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    assert untied.weights.aliases == {}
    assert tied.weights.parameters == parameters(with_vocabulary(PAIRS["narrow decoder"]))
    facts = inspect_model(str(tmp_path / "narrow decoder" / "student"))
    assert (facts["task"], facts["model_type"]) == ("text2text-generation", "edgepipe_encoder_decoder")
    assert {part["part"] for part in facts["parts"]} >= {"attention", "mlp", "embedding and head"}


def test_the_artifact(tmp_path: Path) -> None:
    """Three graphs over one store, with the facts a runtime needs."""
    model = opened(tmp_path, PAIR)
    exported = Export(context=64)(model, context(tmp_path))
    assert list(exported.graphs) == ["encoder", "decoder", "scorer"]
    assert exported.spec == {
        "layers": 1,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "hidden_size": 48,
        "vocab_size": VOCABULARY,
        "context": 64,
        "source_context": 64,
        "encoder_layers": 2,
        "encoder_heads": 4,
        "encoder_head_dim": 16,
        "decoder_prefix_ids": [0],
        "bos_token_id": 0,
        "eos_token_ids": [1],
    }
    read = {name: _weights(graph) for name, graph in exported.graphs.items()}
    assert read["encoder"] | read["decoder"] == set(model.weights) | {"lm_head.weight"}
    assert read["encoder"] & read["decoder"] == {"embed_tokens.weight"}
    assert read["scorer"] == read["decoder"]


def _weights(graph: bytes) -> set[str]:
    names = [value.name for value in onnx.load_model_from_string(graph).graph.input]
    return {name.removeprefix("weight/").removesuffix(".T") for name in names if name.startswith("weight/")}


def test_the_facts_of_an_encoder(tmp_path: Path) -> None:
    """What a bundle's manifest says of a model with one graph."""
    classes, vectors = (opened(tmp_path / name, ENCODERS[name]) for name in ("classes", "last"))
    spec = Export(context=32)(classes, context(tmp_path)).spec
    assert (spec["labels"], spec["pooling"], spec["context"]) == (["no", "maybe", "yes"], None, 32)
    assert (classes.info.task, vectors.info.task) == ("text-classification", "feature-extraction")
    spec = Export()(vectors, context(tmp_path)).spec
    assert (spec["labels"], spec["pooling"], spec["normalize"], spec["context"]) == (None, "last", True, 128)
    assert list(spec["ends"]["model"]["outputs"]) == ["embedding"]
    spec = Export(pooling="max", normalize="no")(vectors, context(tmp_path)).spec
    assert (spec["pooling"], spec["normalize"]) == ("max", False)


def test_a_padded_source_changes_nothing(tmp_path: Path) -> None:
    """Logits over a source are those over the same source padded in a batch."""
    exported = Export(context=64, check_tokens=0)(opened(tmp_path, PAIR), context(tmp_path))
    rng = np.random.default_rng(3)
    ids, mask, target = rng.integers(0, 200, (2, 9)), padding([2, 9]), rng.integers(0, 200, (2, 5))
    both = logits_in_pieces(exported, target, [5], {"input_ids": ids, "attention_mask": mask})
    short = {"input_ids": ids[1:, :5], "attention_mask": mask[1:, :5]}
    assert mask.sum(1).tolist() == [9, 5]
    np.testing.assert_allclose(both[1:], logits_in_pieces(exported, target[1:], [5], short), atol=1e-5)


def test_the_scorer_gives_the_rows_that_are_asked_for(tmp_path: Path) -> None:
    """Any tokens, in any order, twice if asked twice: those columns of the decoder's logits."""
    exported = Export(context=64, check_tokens=0)(opened(tmp_path, PAIRS["untied"]), context(tmp_path))
    source = {"input_ids": np.array([[5, 9, 2, 7]]), "attention_mask": np.ones((1, 4), np.int64)}
    whole = logits_in_pieces(exported, np.array([[0]]), [1], source)
    crossed = evaluate(exported.graphs["encoder"], exported.weights, source)
    tokens = np.array([7, 383, 7, 0])
    feeds = {"input_ids": np.array([[0]]), "token_ids": tokens, "encoder_attention_mask": source["attention_mask"]}
    got = evaluate(exported.graphs["scorer"], exported.weights, {**feeds, **crossed})["logits"]
    np.testing.assert_allclose(got, whole[:, 0, tokens], atol=1e-5)


def test_a_graph_that_computes_something_else_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check sees a mask that is not dropped."""
    build = students.build_student
    monkeypatch.setattr(students, "build_student", lambda c, n: build(dataclasses.replace(c, causal_encoder=True), n))
    with pytest.raises(ContractError, match=r"the exported graph encoder, cross_key\.0, differs from torch by"):
        Export()(opened(tmp_path, PAIR), context(tmp_path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": 129}, "--context 129 is more than the 128 positions"),
        ({"exporter": "framework"}, "students have a builder of their own; leave it out"),
        ({"pooling": "mean"}, "export.pooling is for encoders of texts, but the task is text2text-generation"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    """One sentence each, before any work."""
    with pytest.raises(ConfigError, match=words):
        Export(**options).check(opened(tmp_path, PAIR))


@pytest.mark.parametrize("start", [None, VOCABULARY, "<s>"])
def test_an_answer_needs_a_first_token(start: object, tmp_path: Path) -> None:
    """The id that every answer begins with is in the config, or nothing can be decoded."""
    with pytest.raises(ConfigError, match=r"decoder_start_token_id.* expected an id below 384"):
        Export().check(opened(tmp_path, PAIR, decoder_start_token_id=start))


def test_another_task_is_refused(tmp_path: Path) -> None:
    """A student is for what it was made for."""
    path = save_tiny_student(tmp_path / "student", PAIR)
    assert open_model(str(path), task="text2text-generation").info.task == "text2text-generation"
    with pytest.raises(ConfigError, match=r"--task fill-mask: the student in .* is for text2text-generation"):
        open_model(str(path), task="fill-mask")


def test_weights_that_contradict_the_config(tmp_path: Path) -> None:
    """The first tensor that is missing, of another shape or one too many is named."""
    model = opened(tmp_path, PAIR)
    extra = model.weights.replace({"more": stored("more", np.zeros((2, 2), np.float32))})
    with pytest.raises(ConfigError, match=r"the weights hold more, which a student with this config"):
        Export().check(dataclasses.replace(model, weights=extra))
    name = "decoder.layers.0.cross_attn.k_proj.weight"
    other = model.weights.replace({name: stored(name, np.zeros((2, 2), np.float32))})
    with pytest.raises(ConfigError, match=rf"promises {re.escape(name)} \[32, 48\], but the weights hold \[2, 2\]"):
        Export().check(dataclasses.replace(model, weights=other))
    without = model.weights.only(set(model.weights) - {name})
    with pytest.raises(ConfigError, match=rf"promises {re.escape(name)} .*, but the weights do not have it"):
        Export().check(dataclasses.replace(model, weights=without))
