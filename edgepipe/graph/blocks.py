"""The parts that every graph of Llama-style blocks is built from: norms, projections, rotations, attention, MLP.

A part takes the builder, the facts of its stack and the prefix of its weights' names; weights are named as in
transformers. B rows, S new tokens, P past tokens, T = P + S; values between parts are [B, S, width] float32.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepipe.artifacts import Json
from edgepipe.graph.dialect import GraphBuilder
from edgepipe.graph.shape import Shape, rotary_frequencies

Tables = tuple[ir.Value, ir.Value]  # cosine and sine [positions, head_dim / 2]
Projected = tuple[
    ir.Value, ir.Value, ir.Value
]  # queries [B, S, heads · head_dim], keys and values [B, S, kv_heads · …]

_ACTIVATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "silu": ("Sigmoid", {}),  # x · sigmoid(x)
    "gelu": ("Gelu", {}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
}


def self_projections(
    g: GraphBuilder, s: Shape, i: int, p: str, h: ir.Value, positions: ir.Value, tables: Tables
) -> Projected:
    """Return queries, keys and values of layer `i`, rotated where the layer does; `p` is "….layers.i."."""
    q_width, kv_width = s.heads * s.head_dim, s.kv_heads * s.head_dim
    q = linear(g, p + "self_attn.q_proj", h, q_width, s.hidden, bias=s.qkv_bias)
    k = linear(g, p + "self_attn.k_proj", h, kv_width, s.hidden, bias=s.qkv_bias)
    v = linear(g, p + "self_attn.v_proj", h, kv_width, s.hidden, bias=s.qkv_bias)
    if s.variant.qk_norm:
        q = head_norm(g, s, p + "self_attn.q_norm.weight", q, s.heads)
        k = head_norm(g, s, p + "self_attn.k_norm.weight", k, s.kv_heads)
    if s.ropes[i]:
        q = g.op("RotaryEmbedding", [q, *tables, positions], {"num_heads": s.heads})
        k = g.op("RotaryEmbedding", [k, *tables, positions], {"num_heads": s.kv_heads})
    return q, k, v


def keys_and_values(
    g: GraphBuilder, s: Shape, i: int, p: str, h: ir.Value, positions: ir.Value, tables: Tables
) -> tuple[ir.Value, ir.Value]:
    """Return what `self_projections` does, but for the queries."""
    width = s.kv_heads * s.head_dim
    k = linear(g, p + "self_attn.k_proj", h, width, s.hidden, bias=s.qkv_bias)
    v = linear(g, p + "self_attn.v_proj", h, width, s.hidden, bias=s.qkv_bias)
    if s.variant.qk_norm:
        k = head_norm(g, s, p + "self_attn.k_norm.weight", k, s.kv_heads)
    if s.ropes[i]:
        k = g.op("RotaryEmbedding", [k, *tables, positions], {"num_heads": s.kv_heads})
    return k, v


def cached_attention(g: GraphBuilder, s: Shape, i: int, qkv: Projected, positions: ir.Value) -> ir.Value:
    """Attend causally over past and new tokens; the graph gains layer `i`'s past inputs and present outputs."""
    past = [
        g.input(f"past_{kind}.{i}", ir.DataType.FLOAT, ["batch", s.kv_heads, "past", s.head_dim])
        for kind in ("key", "value")
    ]
    window = s.windows[i]
    mask = None if window is None else _window_mask(g, past[0], positions, window)
    y, *present = g.op_multi(
        "Attention",
        [*qkv, mask, *past],
        {
            "q_num_heads": s.heads,
            "kv_num_heads": s.kv_heads,
            "scale": s.attention_scale,
            "is_causal": int(window is None),
        },
        3,
    )
    node = y.producer()
    assert node is not None
    if window is not None:
        node.metadata_props["sliding_window"] = str(window)
    for kind, value in zip(("key", "value"), present, strict=True):
        shape: list[int | str] = ["batch", s.kv_heads, "total", s.head_dim]
        g.output(f"present_{kind}.{i}", value, ir.DataType.FLOAT, shape)
    return y


def attention_output(g: GraphBuilder, s: Shape, name: str, x: ir.Value, y: ir.Value) -> ir.Value:
    """Project what attention gave (`name`: "….self_attn.o_proj") and add it to the residual stream x."""
    y = linear(g, name, y, s.hidden, s.heads * s.head_dim, bias=s.o_bias)
    return g.op("Add", [x, scaled(g, y, s.residual_scale)])


def mlp(g: GraphBuilder, s: Shape, p: str, x: ir.Value) -> ir.Value:
    """Add norm and MLP of one layer to the residual stream x."""
    h = norm(g, s, p + "post_attention_layernorm.weight", x)
    up = linear(g, p + "mlp.up_proj", h, s.ffn, s.hidden, bias=s.mlp_bias)
    inner = linear(g, p + "mlp.gate_proj", h, s.ffn, s.hidden, bias=s.mlp_bias) if s.gated else up
    kind, attributes = _ACTIVATIONS[s.activation]
    activated = g.op(kind, [inner], attributes)
    if s.activation == "silu":
        activated = g.op("Mul", [inner, activated])
    if s.gated:
        activated = g.op("Mul", [activated, up])
    down = linear(g, p + "mlp.down_proj", activated, s.hidden, s.ffn, bias=s.mlp_bias)
    return g.op("Add", [x, scaled(g, down, s.residual_scale)])


def rotary_tables(g: GraphBuilder, s: Shape, config: Json, first: int = 0) -> Tables:
    """Compute cosine and sine of positions `first` … `first` + context − 1 in the graph, from the frequencies alone.

    An engine folds them when it loads; stored, they would be the largest float tensors of a 4-bit bundle.
    """
    inverse, factor = rotary_frequencies(config, s)
    ends = (g.constant(np.float32(first)), g.constant(np.float32(first + s.context)))
    steps = g.op("Range", [*ends, g.constant(np.float32(1))])
    angles = g.op("Mul", [g.op("Unsqueeze", [steps, ints(g, 1)]), g.constant(inverse[None, :])])
    return scaled(g, g.op("Cos", [angles]), factor), scaled(g, g.op("Sin", [angles]), factor)


def pick_positions(g: GraphBuilder, x: ir.Value, wanted: ir.Value) -> ir.Value:
    """Return x [B, S, width] at the wanted positions [B, L] int64 of each row. → [B, L, width]"""
    return g.op("GatherND", [x, g.op("Unsqueeze", [wanted, ints(g, -1)])], {"batch_dims": 1})


def linear(g: GraphBuilder, name: str, x: ir.Value, n_out: int, n_in: int, *, bias: bool) -> ir.Value:
    """Multiply by the weight `name`.weight [n_out, n_in], and add `name`.bias when there is one."""
    y = g.op("MatMul", [x, g.weight(f"{name}.weight", [n_in, n_out], transposed=True)])
    return g.op("Add", [y, g.weight(f"{name}.bias", [n_out])]) if bias else y


def norm(g: GraphBuilder, s: Shape, name: str, x: ir.Value) -> ir.Value:
    """Apply RMSNorm over the last axis with the weight `name`."""
    width = s.head_dim if name.endswith(("q_norm.weight", "k_norm.weight")) else s.hidden
    weight = g.weight(name, [width])
    if s.variant.norm_plus_one:
        weight = g.op("Add", [weight, g.constant(np.float32(1))])
    return g.op("RMSNormalization", [x, weight], {"axis": -1, "epsilon": s.norm_eps})


def head_norm(g: GraphBuilder, s: Shape, name: str, x: ir.Value, heads: int) -> ir.Value:
    """Apply RMSNorm to each head of x [B, S, heads · head_dim]."""
    split = g.op("Reshape", [x, ints(g, 0, 0, heads, s.head_dim)])
    return g.op("Reshape", [norm(g, s, name, split), ints(g, 0, 0, heads * s.head_dim)])


def scaled(g: GraphBuilder, x: ir.Value, factor: float) -> ir.Value:
    """Multiply by a number; by 1, not at all."""
    return x if factor == 1 else g.op("Mul", [x, g.constant(np.float32(factor))])


def ints(g: GraphBuilder, *values: int) -> ir.Value:
    """Return a constant vector of int64."""
    return g.constant(np.array(values, np.int64))


def _window_mask(g: GraphBuilder, past_key: ir.Value, positions: ir.Value, window: int) -> ir.Value:
    """Make a mask [B, 1, S, T] bool: key j is seen from position q when q − window < j ≤ q."""
    total = g.op("Add", [g.op("Shape", [past_key], {"start": 2, "end": 3}), g.op("Shape", [positions], {"start": 1})])
    keys = g.op("Range", [g.constant(np.int64(0)), g.op("Squeeze", [total]), g.constant(np.int64(1))])
    query = g.op("Unsqueeze", [positions, ints(g, 1, 3)])
    near = g.op("Greater", [keys, g.op("Sub", [query, g.constant(np.int64(window))])])
    return g.op("And", [near, g.op("LessOrEqual", [keys, query])])
