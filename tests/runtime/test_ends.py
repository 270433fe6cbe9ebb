"""Manifests of schema 2 that lie about tasks, graphs and their ends: one sentence each, before an engine is asked."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepipe.errors import ConfigError, EdgepipeError
from edgepipe.runtime import load
from edgepipe.runtime.bundle import read_manifest
from edgepipe.verify import verify_bundle
from tests.runtime.damages import drop, put

TEXT = {"dtype": "int64", "shape": ["batch", "sequence"]}
FLOATS = {"dtype": "float32", "shape": ["batch", 3]}


@pytest.fixture
def copy(tmp_path: Path, family_bundle: Callable[..., Path]) -> Callable[[str], Path]:
    """Return a function that copies a bundle: of one graph, or t5's of two."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(family_bundle(name, bits=16 if name == "t5" else 8), tmp_path / "bundle"))

    return make


TASK = "text2text-generation"
LIES: list[tuple[str, str, Any, str]] = [
    ("bert", "ends", {}, "ends must describe model for feature-extraction, but describe none"),
    ("bert", "ends", {"decoder": {"inputs": {}, "outputs": {}}}, "'decoder', which graphs does not list"),
    ("bert", "ends/model/inputs", {}, "are among input_ids, attention_mask, token_type_ids, but are none"),
    ("bert", "ends/model/inputs/pixels", TEXT, "are among input_ids, attention_mask, token_type_ids, but are"),
    ("bert", "ends/model/inputs/input_ids/dtype", "int32", r"input_ids should be int64 \[\*, \*\], but is int32"),
    ("bert", "ends/model/inputs/input_ids/dtype", "object", "dtype must be one of float32, float16, int64"),
    ("bert", "ends/model/inputs/input_ids/dtype", 7, "dtype must be a text, but is a number"),
    ("bert", "ends/model/inputs/input_ids/shape", [2, 9], r"but is int64 \[2, 9\]"),
    ("bert", "ends/model/inputs/input_ids/shape", "2x9", "shape must be a list of numbers and names"),
    ("bert", "ends/model/inputs/input_ids/shape", [True, None], "shape must be a list of numbers and names"),
    ("bert", "ends/model/outputs", {}, "must have inputs and outputs"),
    ("bert", "model/pooling", None, "an embedding where model.pooling is set, only there"),
    ("bert", "model/pooling", 3, "model.pooling must be a text"),
    ("bert", "model/pad_token_id", -1, "model.pad_token_id must be from 0"),
    ("bert", "model/context", 0, "model.context must be from 1"),
    ("bert", "tokenizer", None, "the model has a context of tokens, but no tokenizer"),
    ("bert", "cache", {"kind": "growing"}, "feature-extraction keeps no cache, but cache is an object"),
    ("bert", "task", "text-generation", "graphs must name decoder, but does not"),
    ("bert", "task", TASK, "graphs must name encoder, but does not"),
    ("bert", "task", "text-classification", "must have model.context and model.labels"),
    ("bert", "preprocessor", "nowhere.json", "preprocessor is 'nowhere.json', which files does not list"),
    ("bert as classifier", "model/labels", ["a", "b"], r"logits should be float32 \[\*, 2\]"),
    ("bert as classifier", "model/labels", ["a", "b", 3], "model.labels must be a list of texts, or null"),
    ("bert as classifier", "model/labels", "abc", "model.labels must be a list of texts, or null"),
    ("bert as classifier", "model/labels", None, "must have model.context and model.labels"),
    ("bert as classifier", "model/context", None, "must have model.context and model.labels"),
    ("vit as classifier", "ends", {}, "ends must describe model for image-classification, but describe none"),
    ("vit as classifier", "graphs", {}, "graphs must name model, but does not"),
    ("t5", "graphs", {"decoder": "decoder.onnx"}, "graphs must name encoder, but does not"),
    ("t5", "ends", {}, "ends must describe a decoder whose cache grows"),
    ("t5", "ends/encoder/inputs/attention_mask/shape", ["batch"], "attention_mask should be int64"),
    ("t5", "ends/decoder/inputs/more", FLOATS, "ends.decoder.inputs: 'more' is one too many"),
    ("t5", "ends/decoder/outputs/logits/dtype", "float16", r"logits should be float32 \[\*, \*, 384\]"),
    ("t5", "model/layers", 3, "ends.encoder.outputs: 'cross_key.2' is missing"),
    ("t5", "model/head_dim", 8, r"should be float32 \[\*, 3, \*, 8\], but is"),
    ("t5", "model/vocab_size", 500, r"logits should be float32 \[\*, \*, 500\]"),
    ("t5", "model/decoder_prefix_ids", [], "model.decoder_prefix_ids must be a list of ids below 384"),
    ("t5", "model/decoder_prefix_ids", [384], "model.decoder_prefix_ids must be a list of ids below 384"),
    ("t5", "model/source_context", 0, "model.source_context must be from 1"),
    ("t5", "cache", None, "cache must be an object, but is null"),
    ("t5", "cache/kind", "preallocated", "ends must describe a decoder whose cache grows"),
    ("t5", "cache/kind", "elastic", "cache.kind must be one of preallocated, growing"),
    ("t5", "tokenizer", None, "tokenizer must be an object, but is null"),
    ("t5", "task", "text-generation", "ends must describe decoder for text-generation, but describe"),
]


@pytest.mark.parametrize(("name", "where", "value", "sentence"), LIES)
def test_a_lie_is_refused(name: str, where: str, value: Any, sentence: str, copy: Callable[[str], Path]) -> None:
    """By reading, loading and verifying alike."""
    bundle = copy(name)
    put(where, value)(bundle, random.Random(0))
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_manifest(bundle)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    with pytest.raises(EdgepipeError):
        load(bundle)
    checks = verify_bundle(bundle)["checks"]
    assert next(check["name"] for check in checks if check["ok"] is False) == "manifest"


@pytest.mark.parametrize("where", ["ends", "preprocessor", "cache/kind", "model/source_context", "ends/decoder/inputs"])
def test_a_key_that_is_missing_is_refused(where: str, copy: Callable[[str], Path]) -> None:
    """Nothing is made up for schema 2."""
    bundle = copy("t5")
    drop(where)(bundle, random.Random(0))
    with pytest.raises(ConfigError, match=f"{where.rpartition('/')[2]} is missing"):
        read_manifest(bundle)


@pytest.mark.parametrize(("name", "role"), [("bert", "model"), ("t5", "encoder"), ("t5", "decoder")])
def test_a_graph_that_is_gone_is_refused(name: str, role: str, copy: Callable[[str], Path]) -> None:
    """With its name."""
    bundle = copy(name)
    (bundle / f"{role}.onnx").unlink()
    with pytest.raises(EdgepipeError, match=f"should hold {role}.onnx but does not"):
        load(bundle)


def test_graphs_that_changed_places_are_refused(copy: Callable[[str], Path]) -> None:
    """The files are whole, the roles are not theirs."""
    bundle = copy("t5")
    put("graphs", {"encoder": "decoder.onnx", "decoder": "encoder.onnx"})(bundle, random.Random(0))
    with pytest.raises(EdgepipeError, match=r"the graph's input .* build the bundle again"):
        load(bundle)
    failed = [check for check in verify_bundle(bundle)["checks"] if check["ok"] is False]
    assert [check["name"] for check in failed] == ["graph"]


def test_schema_1_has_no_ends(tiny_bundle: Path, tmp_path: Path) -> None:
    """An older manifest says nothing of them, and is read all the same."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    del manifest["ends"], manifest["preprocessor"], manifest["cache"]["kind"]
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "schema": 1}), encoding="utf-8")
    read = read_manifest(bundle)
    assert (read["schema"], read["ends"], read["preprocessor"], read["cache"]["kind"]) == (1, {}, None, "preallocated")
    assert load(bundle).name == manifest["name"]
