"""Pass: Attention without a cache, as an encoder has it over its text and a decoder over its source → fast forms.

    Attention(q, k, v, mask [B, 1, 1, N])    all tokens see all: MultiHeadAttention, by its blocked kernel, which takes
                                             no mask, If nothing is padding, and else by the one that does
    Attention(q [B, H, S, D], cross_key, …)  FusedMatMul · softmax · MatMul over keys and values as they come

Heads that share keys and values are not repeated: their queries become further rows of the shared head. Measured on
one thread of an AMD EPYC (onnxruntime 1.31; 8 heads of 64): at 2048 tokens 90 ms blocked, 170 by Attention, 178 with a
mask, 255 as plain products; over a source of 512 tokens a step of a layer takes 29 µs with 2 key heads as plain
products, 48 by Attention, and keys that are stored transposed gain nothing.
Left alone: causal attention without a cache, and masks that aren't made from a graph's input of ones and zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

_MICROSOFT = "com.microsoft"
_LOWEST = np.finfo(np.float32).min


@dataclass(slots=True)
class _Reading:
    """Hold a graph, and what its attentions share."""

    graph: ir.Graph
    shared: dict[tuple[str, ir.Value], ir.Value] = field(default_factory=dict)

    def ints(self, *values: int) -> ir.Value:
        """Return a constant vector of int64."""
        return self.constant(np.array(values, np.int64), "reading:" + "x".join(map(str, values)))

    def constant(self, array: np.ndarray | np.float32, name: str) -> ir.Value:
        """Return a small embedded constant, made on first use."""
        if name not in self.graph.initializers:
            self.graph.initializers[name] = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        return self.graph.initializers[name]


def fuse_reading(graph: ir.Graph) -> None:
    """Rewrite every Attention of `graph` that has no cache and isn't causal, in place."""
    reading = _Reading(graph)
    for node in list(graph):
        if node.op_type != "Attention" or len(node.inputs) > 4 or node.attributes["is_causal"].as_int():
            continue
        key = node.inputs[1]
        if key is not None and key.is_graph_input():
            _fuse_cross(reading, node)
        else:
            _fuse_whole(reading, node)


def _fuse_whole(r: _Reading, node: ir.Node) -> None:
    """Turn attention of all tokens to all, q [B, S, heads · D], into MultiHeadAttention over the key heads."""
    q, k, v, *masks = node.inputs
    ones = _ones_and_zeros(masks[0]) if masks else None
    if masks and ones is None:
        return
    heads, kv_heads = (node.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads"))
    attributes = {"num_heads": kv_heads, "scale": node.attributes["scale"].as_float()}
    groups, width = heads // kv_heads, int(node.metadata_props["head_dim"])
    if groups > 1:  # [B, S, kv · group · D] → [B, S · group, kv · D]
        split = ir.node("Reshape", [q, r.ints(0, 0, kv_heads, groups, width)])
        turned = ir.node("Transpose", [split.outputs[0]], {"perm": [0, 1, 3, 2, 4]})
        rows = ir.node("Reshape", [turned.outputs[0], r.ints(0, -1, kv_heads * width)])
        r.graph.insert_before(node, [split, turned, rows])
        q = rows.outputs[0]
    if ones is None:
        last = ir.node("MultiHeadAttention", [q, k, v], attributes, domain=_MICROSOFT)
    else:
        whole, padding = _whole_and_padding(r, node, ones)
        branches = {
            "then_branch": _branch([q, k, v], attributes, "whole"),
            "else_branch": _branch([q, k, v, None, padding], attributes, "padded"),
        }
        last = ir.node("If", [whole], branches)
    nodes = [last]
    if groups > 1:
        split = ir.node("Reshape", [last.outputs[0], r.ints(0, -1, groups, kv_heads, width)])
        turned = ir.node("Transpose", [split.outputs[0]], {"perm": [0, 1, 3, 2, 4]})
        nodes += [split, turned, ir.node("Reshape", [turned.outputs[0], r.ints(0, 0, heads * width)])]
    _replace(r.graph, node, nodes)


def _branch(operands: list[ir.Value | None], attributes: dict[str, int | float], name: str) -> ir.Graph:
    """Return a branch that attends; what it reads stands outside."""
    attend = ir.node("MultiHeadAttention", operands, attributes, domain=_MICROSOFT)
    y = attend.outputs[0]
    y.name, y.type = f"attended {name}", ir.TensorType(ir.DataType.FLOAT)
    return ir.Graph(inputs=[], outputs=[y], nodes=[attend], name=name)


def _whole_and_padding(r: _Reading, node: ir.Node, ones: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return whether nothing in `ones` [B, N] is padding, and `ones` as the operator wants it; computed once."""
    if ("whole", ones) not in r.shared:
        least = ir.node("ReduceMin", [ones], {"keepdims": 0})
        whole = ir.node("Cast", [least.outputs[0]], {"to": int(ir.DataType.BOOL)})
        padding = ir.node("Cast", [ones], {"to": int(ir.DataType.INT32)})
        r.graph.insert_before(node, [least, whole, padding])
        r.shared["whole", ones], r.shared["padding", ones] = whole.outputs[0], padding.outputs[0]
    return r.shared["whole", ones], r.shared["padding", ones]


def _fuse_cross(r: _Reading, node: ir.Node) -> None:
    """Turn attention of q [B, heads, S, D] to a source's keys and values [B, kv, N, D] into plain products."""
    q, k, v, mask = node.inputs
    assert k is not None
    assert k.shape is not None
    assert mask is not None
    heads, kv_heads, width = int(node.metadata_props["heads"]), int(k.shape[1]), int(k.shape[3])  # type: ignore[arg-type]
    scale = node.attributes["scale"].as_float()
    if ("bias", mask) not in r.shared:
        zero, lowest = (r.constant(np.float32(x), f"reading:{name}") for x, name in ((0, "zero"), (_LOWEST, "lowest")))
        bias = ir.node("Where", [mask, zero, lowest])
        r.graph.insert_before(node, [bias])
        r.shared["bias", mask] = bias.outputs[0]
    nodes = []
    if heads > kv_heads:  # rows of the shared head: [B, kv, group · S, D]
        nodes.append(ir.node("Reshape", [q, r.ints(0, kv_heads, -1, width)]))
        q = nodes[-1].outputs[0]
    nodes.append(ir.node("FusedMatMul", [q, k], {"transB": 1, "alpha": scale}, domain=_MICROSOFT))
    nodes.append(ir.node("Add", [nodes[-1].outputs[0], r.shared["bias", mask]]))
    nodes.append(ir.node("Softmax", [nodes[-1].outputs[0]], {"axis": -1}))
    nodes.append(ir.node("MatMul", [nodes[-1].outputs[0], v]))
    if heads > kv_heads:
        nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], r.ints(0, heads, -1, width)]))
    _replace(r.graph, node, nodes)


def _replace(graph: ir.Graph, node: ir.Node, nodes: list[ir.Node]) -> None:
    old, new = node.outputs[0], nodes[-1].outputs[0]
    graph.insert_before(node, nodes)
    if old.is_graph_output():
        new.name, old.name, new.type, new.shape = old.name, None, old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove([node], safe=True)


def _ones_and_zeros(mask: ir.Value | None) -> ir.Value | None:
    """Return the graph's input [B, N] that a mask [B, 1, 1, N] bool is made from; None when it is made otherwise."""
    for kind in ("Unsqueeze", "Cast"):
        node = mask.producer() if mask is not None else None
        if node is None or node.op_type != kind:
            return None
        mask = node.inputs[0]
    return mask if mask is not None and mask.is_graph_input() else None
