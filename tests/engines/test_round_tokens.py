"""Products of rounded tokens: what the naive twins compute, on 16 values a token, one scale a row in the file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgepipe.artifacts import ActivationPlan, OnnxModel, QuantizedTensor, TokenGrid
from edgepipe.engines import onnxruntime as engine
from edgepipe.engines.onnxruntime.names import ROUNDED
from edgepipe.engines.onnxruntime.planned import kernel_block
from edgepipe.errors import ContractError
from edgepipe.graph.bitlinear import normalize_inputs
from edgepipe.graph.dialect import GraphBuilder
from edgepipe.graph.evaluate import evaluate
from edgepipe.numerics.grids import round_to_nearest
from edgepipe.numerics.ternary import round_to_ternary
from edgepipe.runtime.onnxruntime import open_graph
from edgepipe.weights import WeightStore
from tests.decoders import stored
from tests.engines.test_integer_products import INFO
from tests.reference import decode_naively, round_token_naively

GRIDS = [(4, "signed"), (4, "zero points"), (8, "signed"), (8, "zero points"), (8, "largest")]
WIDTHS = [(7, 5), (64, 32), (100, 9), (96, 33), (512, 16), (384, 16)]


def layer(n_in: int, out: int, bits: int, grid: TokenGrid, *, group: int = 32, inside: bool = False) -> OnnxModel:
    """Return two matrices [out, n_in] that read one input x [B, S, n_in], and a third that stays in groups.

    `inside`: their products aren't the graph's own outputs.
    """
    rng = np.random.default_rng(n_in)
    g = GraphBuilder("model")
    x = g.input("x", ir.DataType.FLOAT, ["batch", "sequence", n_in])
    weights = {}
    for name in ("w0", "w1", "head"):
        matrix = rng.standard_normal((out, n_in), np.float32)
        matrix[0], matrix[-1, 0] = 0, 30
        value = round_to_nearest(matrix, bits=4, group=0 if name != "head" else group, symmetric=True)
        weights[name] = stored(name, round_to_ternary(matrix, "mean") if bits == 2 and name != "head" else value)
        weights[f"{name}_bias"] = stored(f"{name}_bias", rng.standard_normal(out).astype(np.float32))
        y = g.op("MatMul", [x, g.weight(name, [n_in, out], transposed=True)])
        y = g.op("Add", [y, g.weight(f"{name}_bias", [out])])
        y = g.op("Neg", [g.op("Neg", [y])]) if inside else y
        g.output(f"y_{name}", y, ir.DataType.FLOAT, ["batch", "sequence", out])
    plan = ActivationPlan(kind="token", tokens=grid, layers=("w0", "w1"))
    return OnnxModel(
        info=INFO, graphs={"model": g.finish()}, weights=WeightStore(weights), spec={"ends": {}}, activations=plan
    )


def inputs(n_in: int) -> np.ndarray:
    """Return x [2, 4, n_in]: channels of growing size, a token of zeros, one without negative values."""
    x = np.random.default_rng(1).standard_normal((2, 4, n_in)) * np.linspace(0.1, 5, n_in)
    x[0, 1], x[1, 2] = 0, np.abs(x[1, 2])
    return x.astype(np.float32)


def rounded_naively(x: np.ndarray, grid: TokenGrid) -> np.ndarray:
    """Return what x [B, S, in] is rounded to."""
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        levels, scale = round_token_naively(row.tolist(), grid.bits, grid.form)
        rows.append(np.array(levels, np.float32) * scale)
    return np.stack(rows).reshape(x.shape)


def lowered(model: OnnxModel, directory: Path, level: int = 0, *, exact: bool = False, name: str = "model") -> Path:
    """Lower a model of one graph into a directory and return the graph."""
    model = dataclasses.replace(model, graphs={name: model.graphs["model"]})
    graphs, file = engine.lower(model, accuracy_level=level, exact=exact)
    engine.write(graphs, file, directory, lambda _done, _total: None)
    return directory / f"{name}.onnx"


@pytest.mark.parametrize("name", ["model", "scorer"])
@pytest.mark.parametrize(("n_in", "out"), WIDTHS)
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("token_bits", "form"), GRIDS)
def test_products_are_the_twins(
    tmp_path: Path, token_bits: int, form: str, bits: int, n_in: int, out: int, name: str
) -> None:
    """Any width, in graphs of many rows and of few; the exact form is the portable graph's."""
    model = layer(n_in, out, bits, grid := TokenGrid(bits=token_bits, form=form))  # type: ignore[arg-type]
    x = inputs(n_in)
    expected = evaluate(model.graphs["model"], model.weights, {"x": x})
    exact = open_graph(lowered(model, tmp_path, exact=True, name=name), 1).run({"x": x})
    for key, value in expected.items():
        np.testing.assert_allclose(exact[key], value, rtol=1e-3, atol=2e-3 * np.abs(value).max())
    got = open_graph(lowered(model, tmp_path, name=name), 1).run({"x": x})
    np.testing.assert_allclose(got["y_head"], expected["y_head"], rtol=1e-4, atol=1e-4 * np.abs(x).max())
    read = rounded_naively(x, grid)
    for weight in ("w0", "w1"):
        value = model.weights.load(weight)
        assert isinstance(value, QuantizedTensor)
        twin = read.astype(np.float64) @ decode_naively(value).T + model.weights.float32(f"{weight}_bias")
        np.testing.assert_allclose(got[f"y_{weight}"], twin, rtol=1e-3, atol=5e-4 * np.abs(twin).max())


@pytest.mark.parametrize("form", ["signed", "zero points"])
def test_what_a_product_reads_has_16_values_a_token(tmp_path: Path, form: str) -> None:
    """Seen in the graph that ships: the value itself is asked for, and it is what MatMulNBits reads."""
    model = layer(384, 16, 4, TokenGrid(bits=4, form=form))  # type: ignore[arg-type]
    path = lowered(model, tmp_path)
    graph = onnx.load(path, load_external_data=False)
    (name,) = {n.input[0] for n in graph.graph.node if n.op_type == "MatMulNBits" and n.input[0].startswith(ROUNDED)}
    assert sum(n.input[0] == name for n in graph.graph.node) == 2, "x is rounded once for both"
    graph.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    onnx.save(graph, path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (read,) = session.run([name], {"x": inputs(384)})
    counts = [len(np.unique(row)) for row in read.reshape(-1, 384)]
    assert max(counts) == 16 and counts[1] == 1
    np.testing.assert_array_equal(read, rounded_naively(inputs(384), TokenGrid(bits=4, form=form)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("n_in", "out"), WIDTHS)
@pytest.mark.parametrize("bits", [2, 4])
def test_the_file_holds_one_scale_a_row(tmp_path: Path, bits: int, n_in: int, out: int) -> None:
    model = layer(n_in, out, bits, TokenGrid(bits=4, form="signed"))
    _, file = engine.lower(model, accuracy_level=0)
    sizes = {tensor.name: tensor.nbytes for tensor in file.tensors}
    value = model.weights.load("w0")
    assert isinstance(value, QuantizedTensor)
    block = kernel_block(value)
    assert sizes["w0:scale"] == 2 * out
    assert sizes["w0:codes"] == out * (-(-n_in // block) * block) * bits // 8
    if n_in == 384:
        assert 8 * (sizes["w0:codes"] + sizes["w0:scale"]) / (out * n_in) == bits + 16 / 384


def test_4_bit_products_of_rounded_tokens_stay_exact_at_any_level(tmp_path: Path) -> None:
    model = layer(384, 16, 4, TokenGrid(bits=4, form="zero points"))
    x = inputs(384)
    (exact, *_), (fast, *_) = (
        open_graph(lowered(model, tmp_path, level), 1).run({"x": x}).values() for level in (0, 4)
    )
    np.testing.assert_array_equal(exact, fast)


def test_int8_products_of_ternary_rows_stay_close(tmp_path: Path) -> None:
    """At accuracy level 4 the kernel rounds what it reads once more, in blocks."""
    model = layer(384, 16, 2, grid := TokenGrid(bits=8, form="largest"))
    x = inputs(384)
    got = open_graph(lowered(model, tmp_path, 4, name="scorer"), 1).run({"x": x})["y_w0"]
    twin = rounded_naively(x, grid) @ model.weights.float32("w0").T + model.weights.float32("w0_bias")
    assert np.abs(got - twin).max() < 0.02 * np.abs(twin).max()


def test_a_product_that_reads_floats_is_not_joined_with_rounded_ones(tmp_path: Path) -> None:
    """A group as wide as the row looks alike in the file; the plan tells them apart."""
    model = layer(64, 32, 4, grid := TokenGrid(bits=4, form="signed"), group=64, inside=True)
    x = inputs(64)
    path = lowered(model, tmp_path, name="decoder")
    assert sum(n.op_type == "MatMulNBits" for n in onnx.load(path, load_external_data=False).graph.node) == 2
    got = open_graph(path, 1).run({"x": x})
    for name, read in (("w0", rounded_naively(x, grid)), ("w1", rounded_naively(x, grid)), ("head", x)):
        twin = read @ model.weights.float32(name).T + model.weights.float32(f"{name}_bias")
        np.testing.assert_allclose(got[f"y_{name}"], twin, rtol=1e-3, atol=5e-4 * np.abs(twin).max())


def test_a_layer_that_is_no_product_is_an_error() -> None:
    """What ships would not be what was trained, and nothing would show it."""
    g = GraphBuilder("model")
    x = g.input("x", ir.DataType.FLOAT, ["batch", "sequence", 8])
    y = g.op("Mul", [x, g.weight("w0", [8, 8], transposed=True)])
    g.output("y", y, ir.DataType.FLOAT, ["batch", "sequence", 8])
    value = round_to_nearest(np.eye(8, dtype=np.float32), bits=4, group=0, symmetric=True)
    plan = ActivationPlan(kind="token", tokens=TokenGrid(bits=4, form="signed"), layers=("w0",))
    weights = WeightStore({"w0": stored("w0", value)})
    model = OnnxModel(info=INFO, graphs={"model": g.finish()}, weights=weights, spec={"ends": {}}, activations=plan)
    with pytest.raises(ContractError, match="w0 should read rounded tokens: Mul is no product"):
        engine.lower(model, accuracy_level=0)
    with pytest.raises(ContractError, match="w0 should read normalized values: Mul is no product"):
        normalize_inputs(model.graphs["model"], plan.layers)
