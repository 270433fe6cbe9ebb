"""Pass: add the sentence embedding to an encoder's graph, from last_hidden_state and attention_mask.

    mean   Σ hidden · mask / max(Σ mask, 1e-9)        cls   hidden[:, 0]
    max    of hidden where mask, over the tokens      last  hidden[i, Σ mask[i] − 1]

then x / max(‖x‖, 1e-12) when embeddings are to have length 1. The same as modules.py says in torch.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import onnx_ir as ir

from edgepipe.errors import StageError
from edgepipe.graph.dialect import Attribute

_FLOAT = int(ir.DataType.FLOAT)


class Tape(Protocol):
    """Say what takes nodes: the end of a traced graph here, or the dialect's GraphBuilder."""

    def op(self, kind: str, inputs: list[ir.Value | None], attributes: dict[str, Attribute] | None = None) -> ir.Value:
        """Append a node and return its output."""

    def constant(self, array: np.ndarray) -> ir.Value:
        """Return a constant."""


def add_embedding(graph: ir.Graph, pooling: str, *, normalize: bool) -> None:
    """Make `embedding` [batch, hidden] float32 the first output of a graph that gives last_hidden_state."""
    tape = _Tape(graph)
    (hidden,) = (value for value in graph.outputs if value.name == "last_hidden_state")
    mask = next((value for value in graph.inputs if value.name == "attention_mask"), None)
    if mask is None and pooling != "cls":
        raise StageError(f"the graph takes no attention_mask, which the pooling {pooling!r} needs")
    vector = pool(tape, hidden, mask, pooling)
    if normalize:
        vector = unit_length(tape, vector)
    vector.name = "embedding"
    vector.type = ir.TensorType(ir.DataType.FLOAT)
    graph.extend(tape.nodes)
    graph.outputs.insert(0, vector)


def pool(tape: Tape, hidden: ir.Value, mask: ir.Value | None, pooling: str) -> ir.Value:
    """Pool hidden [B, S, H] over the tokens where mask [B, S] is 1 → [B, H]; "cls" reads no mask."""
    if pooling == "cls" or mask is None:
        return tape.op("Gather", [hidden, tape.constant(np.array(0, np.int64))], {"axis": 1})
    second, last = (tape.constant(np.array([axis], np.int64)) for axis in (1, -1))
    if pooling == "last":
        end = tape.op("Sub", [tape.op("ReduceSum", [mask, second], {"keepdims": 1}), tape.constant(np.array(1))])
        return tape.op("GatherND", [hidden, end], {"batch_dims": 1})
    wide = tape.op("Unsqueeze", [mask, last])
    if pooling == "max":
        lowest = tape.constant(np.array(np.finfo(np.float32).min, np.float32))
        kept = tape.op("Where", [tape.op("Cast", [wide], {"to": int(ir.DataType.BOOL)}), hidden, lowest])
        return tape.op("ReduceMax", [kept, second], {"keepdims": 0})
    weight = tape.op("Cast", [wide], {"to": _FLOAT})
    total = tape.op("ReduceSum", [tape.op("Mul", [hidden, weight]), second], {"keepdims": 0})
    count = tape.op("ReduceSum", [weight, second], {"keepdims": 0})
    return tape.op("Div", [total, tape.op("Max", [count, tape.constant(np.array(1e-9, np.float32))])])


def unit_length(tape: Tape, vector: ir.Value) -> ir.Value:
    """Divide vectors [B, H] by their lengths."""
    length = tape.op("ReduceL2", [vector, tape.constant(np.array([1], np.int64))], {"keepdims": 1})
    return tape.op("Div", [vector, tape.op("Max", [length, tape.constant(np.array(1e-12, np.float32))])])


class _Tape:
    """Collect nodes and constants for the end of a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.nodes: list[ir.Node] = []
        self._graph = graph

    def op(self, kind: str, inputs: list[ir.Value | None], attributes: dict[str, Attribute] | None = None) -> ir.Value:
        self.nodes.append(ir.node(kind, inputs, attributes or {}))
        return self.nodes[-1].outputs[0]

    def constant(self, array: np.ndarray) -> ir.Value:
        name = f"pooling.{len(self._graph.initializers)}"
        self._graph.initializers[name] = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        return self._graph.initializers[name]
