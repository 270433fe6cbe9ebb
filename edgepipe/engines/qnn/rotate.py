"""Pass: turn the residual stream of a decoder, so that no channel of it stands out.

    x                       →  x · Q, Q orthogonal, everywhere in the stream: the embedding's rows are turned
    RMSNormalization(x, w)  →  RMSNormalization(x · Q, 1): a turn keeps the mean of squares
    MatMul(norm, W)         →  MatMul(norm, Qᵀ · diag(w) · W)
    x + MatMul(y, W) (+ b)  →  x · Q + MatMul(y, W · Q) (+ b · Q)

The graph computes what it did; nothing is added to it. Decoders put thousands into one or two channels at a text's
first place (24,000 in SmolLM2-135M, where others have some tens), and 65,536 levels for that range leave a step of 0.4.
Turned, that value is spread over all channels. Q is a Hadamard matrix ⊗ a cosine transform, with seeded signs.
Source: Ashkboos et al., QuaRot, arXiv:2404.00456; the massive values: Sun et al., arXiv:2402.17762.

A graph whose stream is read by anything but norms and sums is left as it is.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import onnx

from edgepipe.engines.qnn.nodes import Nodes
from edgepipe.graph.dialect import weight_name

TURNED = "turned/"  # begins the names of constants that were turned
_SEED = 0


@dataclass(slots=True)
class _Plan:
    """Hold what becomes of the constants, by name: what they are multiplied by before, and whether after."""

    rows: dict[str, str] = field(default_factory=dict)  # matrices [k, n] behind a norm → the weight of that
    columns: set[str] = field(default_factory=set)  # tables and matrices [k, n] and biases [n] of the stream
    norms: dict[str, str] = field(default_factory=dict)  # result of a norm → its weight


def rotate(plain: onnx.ModelProto) -> onnx.ModelProto:
    """Return a decoder's plain graph with its stream turned, or the graph as it is."""
    nodes = Nodes(plain)
    plan = _planned(nodes, list(plain.graph.node))
    if plan is None:
        return plain
    width = nodes.constants[next(iter(plan.norms.values()))].size
    turn = orthogonal(width)
    made: dict[str, str] = {}
    for name, norm in plan.rows.items():
        value = turn.T @ (nodes.constants[norm].astype(np.float64)[:, None] * nodes.constants[name])
        made[name] = nodes.constant(value.astype(np.float32), TURNED + name)
    for name in plan.columns:
        held = nodes.constants[TURNED + name if name in plan.rows else name]
        made[name] = nodes.constant((held @ turn).astype(np.float32), TURNED + name)
    ones = {name: nodes.constant(np.ones(width, np.float32), TURNED + name) for name in plan.norms.values()}
    for node in plain.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for place, name in enumerate(node.input):
            is_norm = node.output[0] in plan.norms and place == 1
            copy.input[place] = ones[name] if is_norm else made.get(name, name)
        nodes.out.append(copy)
    return nodes.finish()


def _planned(nodes: Nodes, graph: list[onnx.NodeProto]) -> _Plan | None:
    """Find the stream; None where it isn't what this pass knows."""
    plan, stream = _Plan(), set()
    makers = {node.output[0]: node for node in graph}
    uses: dict[str, int] = defaultdict(int)  # of each constant
    for node in graph:
        for name in node.input:
            uses[name] += name in nodes.constants
        inside = [name for name in node.input if name in stream]
        kind, constant = node.op_type, [name for name in node.input if name in nodes.constants]
        if kind == "Gather" and weight_name(node.input[0]) is not None:
            plan.columns.add(node.input[0])
            stream.add(node.output[0])
        elif kind == "MatMul" and node.input[0] in plan.norms and constant == [node.input[1]]:
            plan.rows[node.input[1]] = plan.norms[node.input[0]]
        elif any(name in plan.norms for name in node.input):
            return None
        elif not inside:
            continue
        elif kind == "RMSNormalization" and constant == [node.input[1]]:
            plan.norms[node.output[0]] = node.input[1]
        elif kind == "Mul" and constant and nodes.constants[constant[0]].size == 1:
            stream.add(node.output[0])
        elif kind == "Add" and len(inside) == 1 and not constant:
            other = next(name for name in node.input if name not in stream)
            if not _turns_columns(nodes, makers, other, plan):
                return None
            stream.add(node.output[0])
        else:
            return None
    ends = {value.name for value in nodes.outputs}
    turned = {*plan.rows, *plan.columns}
    if not plan.norms or ends & (stream | set(plan.norms)) or any(uses[name] > 1 for name in turned):
        return None
    return plan


def _turns_columns(nodes: Nodes, makers: dict[str, onnx.NodeProto], name: str, plan: _Plan) -> bool:
    """Note the matrix and bias that make what is added to the stream; say whether they are all that does."""
    node = makers[name]
    while node.op_type in ("Add", "Mul"):
        constant = next((one for one in node.input if one in nodes.constants), "")
        if not constant or (node.op_type == "Mul" and nodes.constants[constant].size != 1):
            return False
        if node.op_type == "Add":
            plan.columns.add(constant)
        node = makers[next(one for one in node.input if one != constant)]
    if node.op_type != "MatMul" or node.input[1] not in nodes.constants:
        return False
    plan.columns.add(node.input[1])
    return True


def orthogonal(width: int) -> np.ndarray:
    """Return Q [width, width] float64, whose entries are all small: Hadamard of the power of two in it ⊗ cosines."""
    two = width & -width
    hadamard = np.ones((1, 1))
    while len(hadamard) < two:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    rest = np.arange(width // two)
    cosines = np.cos(np.pi * (rest[None] + 0.5) * rest[:, None] / len(rest)) * np.sqrt(2 / len(rest))
    cosines[0] = np.sqrt(1 / len(rest))
    signs = np.random.default_rng(_SEED).choice([-1.0, 1.0], width)
    return signs[:, None] * np.kron(hadamard / np.sqrt(two), cosines)
