"""Compile: a whole bundle, checked through the runtime that ships; what differs too much isn't shipped."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgepipe.artifacts import Context, OnnxModel
from edgepipe.engines import onnxruntime as engine
from edgepipe.engines.onnxruntime import planned
from edgepipe.errors import ConfigError, ContractError, TargetError
from edgepipe.graph.evaluate import prompt_logits
from edgepipe.runtime.onnxruntime import open_decoder
from edgepipe.stages.compile import Compile
from edgepipe.stages.quantize import Quantize
from edgepipe.target import OnnxruntimeSettings
from tests.decoders import context, difference, exported, opened, random_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the tiny models of this file."""
    return tmp_path_factory.mktemp("decoders")


@pytest.fixture(scope="module")
def model(folder: Path) -> OnnxModel:
    """A Llama with 4-bit layers and an 8-bit embedding and head."""
    return exported(Quantize()(opened(folder, "llama grouped"), context(folder)))


def test_the_bundle(model: OnnxModel, tmp_path: Path) -> None:
    """All files are there, each with its bytes and hash in the manifest; nothing is left beside."""
    recipe = {"stages": ["quantize"]}
    compiled = Compile()(model, dataclasses.replace(context(tmp_path), recipe=recipe))
    names = {"decoder.onnx", "weights.bin", "tokenizer.json", "chat_template.jinja", "sbom.cdx.json"}
    assert compiled.path.parent == tmp_path
    assert {path.name for path in compiled.path.iterdir()} == names | {"manifest.json"}
    manifest = json.loads((compiled.path / "manifest.json").read_text(encoding="utf-8"))
    assert manifest == json.loads(json.dumps(compiled.manifest))
    assert set(manifest["files"]) == names
    for name, entry in manifest["files"].items():
        content = (compiled.path / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert manifest["model"] == model.spec
    assert manifest["recipe"] == recipe
    assert manifest["cache"] == {
        "kind": "preallocated",
        "bytes": 2 * 2 * 2 * 2 * 64 * 16,
        "dtype": "float16",
        "shape": [1, 2, 64, 16],
        "layers": 2,
    }
    assert manifest["weights"]["bytes"] == (compiled.path / "weights.bin").stat().st_size
    assert manifest["weights"]["parameters"] == model.weights.parameters
    assert sum(part["bytes"] for part in manifest["weights"]["parts"]) == model.weights.nbytes
    assert (compiled.info, compiled.history) == (model.info, model.history)


@pytest.mark.parametrize("cache_dtype", ["float32", "float16"])
@pytest.mark.parametrize("level", [0, 4])
def test_the_bundle_computes_the_portable_graph(model: OnnxModel, tmp_path: Path, level: int, cache_dtype: str) -> None:
    """The note says by how much it differs, exactly and, where other arithmetic ships, as shipped."""
    notes: list[str] = []
    compiled = Compile(accuracy_level=level, cache_dtype=cache_dtype)(model, context(tmp_path, notes))
    exact = r"agrees with the portable graph on 16 tokens: \de-0\d exact"
    assert re.fullmatch(exact if level == 0 else exact + r", \de-0\d as shipped", notes[0])
    decoder = open_decoder(compiled.path, compiled.manifest, 1)
    ids = random_ids(model)
    got = decoder.run(decoder.new_cache(1), ids, np.array([0]), np.array([12]), np.arange(12)[None])
    found = difference(got, prompt_logits(model, ids))
    assert found < (0.1 if level else 2e-2 if cache_dtype == "float16" else 1e-3)
    assert level == 0 or found > 1e-3


def test_the_targets_arithmetic_is_taken_unless_another_is_asked_for(model: OnnxModel, tmp_path: Path) -> None:
    def note(ask: int, have: int) -> str:
        directory = tmp_path / f"{ask} {have}"
        directory.mkdir()
        notes: list[str] = []
        ctx = context(directory, notes)
        settings = OnnxruntimeSettings(accuracy_level=have)
        Compile(accuracy_level=ask)(
            model, dataclasses.replace(ctx, target=dataclasses.replace(ctx.target, onnxruntime=settings))
        )
        return notes[0]

    assert "as shipped" in note(-1, 4)
    assert "as shipped" not in note(-1, 0)
    assert "as shipped" not in note(0, 4)
    assert "as shipped" in note(4, 0)


def spoil_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every packed weight be written with its nibbles swapped."""
    # the package has a function of the module's name, so the module is asked for by its path
    place_weights = importlib.import_module("edgepipe.engines.onnxruntime.place_weights")
    plan = place_weights.plan_codes

    def swapped(*arguments: Any) -> planned.PlannedTensor:
        tensor: planned.PlannedTensor = plan(*arguments)
        return dataclasses.replace(tensor, load=lambda: (tensor.load() << 4) | (tensor.load() >> 4))

    monkeypatch.setattr(place_weights, "plan_codes", swapped)


def spoil_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let attention be computed with a scale of 0.3 instead of 0.25."""
    fuse = engine.fuse_attention

    def other(graph: ir.Graph, *arguments: Any) -> None:
        fuse(graph, *arguments)
        for node in graph:
            if node.op_type == "GroupQueryAttention":
                node.attributes["scale"] = ir.AttrFloat32("scale", 0.3)

    monkeypatch.setattr(engine, "fuse_attention", other)


@pytest.mark.parametrize("spoil", [spoil_codes, spoil_scale])
@pytest.mark.parametrize("cache_dtype", ["float32", "float16"])
def test_a_graph_that_computes_something_else_fails(
    model: OnnxModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any, cache_dtype: str
) -> None:
    spoil(monkeypatch)
    allowed = "1e-03" if cache_dtype == "float32" else "2e-02"
    with pytest.raises(ContractError, match=rf"\(exact\) differs from the portable one by .*; allowed {allowed}$"):
        Compile(cache_dtype=cache_dtype)(model, context(tmp_path))


def test_the_tolerance_of_exact_arithmetic_decides(model: OnnxModel, tmp_path: Path) -> None:
    """A float16 cache is worse than float32 rounding: a tolerance between them says so."""
    with pytest.raises(ContractError, match=r"\(exact\) differs .*; allowed 1e-06"):
        Compile(exact_tolerance=1e-6)(model, context(tmp_path))
    (tmp_path / "other").mkdir()
    Compile(exact_tolerance=1e-3, cache_dtype="float32")(model, context(tmp_path / "other"))


def test_the_tolerance_of_what_ships_decides(model: OnnxModel, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"\(as shipped\) differs .*; allowed 1e-04"):
        Compile(accuracy_level=4, shipped_tolerance=1e-4)(model, context(tmp_path))
    (tmp_path / "other").mkdir()
    Compile(accuracy_level=4, shipped_tolerance=0.1)(model, context(tmp_path / "other"))


def test_without_a_check_nothing_is_run(model: OnnxModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_codes(monkeypatch)
    notes: list[str] = []
    compiled = Compile(check_tokens=0)(model, context(tmp_path, notes))
    assert notes == []
    assert (compiled.path / "weights.bin").is_file()


@pytest.mark.parametrize(("asked", "got"), [(1, 1), (3, 3), (100, 64)])
def test_the_check_has_the_tokens_asked_for(model: OnnxModel, tmp_path: Path, asked: int, got: int) -> None:
    """No more than the context holds."""
    notes: list[str] = []
    Compile(check_tokens=asked)(model, context(tmp_path, notes))
    assert f"on {got} tokens" in notes[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accuracy_level": -2}, "compile.accuracy_level: expected 0 to 4, or -1 for the target's, got -2"),
        ({"accuracy_level": 5}, "compile.accuracy_level"),
        ({"cache_dtype": "int4"}, "compile.cache_dtype: expected float32, float16 or int8, got 'int4'"),
        ({"check_tokens": -1}, "compile.check_tokens and the tolerances must not be negative"),
        ({"exact_tolerance": -0.1}, "the tolerances must not be negative"),
        ({"shipped_tolerance": -0.1}, "the tolerances must not be negative"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Compile(**options)


def test_a_head_size_the_engine_has_no_kernel_for(model: OnnxModel, tmp_path: Path) -> None:
    odd = dataclasses.replace(model, spec={**model.spec, "head_dim": 24})
    with pytest.raises(TargetError, match="a multiple of 16, and this model's is 24"):
        Compile()(odd, context(tmp_path))


def test_progress_goes_from_weights_to_checks(model: OnnxModel, tmp_path: Path) -> None:
    said: list[str] = []
    ctx: Context = dataclasses.replace(context(tmp_path), progress=lambda what, _done, _total: said.append(what))
    Compile(accuracy_level=4)(model, ctx)
    assert list(dict.fromkeys(said)) == [
        "writing weights",
        "the portable graph's logits",
        "the lowered graph's logits, exact",
        "the lowered graph's logits, as shipped",
    ]
