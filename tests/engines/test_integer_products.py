"""Integer products: what the naive twin computes, by integer kernels, over ranges that padding doesn't widen."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgepipe.artifacts import ActivationPlan, ModelInfo, OnnxModel, QuantizedTensor, TorchModel
from edgepipe.engines import onnxruntime as engine
from edgepipe.engines.onnxruntime.integer_products import product_inputs, step_and_zero
from edgepipe.engines.onnxruntime.ranges import observe_ranges
from edgepipe.errors import ConfigError, ContractError, StageError
from edgepipe.graph.dialect import GraphBuilder
from edgepipe.graph.evaluate import evaluate
from edgepipe.numerics.grids import round_to_nearest
from edgepipe.numerics.smoothing import column_scales, smoothed
from edgepipe.runtime.onnxruntime import open_graph
from edgepipe.sources import open_model
from edgepipe.stages.compile import Compile
from edgepipe.stages.export import Export
from edgepipe.stages.quantize import Quantize
from edgepipe.weights import WeightStore
from tests.decoders import context, opened, stored
from tests.encoders import save_encoder
from tests.reference import integer_product_naively
from tests.students.test_models import PAIRS
from tests.students.tiny import save_tiny_student

INFO = ModelInfo(
    name="layer",
    task="feature-extraction",
    config={"model_type": "bert"},
    tokenizer={},
    chat_template=None,
    eos_token_ids=(),
    bos_token_id=None,
    licence=None,  # type: ignore[arg-type]  nothing asks for it here
    fingerprint="",
)
DYNAMIC, STATIC = ActivationPlan(kind="dynamic"), ActivationPlan(kind="static", ranges="minmax")


def layer(n_in: int, widths: tuple[int, ...], *, alpha: float = 0.0, bias: bool = True) -> OnnxModel:
    """Return matrices [width, n_in] that read one input x [B, S, n_in], on 8-bit grids with one scale a row."""
    rng = np.random.default_rng(n_in)
    matrices = [rng.standard_normal((width, n_in)).astype(np.float32) for width in widths]
    matrices[0][0] = 0  # a row of zeros
    matrices[-1][-1, 0] = 30  # an outlier
    scales = column_scales(np.linspace(0.1, 20, n_in), matrices, alpha) if alpha else None
    g = GraphBuilder("model")
    x = g.input("x", ir.DataType.FLOAT, ["batch", "sequence", n_in])
    weights = {}
    for i, matrix in enumerate(matrices):
        value = round_to_nearest(
            matrix if scales is None else smoothed(matrix, scales), bits=8, group=0, symmetric=True
        )
        weights[f"w{i}"] = stored(f"w{i}", dataclasses.replace(value, column_scale=scales))
        y = g.op("MatMul", [x, g.weight(f"w{i}", [n_in, len(matrix)], transposed=True)])
        if bias:
            weights[f"b{i}"] = stored(f"b{i}", rng.standard_normal(len(matrix)).astype(np.float32))
            y = g.op("Add", [y, g.weight(f"b{i}", [len(matrix)])])
        g.output(f"y{i}", y, ir.DataType.FLOAT, ["batch", "sequence", len(matrix)])
    return OnnxModel(
        info=INFO, graphs={"model": g.finish()}, weights=WeightStore(weights), spec={"ends": {}}, activations=DYNAMIC
    )


def inputs(n_in: int) -> np.ndarray:
    """Return x [2, 3, n_in], channels of growing size."""
    x = np.random.default_rng(1).standard_normal((2, 3, n_in)) * np.linspace(0.1, 5, n_in)
    return x.astype(np.float32)


def lowered(model: OnnxModel, directory: Path, **options: Any) -> Path:
    """Lower a model of one graph into a directory and return the graph."""
    graphs, file = engine.lower(model, accuracy_level=0, **options)
    engine.write(graphs, file, directory, lambda _done, _total: None)
    return directory / "model.onnx"


def operators(graph: Path) -> Counter[str]:
    """Return what onnxruntime makes of a graph with the options of the runtime: operator → times."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(graph.with_name("optimized.onnx"))
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node
    return Counter(node.op_type for node in nodes)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.6])
@pytest.mark.parametrize(("n_in", "widths"), [(7, (5,)), (64, (32, 8)), (33, (1, 65, 16))])
@pytest.mark.parametrize("observed", [None, (-3.0, 4.0), (0.0, 0.0)])
def test_products_are_the_twins(
    tmp_path: Path, n_in: int, widths: tuple[int, ...], alpha: float, bias: bool, observed: tuple[float, float] | None
) -> None:
    """Any shape, values beyond a static range, a range of nothing; the exact form is the portable graph's."""
    model = layer(n_in, widths, alpha=alpha, bias=bias)
    x = inputs(n_in)
    exact = open_graph(lowered(model, tmp_path, exact=True), 1).run({"x": x})
    expected = evaluate(model.graphs["model"], model.weights, {"x": x})
    names = product_inputs(onnx.load(tmp_path / "model.onnx", load_external_data=False).graph)
    assert len(names) == 1
    if observed is not None:
        model = dataclasses.replace(model, activations=STATIC)
    ranges = None if observed is None else {"model": {names[0]: observed}}
    got = open_graph(lowered(model, tmp_path, ranges=ranges), 1).run({"x": x})
    for i in range(len(widths)):
        weight = model.weights.load(f"w{i}")
        assert isinstance(weight, QuantizedTensor)
        np.testing.assert_allclose(exact[f"y{i}"], expected[f"y{i}"], rtol=1e-4, atol=1e-4)
        twin = integer_product_naively(x, weight, model.weights.float32(f"b{i}") if bias else None, observed)
        np.testing.assert_allclose(got[f"y{i}"], twin, rtol=1e-4, atol=1e-4)


def test_what_several_matrices_read_is_rounded_once(tmp_path: Path) -> None:
    found = operators(lowered(layer(64, (32, 32, 16), alpha=0.5), tmp_path))
    assert found["DynamicQuantizeLinear"] == 1
    assert found["MatMulIntegerToFloat"] == 3
    assert found["Mul"] == 1
    assert not {"MatMul", "FusedMatMul", "Gemm", "DequantizeLinear"} & set(found)


def test_scales_of_channels_must_agree_where_one_value_is_read_by_a_joined_product(tmp_path: Path) -> None:
    """Siblings with different scales of channels aren't joined, so each reads its own scaled value."""
    model = layer(16, (8, 8), alpha=0.5)
    other = model.weights.load("w1")
    assert isinstance(other, QuantizedTensor) and other.column_scale is not None
    changed = dataclasses.replace(other, column_scale=other.column_scale * np.float16(2))
    model = dataclasses.replace(
        model, weights=model.weights.replace({"w1": stored("w1", changed)}), graphs={"decoder": model.graphs["model"]}
    )
    graphs, _ = engine.lower(model, accuracy_level=0)
    kinds = Counter(node.op_type for node in onnx.load_model_from_string(graphs["decoder"]).graph.node)
    assert (kinds["DynamicQuantizeLinear"], kinds["MatMulIntegerToFloat"], kinds["Mul"]) == (2, 2, 2)


@pytest.mark.parametrize(
    ("observed", "step", "zero"),
    [((-1.0, 1.55), 0.01, 100), ((0.5, 2.55), 0.01, 0), ((-2.55, -1.0), 0.01, 255), ((0.0, 0.0), 1e-10, 0)],
)
def test_step_and_zero_point(observed: tuple[float, float], step: float, zero: int) -> None:
    """Zero keeps a code whatever the range is."""
    found = step_and_zero(observed)
    assert found[0] == pytest.approx(step, rel=1e-5)
    assert found[1] == zero


def test_a_static_product_without_a_range(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="no range was observed for x"):
        engine.lower(dataclasses.replace(layer(7, (5,)), activations=STATIC), accuracy_level=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the tiny models of this file."""
    return tmp_path_factory.mktemp("integers")


Exported = tuple[TorchModel, OnnxModel]


def exported(model: TorchModel) -> Exported:
    """Return a model and its portable graphs, unchecked."""
    return model, Export(context=64, check_tokens=0)(model, context(Path()))


@pytest.fixture(scope="module")
def bert(folder: Path) -> Exported:
    """A BERT of two layers, 64 wide."""
    return exported(open_model(str(save_encoder(folder / "bert", "bert"))))


def planned(model: Exported, **options: Any) -> OnnxModel:
    """Return the portable graphs over the weights that quantize gives, with its plan."""
    quantized = Quantize(bits=8, samples=16, tokens=16, **options)(model[0], context(Path()))
    return dataclasses.replace(model[1], weights=quantized.weights, activations=quantized.activations)


def seen(model: OnnxModel, directory: Path, plan: ActivationPlan) -> dict[str, tuple[float, float]]:
    """Return the ranges of the graph `model` by a plan."""
    graphs, file = engine.lower(model, accuracy_level=0, exact=True)
    engine.write(graphs, file, directory, lambda _done, _total: None)
    return observe_ranges(model, plan, directory, {"model": "model.onnx"}, "float32", lambda *_: None)["model"]


def test_ranges_are_those_of_tokens_that_count(bert: Exported, tmp_path: Path) -> None:
    """Padding, and the mask that hides it, widen nothing; percentile and entropy stay inside of what was seen."""
    model = planned(bert, activations="static")
    assert model.activations is not None
    ids = np.random.default_rng(0).integers(3, 384, (2, 9))
    mask = np.ones_like(ids)
    whole = {"input_ids": ids, "attention_mask": mask}
    filled = {"input_ids": np.pad(ids, [(0, 0), (0, 4)]), "attention_mask": np.pad(mask, [(0, 0), (0, 4)])}
    plan = dataclasses.replace(model.activations, batches=(whole,))
    expected = seen(model, tmp_path, plan)
    assert len(expected) == 2 * 4  # of a layer: what q, k and v read, o, up, down
    padded = seen(model, tmp_path, dataclasses.replace(plan, batches=(filled,)))
    for name, (low, high) in expected.items():
        assert -100 < low < 0 < high < 100
        assert padded[name] == pytest.approx((low, high), rel=1e-4)
    for rule in ("percentile", "entropy"):
        for name, (low, high) in seen(model, tmp_path, dataclasses.replace(plan, ranges=rule)).items():
            assert expected[name][0] - 1e-3 <= low < high <= expected[name][1] + 1e-3


def test_ranges_need_texts_and_finite_values(bert: Exported, tmp_path: Path) -> None:
    model = planned(bert, activations="static")
    plan = model.activations
    assert plan is not None
    with pytest.raises(ConfigError, match="seen over a calibration set, and this plan has none"):
        seen(model, tmp_path, dataclasses.replace(plan, batches=()))
    norm = "embeddings.LayerNorm.bias"
    broken = model.weights.replace({norm: stored(norm, np.full(64, np.nan, np.float32))})
    with pytest.raises(StageError, match="has values that are not finite: it has no range"):
        seen(dataclasses.replace(model, weights=broken), tmp_path, plan)


@pytest.mark.parametrize(
    "options",
    [{"activations": "dynamic"}, {"activations": "static"}, {"activations": "static", "smooth": 0.7}],
    ids=str,
)
def test_an_encoder_ships_each_weight_once_and_multiplies_integers(
    bert: Exported, tmp_path: Path, options: dict[str, Any]
) -> None:
    """The file has one byte a weight of the layers, all twelve products are integer, and compile's check passes."""
    notes: list[str] = []
    model = planned(bert, **options)
    compiled = Compile()(model, context(tmp_path, notes))
    assert "exact" in notes[-1] and "as shipped" in notes[-1]
    found = operators(compiled.path / "model.onnx")
    assert found["DynamicQuantizeMatMul"] + found["MatMulIntegerToFloat"] == 2 * 6
    assert found["DynamicQuantizeLinear" if options["activations"] == "static" else "QuantizeLinear"] == 0
    assert not {"MatMul", "FusedMatMul", "MatMulNBits"} & set(found)
    layers = [w for name, w in model.weights.items() if ".layer." in name and len(w.shape) == 2]
    assert len(layers) == 2 * 6
    columns = 2 * (64 + 64 + 64 + 96) if "smooth" in options else 0  # 1/s of what is read in two layers, float16
    rows = sum(w.shape[0] for w in layers)
    others = sum(w.nbytes for name, w in model.weights.items() if w not in layers and "pooler" not in name)
    parts = compiled.manifest["weights"]["parts"]
    assert sum(part["bytes"] for part in parts) == sum(w.size for w in layers) + 2 * rows + 2 * columns + others
    assert (compiled.path / "weights.bin").stat().st_size == compiled.manifest["weights"]["bytes"]


@pytest.mark.parametrize("kind", ["llama biases", "shared", "t5"])
def test_other_tasks(folder: Path, tmp_path: Path, kind: str) -> None:
    """A decoder, a student that answers, a traced encoder-decoder: ranges for every graph, and checks that pass."""
    if kind == "t5":
        sizes = {"num_hidden_layers": 1, "num_decoder_layers": 1, "decoder_start_token_id": 0}  # tracing is slow
        model = open_model(str(save_encoder(folder / "t5", "t5", "text2text-generation", **sizes)))
    elif kind in PAIRS:
        save_tiny_student(folder / kind, PAIRS[kind])
        model = open_model(str(folder / kind))
    else:
        model = opened(folder, kind)
    notes: list[str] = []
    compiled = Compile()(planned(exported(model), activations="static"), context(tmp_path, notes))
    assert "as shipped" in notes[-1]
    for file in compiled.manifest["graphs"].values():
        found = operators(compiled.path / file)
        assert found["MatMulIntegerToFloat"] > 0, file
