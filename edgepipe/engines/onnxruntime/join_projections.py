"""Pass: MatMuls that read the same value become one MatMul over joined rows, then a Split.

    q = x·Wq (+ bq) ; k = x·Wk (+ bk) ; v = x·Wv (+ bv)   →   q, k, v = Split(x·[Wq|Wk|Wv] (+ [bq|bk|bv]))

One kernel call instead of three: at one token a call costs as much as its arithmetic. Weights are joined only when
they lie on grids of one kind (bits, group, offset), all or none have a bias, and all or none read rounded tokens;
others stay as they are, and so do weights that are multiplied as stored (GPT-2) and products that are the graph's own
outputs.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from edgepipe.artifacts import QuantizedTensor
from edgepipe.engines.onnxruntime.names import is_transposed, joined_name, weight_parts
from edgepipe.engines.onnxruntime.planned import middle_code
from edgepipe.weights import WeightStore

Kind = tuple[str, int, int, int, bool, bool]


def join_projections(graph: ir.Graph, weights: WeightStore, rounded: Collection[str] = ()) -> None:
    """Join every group of sibling projections of `graph` in place; `rounded` names weights that read rounded tokens."""
    siblings: dict[tuple[ir.Value, Kind], list[ir.Node]] = defaultdict(list)
    for node in graph:
        if (
            node.op_type == "MatMul"
            and is_transposed(node.inputs[1])
            and not (_bias(node) or node).outputs[0].is_graph_output()
        ):
            x = node.inputs[0]
            assert x is not None
            siblings[x, _kind(node, weights, rounded)].append(node)
    for group in siblings.values():
        if len(group) > 1:
            _join(graph, group)


def grid_kind(weights: WeightStore, name: str) -> tuple[str, int, int, int]:
    """Return what must agree for two weights to share a kernel call: (dtype and offset, bits, group, middle code)."""
    record = weights[name]
    if record.grid is None:
        return record.dtype, 0, 0, 0
    value = weights.load(name)
    assert isinstance(value, QuantizedTensor)
    offset = "z" if value.zero_points is not None else "m" if value.minima is not None else ""
    if value.column_scale is not None:  # what is read is multiplied by them: all must have the same
        offset += hashlib.sha256(np.asarray(value.column_scale).tobytes()).hexdigest()
    return value.scale.dtype.name + offset, value.bits, value.group, middle_code(value)


def _kind(node: ir.Node, weights: WeightStore, rounded: Collection[str]) -> Kind:
    assert node.inputs[1] is not None
    name = weight_parts(node.inputs[1])[0]
    return *grid_kind(weights, name), _bias(node) is not None, weights[name].name in rounded


def _bias(node: ir.Node) -> ir.Node | None:
    """Return the Add that gives a MatMul its bias, when its result goes nowhere else."""
    users = node.outputs[0].consumers()
    if len(users) == 1:
        user: ir.Node = users[0]
        added = user.inputs[1] if user.op_type == "Add" else None
        if added is not None and weight_parts(added) and added.shape is not None and len(added.shape) == 1:
            return user
    return None


def _join(graph: ir.Graph, group: list[ir.Node]) -> None:
    ends = [_bias(node) or node for node in group]
    x = group[0].inputs[0]
    views = [n.inputs[1] for n in group]
    widths = [v.shape.numpy()[-1] for v in views if v is not None and v.shape is not None]
    first = group[0]
    joined = joined_name([v for v in views if v is not None])
    weight = ir.Value(
        name=joined,
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([views[0].shape[0], sum(widths)]),  # type: ignore[union-attr,index]
    )
    graph.inputs.append(weight)
    nodes = [ir.node("MatMul", [x, weight])]
    if _bias(first) is not None:
        biases = [e.inputs[1] for e in ends]
        bias = ir.Value(
            name=joined_name([b for b in biases if b is not None]),
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape([sum(widths)]),
        )
        graph.inputs.append(bias)
        nodes.append(ir.node("Add", [nodes[0].outputs[0], bias]))
    sizes = ir.Value(name=f"{joined}:widths", const_value=ir.tensor(np.array(widths, np.int64)))
    graph.initializers[sizes.name] = sizes  # type: ignore[index]
    nodes.append(ir.node("Split", [nodes[-1].outputs[0], sizes], {"axis": -1}, num_outputs=len(group)))
    graph.insert_before(first, nodes)
    for end, part in zip(ends, nodes[-1].outputs, strict=True):
        end.outputs[0].replace_all_uses_with(part)
    for node, end in zip(group, ends, strict=True):
        graph.remove([end, node] if end is not node else [node], safe=True)
