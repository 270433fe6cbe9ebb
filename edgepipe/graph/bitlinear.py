"""Pass: ternary layers put what they read through a LayerNorm without weights, as BitLinear does.

    MatMul(x, W.T)   → MatMul(LayerNormalization(x, ones), W.T)      over the last axis, ε 1e-5; once for each x

The norm belongs to how such layers were trained (quantizers/fake.py), so it stands in the portable graph. The
framework's module has none: export compares it with the graph as it was before. Left alone: all other matrices.
Source: arXiv:2411.05882 and its authors' BitLinear.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
import onnx_ir as ir

from edgepipe.errors import ContractError
from edgepipe.graph.dialect import weight_name

EPSILON = 1e-5


def normalize_inputs(portable: bytes, layers: Collection[str]) -> bytes:
    """Return a graph in which the products by the matrices called `layers` read normalized values.

    Raises ContractError where one of them isn't multiplied so.
    """
    source = ir.from_proto(onnx.load_model_from_string(portable))
    graph = source.graph
    normed: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        w = next((value for value in node.inputs if value is not None and _name(value) in layers), None)
        if w is None:
            continue
        x = node.inputs[0]
        if node.op_type != "MatMul" or x is None or x is w:
            raise ContractError(f"{_name(w)} should read normalized values: {node.op_type} is no product that could")
        if x not in normed:
            width = w.shape[0]  # type: ignore[index]
            ones = _ones(graph, int(width))  # type: ignore[arg-type]
            norm = ir.node("LayerNormalization", [x, ones], {"axis": -1, "epsilon": EPSILON})
            graph.insert_before(node, norm)
            norm.outputs[0].name = f"normalized:{_name(w)}"
            norm.outputs[0].shape, norm.outputs[0].dtype = x.shape, ir.DataType.FLOAT
            normed[x] = norm.outputs[0]
        node.replace_input_with(0, normed[x])
    return bytes(ir.to_proto(source).SerializeToString(deterministic=True))


def _name(value: ir.Value) -> str:
    """Return the name of the weight that a value is; empty when it is none."""
    named = weight_name(value.name or "")
    return named[0] if named else ""


def _ones(graph: ir.Graph, width: int) -> ir.Value:
    name = f"ones_{width}"
    if name not in graph.initializers:
        tensor = ir.tensor(np.ones(width, np.float32), name=name)
        shape = ir.Shape([width])
        graph.initializers[name] = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor
        )
    return graph.initializers[name]
