"""Activations in two int8 parts: the product is float32's, ragged widths and outliers included."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgepipe.artifacts import QuantizedTensor
from edgepipe.engines.onnxruntime.two_parts import split_in_two, sum_of_two
from edgepipe.numerics.grids import dequantize, round_to_nearest

GROUP = 32


def two_parts_naively(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round every group of one row to 127 steps of its largest magnitude; return that and what is left."""
    high = np.zeros_like(x)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], GROUP):
            part = x[row, start : start + GROUP]
            step = np.abs(part).max() * np.float32(1 / 127)
            if step > 0:
                high[row, start : start + GROUP] = np.round(part / step) * step
    return high, x - high


def product_graph(weight: QuantizedTensor, in_two: bool) -> bytes:
    """Build x [B, S, in] → y = x · Wᵀ and, in two parts, those; initializers are what the kernels pack."""
    rows, width = weight.shape
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", "sequence", width]))
    constants: dict[str, ir.Value] = {}

    def constant(array: np.ndarray, name: str) -> ir.Value:
        return constants.setdefault(name, ir.Value(name=name, const_value=ir.tensor(array, name=name)))

    codes = constant(weight.codes.reshape(rows, -1, GROUP), "codes")
    scale = constant(weight.scale.astype(np.float32), "scale")
    nodes = split_in_two(x, width, GROUP, constant) if in_two else []
    operand = nodes[-1].outputs[0] if in_two else x
    attributes = {"K": width, "N": rows, "bits": 8, "block_size": GROUP, "accuracy_level": 4}
    nodes.append(ir.node("MatMulNBits", [operand, codes, scale], attributes, domain="com.microsoft"))
    if in_two:
        nodes.append(sum_of_two(nodes[-1].outputs[0], constant))
    y = nodes[-1].outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "sequence", rows])
    outputs = [y]
    if in_two:
        operand.name, operand.type = "parts", ir.TensorType(ir.DataType.FLOAT)
        operand.shape = ir.Shape([2, "batch", "sequence", width])
        outputs.append(operand)
    graph = ir.Graph(
        [x],
        outputs,
        nodes=nodes,
        initializers=list(constants.values()),
        opset_imports={"": 23, "com.microsoft": 1},
        name="product",
    )
    return bytes(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())


def run(weight: QuantizedTensor, x: np.ndarray, *, in_two: bool) -> list[np.ndarray]:
    """Multiply x by an 8-bit weight with int8 kernels."""
    session = ort.InferenceSession(product_graph(weight, in_two), providers=["CPUExecutionProvider"])
    results: list[np.ndarray] = session.run(None, {"x": x})
    return results


@pytest.mark.parametrize("width", [64, 100, 576])
@pytest.mark.parametrize("rows", [1, 5])
def test_products_are_those_of_float32(width: int, rows: int) -> None:
    rng = np.random.default_rng(width + rows)
    x = rng.standard_normal((2, rows, width), np.float32)
    x[0, 0, 3] = 80  # one outlier decides the grid of its group
    x[1, 0] = 0
    weight = round_to_nearest(rng.standard_normal((48, width), np.float32), bits=8, group=GROUP, symmetric=True)
    exact = x @ dequantize(weight).T
    largest = np.abs(exact).max()
    y, parts = run(weight, x, in_two=True)
    (rounded,) = run(weight, x, in_two=False)
    assert np.abs(y - exact).max() < 1e-4 * largest
    assert np.abs(rounded - exact).max() > 10 * np.abs(y - exact).max()
    high, low = two_parts_naively(x.reshape(-1, width))
    np.testing.assert_allclose(parts[0].reshape(-1, width), high, rtol=0, atol=1e-6 * np.abs(x).max())
    np.testing.assert_allclose(parts[0] + parts[1], x, rtol=0, atol=1e-6 * np.abs(x).max())
    assert np.abs(low).max() <= np.abs(x).max() / 127 / 2 * 1.01
