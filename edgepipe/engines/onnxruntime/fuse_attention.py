"""Pass: RotaryEmbedding + Attention over a growing past → GroupQueryAttention over one preallocated buffer.

    Attention(RotaryEmbedding(q), RotaryEmbedding(k), v, mask, past…)  →  GroupQueryAttention(q, k, v, past…, lengths)

The operator rotates, appends to the cache and attends in one call; past and present are the same memory. When q, k and
v are the three parts of one Split, it takes the packed value and the Split goes. A window mask becomes an attribute.
With a float16 cache the operator works in float16 between two Casts: half the memory, some time at short contexts.
With an int8 cache it works in float32, rounds what is new, and reads codes · scale, one scale a head and channel.
Left alone: nothing. A graph with an Attention this pass can't read is an error, since the cache layout depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from edgepipe.artifacts import Json
from edgepipe.errors import ContractError

_MICROSOFT = "com.microsoft"
_INT8: dict[str, str | int] = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}


def fuse_attention(
    graph: ir.Graph, spec: Json, cache_dtype: ir.DataType, scales: Mapping[str, np.ndarray] | None = None
) -> None:
    """Replace every Attention of `graph` in place and give the graph the inputs the operator needs.

    `scales` are those of an int8 cache: key.i, value.i → [kv_heads, 1, head_dim] float32.
    """
    batch = ir.Shape(["batch"])
    lengths = ir.Value(name="seqlens_k", type=ir.TensorType(ir.DataType.INT32), shape=batch)
    total = ir.Value(name="total_sequence_length", type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape([1]))
    graph.inputs.extend([lengths, total])
    for node in list(graph):
        if node.op_type == "Attention":
            _fuse(graph, node, (lengths, total), cache_dtype, scales or {})
    cache = ir.Shape(["batch", spec["kv_heads"], spec["context"], spec["head_dim"]])
    for value in [*graph.inputs, *graph.outputs]:
        if value.name is not None and value.name.startswith(("past_", "present_")):
            value.shape, value.dtype = cache, cache_dtype


def _fuse(
    graph: ir.Graph,
    node: ir.Node,
    lengths: tuple[ir.Value, ir.Value],
    cache_dtype: ir.DataType,
    scales: Mapping[str, np.ndarray],
) -> None:
    q, k, v, _mask, past_key, past_value = node.inputs
    rotated = _producer(q, "RotaryEmbedding"), _producer(k, "RotaryEmbedding")
    tables: list[ir.Value | None] = [None, None]
    if rotated[0] is not None and rotated[1] is not None:
        q, k = rotated[0].inputs[0], rotated[1].inputs[0]
        tables = [rotated[0].inputs[1], rotated[0].inputs[2]]
    elif any(rotated):
        raise ContractError("an Attention whose queries are rotated and whose keys are not cannot be lowered")
    split = _producer(q, "Split")
    packed = split is not None and [q, k, v] == list(split.outputs)
    operands = [split.inputs[0], None, None] if packed and split is not None else [q, k, v]
    halves = cache_dtype == ir.DataType.FLOAT16
    if halves:
        operands = [_cast(graph, node, value, cache_dtype) for value in operands]
        tables = [_cast(graph, node, value, cache_dtype) for value in tables]
    coded: list[ir.Value | None] = []
    if cache_dtype == ir.DataType.INT8:  # behind positions, bias and sink, which there are none of
        coded = [None, None, None, *(_scale(graph, past, scales) for past in (past_key, past_value))]
    attributes: dict[str, int | float | str] = {
        "num_heads": node.attributes["q_num_heads"].as_int(),
        "kv_num_heads": node.attributes["kv_num_heads"].as_int(),
        "scale": node.attributes["scale"].as_float(),
        "do_rotary": int(tables[0] is not None),
        "local_window_size": int(node.metadata_props.get("sliding_window", -1)),
    }
    if coded:
        attributes |= _INT8
    operands += [past_key, past_value, *lengths, *tables, *coded]
    fused = ir.node("GroupQueryAttention", operands, attributes, domain=_MICROSOFT, num_outputs=3)
    graph.insert_before(node, [fused])
    results: list[ir.Value] = list(fused.outputs)
    for old, new in zip(node.outputs[1:], results[1:], strict=True):
        new.name, new.type = old.name, old.type
    if halves:
        widened = _cast(graph, node, results[0], ir.DataType.FLOAT)
        assert widened is not None
        results[0] = widened
    for old, new in zip(node.outputs, results, strict=True):
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove([node], safe=True)


def _scale(graph: ir.Graph, past: ir.Value | None, scales: Mapping[str, np.ndarray]) -> ir.Value:
    """Return the constant with the scales of one buffer."""
    assert past is not None
    assert past.name is not None
    name = past.name.removeprefix("past_")
    value = ir.Value(name=f"scale:{name}", const_value=ir.tensor(scales[name], name=f"scale:{name}"))
    graph.initializers[f"scale:{name}"] = value
    return value


def _cast(graph: ir.Graph, before: ir.Node, value: ir.Value | None, dtype: ir.DataType) -> ir.Value | None:
    if value is None:
        return None
    node = ir.node("Cast", [value], {"to": int(dtype)})
    graph.insert_before(before, [node])
    return node.outputs[0]


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None
