"""Optimum's exporter as far as it goes without its environment: refusals, inputs it invents, a child that ends."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgepipe.artifacts import TorchModel
from edgepipe.errors import ConfigError, StageError, TargetError
from edgepipe.graph import optimum
from edgepipe.graph.dialect import OPSET
from edgepipe.graph.evaluate import evaluate
from edgepipe.sources import open_model
from edgepipe.stages.export import Export
from edgepipe.weights import WeightStore
from tests.decoders import context, opened
from tests.encoders import save_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    """Open a tiny BERT."""
    return open_model(str(save_encoder(tmp_path_factory.mktemp("model") / "bert", "bert")), task="feature-extraction")


def test_without_its_environment(encoder: TorchModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence says what to do, before any work."""
    monkeypatch.delenv(optimum.PYTHON_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TargetError, match=r"there is no .venv-optimum.* here: `make optimum` in a checkout"):
        Export(exporter="optimum").check(encoder)
    monkeypatch.setenv(optimum.PYTHON_VARIABLE, str(tmp_path / "nothing"))
    with pytest.raises(TargetError, match=r"EDGEPIPE_OPTIMUM_PYTHON names .*nothing, which is no file: `make optimum`"):
        Export(exporter="optimum").check(encoder)


def test_an_environment_without_optimum(encoder: TorchModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any Python can be named; one that lacks the packages says so. Here it is that of edgepipe itself."""
    monkeypatch.setenv(optimum.PYTHON_VARIABLE, sys.executable)
    with pytest.raises(TargetError, match=r"can't run optimum's exporter .No module named 'optimum.*`make optimum`"):
        Export(exporter="optimum")(encoder, context(tmp_path))


def test_what_cannot_be_started(encoder: TorchModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").write_text("no program")
    monkeypatch.setenv(optimum.PYTHON_VARIABLE, str(tmp_path / "python"))
    with pytest.raises(TargetError, match=r"can't be started .Permission denied"):
        Export(exporter="optimum")(encoder, context(tmp_path))


def test_models_of_several_graphs(encoder: TorchModel, tmp_path: Path) -> None:
    """A cache, or an encoder and a decoder, aren't taken from optimum."""
    with pytest.raises(ConfigError, match=r"models of one graph, but this is the task text-generation"):
        Export(exporter="optimum").check(opened(tmp_path, "llama"))
    config = {**encoder.info.config, "is_encoder_decoder": True}
    info = dataclasses.replace(encoder.info, config=config)
    with pytest.raises(ConfigError, match=r"but this is an encoder-decoder for feature-extraction"):
        optimum.check_optimum(info)


def test_an_unknown_exporter() -> None:
    with pytest.raises(ConfigError, match=r"export.exporter: expected one of auto, framework, optimum, got 'onnx'"):
        Export(exporter="onnx")


def test_a_llama_through_the_framework(tmp_path: Path) -> None:
    """Where edgepipe has a builder, the framework's exporter can be asked for."""
    notes: list[str] = []
    exported = Export(exporter="framework", check_tokens=4)(opened(tmp_path, "llama"), context(tmp_path, notes))
    assert "ends" in exported.spec and any("without a cache" in note for note in notes)


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    """It watches its stdin, and leaves at once when that closes: long before its imports are done."""
    command = [sys.executable, "-I", str(optimum._CHILD), "none", str(tmp_path), "feature-extraction", "AutoModel"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(timeout=60) == 1
    assert not (tmp_path / "result.json").exists()


def traced(*extra: tuple[str, ir.DataType, list[int | str]]) -> ir.Graph:
    """Return a graph as optimum writes it: hidden = input_ids + every extra input."""
    ids = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch_size", "length"]))
    inputs, nodes = [ids], [ir.node("Identity", [ids])]
    total = nodes[0].outputs[0]
    for name, dtype, shape in extra:
        inputs.append(ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape)))
        nodes.append(ir.node("Add", [total, inputs[-1]]))
        total = nodes[-1].outputs[0]
    total.name, total.type, total.shape = "last_hidden_state", ids.type, ids.shape
    return ir.Graph(inputs=inputs, outputs=[total], nodes=nodes, opset_imports={"": OPSET}, name="g")


DIMS: dict[str, list[int | str]] = {"input_ids": ["batch", "sequence"]}


def test_inputs_that_transformers_fills_itself() -> None:
    """A second mask becomes zeros in the shape of the ids, and the inputs get the contract's dimensions."""
    graph = traced(("global_attention_mask", ir.DataType.INT64, ["batch_size", "length"]))
    optimum._fit_inputs(graph, DIMS)
    assert [(value.name, str(value.shape)) for value in graph.inputs] == [("input_ids", "[batch,sequence]")]
    proto = bytes(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())
    ids = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(evaluate(proto, WeightStore({}), {"input_ids": ids})["last_hidden_state"], ids)


@pytest.mark.parametrize("shape", [["batch_size", "other"], ["batch_size", "length", "boxes"], [4]])
def test_inputs_that_nobody_can_fill(shape: list[int | str]) -> None:
    graph = traced()
    graph.inputs.append(ir.Value(name="odd", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape)))
    with pytest.raises(StageError, match=r"optimum's graph takes odd .*which edgepipe can't feed"):
        optimum._fit_inputs(graph, DIMS)


def test_ends_that_are_missing() -> None:
    with pytest.raises(StageError, match=r"doesn't take pixel_values: it takes input_ids"):
        optimum._fit_inputs(traced(), {"pixel_values": ["batch", 3, 8, 8]})
    with pytest.raises(StageError, match=r"doesn't give logits: it gives last_hidden_state"):
        optimum._fit_outputs(traced(), ("logits",))
