"""Pass: Attention and RotaryEmbedding → products, sums and a softmax, the operators that an NPU has.

    Attention(q, k, v, mask)  →  Softmax(q · scale · kᵀ + open + hidden) · v
    Where(rows that see nothing, 0, Attention)  →  Attention       with finite masks no row divides by zero
    Attention with a past     →  cached_attention.py
    RotaryEmbedding(x)        →  x · cos + swapped halves(x) · sin, rows of tables where positions are an input
    GatherND(x, all places)   →  x
    Where(tokens, 0, −3.4e38) →  Where(tokens, 0, −100), where an exporter adds that to scores itself

`hidden` [1, 1, 1, N] is 0 for a token and −100 for padding; `open` is what a mask holds when nothing is padded (a
window, a causal mask, a bias of positions), and left out where that is zero. What a mask means is found by running
the nodes before it on two attention masks: −3.4e38 for minus infinity, or a comparison of ranges, would leave 16 bits
no level for a score. Heads that share keys are one taller matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from edgepipe.engines.qnn.cached_attention import HIDDEN, cached_attention
from edgepipe.engines.qnn.nodes import Nodes, attributes_of
from edgepipe.errors import TargetError
from edgepipe.graph.evaluate import run_node

_MASK = "attention_mask"
_LEAST_HIDDEN = -1e3  # what every exporter's minus infinity lies below, and no bias does


def plain_attention(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph of fixed shapes without Attention and RotaryEmbedding; TargetError for forms that aren't known."""
    nodes = Nodes(model)
    skipped: dict[str, str] = {}  # output of a Where → the attention it guards
    attentions = {node.output[0] for node in model.graph.node if node.op_type == "Attention"}
    for node in model.graph.node:
        node = _renamed(node, skipped)
        if node.op_type == "Attention" and len(node.input) > 4:
            cached_attention(nodes, node)
        elif node.op_type == "Attention":
            _attention(nodes, node)
        elif node.op_type == "GatherND" and _is_whole(nodes, node):
            skipped[node.output[0]] = node.input[0]
        elif node.op_type == "RotaryEmbedding":
            _rotary(nodes, node)
        elif node.op_type == "Where" and node.input[2] in attentions and _is_zero(nodes, node.input[1]):
            skipped[node.output[0]] = node.input[2]
        elif node.op_type == "Where" and all(name in nodes.constants for name in node.input[1:]):
            _finite(nodes, node)
        else:
            nodes.out.append(node)
    return nodes.finish()


def _finite(nodes: Nodes, node: onnx.NodeProto) -> None:
    """Write a choice between two constants, a mask that is added to scores, with a finite number for minus infinity."""
    given = [node.input[0]]
    for name in node.input[1:]:
        value = nodes.constants[name]
        low = value.dtype == np.float32 and bool(np.any(value < _LEAST_HIDDEN))
        given.append(nodes.constant(np.maximum(value, np.float32(HIDDEN)), f"{name}.finite") if low else name)
    nodes.op("Where", given, output=node.output[0])


def _renamed(node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
    if any(name in names for name in node.input):
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        del copy.input[:]
        copy.input.extend(names.get(name, name) for name in node.input)
        return copy
    return node


def _is_whole(nodes: Nodes, node: onnx.NodeProto) -> bool:
    """Say whether a GatherND picks every position of its data [1, S, width] in order."""
    places = nodes.constants.get(node.input[1])
    count = nodes.shapes[node.input[0]][1]
    return places is not None and places.shape == (1, count, 1) and np.array_equal(places.ravel(), np.arange(count))


def _is_zero(nodes: Nodes, name: str) -> bool:
    return name in nodes.constants and not np.any(nodes.constants[name])


def _attention(nodes: Nodes, node: onnx.NodeProto) -> None:
    """Write one attention, of one text, as plain operators."""
    given = attributes_of(node)
    if given.get("softcap") or given.get("qk_matmul_output_mode") or any(node.output[1:]):
        raise TargetError(
            f"the attention {node.output[0]} has a soft cap or gives its cache, which the NPU path doesn't know yet: "
            "take another target"
        )
    q, k, v = node.input[:3]
    whole = len(nodes.shapes[q]) == 3  # [1, S, H · D]: heads aren't apart yet
    if whole:
        heads, shared, rows = given["q_num_heads"], given["kv_num_heads"], nodes.shapes[q][1]
        keys, width = nodes.shapes[k][1], nodes.shapes[q][2] // heads
        value_width = nodes.shapes[v][2] // shared
    else:
        (_, heads, rows, width), (_, shared, keys, _), value_width = (
            nodes.shapes[q],
            nodes.shapes[k],
            nodes.shapes[v][3],
        )
    scale = np.float32(given.get("scale") or width**-0.5)
    q = nodes.op("Mul", [q, nodes.constant(np.array(scale), f"scale.{scale:.6g}")])
    if whole:
        q = _turned(nodes, q, (1, rows, heads, width), (0, 2, 1, 3))
        k = _turned(nodes, k, (1, keys, shared, width), (0, 2, 3, 1))
        v = _turned(nodes, v, (1, keys, shared, value_width), (0, 2, 1, 3))
    else:
        k = nodes.op("Transpose", [k], {"perm": (0, 1, 3, 2)})
    taller = heads // shared
    if taller > 1:
        q = nodes.op("Reshape", [q, nodes.sizes(1, shared, taller * rows, width)])
    scores = nodes.op("MatMul", [q, k])
    mask = node.input[3] if len(node.input) > 3 else ""
    for term in _mask_terms(nodes, mask, rows, keys, taller, is_causal=bool(given.get("is_causal"))):
        scores = nodes.op("Add", [scores, term])
    y = nodes.op("MatMul", [nodes.op("Softmax", [scores], {"axis": -1}), v])
    if taller > 1:
        y = nodes.op("Reshape", [y, nodes.sizes(1, heads, rows, value_width)])
    if whole:
        y = nodes.op("Transpose", [y], {"perm": (0, 2, 1, 3)})
        nodes.op("Reshape", [y, nodes.sizes(1, rows, heads * value_width)], output=node.output[0])
    else:
        nodes.out[-1].output[0] = node.output[0]


def _turned(nodes: Nodes, x: str, shape: tuple[int, ...], perm: tuple[int, ...]) -> str:
    return nodes.op("Transpose", [nodes.op("Reshape", [x, nodes.sizes(*shape)])], {"perm": perm})


def _mask_terms(nodes: Nodes, mask: str, rows: int, keys: int, taller: int, *, is_causal: bool) -> list[str]:
    """Return what is added to the scores [1, H, rows, keys]."""
    opened = np.zeros((1, 1, 1, 1), np.float32)
    terms = []
    if mask:
        opened, hides = _meaning(nodes, mask, keys)
        terms = [_hidden(nodes, keys)] if hides else []
    if is_causal:
        opened = opened + np.triu(np.full((rows, keys), HIDDEN, np.float32), 1 + keys - rows)
    if np.any(opened):
        opened = np.maximum(opened, HIDDEN)
        if taller > 1 and opened.shape[2] > 1:  # one mask below the other, as the heads that share keys are
            if opened.shape[1] > 1:
                opened = opened.reshape(1, opened.shape[1] // taller, taller * rows, opened.shape[3])
            else:
                opened = np.tile(opened, (1, 1, taller, 1))
        terms.append(nodes.constant(opened.astype(np.float32), "attention.open"))
    return terms


def _hidden(nodes: Nodes, keys: int) -> str:
    """Return the scores of padding [1, 1, 1, keys], made once for all layers."""
    name = "attention.hidden"
    if not any(name in node.output for node in nodes.out):
        table = nodes.constant(np.array([HIDDEN, 0], np.float32), f"{name}.of")
        rows = nodes.op("Gather", [table, _MASK], {"axis": 0})
        nodes.op("Reshape", [rows, nodes.sizes(1, 1, 1, keys)], output=name)
    return name


def _meaning(nodes: Nodes, mask: str, keys: int) -> tuple[np.ndarray, bool]:
    """Return what a mask adds to scores when nothing is padding, four axes, and whether it hides padding.

    Raises TargetError for one that does anything else.
    """
    if mask in nodes.constants:
        return _added(nodes.constants[mask]), False
    run = _before(nodes, mask)
    whole, some = np.ones(keys, bool), np.arange(keys) % 3 != 1
    opened, masked = (_added(run(seen)) for seen in (whole, some))
    shape = np.broadcast_shapes(opened.shape, masked.shape)
    both = np.broadcast_to(opened, shape), np.broadcast_to(masked, shape)
    if shape[2] == keys:  # what padding itself sees is nobody's business
        both = both[0][:, :, some], both[1][:, :, some]
    full = np.broadcast_to(both[0], (*both[0].shape[:3], keys)), np.broadcast_to(both[1], (*both[1].shape[:3], keys))
    if not (np.array_equal(full[0][..., some], full[1][..., some]) and np.all(full[1][..., ~some] <= HIDDEN)):
        raise TargetError(f"the mask {mask} does more than hide padding, which the NPU path doesn't know yet")
    return opened, True


def _added(mask: np.ndarray) -> np.ndarray:
    """Return a mask as what is added to scores, with four axes."""
    added = np.where(mask, np.float32(0), np.float32(-np.inf)) if mask.dtype == bool else mask
    return added.reshape((1,) * (4 - added.ndim) + added.shape)


def _before(nodes: Nodes, mask: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return what computes a mask [… keys] from the tokens that are seen [keys]; TargetError when it needs more."""
    wanted, chain = {mask}, []
    for node in reversed(nodes.out):
        if wanted.intersection(node.output):
            chain.append(node)
            wanted.update(node.input)
    made = {name for node in chain for name in node.output}
    if others := sorted(name for name in wanted - made - {_MASK, ""} if name not in nodes.constants):
        raise TargetError(f"the mask {mask} depends on {others[0]}, and an NPU's is made of attention_mask alone")

    def run(seen: np.ndarray) -> np.ndarray:
        values = {_MASK: seen[None].astype(np.int64)}
        for node in chain[::-1]:
            inputs = {n: values[n] if n in values else nodes.constants[n] for n in node.input if n}
            values.update(zip(node.output, run_node(node, inputs), strict=True))
        return values[mask]

    return run


def _rotary(nodes: Nodes, node: onnx.NodeProto) -> None:
    """Write one rotation; cosines and sines are constants, or rows of a table where positions are given."""
    given = attributes_of(node)
    tables = [nodes.constants.get(name) for name in node.input[1:3]]
    shape = nodes.shapes[node.input[0]]
    heads = given.get("num_heads", 0) if len(shape) == 3 else shape[1]
    if any(t is None for t in tables) or given.get("interleaved") or given.get("rotary_embedding_dim") or not heads:
        raise TargetError(f"the rotation {node.output[0]} is of a form that the NPU path doesn't know yet")
    half = tables[0].shape[-1]  # type: ignore[union-attr]
    x = node.input[0]
    axis = 2 if len(shape) == 3 else 1
    if len(shape) == 3:
        x = nodes.op("Reshape", [x, nodes.sizes(1, shape[1], heads, 2 * half)])
    cos, sin = _turns(nodes, node, axis)
    first, second = (
        nodes.op("Slice", [x, nodes.sizes(start), nodes.sizes(start + half), nodes.sizes(3)]) for start in (0, half)
    )
    swapped = nodes.op("Concat", [second, first], {"axis": 3})
    left = nodes.op("Mul", [x, cos])
    right = nodes.op("Mul", [swapped, sin])
    turned = nodes.op("Add", [left, right], output="" if len(shape) == 3 else node.output[0])
    if len(shape) == 3:
        nodes.op("Reshape", [turned, nodes.sizes(*shape)], output=node.output[0])


def _turns(nodes: Nodes, node: onnx.NodeProto, axis: int) -> list[str]:
    """Return cosines and sines of a rotation's positions, four axes, heads along `axis`."""
    cos, sin = (nodes.constants[name] for name in node.input[1:3])
    places = node.input[3] if len(node.input) > 3 else ""
    both = {"rotary.cos": np.concatenate((cos, cos), -1), "rotary.sin": np.concatenate((-sin, sin), -1)}
    found = []
    for name, table in both.items():
        table = table.astype(np.float32)
        if places in nodes.constants or not places:
            rows = table[nodes.constants[places]] if places else table  # [1, S, D]
            found.append(nodes.constant(np.expand_dims(rows, axis), name))
            continue
        shape = [*nodes.shapes[places], table.shape[-1]]
        shape.insert(axis, 1)
        if not any(name in made.output for made in nodes.out):  # once for all layers
            rows_of = nodes.op("Gather", [nodes.constant(table, f"{name}.of"), places], {"axis": 0})
            nodes.op("Reshape", [rows_of, nodes.sizes(*shape)], output=name)
        found.append(name)
    return found
