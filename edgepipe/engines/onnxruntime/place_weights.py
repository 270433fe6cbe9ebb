"""Pass: MatMul and Gather on named weights → kernels that read the stored grid, weights in one file.

    MatMul(x, W.T)   symmetric or zero points → MatMulNBits(x, codes, scale, zero_points, bias)
                     8 bits, float32 arithmetic → the same on x in two int8 parts (two_parts.py); in a graph that
                     runs many rows at a time → FusedMatMul on the decoded weight, which the engine folds when it loads
                     2 bits, float32 arithmetic → on x in two int8 parts; with many rows at a time as it is, since the
                     kernel then decodes the weight once for all of them
                     minima                   → the same on symmetric codes, + groupsum(x) · (minima + middle·scale)ᵀ
                     float                    → FusedMatMul(x, Cast(W), transB)
                     one scale a row          → 2 and 4 bits: the same, the scale repeated for the kernel's blocks
    MatMul(x, W)     as stored (GPT-2's Conv1D) → MatMul(x, decoded W): its groups lie along the other axis
    Gather(W, ids)   quantized                → GatherBlockQuantized, sliced to the width where rows were padded
                     float                    → Cast(Gather(W, ids))

The identity for minima is exact: s·q + m = s·(q − middle) + (m + middle·s), where `middle` is 2^(b−1), or 16 for 5-bit
codes kept in 8 bits (`planned.middle_code` says why). onnxruntime's own float zero points are exact too, but
unpack the whole weight at every call (70 times slower at one row). Scales are stored as the grid has them (float16) and
widened by a Cast that the engine folds when it loads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgepipe.artifacts import QuantizedTensor
from edgepipe.engines.onnxruntime.names import ROUNDED, is_transposed, weight_parts
from edgepipe.engines.onnxruntime.planned import (
    PlannedTensor,
    WeightsFile,
    kernel_block,
    middle_code,
    plan_codes,
    plan_columns,
    plan_float,
    plan_part,
)
from edgepipe.engines.onnxruntime.two_parts import pads, rank, split_groups, split_in_two, sum_of_two
from edgepipe.weights import WeightStore

_MICROSOFT = "com.microsoft"
_INT8 = 4  # MatMulNBits' accuracy level: activations are rounded to int8 per group


@dataclass(slots=True, kw_only=True)
class Lowering:
    """Hold what one run of a pass that places weights needs."""

    graph: ir.Graph
    weights: WeightStore
    file: WeightsFile
    accuracy_level: int = 0
    many_rows: bool = False
    group_sums: dict[tuple[ir.Value, int], ir.Value] = field(default_factory=dict)
    two_parts: dict[tuple[ir.Value, int], ir.Value] = field(default_factory=dict)

    def initializer(self, planned: PlannedTensor, shape: tuple[int, ...] | None = None) -> ir.Value:
        """Return the graph's initializer for a planned tensor, made on first use."""
        tensor = self.file.place(planned, shape)
        name = tensor.name
        assert name is not None
        if name not in self.graph.initializers:
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
            self.graph.initializers[name] = value
        return self.graph.initializers[name]

    def constant(self, array: np.ndarray, name: str) -> ir.Value:
        """Return a small embedded constant, made on first use."""
        if name not in self.graph.initializers:
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
            self.graph.initializers[name] = value
        return self.graph.initializers[name]


def place_weights(
    graph: ir.Graph, weights: WeightStore, file: WeightsFile, accuracy_level: int, *, many_rows: bool = False
) -> None:
    """Lower every use of a named weight in `graph` in place; `file` collects the tensors to write.

    `many_rows` is for a graph that always runs a whole text (an encoder): its 8-bit products are five times as fast on
    decoded weights, which cost four times their bytes in memory and none in the file.
    """
    low = Lowering(graph=graph, weights=weights, file=file, accuracy_level=accuracy_level, many_rows=many_rows)
    for node in list(graph):
        if node.op_type == "MatMul" and is_transposed(node.inputs[1]):
            _lower_matmul(low, node)
        elif node.op_type == "Gather" and _parts(node, 0) and node.attributes.get_int("axis", 0) == 0:
            _lower_gather(low, node)
    for value in list(graph.inputs):
        if weight_parts(value):
            _lower_rest(low, value)


def _parts(node: ir.Node, index: int) -> tuple[str, ...]:
    value = node.inputs[index]
    return weight_parts(value) if value is not None else ()


def emit(low: Lowering, before: ir.Node, nodes: list[ir.Node]) -> ir.Value:
    """Insert nodes before another and return the last one's first output."""
    low.graph.insert_before(before, nodes)
    return nodes[-1].outputs[0]


def widened(low: Lowering, before: ir.Node, value: ir.Value) -> ir.Value:
    """Return a float value as float32."""
    if value.dtype == ir.DataType.FLOAT:
        return value
    return emit(low, before, [ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})])


def replace_node(low: Lowering, node: ir.Node, value: ir.Value) -> None:
    """Let `value` stand for the node's first output, under its name, and remove the node."""
    node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
    if node.outputs[0].name and value.name != node.outputs[0].name:
        value.name, node.outputs[0].name = node.outputs[0].name, None
        value.type, value.shape = node.outputs[0].type, node.outputs[0].shape
    low.graph.remove([node], safe=True)


def _lower_matmul(low: Lowering, node: ir.Node) -> None:
    names = _parts(node, 1)
    x = node.inputs[0]
    assert x is not None
    sample = low.weights.load(names[0])
    if not isinstance(sample, QuantizedTensor) or _is_decoded(low, sample):
        weight = _whole(low, node, names)
        product = ir.node("FusedMatMul", [x, weight], {"transB": 1}, domain=_MICROSOFT)
        replace_node(low, node, emit(low, node, [product]))
        return
    rows = sum(low.weights[n].shape[0] for n in names)
    block = kernel_block(sample)
    blocks = -(-sample.shape[1] // block)
    codes = low.initializer(plan_codes(low.weights, names, sample), (rows, blocks, block * sample.bits // 8))
    scale = _scales(low, node, names, sample)
    zeros = None
    if sample.zero_points is not None:
        zeros = low.initializer(plan_part(low.weights, names, "zero_points", sample))
    bias = take_bias(low, node)
    # What was rounded to levels keeps them: the int8 kernel would round it once more, in blocks
    level = 0 if sample.bits == 4 and (x.name or "").startswith(ROUNDED) else low.accuracy_level
    slow = sample.bits == 8 or (sample.bits == 2 and not low.many_rows)  # decoded whole at every call, in float32
    in_two = slow and level != _INT8
    operand = _two_parts(low, node, x, sample) if in_two else x
    product = ir.node(
        "MatMulNBits",
        [operand, codes, scale, zeros, None, None if in_two else bias],
        {
            "K": sample.shape[1],
            "N": rows,
            "bits": sample.bits,
            "block_size": block,
            "accuracy_level": _INT8 if in_two else level,
        },
        domain=_MICROSOFT,
    )
    y = emit(low, node, [product])
    if in_two:
        y = emit(low, node, [sum_of_two(y, low.constant)])
        if bias is not None:  # the kernel would add it to both parts
            y = emit(low, node, [ir.node("Add", [y, bias])])
    if sample.minima is not None:
        y = _add_minima(low, node, y, scale, names, sample)
    replace_node(low, node, y)


def _is_decoded(low: Lowering, value: QuantizedTensor) -> bool:
    """Say whether a matrix is multiplied as floats: MatMulNBits would be slower, or takes no such groups."""
    return not kernel_block(value) or (low.many_rows and value.bits == 8 and low.accuracy_level != _INT8)


def _scales(low: Lowering, before: ir.Node, names: tuple[str, ...], sample: QuantizedTensor) -> ir.Value:
    """Return scales as the kernel takes them, float32 [rows, blocks]: one a row is repeated when the engine loads."""
    planned = plan_part(low.weights, names, "scale", sample)
    scale = widened(low, before, low.initializer(planned))
    blocks = -(-sample.shape[1] // kernel_block(sample))
    if blocks == sample.groups:
        return scale
    rows = planned.shape[0]
    shape = low.constant(np.array([rows, blocks], np.int64), f"shape_{rows}x{blocks}")
    return emit(low, before, [ir.node("Expand", [scale, shape])])


def take_bias(low: Lowering, node: ir.Node) -> ir.Value | None:
    """Move the bias that follows a MatMul into it: the kernel adds it for nothing, the node is the sum then."""
    users = node.outputs[0].consumers()
    if len(users) != 1 or users[0].op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    add = users[0]
    parts = _parts(add, 1)
    if not parts or any(len(low.weights[name].shape) != 1 for name in parts):
        return None
    bias = widened(low, node, low.initializer(plan_float(low.weights, parts)))
    total, product = add.outputs[0], node.outputs[0]
    total.replace_all_uses_with(product, replace_graph_outputs=True)
    product.name, total.name = total.name, None
    product.type, product.shape = total.type, total.shape
    low.graph.remove([add], safe=True)
    return bias


def _add_minima(
    low: Lowering, node: ir.Node, y: ir.Value, scale: ir.Value, names: tuple[str, ...], sample: QuantizedTensor
) -> ir.Value:
    """Add groupsum(x) · (minima + middle·scale)ᵀ to the symmetric product `y`."""
    x = node.inputs[0]
    assert x is not None
    middle = low.constant(np.array(middle_code(sample), np.float32), f"middle_{middle_code(sample)}")
    minima = widened(low, node, low.initializer(plan_part(low.weights, names, "minima", sample)))
    shift = ir.node("Mul", [scale, middle])
    offset = ir.node("Add", [minima, shift.outputs[0]])
    low.graph.insert_before(node, [shift, offset])
    product = ir.node(
        "FusedMatMul", [_group_sums(low, node, x, sample), offset.outputs[0]], {"transB": 1}, domain=_MICROSOFT
    )
    return emit(low, node, [product, ir.node("Add", [y, product.outputs[0]])])


def _two_parts(low: Lowering, node: ir.Node, x: ir.Value, sample: QuantizedTensor) -> ir.Value:
    """Split x [B, S, in] into two int8 parts → [2, B, S, in], once for all weights with groups of one size."""
    key = (x, kernel_block(sample))
    if key not in low.two_parts:
        low.two_parts[key] = emit(low, node, split_in_two(x, sample.shape[1], key[1], low.constant))
    return low.two_parts[key]


def _group_sums(low: Lowering, node: ir.Node, x: ir.Value, sample: QuantizedTensor) -> ir.Value:
    """Sum x [B, S, in] over groups → [B, S, groups]; computed once for all weights that read x."""
    key = (x, sample.group)
    if key not in low.group_sums:
        columns, group = sample.shape[1], sample.group
        nodes = []
        if columns % group:
            short = sample.groups * group - columns
            nodes.append(ir.node("Pad", [x, pads(rank(x), short, low.constant)]))
        dims = split_groups(rank(x), sample.groups, group, low.constant)
        nodes.append(ir.node("Reshape", [nodes[-1].outputs[0] if nodes else x, dims]))
        axis = low.constant(np.array([-1], np.int64), "last_axis")
        nodes.append(ir.node("ReduceSum", [nodes[-1].outputs[0], axis], {"keepdims": 0}))
        low.group_sums[key] = emit(low, node, nodes)
    return low.group_sums[key]


def _lower_gather(low: Lowering, node: ir.Node) -> None:
    ids = node.inputs[1]
    assert ids is not None
    replace_node(low, node, _gathered(low, node, _parts(node, 0), ids))


def _whole(low: Lowering, before: ir.Node, names: tuple[str, ...]) -> ir.Value:
    """Return whole weights, joined along their rows, as float32.

    8-bit codes become DequantizeLinear, which the engine folds when it loads if the session asks for it; others, which
    only small tables have, are gathered whole at every run.
    """
    sample = low.weights.load(names[0])
    if not isinstance(sample, QuantizedTensor):
        return widened(low, before, low.initializer(plan_float(low.weights, names)))

    rows = sum(low.weights[name].shape[0] for name in names)
    if sample.bits != 8 or sample.minima is not None:  # always in blocks
        return _gathered(low, before, names, low.constant(np.arange(rows, dtype=np.int64), f"rows_{rows}"))
    codes = low.initializer(plan_part(low.weights, names, "codes", sample))
    scale = widened(low, before, low.initializer(plan_part(low.weights, names, "scale", sample)))
    if sample.zero_points is None:
        dims = low.constant(np.array([rows, sample.groups], np.int64), f"shape_{rows}x{sample.groups}")
        middle = ir.tensor(np.array([middle_code(sample)], np.uint8))
        zeros = emit(low, before, [ir.node("ConstantOfShape", [dims], {"value": middle})])
    else:
        zeros = low.initializer(plan_part(low.weights, names, "zero_points", sample))
    x = emit(low, before, [ir.node("DequantizeLinear", [codes, scale, zeros], {"axis": 1, "block_size": sample.group})])
    x = _cut(low, before, x, sample)
    if sample.column_scale is None:
        return x
    columns = widened(low, before, low.initializer(plan_columns(low.weights, names[0], sample)))
    return emit(low, before, [ir.node("Mul", [x, columns])])


def _gathered(low: Lowering, before: ir.Node, names: tuple[str, ...], ids: ir.Value) -> ir.Value:
    """Return the rows `ids` of weights joined along their rows as float32 [..., width], computed before a node."""
    value = low.weights.load(names[0])
    if not isinstance(value, QuantizedTensor):
        table = low.initializer(plan_float(low.weights, names))
        gathered = emit(low, before, [ir.node("Gather", [table, ids])])
        gathered.type = table.type
        return widened(low, before, gathered)
    block = kernel_block(value)
    if not block:
        return emit(low, before, [ir.node("Gather", [_whole(low, before, names), ids])])
    codes = plan_codes(low.weights, names, value)
    scale = _scales(low, before, names, value)
    zeros = None
    if value.zero_points is not None:
        zeros = low.initializer(plan_part(low.weights, names, "zero_points", value))
    attributes = {"bits": value.bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    rows = ir.node("GatherBlockQuantized", [low.initializer(codes), ids, scale, zeros], attributes, domain=_MICROSOFT)
    x = emit(low, before, [rows])
    if value.minima is not None:
        minima = low.initializer(plan_part(low.weights, names, "minima", value))
        x = _gather_minima(low, before, x, ids, (scale, widened(low, before, minima)), value)
    return _cut(low, before, x, value)


def _cut(low: Lowering, before: ir.Node, x: ir.Value, value: QuantizedTensor) -> ir.Value:
    """Return x [..., groups · group] without what pads its rows to whole groups."""
    if value.shape[1] % (kernel_block(value) or value.group) == 0:
        return x
    bounds = [low.constant(np.array([v], np.int64), f"int_{v}") for v in (0, value.shape[1], -1)]
    return emit(low, before, [ir.node("Slice", [x, *bounds])])


def _gather_minima(
    low: Lowering,
    before: ir.Node,
    x: ir.Value,
    ids: ir.Value,
    parts: tuple[ir.Value, ir.Value],
    value: QuantizedTensor,
) -> ir.Value:
    """Add each group's minima + middle·scale to gathered rows x [..., groups · group]; `parts`: scale, minima."""
    scale, minima = parts
    axes = 3 if ids.shape is None else len(ids.shape) + 1
    middle = low.constant(np.array(middle_code(value), np.float32), f"middle_{middle_code(value)}")
    split = split_groups(axes, value.groups, value.group, low.constant)
    width = value.groups * value.group
    whole = low.constant(np.array([0] * (axes - 1) + [width], np.int64), f"row_{axes}d_{width}")
    last = low.constant(np.array([-1], np.int64), "last_axis")
    shift = ir.node("Mul", [scale, middle])
    offset = ir.node("Add", [minima, shift.outputs[0]])
    picked = ir.node("Gather", [offset.outputs[0], ids])
    column = ir.node("Unsqueeze", [picked.outputs[0], last])
    blocks = ir.node("Reshape", [x, split])
    added = ir.node("Add", [blocks.outputs[0], column.outputs[0]])
    return emit(
        low, before, [shift, offset, picked, column, blocks, added, ir.node("Reshape", [added.outputs[0], whole])]
    )


def _lower_rest(low: Lowering, value: ir.Value) -> None:
    """Turn the weights that are left (norms, biases, tables) into initializers, and drop inputs nobody reads any more.

    A quantized table that is added or sliced as a whole is decoded whole.
    """
    if value.uses():
        names = weight_parts(value)
        before = next(iter(low.graph))  # a branch or loop may be the only reader, and sees what stands before it
        whole = _whole(low, before, names)
        if is_transposed(value):
            whole = emit(low, before, [ir.node("Transpose", [whole], {"perm": [1, 0]})])
        value.replace_all_uses_with(whole)
    low.graph.inputs.remove(value)
