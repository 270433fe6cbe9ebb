"""Lowering of what only traced graphs hold: other ranks, biases at the end, weights as stored, whole tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgepipe.artifacts import Licence, ModelInfo, OnnxModel
from edgepipe.engines import onnxruntime as engine
from edgepipe.graph.dialect import GraphBuilder
from edgepipe.graph.evaluate import evaluate
from edgepipe.runtime.onnxruntime import open_graph
from edgepipe.weights import Value, WeightStore
from tests.decoders import difference, rounded, stored, with_minima

WIDTH, ROWS = 40, 24  # no multiples of a group
TOLERANCE = 1e-4  # 8-bit weights in two int8 parts; everything else is far below
INFO = ModelInfo(
    name="small",
    task="feature-extraction",
    config={},
    tokenizer={},
    chat_template=None,
    eos_token_ids=(),
    bos_token_id=None,
    licence=Licence(id="Apache-2.0", source="here"),
    fingerprint="0" * 64,
    embeddings=(),
)


def matrix(seed: int, rows: int = ROWS, width: int = WIDTH) -> np.ndarray:
    """Return a random matrix."""
    return np.random.default_rng(seed).standard_normal((rows, width), np.float32)


GRIDS = {
    "float16": lambda value: value.astype(np.float16),
    "4 bits": lambda value: rounded(value, bits=4),
    "4 bits, zero points": lambda value: rounded(value, bits=4, symmetric=False),
    "8 bits": lambda value: rounded(value, bits=8),
    "8 bits, zero points": lambda value: rounded(value, bits=8, symmetric=False),
    "minima": lambda value: with_minima(value, bits=4),
}


def lowered(
    graphs: dict[str, bytes], values: dict[str, Value], folder: Path
) -> tuple[WeightStore, dict[str, onnx.ModelProto]]:
    """Lower graphs as those of a traced model and write them; return the store and the lowered graphs."""
    weights = WeightStore({name: stored(name, value) for name, value in values.items()})
    model = OnnxModel(info=INFO, graphs=graphs, weights=weights, spec={"ends": {name: {} for name in graphs}})
    lower, file = engine.lower(model, accuracy_level=0)
    engine.write(lower, file, folder, lambda _done, _total: None)
    return weights, {name: onnx.load_model_from_string(graph) for name, graph in lower.items()}


def check(role: str, graph: bytes, values: dict[str, Value], folder: Path, x: np.ndarray) -> onnx.ModelProto:
    """Hold that a graph computes the same after the lowering; return it."""
    weights, graphs = lowered({role: graph}, values, folder)
    expected = evaluate(graph, weights, {"x": x})
    got = open_graph(folder / f"{role}.onnx", 1).run({"x": x})
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert difference(got[name], value) < TOLERANCE, name
    return graphs[role]


def product(dims: list[int | str], *, bias: bool, transposed: bool = True) -> bytes:
    """Build y = x · W (+ b), whose result is the graph's output."""
    g = GraphBuilder("product")
    x = g.input("x", ir.DataType.FLOAT, dims)
    shape = [WIDTH, ROWS]
    y = g.op("MatMul", [x, g.weight("w", shape, transposed=transposed)])
    if bias:
        y = g.op("Add", [y, g.weight("b", [ROWS])])
    g.output("y", y, ir.DataType.FLOAT, [*dims[:-1], ROWS])
    return g.finish()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("role", ["model", "decoder"])
def test_a_product_of_any_rank_that_ends_a_graph(role: str, rank: int, grid: str, bias: bool, tmp_path: Path) -> None:
    """A classifier's logits are a product and a bias with nothing behind them; heads of attention have four axes."""
    dims: list[int | str] = [*["batch", "sequence", 2][: rank - 1], WIDTH]
    values: dict[str, Value] = {"w": GRIDS[grid](matrix(1)), "b": matrix(2, 1, ROWS)[0]}
    x = np.random.default_rng(9).standard_normal((*(3, 5, 2)[: rank - 1], WIDTH), np.float32)
    check(role, product(dims, bias=bias), values, tmp_path, x)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shape", [(WIDTH, ROWS), (WIDTH, WIDTH)])
def test_a_weight_that_is_multiplied_as_stored(grid: str, shape: tuple[int, int], tmp_path: Path) -> None:
    """GPT-2 keeps [in, out], its groups run along the outputs: no packed product may read it, not even a square one."""
    g = GraphBuilder("conv1d")
    x = g.input("x", ir.DataType.FLOAT, ["batch", "sequence", WIDTH])
    first, second = (g.op("MatMul", [x, g.weight(name, list(shape))]) for name in ("w", "v"))
    g.output("y", g.op("Sub", [first, second]), ir.DataType.FLOAT, ["batch", "sequence", shape[1]])
    values: dict[str, Value] = {name: GRIDS[grid](matrix(seed, *shape)) for seed, name in enumerate("wv")}
    x_value = np.random.default_rng(9).standard_normal((2, 3, WIDTH), np.float32)
    graph = check("decoder", g.finish(), values, tmp_path, x_value)
    assert "MatMulNBits" not in {node.op_type for node in graph.graph.node}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_table_that_another_operator_reads_is_decoded_whole(grid: str, transposed: bool, tmp_path: Path) -> None:
    """Position tables are sliced and added, not gathered from."""
    g = GraphBuilder("table")
    x = g.input("x", ir.DataType.FLOAT, ["batch", WIDTH if not transposed else ROWS])
    table = g.weight("w", [WIDTH, ROWS] if transposed else [ROWS, WIDTH], transposed=transposed)
    axes = [g.constant(np.array([value], np.int64)) for value in (2, 3, 0)]
    row = g.op("Slice", [table, *axes])
    g.output("y", g.op("Mul", [x, row]), ir.DataType.FLOAT, ["batch", WIDTH if not transposed else ROWS])
    x_value = np.ones((2, ROWS if transposed else WIDTH), np.float32)
    check("model", g.finish(), {"w": GRIDS[grid](matrix(1))}, tmp_path, x_value)


def test_a_weight_that_only_a_branch_reads(tmp_path: Path) -> None:
    """The body of an If sees the outer graph's values; its weight is decoded outside."""
    g = GraphBuilder("branches")
    x = g.input("x", ir.DataType.FLOAT, ["batch", WIDTH])
    weight = g.weight("w", [ROWS, WIDTH])
    condition = g.op("Greater", [g.op("ReduceMax", [x], {"keepdims": 0}), g.constant(np.float32(0))])
    branches = []
    for kind in ("ReduceSum", "ReduceMax"):
        node = ir.node(kind, [weight], {"keepdims": 0}, name=kind)
        node.outputs[0].name = f"of_{kind}"
        branches.append(ir.Graph([], [node.outputs[0]], nodes=[node], name=kind))
    y = g.op("If", [condition], {"then_branch": branches[0], "else_branch": branches[1]})
    g.output("y", y, ir.DataType.FLOAT, [])
    values: dict[str, Value] = {"w": rounded(matrix(3), bits=8)}
    weights, _ = lowered({"model": g.finish()}, values, tmp_path)
    for sign, reduced in ((1, np.sum), (-1, np.max)):
        got = open_graph(tmp_path / "model.onnx", 1).run({"x": np.full((2, WIDTH), sign, np.float32)})
        assert got["y"] == pytest.approx(float(reduced(weights.float32("w"))), rel=1e-4)


def test_two_graphs_share_one_place_in_the_file(tmp_path: Path) -> None:
    """A matrix that an encoder and a decoder read is stored once, however each of them multiplies."""
    graphs = {role: product(["batch", WIDTH], bias=False) for role in ("encoder", "decoder")}
    value = rounded(matrix(1), bits=8)
    _, made = lowered(graphs, {"w": value}, tmp_path)
    assert (tmp_path / "weights.bin").stat().st_size < value.nbytes + 256
    operators = {role: {node.op_type for node in graph.graph.node} for role, graph in made.items()}
    assert "FusedMatMul" in operators["encoder"] and "MatMulNBits" in operators["decoder"]
    x = np.random.default_rng(9).standard_normal((3, WIDTH), np.float32)
    both = [open_graph(tmp_path / f"{role}.onnx", 1).run({"x": x})["y"] for role in graphs]
    assert difference(*both) < TOLERANCE
