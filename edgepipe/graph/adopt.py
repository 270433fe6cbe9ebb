"""Pass: a graph that the framework traced → the portable dialect.

    initializer of a parameter          → the named weight weight/NAME
    Transpose(weight/NAME)              → the view weight/NAME.T
    Gemm(x, W, b) with W transposed     → MatMul(x, weight/W.T) + b
    constants, shapes of constants …    → folded; what nothing reads is dropped

Everything else stays what the exporter wrote: standard operators of opset 23, Attention among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir

from edgepipe.errors import ConfigError, ContractError
from edgepipe.graph.dialect import OPSET, weight_input
from edgepipe.weights import WeightStore

_WEIGHT = "weight/"
_MOST_CONSTANT_BYTES = 64 << 20  # tables a model computes from its config; weights beyond this must be in the store


def adopt(
    traced: Any, name: str, weights: WeightStore, names: Mapping[str, str], dims: Mapping[str, Sequence[int | str]]
) -> bytes:
    """Return a traced model (onnx_ir.Model) as a serialized graph of the dialect.

    `names` maps initializers that a checkpoint must hold to entries of `weights`; `dims` gives the inputs their shapes,
    varying axes by name.
    Raises ConfigError when the graph reads a parameter that the store lacks.
    """
    _name_inputs(traced.graph, dims)
    _name_weights(traced.graph, weights, names)
    return to_dialect(traced, name)


def to_dialect(model: Any, name: str) -> bytes:
    """Return a model (onnx_ir.Model of opset 23), whose weights are named, as a serialized graph of the dialect."""
    graph = model.graph
    _split_gemms(graph)
    _simplify(model)
    _transpose_views(graph)
    _drop_unused(graph)
    _check_constants(graph)
    graph.name = name
    graph.opset_imports.clear()
    graph.opset_imports[""] = OPSET
    plain = ir.Model(graph, ir_version=10, producer_name="edgepipe")
    _strip(plain)
    proto = ir.to_proto(plain)
    proto = onnx.shape_inference.infer_shapes(proto)
    onnx.checker.check_model(proto)
    return bytes(proto.SerializeToString(deterministic=True))


def _name_inputs(graph: ir.Graph, dims: Mapping[str, Sequence[int | str]]) -> None:
    """Give the inputs the names and dimensions of the contract, in the order they were traced."""
    if len(graph.inputs) != len(dims):
        raise ContractError(f"the traced graph takes {len(graph.inputs)} inputs, where {len(dims)} were given")
    for value, (name, shape) in zip(graph.inputs, dims.items(), strict=True):
        value.name = name
        value.shape = ir.Shape(shape)


def _name_weights(graph: ir.Graph, weights: WeightStore, names: Mapping[str, str]) -> None:
    """Turn the initializers of parameters into named weights."""
    inputs: dict[str, ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
            continue
        stored = names.get(name)
        if stored is None:
            continue
        if stored not in weights:
            if value.dtype is None or not value.dtype.is_floating_point():
                continue  # positions and the like, which a module numbers itself
            raise ConfigError(
                f"the model's files have no {stored}, which this task needs: name the task they were saved for with "
                "--task"
            )
        real = weights[stored].name
        if real not in inputs:
            assert value.shape is not None
            inputs[real] = weight_input(real, value.shape.numpy())
        value.replace_all_uses_with(inputs[real])
        del graph.initializers[name]
    graph.inputs.extend(inputs.values())


def _split_gemms(graph: ir.Graph) -> None:
    """Write Gemm as MatMul and Add."""
    for node in list(graph):
        if node.op_type != "Gemm":
            continue
        x, w = node.inputs[:2]
        if node.attributes.get_int("transA", 0):
            continue
        nodes = []
        if node.attributes.get_int("transB", 0):
            nodes.append(ir.node("Transpose", [w], {"perm": [1, 0]}))
            w = nodes[-1].outputs[0]
        nodes.append(ir.node("MatMul", [x, w]))
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            nodes.append(ir.node("Add", [nodes[-1].outputs[0], node.inputs[2]]))
        last, old = nodes[-1].outputs[0], node.outputs[0]
        last.type, last.shape = old.type, old.shape
        graph.insert_before(node, nodes)
        old.replace_all_uses_with(last, replace_graph_outputs=True)
        if old.name:
            last.name, old.name = old.name, None
        graph.remove([node], safe=True)


def _simplify(model: Any) -> None:
    """Fold constants, drop casts and copies that change nothing, and share what is computed twice."""
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass, InlinePass, LiftConstantsToInitializersPass
    from onnxscript.optimizer import optimize_ir

    InlinePass()(model)
    optimize_ir(model, input_size_limit=1 << 20, output_size_limit=1 << 22)
    LiftConstantsToInitializersPass(size_limit=0)(model)
    CommonSubexpressionEliminationPass()(model)


def _transpose_views(graph: ir.Graph) -> None:
    """Replace Transpose of a whole weight matrix by its transposed view."""
    views: dict[str, ir.Value] = {}
    for node in list(graph):
        if node.op_type != "Transpose":
            continue
        source = node.inputs[0]
        if source is None or not (source.name or "").startswith(_WEIGHT) or source.shape is None:
            continue
        if list(node.attributes.get_ints("perm", [1, 0])) != [1, 0] or len(source.shape) != 2:
            continue
        name = f"{source.name}.T"
        if name not in views:
            rows, columns = source.shape
            views[name] = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([columns, rows]))
            graph.inputs.append(views[name])
        node.outputs[0].replace_all_uses_with(views[name])
        graph.remove([node], safe=True)


def _drop_unused(graph: ir.Graph) -> None:
    """Remove nodes, last to first, then weights and constants, that nothing reads."""
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(o.uses() or o in outputs for o in node.outputs):
            graph.remove([node], safe=True)
    for value in list(graph.inputs):
        if not value.uses() and (value.name or "").startswith(_WEIGHT):
            graph.inputs.remove(value)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]


def _check_constants(graph: ir.Graph) -> None:
    """Refuse a graph that carries more than tables: a weight inside it would ship as floats."""
    total = sum(v.const_value.nbytes for v in graph.initializers.values() if v.const_value is not None)
    if total > _MOST_CONSTANT_BYTES:
        raise ContractError(f"{total >> 20} MiB of constants stayed inside the traced graph: they should be weights")


def _strip(model: Any) -> None:
    """Take out what the exporter noted for debugging: stack traces with paths of this machine."""
    model.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        for output in node.outputs:
            output.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
