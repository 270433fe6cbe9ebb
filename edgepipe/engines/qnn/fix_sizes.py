"""Pass: give every axis its size, and compute now what depends on sizes and weights alone.

    Shape(x), Range, Expand of sizes, tables of positions, Gather(weight, known ids)  →  constants
    everything that depends on ids, masks or other data                               →  stays

The graph is run once, node by node, by the operators that define the dialect, so nothing is assumed of how an exporter
writes shapes. What comes out holds its weights, float32, as initializers under the names the dialect gives them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from edgepipe.errors import TargetError
from edgepipe.graph.dialect import weight_name
from edgepipe.graph.evaluate import run_node
from edgepipe.weights import WeightStore


def fix_sizes(
    portable: bytes,
    weights: WeightStore,
    sizes: Mapping[str, int],
    constant: Mapping[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    """Return a portable graph with the size of every named axis, as `sizes` has them; every shape is written down.

    `constant` are inputs that never change: they become constants. Raises TargetError for a graph whose inputs have
    other axes of any length.
    """
    model = onnx.load_model_from_string(portable)
    graph = model.graph
    known: dict[str, np.ndarray] = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    known |= constant or {}
    named = {value.name: weight_name(value.name) for value in graph.input}
    example = {v.name: _example(v, sizes) for v in graph.input if named[v.name] is None and v.name not in known}
    seen: dict[str, np.ndarray] = dict(example)
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        for name in node.input:
            stored = named.get(name)
            if stored is not None and name not in known:
                value = weights.float32(stored[0])
                known[name] = value.T if stored[1] else value
        inputs = {name: known[name] if name in known else seen[name] for name in node.input if name}
        fixed = node.op_type == "Shape" or all(name in known for name in inputs)
        results = dict(zip(node.output, run_node(node, inputs), strict=True))
        (known if fixed else seen).update({name: value for name, value in results.items() if name})
        if not fixed:
            kept.append(node)
    read = {name for node in kept for name in node.input if name in known}
    outputs = [value.name for value in graph.output]
    if computed := [name for name in outputs if name in known]:
        raise TargetError(f"the graph's output {computed[0]} depends on no text: there is nothing to run")
    fixed_graph = onnx.helper.make_graph(
        kept,
        graph.name or "model",
        [_described(name, value) for name, value in example.items()],
        [_described(name, seen[name]) for name in outputs],
        [onnx.numpy_helper.from_array(known[name], name) for name in sorted(read)],
        value_info=[_described(n, v) for n, v in seen.items() if n not in example and n not in outputs],
    )
    return onnx.helper.make_model(fixed_graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _example(value: onnx.ValueInfoProto, sizes: Mapping[str, int]) -> np.ndarray:
    """Return what an input is given while sizes are found: ones, since a mask of zeros would hide every token."""
    tensor = value.type.tensor_type
    dims = [dim.dim_value or sizes.get(dim.dim_param, 0) for dim in tensor.shape.dim]
    if not all(dims):
        free = next(dim.dim_param for dim, size in zip(tensor.shape.dim, dims, strict=True) if not size)
        raise TargetError(
            f"an NPU runs fixed shapes, and {value.name} has an axis {free!r} beside {' and '.join(sizes)}: take "
            "a model of texts, or another target"
        )
    return np.ones(dims, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))


def _described(name: str, value: np.ndarray) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
