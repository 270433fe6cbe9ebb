"""Pass: Attention over heads that were taken apart by hand, as exporters write encoders → attention on whole rows.

    Attention(heads(q), heads(k), heads(v), mask)  →  rows    with heads(x) = Transpose(Reshape(x [B, S, H · D]))
    becomes, with `open` saying that nothing is masked,
    If open: MultiHeadAttention(q, k, v)                      the blocked kernel, which takes no mask
    else:    Attention(q, k, v, mask)                         the operator splits rows into heads itself

Without a mask the first alone. `open` is computed from the mask's own values, once for all layers that share it, so
nothing is assumed of where a mask comes from. A Where that clears rows which see nothing stays, in the second branch.
Left alone: a past, causal attention, heads that are shared or rotated in between, and a mask per head, which gets the
second form without asking.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

_MICROSOFT = "com.microsoft"
_BOOL, _INT32 = int(ir.DataType.BOOL), int(ir.DataType.INT32)
_HEADS_FIRST = [0, 2, 1, 3]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """Hold what stands around one Attention."""

    rows: list[ir.Value]  # q, k, v: [B, S, heads · D]
    heads: int
    mask: ir.Value | None
    clear: ir.Node | None  # Where(rows that see nothing, 0, y)
    last: ir.Node  # the Reshape whose result is [B, S, heads · D]


@dataclass(slots=True)
class _Pass:
    """Hold a graph, and what its attentions share."""

    graph: ir.Graph
    shared: dict[tuple[ir.Value | None, ...], ir.Value] = field(default_factory=dict)

    def constant(self, array: np.ndarray, name: str) -> ir.Value:
        """Return a small embedded constant, made on first use."""
        if name not in self.graph.initializers:
            self.graph.initializers[name] = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        return self.graph.initializers[name]


def whole_heads(graph: ir.Graph) -> None:
    """Rewrite every Attention of `graph` whose heads are taken apart and put together beside it, in place."""
    one = _Pass(graph)
    for node in list(graph):
        if node.op_type == "Attention" and (found := _around(node)) is not None:
            _rewrite(one, node, found)


def _around(node: ir.Node) -> _Found | None:
    """Find what splits and joins the heads of an Attention; None where it isn't of that kind."""
    attributes = node.attributes
    zero = {"is_causal": 0, "softcap": 0.0, "qk_matmul_output_mode": 0}
    if any(name in attributes and attributes[name].value != value for name, value in zero.items()):
        return None
    if not 3 <= len(node.inputs) <= 4 or any(value.name and value.consumers() for value in node.outputs[1:]):
        return None
    split = [_split_rows(value) for value in node.inputs[:3]]
    if any(one is None for one in split):
        return None
    rows, heads = [one[0] for one in split if one], {one[1] for one in split if one}
    end, clear = _only_user(node), None
    if end is not None and end.op_type == "Where" and end.inputs[2] is node.outputs[0]:
        if not _is_a_row_each(end.inputs[0]):
            return None
        end, clear = _only_user(end), end
    while end is not None and end.op_type == "Reshape" and _same(end.inputs[0], end.outputs[0]):
        end = _only_user(end)
    last = _only_user(end) if end is not None and _turns(end) else None
    if len(heads) != 1 or last is None or last.op_type != "Reshape" or not _same(last.outputs[0], rows[0]):
        return None
    mask = node.inputs[3] if len(node.inputs) == 4 else None
    return _Found(rows=rows, heads=heads.pop(), mask=mask, clear=clear, last=last)


def _split_rows(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """Return x [B, S, H · D] and H of a value [B, H, S, D] = Transpose(Reshape(x)); None for any other."""
    turn = value.producer() if value is not None else None
    reshape = turn.inputs[0].producer() if turn is not None and _turns(turn) and turn.inputs[0] is not None else None
    if reshape is None or reshape.op_type != "Reshape":
        return None
    x, apart = reshape.inputs[0], reshape.outputs[0]
    if x is None or x.shape is None or apart.shape is None or len(x.shape) != 3 or len(apart.shape) != 4:
        return None
    heads, width = apart.shape[2], apart.shape[3]
    if not isinstance(heads, int) or not isinstance(width, int) or x.shape[2] != heads * width:
        return None
    return x, heads


def _only_user(node: ir.Node) -> ir.Node | None:
    users = node.outputs[0].consumers()
    return users[0] if len(users) == 1 and not node.outputs[0].is_graph_output() else None


def _turns(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == _HEADS_FIRST


def _same(a: ir.Value | None, b: ir.Value) -> bool:
    return a is not None and a.shape is not None and b.shape is not None and list(a.shape) == list(b.shape)


def _is_a_row_each(condition: ir.Value | None) -> bool:
    """Say whether a condition is [B, 1, S, 1]."""
    shape = condition.shape if condition is not None else None
    return shape is not None and len(shape) == 4 and shape[1] == 1 and shape[3] == 1


def _rewrite(one: _Pass, node: ir.Node, found: _Found) -> None:
    mask = found.mask
    blocked = _blocked(node, found)
    if mask is None and found.clear is None:
        _replace(one.graph, found.last, blocked)
        return
    plain = _plain(one, node, found)
    if mask is None or mask.shape is None or len(mask.shape) != 4 or mask.shape[1] != 1:
        one.graph.insert_before(found.last, plain[:-1])
        _replace(one.graph, found.last, plain[-1])
        return
    name = node.outputs[0].name
    branches = {"then_branch": _branch([blocked], f"open:{name}"), "else_branch": _branch(plain, f"masked:{name}")}
    _replace(one.graph, found.last, ir.node("If", [_is_open(one, node, found)], branches))


def _blocked(node: ir.Node, found: _Found) -> ir.Node:
    attributes: dict[str, int | float] = {"num_heads": found.heads}
    if "scale" in node.attributes:
        attributes["scale"] = node.attributes["scale"].as_float()
    return ir.node("MultiHeadAttention", found.rows, attributes, domain=_MICROSOFT)


def _plain(one: _Pass, node: ir.Node, found: _Found) -> list[ir.Node]:
    """Return nodes that attend on rows, the last of which gives [B, S, heads · D]."""
    kept = {name: attribute for name, attribute in node.attributes.items() if name in ("scale", "is_causal", "softcap")}
    more = [ir.AttrInt64(name, found.heads) for name in ("q_num_heads", "kv_num_heads")]
    masks = [found.mask] if found.mask is not None else []
    attend = ir.Node("", "Attention", [*found.rows, *masks], [*kept.values(), *more])
    if found.clear is None:
        return [attend]
    condition, zeros, _ = found.clear.inputs
    key = (condition, zeros)
    if key not in one.shared:
        squeeze = ir.node("Squeeze", [condition, one.constant(np.array([1], np.int64), "heads:axis")])
        one.graph.insert_before(found.clear, [squeeze])
        one.shared[key] = squeeze.outputs[0]
    return [attend, ir.node("Where", [one.shared[key], zeros, attend.outputs[0]])]


def _is_open(one: _Pass, node: ir.Node, found: _Found) -> ir.Value:
    """Return whether a mask masks nothing, and no row is cleared; computed once."""
    condition = found.clear.inputs[0] if found.clear is not None else None
    key = (found.mask, condition)
    if key in one.shared:
        return one.shared[key]
    nodes: list[ir.Node] = []

    def then(kind: str, *inputs: ir.Value | None, to: int | None = None) -> ir.Value:
        attributes = {"to": to} if to is not None else {"keepdims": 0} if kind.startswith("Reduce") else {}
        nodes.append(ir.node(kind, list(inputs), attributes))
        return nodes[-1].outputs[0]

    assert found.mask is not None
    if found.mask.dtype == ir.DataType.BOOL:
        is_open = then("Cast", then("ReduceMin", then("Cast", found.mask, to=_INT32)), to=_BOOL)
    else:
        zero = one.constant(np.array(0, np.float32), "heads:zero")
        ends = [then("Equal", then(kind, found.mask), zero) for kind in ("ReduceMin", "ReduceMax")]
        is_open = then("And", *ends)
    if condition is not None:
        cleared = then("Cast", then("ReduceMax", then("Cast", condition, to=_INT32)), to=_BOOL)
        is_open = then("And", is_open, then("Not", cleared))
    one.graph.insert_before(node if found.clear is None else found.clear, nodes)
    one.shared[key] = is_open
    return is_open


def _branch(nodes: list[ir.Node], name: str) -> ir.Graph:
    """Return a branch of these nodes; what they read stands outside."""
    for number, node in enumerate(nodes):
        node.outputs[0].name = f"{name}:{number}"  # unlike any name outside: a branch sees those too
    y = nodes[-1].outputs[0]
    y.type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Graph(inputs=[], outputs=[y], nodes=nodes, name=name)


def _replace(graph: ir.Graph, last: ir.Node, node: ir.Node) -> None:
    """Put a node in the place of what joins the heads; what nothing reads any more goes with it."""
    old, new = last.outputs[0], node.outputs[0]
    graph.insert_before(last, [node])
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name, old.name = old.name, None
    new.type, new.shape = old.type, old.shape
    unused = [last]
    while unused:
        gone = unused.pop()
        if any(value.consumers() or value.is_graph_output() for value in gone.outputs):
            continue
        unused += [made for x in gone.inputs if x is not None and (made := x.producer()) is not None]
        if gone.graph is graph:
            graph.remove([gone], safe=True)
