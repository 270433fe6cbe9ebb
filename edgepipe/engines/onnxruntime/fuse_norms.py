"""Pass: Add + RMSNormalization → SkipSimplifiedLayerNormalization; x · Sigmoid(x) → QuickGelu.

    s = Add(a, b) ; y = RMSNormalization(s, w)   →  y, s = SkipSimplifiedLayerNormalization(a, b, w)
    y = RMSNormalization(x, w)                   →  y = SimplifiedLayerNormalization(x, w)
    y = Mul(x, Sigmoid(x))                       →  y = QuickGelu(x, alpha = 1)

An Add that takes a bias or a constant stays: the operator wants two hidden states of one shape.
"""

from __future__ import annotations

import onnx_ir as ir

from edgepipe.engines.onnxruntime.names import weight_parts

_MICROSOFT = "com.microsoft"


def fuse_norms(graph: ir.Graph) -> None:
    """Fuse norms and activations of `graph` in place."""
    for node in list(graph):
        if node.op_type == "RMSNormalization":
            _fuse_norm(graph, node)
        elif node.op_type == "Mul":
            _fuse_silu(graph, node)


def _fuse_norm(graph: ir.Graph, node: ir.Node) -> None:
    x, weight = node.inputs
    assert x is not None
    epsilon = node.attributes["epsilon"].as_float()
    add = x.producer()
    if add is not None and add.op_type == "Add" and all(_is_hidden_state(i) for i in add.inputs):
        fused = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*add.inputs, weight],
            {"epsilon": epsilon},
            domain=_MICROSOFT,
            num_outputs=4,
        )
        for unused in fused.outputs[1:3]:
            unused.name = ""
        graph.insert_before(node, [fused])
        replaced = [(node, fused.outputs[0]), (add, fused.outputs[3])]
    else:
        fused = ir.node("SimplifiedLayerNormalization", [x, weight], {"axis": -1, "epsilon": epsilon})
        graph.insert_before(node, [fused])
        replaced = [(node, fused.outputs[0])]
    for old, new in replaced:
        value = old.outputs[0]
        if value.is_graph_output():  # the sum that the next part of an encoder with exits goes on from
            new.name, new.type, new.shape = value.name, value.type, value.shape
        value.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove([old], safe=True)


def _is_hidden_state(value: ir.Value | None) -> bool:
    """Tell what a node or the caller computes from a weight and from a constant."""
    return value is not None and value.const_value is None and not weight_parts(value)


def _fuse_silu(graph: ir.Graph, node: ir.Node) -> None:
    x, gate = node.inputs
    sigmoid = gate.producer() if gate is not None else None
    if sigmoid is None or sigmoid.op_type != "Sigmoid" or sigmoid.inputs[0] is not x:
        return
    fused = ir.node("QuickGelu", [x], {"alpha": 1.0}, domain=_MICROSOFT)
    graph.insert_before(node, [fused])
    node.outputs[0].replace_all_uses_with(fused.outputs[0])
    graph.remove([node, sigmoid], safe=True)
