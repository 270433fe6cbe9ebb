"""Constants found again among the weights: by name, by content, transposed, and what is left alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgepipe.graph.match import name_weights
from edgepipe.weights import WeightStore
from tests.decoders import rounded, stored

RANDOM = np.random.default_rng(3)
WIDE = RANDOM.standard_normal((6, 32), dtype=np.float32)
SQUARE = RANDOM.standard_normal((4, 4), dtype=np.float32)
KERNEL = RANDOM.standard_normal((3, 2, 5), dtype=np.float32)
NORM = np.ones(6, np.float32)


def store() -> WeightStore:
    """Return four weights; the wide one on a grid of 8 bits, two norms that hold the same, one alias."""
    weights = {
        "wide": stored("wide", rounded(WIDE, bits=8)),
        "square": stored("square", SQUARE.astype(np.float16)),
        "kernel": stored("kernel", KERNEL),
        "first_norm": stored("first_norm", NORM),
        "second_norm": stored("second_norm", NORM),
    }
    return WeightStore(weights, {"tied": "wide"})


def graph_of(constants: dict[str, np.ndarray]) -> ir.Graph:
    """Return a graph in which one node reads every constant."""
    values = {name: ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in constants.items()}
    node = ir.node("Custom", list(values.values()))
    return ir.Graph(inputs=[], outputs=node.outputs, nodes=[node], initializers=list(values.values()), name="test")


def read_by(graph: ir.Graph) -> list[str]:
    """Return the names of what the node reads."""
    return [value.name or "" for value in graph[0].inputs if value is not None]


def test_by_name() -> None:
    """Names that survived, an alias among them, lead to the stored entry."""
    weights = store()
    graph = graph_of({"wide": weights.float32("wide"), "tied": weights.float32("wide"), "kernel": KERNEL})
    assert name_weights(graph, weights) == (3, 0)
    assert read_by(graph) == ["weight/wide", "weight/wide", "weight/kernel"]
    assert not graph.initializers
    assert [(v.name, v.shape) for v in graph.inputs] == [("weight/wide", [6, 32]), ("weight/kernel", [3, 2, 5])]


def test_by_content() -> None:
    """Renamed constants are recognized by the values of the grid, transposed ones become views."""
    weights = store()
    wide, square = weights.float32("wide"), weights.float32("square")
    graph = graph_of({"onnx::MatMul_1": wide.T, "onnx::MatMul_2": square.T, "a": square, "b": KERNEL, "c": wide})
    assert name_weights(graph, weights) == (0, 5)
    assert read_by(graph) == ["weight/wide.T", "weight/square.T", "weight/square", "weight/kernel", "weight/wide"]
    assert list(graph.inputs[0].shape or ()) == [32, 6]


def test_a_name_is_believed_only_with_the_values() -> None:
    """A transposed constant under the weight's own name is the view; other values under it stay a constant."""
    weights = store()
    graph = graph_of({"square": weights.float32("square").T, "kernel": KERNEL + 1, "second_norm": NORM})
    assert name_weights(graph, weights) == (1, 1)
    assert read_by(graph) == ["weight/square.T", "kernel", "weight/second_norm"]
    assert list(graph.initializers) == ["kernel"]


def test_equal_weights_are_one() -> None:
    """Of two weights that hold the same, a constant without a name is the first, whatever its name was."""
    graph = graph_of({"x": NORM, "y": NORM})
    assert name_weights(graph, store()) == (0, 2)
    assert read_by(graph) == ["weight/first_norm", "weight/first_norm"]


@pytest.mark.parametrize(
    "constant",
    [np.array(1.0, np.float32), np.array([1], np.float32), np.arange(6), KERNEL[:, :, :4], WIDE],
    ids=["a scalar", "one number", "integers", "a part", "before rounding"],
)
def test_what_stays(constant: np.ndarray) -> None:
    graph = graph_of({"c": constant})
    assert name_weights(graph, store()) == (0, 0)
    assert read_by(graph) == ["c"] and list(graph.initializers) == ["c"] and not graph.inputs
