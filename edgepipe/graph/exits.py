"""A decoder with exits in parts: layers that a token has skipped aren't run, and their keys and values are filled in.

Graphs beside `decoder`, which stays as it is (B rows, S new tokens, L positions; exit k stands behind part k):

    part_k   input_ids [B, S] int64, or states and added [B, S, hidden], whose sum the part before ended with;
             position_ids, logits_positions, and past and present of its own layers
             → normed [B, L, hidden]: what the head reads; but for the last, gate [B, L] float32, the log odds that the
             token there is that of all layers, next_states and next_added
    fill_k   states, added, position_ids → new_key.i, new_value.i [B, S, kv_heads · head_dim] of the layers of part k
    head     normed → logits [B, L, vocab]

At an exit a translator stands in for the layers behind it: norm(x + A·x + b), with the whole model's last norm. A gate
is w·gelu(G·normed + c) + d. The sum is left to the next part, for in `decoder` it is fused with the norm behind it: so
all parts together compute what `decoder` computes, bit by bit.
Sources: Tuned Lens (arXiv:2303.08112) for translators; CALM (arXiv:2207.07061) and DYNAMAX (arXiv:2504.20922) for exits
by confidence, with keys and values of the skipped layers made of the state at the exit (state propagation).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import onnx_ir as ir

from edgepipe.artifacts import Json
from edgepipe.errors import ConfigError
from edgepipe.graph.blocks import ints, keys_and_values, linear, norm, pick_positions, rotary_tables
from edgepipe.graph.dialect import GraphBuilder
from edgepipe.graph.llama import decoder_layers, embedded, head_logits
from edgepipe.graph.shape import Shape, check_exits
from edgepipe.runtime.exits import GATE, PART
from edgepipe.runtime.leaving import FILL, HEAD

GATE_WIDTH = 64  # features of a gate's hidden layer
_FLOAT, _INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def read_exits(config: Json) -> tuple[int, ...]:
    """Return the layers after which tokens may leave, of a decoder's config.json; ConfigError for what is none."""
    exits = config.get("exits") or []
    if not isinstance(exits, list) or not all(type(one) is int for one in exits):
        raise ConfigError(f"config.json says exits is {exits!r}; expected a list of numbers of layers")
    if exits:
        check_exits(exits, int(config["num_hidden_layers"]))
    return tuple(exits)


def exit_weights(shape: Shape, exits: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """List what exits add to a decoder's parameters, with shapes [out, in] or [n]."""
    sizes: dict[str, tuple[int, ...]] = {
        "translate.weight": (shape.hidden, shape.hidden),
        "translate.bias": (shape.hidden,),
        "gate_in.weight": (GATE_WIDTH, shape.hidden),
        "gate_in.bias": (GATE_WIDTH,),
        "gate_out.weight": (GATE_WIDTH,),
        "gate_out.bias": (1,),
    }
    return {f"exits.{number}.{name}": size for number in range(len(exits)) for name, size in sizes.items()}


def build_exits(shape: Shape, config: Json, exits: Sequence[int]) -> dict[str, bytes]:
    """Build the graphs by name; `exits` are layers after which a token may leave."""
    depths = (0, *exits, shape.layers)
    layers = [range(first, last) for first, last in itertools.pairwise(depths)]
    parts = {f"{PART}{k}": _build_part(shape, config, k, layers[k], k == len(exits)) for k in range(len(layers))}
    fills = {f"{FILL}{k}": _build_fill(shape, config, k, layers[k]) for k in range(1, len(layers))}
    return {**parts, **fills, HEAD: _build_head(shape)}


def _build_part(s: Shape, config: Json, number: int, layers: range, is_last: bool) -> bytes:
    g = GraphBuilder(f"{PART}{number}")
    x = _sum(g, s) if number else None
    ids = None if number else g.input("input_ids", _INT64, ["batch", "sequence"])
    positions = g.input("position_ids", _INT64, ["batch", "sequence"])
    wanted = g.input("logits_positions", _INT64, ["batch", "wanted"])
    tables = rotary_tables(g, s, config)
    if ids is not None:
        x = embedded(g, s, ids)
    assert x is not None
    x = decoder_layers(g, s, x, positions, tables, layers)
    dims: list[int | str] = ["batch", "wanted", s.hidden]
    if is_last:
        g.output("normed", pick_positions(g, norm(g, s, "model.norm.weight", x), wanted), _FLOAT, dims)
        return g.finish()
    whole = x.producer()
    assert whole is not None
    assert whole.op_type == "Add"
    p, picked = f"exits.{number}.", pick_positions(g, x, wanted)
    moved = g.op("Add", [picked, linear(g, p + "translate", picked, s.hidden, s.hidden, bias=True)])
    normed = norm(g, s, "model.norm.weight", moved)
    g.output("normed", normed, _FLOAT, dims)
    g.output(GATE, _gate(g, s, p, normed), _FLOAT, ["batch", "wanted"])
    for name, value in zip(("next_states", "next_added"), whole.inputs, strict=True):
        assert value is not None
        g.output(name, value, _FLOAT, ["batch", "sequence", s.hidden])
    return g.finish()


def _gate(g: GraphBuilder, s: Shape, p: str, normed: ir.Value) -> ir.Value:
    """Return the log odds [B, L] of an exit."""
    inner = g.op("Gelu", [linear(g, p + "gate_in", normed, GATE_WIDTH, s.hidden, bias=True)])
    weighted = g.op("Mul", [inner, g.weight(p + "gate_out.weight", [GATE_WIDTH])])
    odds = g.op("ReduceSum", [weighted, ints(g, -1)], {"keepdims": 0})
    return g.op("Add", [odds, g.weight(p + "gate_out.bias", [1])])


def _build_fill(s: Shape, config: Json, number: int, layers: range) -> bytes:
    g = GraphBuilder(f"{FILL}{number}")
    x = _sum(g, s)
    positions = g.input("position_ids", _INT64, ["batch", "sequence"])
    tables = rotary_tables(g, s, config)
    width = s.kv_heads * s.head_dim
    for i in layers:
        p = f"model.layers.{i}."
        h = norm(g, s, p + "input_layernorm.weight", x)
        for kind, value in zip(("key", "value"), keys_and_values(g, s, i, p, h, positions, tables), strict=True):
            g.output(f"new_{kind}.{i}", value, _FLOAT, ["batch", "sequence", width])
    return g.finish()


def _build_head(s: Shape) -> bytes:
    g = GraphBuilder(HEAD)
    logits = head_logits(g, s, g.input("normed", _FLOAT, ["batch", "wanted", s.hidden]))
    g.output("logits", logits, _FLOAT, ["batch", "wanted", s.vocab])
    return g.finish()


def _sum(g: GraphBuilder, s: Shape) -> ir.Value:
    """Return what the part before ended with."""
    return g.op("Add", [g.input(name, _FLOAT, ["batch", "sequence", s.hidden]) for name in ("states", "added")])
