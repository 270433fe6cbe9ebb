"""Each pass of the lowering alone: what it rewrites, that the result is the same, and what it leaves as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgepipe.artifacts import OnnxModel
from edgepipe.engines import onnxruntime as engine
from edgepipe.engines.onnxruntime.fuse_attention import fuse_attention
from edgepipe.engines.onnxruntime.fuse_norms import fuse_norms
from edgepipe.engines.onnxruntime.join_projections import join_projections
from edgepipe.engines.onnxruntime.names import joined_name, weight_parts
from edgepipe.engines.onnxruntime.place_weights import place_weights
from edgepipe.engines.onnxruntime.planned import FILE_NAME, WeightsFile
from edgepipe.errors import ContractError
from edgepipe.graph.dialect import GraphBuilder
from edgepipe.graph.evaluate import evaluate
from edgepipe.numerics.grids import round_to_nearest
from edgepipe.weights import Value, WeightStore
from tests.decoders import (
    CHANGES,
    DECODERS,
    Change,
    all_on,
    difference,
    exported,
    gguf_blocks,
    mixed,
    opened,
    rounded,
    stored,
    with_minima,
)
from tests.reference import unpack_naively

WIDTH = 40  # no multiple of a group
ROWS = 24
PARTS_TOLERANCE = 2e-4  # 2- and 8-bit weights in float32 arithmetic: two int8 parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the tiny models of this file."""
    return tmp_path_factory.mktemp("decoders")


def matrix(seed: int, rows: int = ROWS, width: int = WIDTH) -> np.ndarray:
    """Return a random matrix [rows, width]."""
    return np.random.default_rng(seed).standard_normal((rows, width), np.float32)


def store(**values: Value) -> WeightStore:
    """Return a store of values that are in memory."""
    return WeightStore({name: stored(name, value) for name, value in values.items()})


def opened_graph(graph: bytes) -> ir.Model:
    """Return a portable graph as the passes take it."""
    return ir.from_proto(onnx.load_model_from_string(graph))


def kinds(model: ir.Model) -> list[str]:
    """Return the operators in order."""
    return [node.op_type for node in model.graph]


def run(model: ir.Model, weights: WeightStore, directory: Path, x: np.ndarray, level: int = 0) -> list[np.ndarray]:
    """Place the weights of a graph in whatever form it is, and run it with onnxruntime."""
    file = WeightsFile()
    place_weights(model.graph, weights, file, level)
    model.graph.opset_imports.update({"": 23, "com.microsoft": 1})
    file.write(directory / FILE_NAME, lambda _done, _total: None)
    (directory / "graph.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(directory / "graph.onnx", options, providers=["CPUExecutionProvider"])
    results: list[np.ndarray] = session.run(None, {"x": x})
    return results


def assert_same(model: ir.Model, graph: bytes, weights: WeightStore, directory: Path) -> None:
    """Hold that a changed graph computes what the portable graph it was made from does."""
    x = np.random.default_rng(99).standard_normal((2, 3, WIDTH), np.float32)
    for got, expected in zip(
        run(model, weights, directory, x), evaluate(graph, weights, {"x": x}).values(), strict=True
    ):
        assert difference(got, expected) < PARTS_TOLERANCE


def projections(names: Sequence[str], biased: Sequence[str] = (), *, inputs: int = 1) -> bytes:
    """Build outputs Sigmoid(x·Wᵀ (+ bias)) of one value x, or of several that are made from it in turn."""
    g = GraphBuilder("projections")
    x = g.input("x", ir.DataType.FLOAT, ["batch", "sequence", WIDTH])
    values = [x, *(g.op("Mul", [x, g.constant(np.float32(i + 2))]) for i in range(inputs - 1))]
    for i, name in enumerate(names):
        y = g.op("MatMul", [values[i % inputs], g.weight(name, [WIDTH, ROWS], transposed=True)])
        if name in biased:
            y = g.op("Add", [y, g.weight(f"{name}_bias", [ROWS])])
        g.output(f"y_{name}", g.op("Sigmoid", [y]), ir.DataType.FLOAT, ["batch", "sequence", ROWS])
    return g.finish()


def qkv(q: Change, k: Change, v: Change) -> WeightStore:
    """Return three matrices and as many biases."""
    biases = {f"{name}_bias": matrix(i, 1, ROWS)[0] for i, name in enumerate("qkv")}
    return store(q=q(matrix(10)), k=k(matrix(11)), v=v(matrix(12)), **biases)


def matmuls(model: ir.Model) -> set[tuple[str, ...]]:
    """Return the weights of every MatMul."""
    return {weight_parts(node.inputs[1]) for node in model.graph if node.op_type == "MatMul" and node.inputs[1]}


FOUR, EIGHT = CHANGES["4 bits"], CHANGES["8 bits"]


@pytest.mark.parametrize("grid", CHANGES)
def test_siblings_of_one_kind_are_joined(tmp_path: Path, grid: str) -> None:
    graph, weights = projections("qkv"), qkv(*[CHANGES[grid]] * 3)
    model = opened_graph(graph)
    join_projections(model.graph, weights)
    assert kinds(model) == ["MatMul", "Split", "Sigmoid", "Sigmoid", "Sigmoid"]
    assert matmuls(model) == {("q", "k", "v")}
    assert_same(model, graph, weights, tmp_path)


def test_siblings_with_biases_are_joined_with_them(tmp_path: Path) -> None:
    graph, weights = projections("qkv", biased="qkv"), qkv(FOUR, FOUR, FOUR)
    model = opened_graph(graph)
    join_projections(model.graph, weights)
    assert kinds(model) == ["MatMul", "Add", "Split", "Sigmoid", "Sigmoid", "Sigmoid"]
    assert_same(model, graph, weights, tmp_path)


def test_a_sibling_without_a_bias_stays_alone(tmp_path: Path) -> None:
    graph, weights = projections("qkv", biased="qv"), qkv(FOUR, FOUR, FOUR)
    model = opened_graph(graph)
    join_projections(model.graph, weights)
    assert matmuls(model) == {("q", "v"), ("k",)}
    assert Counter(kinds(model)) == Counter(["MatMul", "MatMul", "Add", "Split", "Sigmoid", "Sigmoid", "Sigmoid"])
    assert_same(model, graph, weights, tmp_path)


@pytest.mark.parametrize(
    "other",
    [
        EIGHT,
        CHANGES["4 bits zero points"],
        CHANGES["4 bits groups of 16"],
        CHANGES["4 bits minima"],
        CHANGES["float32"],
        CHANGES["float16"],
    ],
    ids=["bits", "zero points", "group", "minima", "float32", "float16"],
)
def test_a_sibling_on_another_grid_stays_alone(tmp_path: Path, other: Change) -> None:
    graph, weights = projections("qkv"), qkv(FOUR, other, FOUR)
    model = opened_graph(graph)
    join_projections(model.graph, weights)
    assert matmuls(model) == {("q", "v"), ("k",)}
    assert_same(model, graph, weights, tmp_path)


def test_5_and_8_bit_codes_with_minima_are_not_joined() -> None:
    """Their codes lie around different middles."""
    blocks = matrix(3, ROWS, 64)
    five = gguf_blocks(blocks, "Q5_1")
    other = with_minima(blocks, bits=8)
    g = GraphBuilder("two")
    x = g.input("x", ir.DataType.FLOAT, ["batch", "sequence", 64])
    for name in ("a", "b"):
        y = g.op("MatMul", [x, g.weight(name, [64, ROWS], transposed=True)])
        g.output(f"y_{name}", g.op("Sigmoid", [y]), ir.DataType.FLOAT, ["batch", "sequence", ROWS])
    model = opened_graph(g.finish())
    join_projections(model.graph, store(a=five, b=other))
    assert matmuls(model) == {("a",), ("b",)}


@pytest.mark.parametrize(
    ("graph", "weights"),
    [
        (projections("qkv"), qkv(FOUR, EIGHT, CHANGES["float32"])),
        (projections("q", biased="q"), qkv(FOUR, FOUR, FOUR)),
        (projections("qkv", inputs=3), qkv(FOUR, FOUR, FOUR)),
    ],
    ids=["three grids", "one alone", "three inputs"],
)
def test_what_has_no_sibling_is_left_alone(graph: bytes, weights: WeightStore) -> None:
    model = opened_graph(graph)
    before = kinds(model)
    join_projections(model.graph, weights)
    assert kinds(model) == before
    assert all(len(parts) == 1 for parts in matmuls(model))


def test_a_bias_that_others_read_around_is_no_bias(tmp_path: Path) -> None:
    """The product of q goes somewhere else as well, so its Add is an ordinary one; k has a bias. Nothing is joined."""
    g = GraphBuilder("around")
    x = g.input("x", ir.DataType.FLOAT, ["batch", "sequence", WIDTH])
    q = g.op("MatMul", [x, g.weight("q", [WIDTH, ROWS], transposed=True)])
    k = g.op("MatMul", [x, g.weight("k", [WIDTH, ROWS], transposed=True)])
    k = g.op("Add", [k, g.weight("k_bias", [ROWS])])
    with_bias = g.op("Add", [q, g.weight("q_bias", [ROWS])])
    for name, value in (("a", q), ("b", with_bias), ("c", k)):
        g.output(f"y_{name}", g.op("Sigmoid", [value]), ir.DataType.FLOAT, ["batch", "sequence", ROWS])
    graph, weights = g.finish(), qkv(FOUR, FOUR, FOUR)
    model = opened_graph(graph)
    join_projections(model.graph, weights)
    assert matmuls(model) == {("q",), ("k",)}
    assert_same(model, graph, weights, tmp_path)


def test_names_of_joined_weights() -> None:
    views = [ir.Value(name=f"weight/{name}.T") for name in ("a.weight", "b.weight")]
    assert joined_name(views) == "weight/a.weight+b.weight.T"
    assert weight_parts(ir.Value(name=joined_name(views))) == ("a.weight", "b.weight")
    assert joined_name([ir.Value(name="weight/a.bias"), ir.Value(name="weight/b.bias")]) == "weight/a.bias+b.bias"
    assert weight_parts(ir.Value(name="hidden")) == ()


def attention_of(model: OnnxModel, *, joined: bool = True, half: bool = False) -> ir.Model:
    """Return a decoder's graph after fuse_attention."""
    found = opened_graph(model.graphs["decoder"])
    if joined:
        join_projections(found.graph, model.weights)
    fuse_attention(found.graph, model.spec, ir.DataType.FLOAT16 if half else ir.DataType.FLOAT)
    return found


def group_queries(model: ir.Model) -> list[ir.Node]:
    """Return the fused nodes."""
    return [node for node in model.graph if node.op_type == "GroupQueryAttention"]


def test_attention_takes_the_packed_projections(folder: Path) -> None:
    model = attention_of(exported(opened(folder, "llama grouped")))
    assert not {"Attention"} & set(kinds(model))
    nodes = group_queries(model)
    assert len(nodes) == 2
    for layer, node in enumerate(nodes):
        qkv_value, key, value, past_key, past_value, lengths, total, cos, sin = node.inputs
        assert qkv_value is not None and qkv_value.producer().op_type == "MatMul"
        assert (key, value) == (None, None)
        assert past_key is not None and past_key.name == f"past_key.{layer}"
        assert past_value is not None and past_value.name == f"past_value.{layer}"
        assert (lengths.name, total.name) == ("seqlens_k", "total_sequence_length")
        assert cos is not None and sin is not None and cos is not sin
        found = {name: attribute.value for name, attribute in node.attributes.items()}
        assert found == {
            "num_heads": 6,
            "kv_num_heads": 2,
            "scale": pytest.approx(0.25),
            "do_rotary": 1,
            "local_window_size": -1,
        }


def test_attention_takes_projections_apart_where_they_are(folder: Path) -> None:
    """Not joined, or not all of one kind, q, k and v are three operands."""
    apart = attention_of(exported(opened(folder, "llama")), joined=False)
    for model in (apart, attention_of(exported(mixed(opened(folder, "llama"))))):
        for node in group_queries(model):
            assert all(value is not None for value in node.inputs[:3])


def test_normed_heads_are_not_taken_packed(folder: Path) -> None:
    """Qwen3's queries and keys go through a norm after the split."""
    for node in group_queries(attention_of(exported(opened(folder, "qwen3")))):
        assert all(value is not None for value in node.inputs[:3])


def test_windows_and_layers_without_positions(folder: Path) -> None:
    nodes = group_queries(attention_of(exported(opened(folder, "smollm3 windows"))))
    assert [node.attributes["local_window_size"].as_int() for node in nodes] == [-1, 5]
    assert [node.attributes["do_rotary"].as_int() for node in nodes] == [0, 1]
    assert nodes[0].inputs[7] is None


def test_the_scale_is_the_configs(folder: Path) -> None:
    nodes = group_queries(attention_of(exported(opened(folder, "granite"))))
    assert [node.attributes["scale"].as_float() for node in nodes] == pytest.approx([0.05, 0.05])


def test_a_float16_cache_puts_casts_around(folder: Path) -> None:
    model = attention_of(exported(opened(folder, "llama")), half=True)
    for node in group_queries(model):
        for value in (node.inputs[0], node.inputs[7], node.inputs[8]):
            assert value is not None and value.producer().op_type == "Cast"
            assert value.producer().attributes["to"].as_int() == ir.DataType.FLOAT16
        (after,) = node.outputs[0].consumers()
        assert (after.op_type, after.attributes["to"].as_int()) == ("Cast", ir.DataType.FLOAT)
    caches = [v for v in [*model.graph.inputs, *model.graph.outputs] if v.name.startswith(("past_", "present_"))]
    assert len(caches) == 8
    assert {value.dtype for value in caches} == {ir.DataType.FLOAT16}


@pytest.mark.parametrize("kind", DECODERS)
def test_the_lowered_graph_has_the_signature_of_the_bundle(folder: Path, kind: str) -> None:
    """Nothing is left that a runtime would have to feed: positions follow from the lengths."""
    model = exported(all_on(opened(folder, kind), "4 bits"))
    graph = onnx.load_model_from_string(engine.lower(model, accuracy_level=0)[0]["decoder"]).graph
    caches = {f"_{part}.{i}" for part in ("key", "value") for i in range(2)}
    fixed = {"input_ids", "seqlens_k", "total_sequence_length", "logits_positions"}
    assert {value.name for value in graph.input} == fixed | {f"past{cache}" for cache in caches}
    assert {value.name for value in graph.output} == {"logits"} | {f"present{cache}" for cache in caches}
    sizes = {"kv_heads": model.spec["kv_heads"], "head_dim": model.spec["head_dim"]}
    for value in graph.input:
        if value.name.startswith("past"):
            dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            assert dims == ["batch", sizes["kv_heads"], 64, sizes["head_dim"]]


def test_queries_rotated_and_keys_not_is_an_error() -> None:
    g = GraphBuilder("half rotated")
    values = [g.input(name, ir.DataType.FLOAT, ["batch", "sequence", 32]) for name in "qkv"]
    past = [g.input(f"past_{kind}.0", ir.DataType.FLOAT, ["batch", 2, "past", 16]) for kind in ("key", "value")]
    positions = g.input("position_ids", ir.DataType.INT64, ["batch", "sequence"])
    tables = [g.constant(table) for table in np.ones((2, 8, 8), np.float32)]
    values[0] = g.op("RotaryEmbedding", [values[0], *tables, positions], {"num_heads": 2})
    attributes = {"q_num_heads": 2, "kv_num_heads": 2, "scale": 0.25, "is_causal": 1}
    y, _, _ = g.op_multi("Attention", [*values, None, *past], attributes, 3)
    g.output("y", y, ir.DataType.FLOAT, ["batch", "sequence", 32])
    model = opened_graph(g.finish())
    with pytest.raises(ContractError, match="queries are rotated and whose keys are not"):
        fuse_attention(model.graph, {"kv_heads": 2, "context": 8, "head_dim": 16}, ir.DataType.FLOAT)


def norms(*, bias: bool = False, constant: bool = False, add: bool = True) -> bytes:
    """Build RMSNormalization(a + b) and its sum, or that of a bias, of a constant, or of x alone."""
    g = GraphBuilder("norms")
    x = g.input("x", ir.DataType.FLOAT, ["batch", "sequence", WIDTH])
    other = g.op("Sigmoid", [x])
    if bias:
        other = g.weight("bias", [WIDTH])
    if constant:
        other = g.constant(np.full(1, 3, np.float32))
    total = g.op("Add", [x, other]) if add else other
    y = g.op("RMSNormalization", [total, g.weight("norm", [WIDTH])], {"axis": -1, "epsilon": 0.02})
    g.output("y", g.op("Neg", [y]), ir.DataType.FLOAT, ["batch", "sequence", WIDTH])
    g.output("sum", g.op("Tanh", [total]), ir.DataType.FLOAT, ["batch", "sequence", WIDTH])
    return g.finish()


NORM_WEIGHTS = store(norm=matrix(1, 1)[0], bias=matrix(2, 1)[0])


def test_a_sum_and_its_norm_are_one_node(tmp_path: Path) -> None:
    """The sum is still there for those who read it."""
    model = opened_graph(norms())
    fuse_norms(model.graph)
    assert kinds(model) == ["Sigmoid", "SkipSimplifiedLayerNormalization", "Neg", "Tanh"]
    assert_same(model, norms(), NORM_WEIGHTS, tmp_path)


@pytest.mark.parametrize(
    ("graph", "left"),
    [
        (norms(add=False), ["Sigmoid", "SimplifiedLayerNormalization", "Neg", "Tanh"]),
        (norms(bias=True), ["Sigmoid", "Add", "SimplifiedLayerNormalization", "Neg", "Tanh"]),
        (norms(constant=True), ["Sigmoid", "Add", "SimplifiedLayerNormalization", "Neg", "Tanh"]),
    ],
    ids=["no sum", "a bias", "a constant"],
)
def test_what_is_no_sum_of_hidden_states_stays(tmp_path: Path, graph: bytes, left: list[str]) -> None:
    model = opened_graph(graph)
    fuse_norms(model.graph)
    assert kinds(model) == left
    assert_same(model, graph, NORM_WEIGHTS, tmp_path)


def gated(which: str) -> bytes:
    """Build a product with a Sigmoid: of the same value, of another one, or of the same with operands swapped."""
    g = GraphBuilder("gated")
    x = g.input("x", ir.DataType.FLOAT, ["batch", "sequence", WIDTH])
    other = g.op("Tanh", [x])
    gate = g.op("Sigmoid", [other if which == "another" else x])
    operands = [gate, x] if which == "swapped" else [x, gate]
    y = g.op("Tanh", [g.op("Mul", operands)])
    g.output("y", y, ir.DataType.FLOAT, ["batch", "sequence", WIDTH])
    g.output("other", g.op("Add", [other, other]), ir.DataType.FLOAT, ["batch", "sequence", WIDTH])
    return g.finish()


def test_silu_is_one_node(tmp_path: Path) -> None:
    model = opened_graph(gated("same"))
    fuse_norms(model.graph)
    assert kinds(model) == ["Tanh", "QuickGelu", "Tanh", "Add"]
    assert_same(model, gated("same"), store(), tmp_path)


@pytest.mark.parametrize("which", ["another", "swapped"])
def test_other_products_with_a_sigmoid_stay(tmp_path: Path, which: str) -> None:
    model = opened_graph(gated(which))
    fuse_norms(model.graph)
    assert kinds(model) == ["Tanh", "Sigmoid", "Mul", "Tanh", "Add"]
    assert_same(model, gated(which), store(), tmp_path)


def placed(value: Value, *, bias: bool = False, level: int = 0) -> ir.Model:
    """Return Sigmoid(x·Wᵀ (+ bias)) with its weight placed."""
    weights = store(q=value, q_bias=matrix(1, 1, ROWS)[0])
    model = opened_graph(projections("q", biased="q" if bias else ""))
    place_weights(model.graph, weights, WeightsFile(), level)
    return model


def kernel(model: ir.Model) -> ir.Node:
    """Return the one MatMulNBits of a graph."""
    (node,) = [node for node in model.graph if node.op_type == "MatMulNBits"]
    return node


@pytest.mark.parametrize("level", [0, 4])
def test_a_4_bit_product(level: int) -> None:
    node = kernel(model := placed(FOUR(matrix(0)), level=level))
    found = {name: attribute.value for name, attribute in node.attributes.items()}
    assert found == {"K": WIDTH, "N": ROWS, "bits": 4, "block_size": 32, "accuracy_level": level}
    codes = node.inputs[1]
    assert codes is not None and codes.shape == (ROWS, 2, 16)
    assert kinds(model) == ["Cast", "MatMulNBits", "Sigmoid"]  # the scale's Cast, folded when the engine loads
    assert [value.name for value in model.graph.inputs] == ["x"]


@pytest.mark.parametrize("grid", ["2 bits", "8 bits"])
def test_2_and_8_bit_products_in_float32_are_two_int8_parts(grid: str) -> None:
    change = CHANGES[grid]
    exact, rounded_ = placed(change(matrix(0)), level=0), placed(change(matrix(0)), level=4)
    assert kernel(exact).attributes["accuracy_level"].as_int() == 4
    assert kernel(exact).outputs[0].consumers()[0].op_type == "ReduceSum"
    assert kinds(rounded_) == ["Cast", "MatMulNBits", "Sigmoid"]


def test_a_2_bit_product_of_many_rows_is_one_product() -> None:
    """The kernel decodes the weight once for all rows, and computes in float32."""
    weights = store(q=CHANGES["2 bits"](matrix(0)))
    model = opened_graph(projections("q"))
    place_weights(model.graph, weights, WeightsFile(), 0, many_rows=True)
    assert kernel(model).attributes["accuracy_level"].as_int() == 0
    assert kinds(model) == ["Cast", "MatMulNBits", "Sigmoid"]


def test_a_bias_goes_into_the_kernel_where_it_is_added_once() -> None:
    inside = placed(FOUR(matrix(0)), bias=True)
    assert kernel(inside).inputs[5] is not None
    assert "Add" not in kinds(inside)
    in_two = placed(EIGHT(matrix(0)), bias=True)
    assert len(kernel(in_two).inputs) < 6 or kernel(in_two).inputs[5] is None
    assert kinds(in_two).count("Add") == 1


@pytest.mark.parametrize("bits", [2, 4])
def test_zero_points_are_packed_as_the_kernel_wants_them(bits: int) -> None:
    """Three groups a row: two or four bits each, padded to whole bytes."""
    value = rounded(matrix(0, ROWS, 90), bits=bits, symmetric=False)
    weights = store(q=value)
    g = GraphBuilder("zero points")
    x = g.input("x", ir.DataType.FLOAT, ["batch", "sequence", 90])
    y = g.op("MatMul", [x, g.weight("q", [90, ROWS], transposed=True)])
    g.output("y", g.op("Sigmoid", [y]), ir.DataType.FLOAT, ["batch", "sequence", ROWS])
    model = opened_graph(g.finish())
    file = WeightsFile()
    place_weights(model.graph, weights, file, 0)
    (zeros,) = [tensor for tensor in file.tensors if tensor.name == "q:zero_points"]
    packed = zeros.load()
    assert packed.shape == zeros.shape == (ROWS, bits // 2)
    assert value.zero_points is not None
    np.testing.assert_array_equal(unpack_naively(packed, bits)[:, :3], value.zero_points)
    assert (unpack_naively(packed, bits)[:, 3:] == 0).all()


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
def test_a_float_product(storage: str) -> None:
    model = placed(CHANGES[storage](matrix(0)))
    cast = [] if storage == "float32" else ["Cast"]
    assert kinds(model) == [*cast, "FusedMatMul", "Sigmoid"]
    (weight,) = model.graph.initializers.values()
    assert weight.dtype is not None and weight.dtype.name in {"FLOAT", "FLOAT16", "BFLOAT16"}
    assert (weight.shape, weight.dtype.itemsize) == ((ROWS, WIDTH), 4 if storage == "float32" else 2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("storage", CHANGES)
def test_products_are_the_portable_ones(tmp_path: Path, storage: str, bias: bool) -> None:
    graph, weights = projections("q", biased="q" if bias else ""), qkv(*[CHANGES[storage]] * 3)
    assert_same(opened_graph(graph), graph, weights, tmp_path)


@pytest.mark.parametrize("storage", CHANGES)
def test_gathered_rows_are_exact(tmp_path: Path, storage: str) -> None:
    """Embedding rows are only decoded: nothing is lost, and a table's padding is cut off."""
    weights = store(table=CHANGES[storage](matrix(0)))
    g = GraphBuilder("rows")
    ids = g.input("x", ir.DataType.INT64, ["batch", "sequence"])
    rows = g.op("Gather", [g.weight("table", [ROWS, WIDTH]), ids])
    g.output("y", g.op("Neg", [rows]), ir.DataType.FLOAT, ["batch", "sequence", WIDTH])
    graph = g.finish()
    ids_value = np.array([[0, 5], [23, 5]])
    (got,) = run(opened_graph(graph), weights, tmp_path, ids_value)
    expected = evaluate(graph, weights, {"x": ids_value})["y"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_sums_over_groups_are_made_once() -> None:
    """Weights with minima that read the same value share them."""
    minima = CHANGES["4 bits minima"]
    model = opened_graph(projections("qkv"))
    place_weights(model.graph, qkv(minima, minima, minima), WeightsFile(), 0)
    assert kinds(model).count("ReduceSum") == 1
    assert kinds(model).count("MatMulNBits") == 3


def test_5_bit_codes_lie_around_the_middle_of_8_bits() -> None:
    """In the file only: the model's own codes are the source's."""
    value = gguf_blocks(matrix(0, ROWS, 64), "Q5_1")
    weights, file = store(q=value), WeightsFile()
    g = GraphBuilder("five")
    x = g.input("x", ir.DataType.FLOAT, ["batch", "sequence", 64])
    y = g.op("MatMul", [x, g.weight("q", [64, ROWS], transposed=True)])
    g.output("y", g.op("Sigmoid", [y]), ir.DataType.FLOAT, ["batch", "sequence", ROWS])
    place_weights(opened_graph(g.finish()).graph, weights, file, 0)
    (codes,) = [tensor.load() for tensor in file.tensors if tensor.name == "q:codes"]
    assert (value.codes.min(), value.codes.max()) == (0, 31)
    assert (codes.min(), codes.max()) == (112, 143)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_transposed_view_with_another_use_is_decoded_whole(tmp_path: Path, bits: int) -> None:
    value: Value = matrix(0)
    if bits < 16:
        value = round_to_nearest(matrix(0), bits=bits, group=32, symmetric=True)
    weights = store(q=value)
    g = GraphBuilder("odd")
    x = g.input("x", ir.DataType.FLOAT, [WIDTH, ROWS])
    g.output("y", g.op("Mul", [x, g.weight("q", [WIDTH, ROWS], transposed=True)]), ir.DataType.FLOAT, [WIDTH, ROWS])
    ones = np.ones((WIDTH, ROWS), np.float32)
    (y,) = run(opened_graph(g.finish()), weights, tmp_path, ones)
    np.testing.assert_allclose(y, weights.float32("q").T, rtol=1e-6, atol=1e-7)


def test_every_pass_leaves_a_graph_without_its_operators_alone() -> None:
    g = GraphBuilder("plain")
    x = g.input("x", ir.DataType.FLOAT, ["batch", "sequence", WIDTH])
    other = g.op("MatMul", [x, g.op("Transpose", [x], {"perm": [0, 2, 1]})])
    g.output("y", g.op("Mul", [other, g.op("Add", [other, g.constant(np.float32(1))])]), ir.DataType.FLOAT, [])
    model = opened_graph(g.finish())
    before = ir.to_proto(model).SerializeToString()
    for apply in (
        partial(join_projections, weights=store()),
        fuse_norms,
        partial(place_weights, weights=store(), file=WeightsFile(), accuracy_level=0),
    ):
        apply(model.graph)
        assert ir.to_proto(model).SerializeToString() == before
