"""The Llama family in the portable dialect: the graph of a decoder, for every variant in shape.py.

Pre-norm decoder blocks with RMSNorm, rotary positions, grouped-query attention and a gated MLP.
Source: Touvron et al., arXiv:2302.13971, and the model files of transformers 5.23, whose parameter names are used.

Graph `decoder` (B batch, S new tokens, P past tokens, T = P + S, L logits positions):

    input_ids [B, S] int64 · position_ids [B, S] int64 · logits_positions [B, L] int64 (indices into S)
    past_key.i, past_value.i [B, kv_heads, P, head_dim] float32
    → logits [B, L, vocab] float32 · present_key.i, present_value.i [B, kv_heads, T, head_dim]
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from edgepipe.artifacts import Json, ModelInfo
from edgepipe.errors import ConfigError
from edgepipe.graph.blocks import (
    Tables,
    attention_output,
    cached_attention,
    linear,
    mlp,
    norm,
    pick_positions,
    rotary_tables,
    scaled,
    self_projections,
)
from edgepipe.graph.dialect import GraphBuilder
from edgepipe.graph.shape import VARIANTS, Shape, block_weights
from edgepipe.weights import WeightStore


def builds(info: ModelInfo) -> bool:
    """Say whether this builder makes the graph of a model; the framework's exporter makes the others'."""
    return info.task == "text-generation" and str(info.config.get("model_type")) in VARIANTS


def expected_weights(shape: Shape, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """List every parameter the graph uses with its shape [out, in] or [n]."""
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for i in range(shape.layers):
        names |= block_weights(shape, f"model.layers.{i}.")
    names["model.norm.weight"] = (shape.hidden,)
    if not tied:
        names["lm_head.weight"] = (shape.vocab, shape.hidden)
    return names


def check_weights(weights: WeightStore, shape: Shape, others: Mapping[str, tuple[int, ...]] | None = None) -> None:
    """Compare a store with what the config promises; ConfigError names the first tensor that contradicts it.

    `others` are parameters beside those of the family, with their shapes.
    """
    tied = weights.aliases.get("lm_head.weight") is not None
    expected = {**expected_weights(shape, tied=tied), **(others or {})}
    for name, dims in expected.items():
        if name not in weights:
            raise ConfigError(f"config.json promises {name} {list(dims)}, but the weights do not have it")
        if weights[name].shape != dims:
            raise ConfigError(
                f"config.json promises {name} {list(dims)}, but the weights hold {list(weights[name].shape)}"
            )
    extra = sorted(set(weights) - set(expected))
    if extra:
        raise ConfigError(
            f"the weights hold {extra[0]}{' and others' if len(extra) > 1 else ''}, which a model of type "
            f"{shape.variant.model_type!r} with this config.json does not use"
        )


def build_decoder(shape: Shape, config: Json) -> bytes:
    """Build the graph `decoder` of one model; see the file's head for inputs and outputs."""
    g = GraphBuilder("decoder")
    ids = g.input("input_ids", ir.DataType.INT64, ["batch", "sequence"])
    positions = g.input("position_ids", ir.DataType.INT64, ["batch", "sequence"])
    wanted = g.input("logits_positions", ir.DataType.INT64, ["batch", "wanted"])
    tables = rotary_tables(g, shape, config)
    x = decoder_layers(g, shape, embedded(g, shape, ids), positions, tables, range(shape.layers))
    picked = pick_positions(g, norm(g, shape, "model.norm.weight", x), wanted)
    g.output("logits", head_logits(g, shape, picked), ir.DataType.FLOAT, ["batch", "wanted", shape.vocab])
    return g.finish()


def embedded(g: GraphBuilder, shape: Shape, ids: ir.Value) -> ir.Value:
    """Return the embeddings [B, S, hidden] of ids [B, S]."""
    x = g.op("Gather", [g.weight("model.embed_tokens.weight", [shape.vocab, shape.hidden]), ids])
    return scaled(g, x, shape.embedding_scale)


def decoder_layers(
    g: GraphBuilder, shape: Shape, x: ir.Value, positions: ir.Value, tables: Tables, layers: range
) -> ir.Value:
    """Run some of the layers on the stream x [B, S, hidden], each with its past and present."""
    for i in layers:
        p = f"model.layers.{i}."
        h = norm(g, shape, p + "input_layernorm.weight", x)
        qkv = self_projections(g, shape, i, p, h, positions, tables)
        y = cached_attention(g, shape, i, qkv, positions)
        x = attention_output(g, shape, p + "self_attn.o_proj", x, y)
        x = mlp(g, shape, p, x)
    return x


def head_logits(g: GraphBuilder, shape: Shape, normed: ir.Value) -> ir.Value:
    """Return the logits [B, L, vocab] of normed states [B, L, hidden]."""
    logits = linear(g, "lm_head", normed, shape.vocab, shape.hidden, bias=False)
    return scaled(g, logits, 1 / shape.logits_divisor)
