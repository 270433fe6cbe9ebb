"""Whole matrices decoded by standard operators: their values are the grid's, and the engine folds them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgepipe.artifacts import QuantizedTensor
from edgepipe.engines.onnxruntime.decode_whole import decode_whole
from edgepipe.engines.onnxruntime.planned import plan_part
from edgepipe.numerics.grids import dequantize, round_to_nearest
from edgepipe.weights import Weight, WeightStore

GROUP = 32


def decoding_graph(value: QuantizedTensor) -> bytes:
    """Build x [n, rows] → x · (the decoded matrix), whose parts lie in the graph as they would in a weights file."""
    weight = Weight(
        name="w", shape=value.shape, dtype=f"q{value.bits}", nbytes=value.nbytes, load=lambda: value, grid="rtn"
    )
    store = WeightStore({"w": weight})
    held: dict[str, ir.Value] = {}

    def constant(array: np.ndarray, name: str) -> ir.Value:
        return held.setdefault(name, ir.Value(name=name, const_value=ir.tensor(array, name=name)))

    kinds = [kind for kind in ("codes", "scale", "zero_points", "minima") if getattr(value, kind) is not None]
    parts = {kind: constant(plan_part(store, ["w"], kind, value).load(), kind) for kind in kinds}
    nodes = decode_whole(parts.pop("codes"), parts, value.shape[0], value, constant)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", value.shape[0]]))
    nodes.append(ir.node("MatMul", [x, nodes[-1].outputs[0]]))
    y = nodes[-1].outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", value.shape[1]])
    graph = ir.Graph([x], [y], nodes=nodes, initializers=list(held.values()), opset_imports={"": 23}, name="decoding")
    return bytes(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["symmetric", "zero points", "minima"])
@pytest.mark.parametrize("width", [64, 100])
def test_values_are_the_grid_s_and_decoding_is_folded(tmp_path: Path, bits: int, kind: str, width: int) -> None:
    rng = np.random.default_rng(bits)
    value = round_to_nearest(
        rng.standard_normal((24, width), np.float32), bits=bits, group=GROUP, symmetric=kind != "zero points"
    )
    if kind == "minima":
        minima = rng.standard_normal(value.scale.shape).astype(np.float16)
        value = QuantizedTensor(
            shape=value.shape, bits=bits, group=GROUP, codes=value.codes, scale=value.scale, minima=minima
        )
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    options.log_severity_level = 3
    session = ort.InferenceSession(decoding_graph(value), options, providers=["CPUExecutionProvider"])
    decoded = session.run(None, {"x": np.eye(24, dtype=np.float32)})[0]
    np.testing.assert_allclose(decoded, dequantize(value), rtol=1e-6, atol=1e-6)
    folded = ir.load(tmp_path / "folded.onnx").graph
    assert [node.op_type for node in folded] == ["MatMul"], json.dumps([node.op_type for node in folded])
