"""Write the attention of a decoder's step, one token behind a cache of fixed length, as plain operators.

    Attention(q, k, v, past)  →  Softmax([q · past_key + past_mask, q · new_key]) · [past_value, new_value]

    past_mask [1, 1, 1, P]           0 for a place of the cache that holds a token, −100 for one that doesn't
    past_key.i [1, kv_heads, D, P]   keys lie turned, as the product reads them: no step turns the cache
    past_value.i [1, kv_heads, P, D]
    → new_key.i [1, kv_heads, D, 1], new_value.i [1, kv_heads, 1, D]: the app writes them to their places

Scores of the cache and of the new token are joined, not keys and values: a step reads the cache once and copies none of
it, and gives back one place of a layer in place of P. Past and new share a grid, so what is written is what was
computed. Heads that share keys are one taller matrix.
"""

from __future__ import annotations

import numpy as np
import onnx

from edgepipe.engines.qnn.nodes import Nodes, attributes_of
from edgepipe.errors import TargetError
from edgepipe.runtime.npu_step import NEW, PAST, PAST_MASK

HIDDEN = -100.0  # of a score: e^−100 is no weight, and scores keep hundreds of levels for each unit
_WINDOW = "sliding_window"  # among a node's notes


def cached_attention(nodes: Nodes, node: onnx.NodeProto) -> None:
    """Write one attention of one token over a cache; TargetError for a soft cap, or a window shorter than the cache."""
    given = attributes_of(node)
    if given.get("softcap") or given.get("qk_matmul_output_mode"):
        raise TargetError(
            f"the attention {node.output[0]} has a soft cap, which the NPU path doesn't know yet: take another target"
        )
    q, k, v = node.input[:3]
    layer = node.input[4].rpartition(".")[2]
    heads, shared = given["q_num_heads"], given["kv_num_heads"]
    width, past = nodes.shapes[q][2] // heads, nodes.shapes[node.input[4]][2]
    window = int({one.key: one.value for one in node.metadata_props}.get(_WINDOW, past))
    if window < past:
        raise TargetError(
            f"layer {layer} sees a window of {window} tokens, and an NPU's step has none yet: set compile.tokens to "
            f"{window} at most, or take another target"
        )
    scale = np.float32(given.get("scale") or width**-0.5)
    q = nodes.op("Mul", [q, nodes.constant(np.array(scale), f"scale.{scale:.6g}")])
    q = nodes.op("Reshape", [q, nodes.sizes(1, shared, heads // shared, width)])
    key = nodes.op("Reshape", [k, nodes.sizes(1, shared, width, 1)], output=f"{NEW}key.{layer}")
    value = nodes.op("Reshape", [v, nodes.sizes(1, shared, 1, width)], output=f"{NEW}value.{layer}")
    _output(nodes, key, (1, shared, width, 1))
    _output(nodes, value, (1, shared, 1, width))
    past_key = _input(nodes, f"{PAST}key.{layer}", (1, shared, width, past))
    past_value = _input(nodes, f"{PAST}value.{layer}", (1, shared, past, width))
    mask = _input(nodes, PAST_MASK, (1, 1, 1, past))
    before = nodes.op("Add", [nodes.op("MatMul", [q, past_key]), mask])
    scores = nodes.op("Concat", [before, nodes.op("MatMul", [q, key])], {"axis": -1})
    weights = nodes.op("Softmax", [scores], {"axis": -1})
    old, new = (
        nodes.op("Slice", [weights, nodes.sizes(start), nodes.sizes(end), nodes.sizes(3)])
        for start, end in ((0, past), (past, past + 1))
    )
    y = nodes.op("Add", [nodes.op("MatMul", [old, past_value]), nodes.op("MatMul", [new, value])])
    nodes.op("Reshape", [y, nodes.sizes(1, 1, heads * width)], output=node.output[0])


def _input(nodes: Nodes, name: str, shape: tuple[int, ...]) -> str:
    """Declare an input of the step in place of the portable one, once, and return its name."""
    nodes.inputs = [one for one in nodes.inputs if one.name != name]
    nodes.inputs.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    return name


def _output(nodes: Nodes, name: str, shape: tuple[int, ...]) -> None:
    """Give the new places of a cache in place of the whole of it."""
    kind, _, layer = name.removeprefix(NEW).rpartition(".")
    nodes.outputs = [one for one in nodes.outputs if one.name != f"present_{kind}.{layer}"]
    nodes.outputs.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
