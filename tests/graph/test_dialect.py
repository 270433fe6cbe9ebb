"""The dialect's builder: weights are named, not contained; constants are shared; what comes out is checked."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgepipe.graph.dialect import OPSET, GraphBuilder, weight_name


@pytest.mark.parametrize(
    ("value_name", "expected"),
    [
        ("weight/model.norm.weight", ("model.norm.weight", False)),
        ("weight/lm_head.weight.T", ("lm_head.weight", True)),
        ("weight/a+b.T", ("a+b", True)),
        ("input_ids", None),
        ("constant_0", None),
        ("", None),
    ],
)
def test_names_of_weights(value_name: str, expected: tuple[str, bool] | None) -> None:
    assert weight_name(value_name) == expected


def linear_graph() -> tuple[GraphBuilder, ir.Value]:
    """Start a graph x [batch, 4] → x·Wᵀ [batch, 3]."""
    g = GraphBuilder("linear")
    x = g.input("x", ir.DataType.FLOAT, ["batch", 4])
    return g, g.op("MatMul", [x, g.weight("w", [4, 3], transposed=True)])


def test_a_graph_and_its_signature() -> None:
    g, y = linear_graph()
    y = g.op("Add", [y, g.weight("b", [3])])
    g.output("y", y, ir.DataType.FLOAT, ["batch", 3])
    model = onnx.load_model_from_string(g.finish())
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
    assert [value.name for value in model.graph.input] == ["x", "weight/w.T", "weight/b"]
    assert [value.name for value in model.graph.output] == ["y"]
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Add"]
    assert list(model.graph.node[1].output) == ["y"]
    assert not model.graph.initializer
    batch, width = model.graph.input[0].type.tensor_type.shape.dim
    assert (batch.dim_param, width.dim_value) == ("batch", 4)


def test_a_view_is_declared_once() -> None:
    """The two views of one weight are two inputs, each of which any number of nodes reads."""
    g = GraphBuilder("views")
    assert g.weight("w", [3, 4]) is g.weight("w", [3, 4])
    assert g.weight("w", [4, 3], transposed=True) is g.weight("w", [4, 3], transposed=True)
    assert g.weight("w", [3, 4]) is not g.weight("w", [4, 3], transposed=True)


def test_a_constant_is_embedded_once() -> None:
    """Equal bytes of another type or shape are another constant."""
    g = GraphBuilder("constants")
    one = g.constant(np.float32(1))
    assert g.constant(np.array(1, np.float32)) is one
    others = [np.float64(1), np.array([1], np.float32), np.int32(np.float32(1).view(np.int32)), np.float32(2)]
    found = [g.constant(other) for other in others]
    assert len({id(value) for value in [one, *found]}) == 5
    assert len({value.name for value in [one, *found]}) == 5


def test_notes_and_attributes_reach_the_node() -> None:
    g, y = linear_graph()
    y = g.op("Gelu", [y], {"approximate": "tanh"}, notes={"seen": "yes"})
    g.output("y", y, ir.DataType.FLOAT, ["batch", 3])
    node = onnx.load_model_from_string(g.finish()).graph.node[1]
    assert [(a.name, a.s) for a in node.attribute] == [("approximate", b"tanh")]
    assert [(note.key, note.value) for note in node.metadata_props] == [("seen", "yes")]


def test_a_node_with_several_outputs() -> None:
    g = GraphBuilder("split")
    x = g.input("x", ir.DataType.FLOAT, [6])
    parts = g.op_multi("Split", [x], {"num_outputs": 3}, 3)
    for i, part in enumerate(parts):
        g.output(f"part.{i}", part, ir.DataType.FLOAT, [2])
    graph = onnx.load_model_from_string(g.finish()).graph
    assert list(graph.node[0].output) == ["part.0", "part.1", "part.2"]


def test_the_same_graph_is_the_same_bytes() -> None:
    def build() -> bytes:
        g, y = linear_graph()
        g.output("y", g.op("Mul", [y, g.constant(np.float32(2))]), ir.DataType.FLOAT, ["batch", 3])
        return g.finish()

    assert build() == build()


def test_a_graph_that_is_no_onnx_is_refused() -> None:
    g, y = linear_graph()
    g.output("y", g.op("NoSuchOperator", [y]), ir.DataType.FLOAT, ["batch", 3])
    with pytest.raises(onnx.checker.ValidationError):
        g.finish()
