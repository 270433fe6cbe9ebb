"""Students in the portable dialect: an encoder-decoder as three graphs, an encoder as one, of the parts in blocks.py.

Graphs of an encoder-decoder (B rows, N source tokens, S new tokens, P past ones, T = P + S, i counts decoder layers):

    encoder   input_ids, attention_mask [B, N] int64 → cross_key.i, cross_value.i [B, kv_heads, N, head_dim] float32
    decoder   what graph/llama.py has, and cross_key.i, cross_value.i, encoder_attention_mask [B, N] int64
    scorer    input_ids [B, S], token_ids [C] int64, and what the decoder reads of the source
              → logits [B, C] of those tokens after input_ids, from C rows of the output matrix and no cache

Graph `model` of an encoder: input_ids, attention_mask → embedding [B, hidden], or logits [B, labels]. One with exits
is there in parts as well, `part_0` and so on, each the layers up to the next exit:

    part_0    input_ids, attention_mask → embedding or logits as if this were all, gate [B] float32: the log odds that
              they are right already, next_states [B, N, hidden]
    part_i    states, attention_mask → the same; the last has no gate and no next states

Sources: Mu (arXiv:2501.16273), T5Gemma (arXiv:2504.06225); monoT5 (arXiv:2003.06713) for the scorer; NV-Embed
(arXiv:2405.17428) for latent attention. students/models.py says the same in torch. Centred positions are not in the
graph: rotary attention sees distances only, so counting from another place changes nothing but rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from edgepipe.artifacts import Json, ModelInfo
from edgepipe.errors import ConfigError
from edgepipe.graph.blocks import (
    attention_output,
    cached_attention,
    head_norm,
    ints,
    linear,
    mlp,
    norm,
    pick_positions,
    rotary_tables,
    scaled,
    self_projections,
)
from edgepipe.graph.dialect import GraphBuilder
from edgepipe.graph.pooling import pool, unit_length
from edgepipe.graph.shape import Shape
from edgepipe.runtime.exits import PART
from edgepipe.students.config import StudentConfig, student_weights
from edgepipe.weights import WeightStore

_FLOAT, _INT64, _BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL


def check_weights(weights: WeightStore, config: StudentConfig) -> None:
    """Compare a store with what the config promises; ConfigError names the first tensor that contradicts it."""
    expected = student_weights(config)
    for name, dims in expected.items():
        held = weights[name].shape if name in weights else None
        if held != dims:
            found = "do not have it" if held is None else f"hold {list(held)}"
            raise ConfigError(f"config.json promises {name} {list(dims)}, but the weights {found}")
    if extra := sorted(set(weights) - set(expected)):
        raise ConfigError(f"the weights hold {extra[0]}, which a student with this config.json does not use")


def build_student(config: StudentConfig, context: int | None) -> dict[str, bytes]:
    """Build the graphs of a student by name; `context` None takes the usual number of tokens."""
    encoder = _all_seen(config.encoder_shape(context))
    if config.decoder is None:
        parts = {f"{PART}{i}": _build_part(config, encoder, i) for i in range(len(config.depths)) if config.exits}
        return {"model": _build_model(config, encoder), **parts}
    decoder = _all_seen(config.decoder_shape(context))
    return {
        "encoder": _build_encoder(config, encoder, decoder),
        "decoder": _build_decoder(config, decoder, config.decoder),
        "scorer": _build_scorer(config, decoder, config.decoder),
    }


def student_spec(config: StudentConfig, info: ModelInfo, context: int | None) -> Json:
    """Return the facts that go into a bundle's manifest; ConfigError when an answer's first token isn't named."""
    encoder = config.encoder_shape(context)
    if config.decoder is None:
        return {
            "context": encoder.context,
            "vocab_size": encoder.vocab,
            "hidden_size": encoder.hidden,
            "layers": encoder.layers,
            "pooling": None if config.labels else config.pooling,
            "normalize": None if config.labels else config.normalize,
            "labels": list(config.labels) or None,
            "pad_token_id": info.config.get("pad_token_id"),
            **({"exits": list(config.exits)} if config.exits else {}),
        }
    decoder = config.decoder_shape(context)
    start = info.config.get("decoder_start_token_id")
    if type(start) is not int or not 0 <= start < decoder.vocab:
        raise ConfigError(
            f"config.json says decoder_start_token_id, which every answer begins with, is {start!r}; expected an id "
            f"below {decoder.vocab}"
        )
    return {
        "layers": decoder.layers,
        "heads": decoder.heads,
        "kv_heads": decoder.kv_heads,
        "head_dim": decoder.head_dim,
        "hidden_size": decoder.hidden,
        "vocab_size": decoder.vocab,
        "context": decoder.context,
        "source_context": encoder.context,
        "encoder_layers": encoder.layers,
        "encoder_heads": encoder.heads,
        "encoder_head_dim": encoder.head_dim,
        "decoder_prefix_ids": [start],
        "bos_token_id": info.bos_token_id,
        "eos_token_ids": list(info.eos_token_ids),
    }


def _all_seen(shape: Shape) -> Shape:
    """Return the facts of a stack without sliding windows, which students don't have."""
    return dataclasses.replace(shape, windows=(None,) * shape.layers)


# ---------------------------------------------------------------------------------------------------------------------
# the encoder


def _build_encoder(config: StudentConfig, s: Shape, decoder: Shape) -> bytes:
    """Build the graph `encoder`: the source's states, projected once for every decoder layer."""
    g = GraphBuilder("encoder")
    ids, mask = (g.input(name, _INT64, ["batch", "sequence"]) for name in ("input_ids", "attention_mask"))
    states = _encode(g, s, config, ids, mask)
    dims: list[int | str] = ["batch", decoder.kv_heads, "sequence", decoder.head_dim]
    for i in range(decoder.layers):
        for part, kind in (("k", "key"), ("v", "value")):
            name = f"decoder.layers.{i}.cross_attn.{part}"
            x = linear(g, f"{name}_proj", states, decoder.kv_heads * decoder.head_dim, s.hidden, bias=decoder.qkv_bias)
            if part == "k" and decoder.variant.qk_norm:
                x = head_norm(g, decoder, f"{name}_norm.weight", x, decoder.kv_heads)
            g.output(f"cross_{kind}.{i}", _split_heads(g, x, decoder.kv_heads, decoder.head_dim), _FLOAT, dims)
    return g.finish()


def _build_model(config: StudentConfig, s: Shape) -> bytes:
    """Build the graph `model` of an encoder student: its states pooled, then normalised or classified."""
    g = GraphBuilder("model")
    ids, mask = (g.input(name, _INT64, ["batch", "sequence"]) for name in ("input_ids", "attention_mask"))
    _answer(g, config, s, _encode(g, s, config, ids, mask), mask)
    return g.finish()


def _build_part(config: StudentConfig, s: Shape, number: int) -> bytes:
    """Build the graph of the layers from one exit to the next."""
    g = GraphBuilder(f"{PART}{number}")
    dims: list[int | str] = ["batch", "sequence", s.hidden]
    first = g.input("states", _FLOAT, dims) if number else g.input("input_ids", _INT64, ["batch", "sequence"])
    mask = g.input("attention_mask", _INT64, ["batch", "sequence"])
    x = first if number else _embed(g, s, config, first)
    positions = _positions(g, mask if number else first)
    layers = range((0, *config.depths)[number], config.depths[number])
    x = _layers(g, s, config, x, (mask, positions), layers)
    vector, answer = _answer(g, config, s, norm(g, s, "encoder.norm.weight", x), mask)
    if number < len(config.exits):
        g.output("gate", _gate(g, config, vector, answer, number), _FLOAT, ["batch"])
        g.output("next_states", x, _FLOAT, dims)
    return g.finish()


def _gate(g: GraphBuilder, config: StudentConfig, vector: ir.Value, answer: ir.Value, number: int) -> ir.Value:
    """Return the log odds [B] that the answer at an exit is right already."""
    if config.labels:
        sure = g.op("ReduceMax", [g.op("Softmax", [answer], {"axis": -1}), ints(g, -1)], {"keepdims": 1})
        vector = g.op("Concat", [vector, sure], {"axis": -1})
    weighted = g.op("Mul", [vector, g.weight(f"gates.{number}.weight", [config.gate_features])])
    odds = g.op("ReduceSum", [weighted, ints(g, -1)], {"keepdims": 0})
    return g.op("Add", [odds, g.weight(f"gates.{number}.bias", [1])])


def _answer(
    g: GraphBuilder, config: StudentConfig, s: Shape, states: ir.Value, mask: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Make pooled states a graph's embedding or logits; return the pooled states [B, hidden] and the output."""
    if config.pooling == "latent":
        states = _attend_to_latents(g, config, s, states)
    pooled = pool(g, states, mask, "mean" if config.pooling == "latent" else config.pooling)
    if config.labels:
        answer = linear(g, "classifier", pooled, len(config.labels), s.hidden, bias=True)
        g.output("logits", answer, _FLOAT, ["batch", len(config.labels)])
    else:
        answer = unit_length(g, pooled) if config.normalize else pooled
        g.output("embedding", answer, _FLOAT, ["batch", s.hidden])
    return pooled, answer


def _encode(g: GraphBuilder, s: Shape, config: StudentConfig, ids: ir.Value, mask: ir.Value) -> ir.Value:
    """Return the normed states [B, N, hidden] of a source; every token sees all that isn't padding."""
    x = _embed(g, s, config, ids)
    x = _layers(g, s, config, x, (mask, _positions(g, ids)), range(s.layers))
    return norm(g, s, "encoder.norm.weight", x)


def _embed(g: GraphBuilder, s: Shape, config: StudentConfig, ids: ir.Value) -> ir.Value:
    table = "embed_tokens.weight" if config.shares_embedding else "encoder.embed_tokens.weight"
    return scaled(g, g.op("Gather", [g.weight(table, [s.vocab, s.hidden]), ids]), s.embedding_scale)


def _layers(
    g: GraphBuilder, s: Shape, config: StudentConfig, x: ir.Value, where: tuple[ir.Value, ir.Value], layers: range
) -> ir.Value:
    """Run some of the encoder's layers on the stream x [B, N, hidden]; `where`: mask and positions [B, N]."""
    (mask, positions), tables = where, rotary_tables(g, s, config.encoder)
    # A causal encoder never looks right, where padding stands
    seen = None if config.causal_encoder else _seen(g, mask)
    for i in layers:
        if i in config.exits and i > layers.start:
            # Nothing is fused across an exit: so parts compute, bit by bit, what the whole does
            x = g.op("Identity", [x])
        p = f"encoder.layers.{i}."
        h = norm(g, s, p + "input_layernorm.weight", x)
        qkv = self_projections(g, s, i, p, h, positions, tables)
        y = _attention(g, s, [*qkv, seen] if seen else qkv, causal=config.causal_encoder)
        x = attention_output(g, s, p + "self_attn.o_proj", x, y)
        x = mlp(g, s.at(i), p, x)
    return x


def _attend_to_latents(g: GraphBuilder, config: StudentConfig, s: Shape, x: ir.Value) -> ir.Value:
    """Let states x [B, N, hidden] attend to the latent array, then an MLP; both on a residual stream."""
    hidden = s.hidden
    latents = g.weight("pooler.latents", [config.latents, hidden])
    rows = g.op("Concat", [g.op("Shape", [x], {"start": 0, "end": 1}), ints(g, 1, 1)], {"axis": 0})
    q = linear(g, "pooler.q_proj", x, hidden, hidden, bias=False)
    k, v = (
        g.op("Expand", [linear(g, f"pooler.{part}_proj", latents, hidden, hidden, bias=False), rows]) for part in "kv"
    )
    heads = config.latent_heads
    scale = (hidden // heads) ** -0.5
    attributes = {"q_num_heads": heads, "kv_num_heads": heads, "scale": scale, "is_causal": 0}
    y = g.op("Attention", [q, k, v], attributes, notes={"head_dim": str(hidden // heads)})
    x = g.op("Add", [x, linear(g, "pooler.o_proj", y, hidden, hidden, bias=False)])
    inner = g.op("Gelu", [linear(g, "pooler.up_proj", x, 4 * hidden, hidden, bias=True)])
    return g.op("Add", [x, linear(g, "pooler.down_proj", inner, hidden, 4 * hidden, bias=True)])


# ---------------------------------------------------------------------------------------------------------------------
# the decoder


def _build_decoder(config: StudentConfig, s: Shape, stack: Json) -> bytes:
    """Build the graph `decoder`: new tokens over a cache, and over the source in every block."""
    g = GraphBuilder("decoder")
    ids = g.input("input_ids", _INT64, ["batch", "sequence"])
    positions = g.input("position_ids", _INT64, ["batch", "sequence"])
    wanted = g.input("logits_positions", _INT64, ["batch", "wanted"])
    source = _source(g, s)
    tables = rotary_tables(g, s, stack)
    x = _embedded(g, config, s, ids)
    for i in range(s.layers):
        p = f"decoder.layers.{i}."
        h = norm(g, s, p + "input_layernorm.weight", x)
        y = cached_attention(g, s, i, self_projections(g, s, i, p, h, positions, tables), positions)
        x = _after_self_attention(g, s, i, x, y, source)
    picked = pick_positions(g, norm(g, s, "decoder.norm.weight", x), wanted)
    logits = linear(g, "lm_head", picked, s.vocab, s.hidden, bias=False)
    logits = scaled(g, logits, 1 / s.logits_divisor)
    g.output("logits", logits, _FLOAT, ["batch", "wanted", s.vocab])
    return g.finish()


def _build_scorer(config: StudentConfig, s: Shape, stack: Json) -> bytes:
    """Build the graph `scorer`: one step from nothing, and of the head only the rows that are asked for."""
    g = GraphBuilder("scorer")
    ids = g.input("input_ids", _INT64, ["batch", "sequence"])
    tokens = g.input("token_ids", _INT64, ["tokens"])
    source = _source(g, s)
    positions, tables = _positions(g, ids), rotary_tables(g, s, stack)
    x = _embedded(g, config, s, ids)
    for i in range(s.layers):
        p = f"decoder.layers.{i}."
        h = norm(g, s, p + "input_layernorm.weight", x)
        y = _attention(g, s, self_projections(g, s, i, p, h, positions, tables), causal=True)
        x = _after_self_attention(g, s, i, x, y, source)
    last = g.op("Gather", [x, g.constant(np.int64(-1))], {"axis": 1})  # [B, hidden]
    rows = g.op("Gather", [g.weight("lm_head.weight", [s.vocab, s.hidden]), tokens])  # [C, hidden]
    states = norm(g, s, "decoder.norm.weight", last)
    logits = g.op("MatMul", [states, g.op("Transpose", [rows], {"perm": [1, 0]})])
    g.output("logits", scaled(g, logits, 1 / s.logits_divisor), _FLOAT, ["batch", "tokens"])
    return g.finish()


def _embedded(g: GraphBuilder, config: StudentConfig, s: Shape, ids: ir.Value) -> ir.Value:
    table = "embed_tokens.weight" if config.shares_embedding else "decoder.embed_tokens.weight"
    return scaled(g, g.op("Gather", [g.weight(table, [s.vocab, s.hidden]), ids]), s.embedding_scale)


def _source(g: GraphBuilder, s: Shape) -> Mapping[str, ir.Value]:
    """Declare what a decoder reads of its source; "mask" is [B, 1, 1, N] bool."""
    dims: list[int | str] = ["batch", s.kv_heads, "source", s.head_dim]
    names = [f"cross_{kind}.{i}" for i in range(s.layers) for kind in ("key", "value")]
    values = {name: g.input(name, _FLOAT, dims) for name in names}
    return {**values, "mask": _seen(g, g.input("encoder_attention_mask", _INT64, ["batch", "source"]))}


def _after_self_attention(
    g: GraphBuilder, s: Shape, i: int, x: ir.Value, y: ir.Value, source: Mapping[str, ir.Value]
) -> ir.Value:
    """Finish block `i`: self-attention's output y, cross-attention and MLP on the residual stream x."""
    p = f"decoder.layers.{i}."
    x = attention_output(g, s, p + "self_attn.o_proj", x, y)
    h = norm(g, s, p + "cross_attention_layernorm.weight", x)
    q = linear(g, p + "cross_attn.q_proj", h, s.heads * s.head_dim, s.hidden, bias=s.qkv_bias)
    if s.variant.qk_norm:
        q = head_norm(g, s, p + "cross_attn.q_norm.weight", q, s.heads)
    q = _split_heads(g, q, s.heads, s.head_dim)
    seen = [source[f"cross_key.{i}"], source[f"cross_value.{i}"], source["mask"]]
    attributes = {"scale": s.attention_scale, "is_causal": 0}
    y = g.op("Attention", [q, *seen], attributes, notes={"heads": str(s.heads)})  # [B, heads, S, head_dim]
    y = g.op("Reshape", [g.op("Transpose", [y], {"perm": [0, 2, 1, 3]}), ints(g, 0, 0, s.heads * s.head_dim)])
    x = attention_output(g, s, p + "cross_attn.o_proj", x, y)
    return mlp(g, s.at(i), p, x)


# ---------------------------------------------------------------------------------------------------------------------
# shared parts


def _positions(g: GraphBuilder, ids: ir.Value) -> ir.Value:
    """Return 0, 1, … for every row of ids [B, S]."""
    count = g.op("Squeeze", [g.op("Shape", [ids], {"start": 1})])
    steps = g.op("Range", [g.constant(np.int64(0)), count, g.constant(np.int64(1))])
    return g.op("Expand", [steps, g.op("Shape", [ids])])


def _seen(g: GraphBuilder, mask: ir.Value) -> ir.Value:
    """Return a mask [B, N] of ones and zeros as [B, 1, 1, N] bool, which all heads and queries share."""
    return g.op("Unsqueeze", [g.op("Cast", [mask], {"to": int(_BOOL)}), ints(g, 1, 2)])


def _split_heads(g: GraphBuilder, x: ir.Value, heads: int, head_dim: int) -> ir.Value:
    """Return x [B, S, heads · head_dim] as [B, heads, S, head_dim]."""
    return g.op("Transpose", [g.op("Reshape", [x, ints(g, 0, 0, heads, head_dim)])], {"perm": [0, 2, 1, 3]})


def _attention(g: GraphBuilder, s: Shape, operands: Sequence[ir.Value | None], *, causal: bool) -> ir.Value:
    """Attend from all tokens to all, or to those before; operands are queries, keys, values and maybe a mask."""
    heads = {"q_num_heads": s.heads, "kv_num_heads": s.kv_heads}
    attributes = {**heads, "scale": s.attention_scale, "is_causal": int(causal)}
    return g.op("Attention", operands, attributes, notes={"head_dim": str(s.head_dim)})
