"""Run a portable graph node by node with onnx's reference operators, one weight in memory at a time.

Slow and plain on purpose: it is the meaning of the dialect that every engine's lowering is checked against. Weights
are decoded to float32 when a node asks for them and dropped after it, so a model larger than memory can be checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from edgepipe.artifacts import OnnxModel
from edgepipe.graph.dialect import OPSET, weight_name
from edgepipe.runtime.exits import PART
from edgepipe.runtime.leaving import FILL, HEAD
from edgepipe.weights import WeightStore


def evaluate(graph: bytes, weights: WeightStore, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return every output of a portable graph by name. `feeds` holds all inputs that aren't weights."""
    model = onnx.load_model_from_string(graph)
    values: dict[str, np.ndarray] = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    values.update(feeds)
    kept = {o.name for o in model.graph.output}
    left = Counter(name for node in model.graph.node for name in node.input)
    for node in model.graph.node:
        inputs = {name: _value(name, values, weights) for name in node.input if name}
        results = run_node(node, inputs)
        del inputs  # or this node's weight would still be there while the next one is read
        for name, result in zip(node.output, results, strict=True):
            if name:
                values[name] = result
        for name in node.input:
            left[name] -= 1
            if left[name] == 0 and name not in kept:
                values.pop(name, None)
    return {o.name: values[o.name] for o in model.graph.output}


def logits_in_pieces(
    model: OnnxModel, input_ids: np.ndarray, pieces: Sequence[int], source: Mapping[str, np.ndarray] | None = None
) -> np.ndarray:
    """Return logits [batch, sequence, vocab] float32 of the graph `decoder`, `pieces` tokens at a time over a cache.

    `source` is what the graph `encoder` is given, for a decoder that answers one.
    """
    batch = input_ids.shape[0]
    empty = np.zeros((batch, model.spec["kv_heads"], 0, model.spec["head_dim"]), np.float32)
    caches = {f"past_{kind}.{i}": empty for kind in ("key", "value") for i in range(model.spec["layers"])}
    fixed: dict[str, np.ndarray] = {}
    if source is not None:
        fixed = evaluate(model.graphs["encoder"], model.weights, source)
        fixed["encoder_attention_mask"] = source["attention_mask"]
    logits = []
    start = 0
    for count in pieces:
        feeds = {"input_ids": input_ids[:, start : start + count], **fixed, **caches}
        if "ends" not in model.spec:  # edgepipe's own builders take positions, and give the logits that are wanted
            steps = np.tile(np.arange(count, dtype=np.int64), (batch, 1))
            feeds |= {"position_ids": start + steps, "logits_positions": steps}
        found = evaluate(model.graphs["decoder"], model.weights, feeds)
        logits.append(found.pop("logits"))
        caches = {name.replace("present_", "past_"): value for name, value in found.items()}
        start += count
    return np.concatenate(logits, axis=1)


def logits_leaving(model: OnnxModel, input_ids: np.ndarray, leaves: Sequence[int]) -> np.ndarray:
    """Return logits [tokens, vocab] float32 of ids [1, tokens] one by one, each leaving behind the part that it names.

    Keys and values of the layers that a token skips are made by the graphs that fill them in (graph/exits.py).
    """
    spec, weights = model.spec, model.weights
    depths = (0, *spec["exits"], spec["layers"])
    empty = np.zeros((1, spec["kv_heads"], 0, spec["head_dim"]), np.float32)
    caches = {f"{kind}.{i}": empty for kind in ("key", "value") for i in range(spec["layers"])}
    rows = []
    for place, part in enumerate(leaves):
        step = {"position_ids": np.array([[place]]), "logits_positions": np.array([[0]])}
        given = {"input_ids": input_ids[:, [place]]}
        for number in range(part + 1):
            own = range(depths[number], depths[number + 1])
            past = {f"past_{kind}.{i}": caches[f"{kind}.{i}"] for kind in ("key", "value") for i in own}
            found = evaluate(model.graphs[f"{PART}{number}"], weights, {**given, **step, **past})
            caches |= {name.removeprefix("present_"): found[name] for name in found if name.startswith("present_")}
            given = {name: found[f"next_{name}"] for name in ("states", "added") if f"next_{name}" in found}
        for number in range(part + 1, len(depths) - 1):
            feeds = {**given, "position_ids": step["position_ids"]}
            for name, value in evaluate(model.graphs[f"{FILL}{number}"], weights, feeds).items():
                new = value.reshape(1, 1, spec["kv_heads"], spec["head_dim"]).swapaxes(1, 2)
                name = name.removeprefix("new_")
                caches[name] = np.concatenate([caches[name], new], axis=2)
        rows.append(evaluate(model.graphs[HEAD], weights, {"normed": found["normed"]})["logits"][0, 0])
    return np.stack(rows)


def prompt_logits(model: OnnxModel, input_ids: np.ndarray) -> np.ndarray:
    """Return logits [batch, sequence, vocab] float32 of the graph `decoder` for prompts input_ids [batch, sequence]."""
    batch, sequence = input_ids.shape
    steps = np.tile(np.arange(sequence, dtype=np.int64), (batch, 1))
    empty = np.zeros((batch, model.spec["kv_heads"], 0, model.spec["head_dim"]), np.float32)
    caches = {f"past_{kind}.{i}": empty for kind in ("key", "value") for i in range(model.spec["layers"])}
    feeds = {"input_ids": input_ids, "position_ids": steps, "logits_positions": steps, **caches}
    return evaluate(model.graphs["decoder"], model.weights, feeds)["logits"]


def _value(name: str, values: Mapping[str, np.ndarray], weights: WeightStore) -> np.ndarray:
    named = weight_name(name)
    if named is None:
        return values[name]
    stored, transposed = named
    value = weights.float32(stored)
    return value.T if transposed else value


def run_node(node: onnx.NodeProto, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Return a node's outputs for its inputs by name."""
    if node.op_type == "MatMul":  # the bulk of the work: straight to BLAS
        return [np.matmul(inputs[node.input[0]], inputs[node.input[1]])]
    if node.op_type == "GatherElements":  # onnx's reference takes no indices that are shorter than the data
        data, indices = (inputs[name] for name in node.input)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0) % data.ndim
        read = tuple(slice(None if a == axis else size) for a, size in enumerate(indices.shape))
        return [np.take_along_axis(data[read], indices, axis)]
    graph = onnx.helper.make_graph(
        [node],
        node.op_type,
        [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for n, v in inputs.items()
        ],
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UNDEFINED, None) for n in node.output if n],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)])
    # A branch that Where doesn't take may hold log 0: the operators' meaning, not a mistake
    with np.errstate(all="ignore"):
        return [np.asarray(r) for r in ReferenceEvaluator(model).run(None, dict(inputs))]
