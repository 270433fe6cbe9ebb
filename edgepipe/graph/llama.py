"""The Llama family in the portable dialect: one builder, and a table of what the variants do differently.

Pre-norm decoder blocks with RMSNorm, rotary positions, grouped-query attention and a gated MLP.
Source: Touvron et al., arXiv:2302.13971, and the model files of transformers 5.23, whose parameter names are used.

Graph `decoder` (B batch, S new tokens, P past tokens, T = P + S, L logits positions):

    input_ids [B, S] int64 · position_ids [B, S] int64 · logits_positions [B, L] int64 (indices into S)
    past_key.i, past_value.i [B, kv_heads, P, head_dim] float32
    → logits [B, L, vocab] float32 · present_key.i, present_value.i [B, kv_heads, T, head_dim]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepipe.artifacts import Json, ModelInfo
from edgepipe.errors import ConfigError
from edgepipe.graph.dialect import GraphBuilder
from edgepipe.graph.reference import framework_config
from edgepipe.weights import WeightStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Say how one member of the family differs from Llama."""

    model_type: str
    qkv_bias: bool | None = None  # None: as config.attention_bias says
    o_bias: bool | None = None
    qk_norm: bool = False  # RMSNorm over each head of queries and keys, before the rotation
    norm_plus_one: bool = False  # the norm multiplies by 1 + weight
    scaled_embedding: bool = False  # embeddings are multiplied by √hidden_size
    multipliers: bool = False  # config has embedding_, attention_, residual_multiplier and logits_scaling
    windows: str = "never"  # "never" | "every layer" (config.sliding_window) | "by layer" (config.layer_types)
    skips_rope: bool = False  # config.no_rope_layers[i] == 0: layer i has no rotary positions


VARIANTS: dict[str, Variant] = {
    v.model_type: v
    for v in (
        Variant(model_type="llama"),
        Variant(model_type="mistral", qkv_bias=False, o_bias=False, windows="every layer"),
        Variant(model_type="qwen2", qkv_bias=True, o_bias=False, windows="by layer"),
        Variant(model_type="qwen3", qk_norm=True, windows="by layer"),
        Variant(model_type="smollm3", windows="by layer", skips_rope=True),
        Variant(model_type="granite", multipliers=True),
        Variant(model_type="gemma", norm_plus_one=True, scaled_embedding=True),
    )
}


def builds(info: ModelInfo) -> bool:
    """Say whether this builder makes the graph of a model; the framework's exporter makes the others'."""
    return info.task == "text-generation" and str(info.config.get("model_type")) in VARIANTS


_ACTIVATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "silu": ("Sigmoid", {}),  # x · sigmoid(x)
    "gelu": ("Gelu", {}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
}


_LARGEST = 2**31 - 1
# Sizes in config.json and the largest each may be. Names are made for every layer: one wrong digit would fill memory.
_SIZES: dict[str, int] = {
    "vocab_size": _LARGEST,
    "hidden_size": _LARGEST,
    "intermediate_size": _LARGEST,
    "num_hidden_layers": 10_000,
    "num_attention_heads": _LARGEST,
    "num_key_value_heads": _LARGEST,
    "head_dim": _LARGEST,
    "max_position_embeddings": _LARGEST,
}

_ROPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Hold the facts of one model that its graph is built from."""

    variant: Variant
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int  # tokens the rotary tables reach
    norm_eps: float
    activation: str
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    attention_scale: float
    embedding_scale: float
    residual_scale: float
    logits_divisor: float
    windows: tuple[int | None, ...]  # attention window of each layer in tokens
    ropes: tuple[bool, ...]  # whether each layer rotates queries and keys


def read_shape(config: Json, context: int | None, usual_context: int = 2048) -> Shape:
    """Read the family's facts from a config; ConfigError when the family or a setting isn't supported.

    `context` None takes `usual_context`, or the positions the model was made for if those are fewer.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in VARIANTS:
        raise ConfigError(
            f"expected a model of the Llama family ({', '.join(VARIANTS)}), got model_type {model_type!r}; "
            "other families are not supported yet"
        )
    variant = VARIANTS[model_type]
    _check_sizes(config)
    c = framework_config(config)
    if context is None:
        context = min(usual_context, c.max_position_embeddings)
    if context > c.max_position_embeddings:
        raise ConfigError(
            f"--context {context} is more than the {c.max_position_embeddings} positions this model was made for"
        )
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    kv_heads = c.num_key_value_heads or c.num_attention_heads
    _check_supported(c, variant, head_dim, kv_heads)
    bias = bool(getattr(c, "attention_bias", False))
    multiplied = variant.multipliers
    return Shape(
        variant=variant,
        layers=c.num_hidden_layers,
        hidden=c.hidden_size,
        heads=c.num_attention_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=c.intermediate_size,
        vocab=c.vocab_size,
        context=context,
        norm_eps=c.rms_norm_eps,
        activation=c.hidden_act,
        qkv_bias=bias if variant.qkv_bias is None else variant.qkv_bias,
        o_bias=bias if variant.o_bias is None else variant.o_bias,
        mlp_bias=bool(getattr(c, "mlp_bias", False)),
        attention_scale=float(c.attention_multiplier) if multiplied else head_dim**-0.5,
        embedding_scale=c.embedding_multiplier if multiplied else c.hidden_size**0.5 if variant.scaled_embedding else 1,
        residual_scale=c.residual_multiplier if multiplied else 1,
        logits_divisor=c.logits_scaling if multiplied else 1,
        windows=tuple(_windows(c, variant, context)),
        ropes=tuple(not variant.skips_rope or bool(c.no_rope_layers[i]) for i in range(c.num_hidden_layers)),
    )


def _check_sizes(config: Json) -> None:
    """Refuse sizes that no model has, before anything is divided by them or made in their number."""
    for name, most in _SIZES.items():
        value = config.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise ConfigError(f"config.json says {name} is {value!r}; expected a whole number from 1 to {most:,}")


def _check_supported(c: Any, variant: Variant, head_dim: int, kv_heads: int) -> None:
    """Refuse settings that the graph has no form for, or that contradict each other."""
    kind = c.rope_parameters["rope_type"]
    if kind not in _ROPES:
        raise ConfigError(
            f"rope scaling {kind!r} is not supported; known: {', '.join(_ROPES)} (scaling that changes with the length "
            "of the prompt has no fixed table)"
        )
    if c.hidden_act not in _ACTIVATIONS:
        raise ConfigError(f"activation {c.hidden_act!r} is not supported; known: {', '.join(_ACTIVATIONS)}")
    if head_dim < 1:
        raise ConfigError(f"{c.num_attention_heads} attention heads are more than the hidden size of {c.hidden_size}")
    if c.num_attention_heads % kv_heads:
        raise ConfigError(f"{c.num_attention_heads} attention heads cannot share {kv_heads} key/value heads evenly")
    if variant.multipliers and c.logits_scaling == 0:
        raise ConfigError("config.json says logits_scaling is 0, and the logits are divided by it")
    if variant.skips_rope and len(c.no_rope_layers) < c.num_hidden_layers:
        raise ConfigError(
            f"config.json has {c.num_hidden_layers} layers, but its no_rope_layers speaks of {len(c.no_rope_layers)}"
        )


def expected_weights(shape: Shape, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """List every parameter the graph uses with its shape [out, in] or [n]."""
    hidden, ffn = shape.hidden, shape.ffn
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, hidden)}
    for i in range(shape.layers):
        p = f"model.layers.{i}."
        names[p + "input_layernorm.weight"] = (hidden,)
        for part, out in (("q", q), ("k", kv), ("v", kv)):
            names[p + f"self_attn.{part}_proj.weight"] = (out, hidden)
            if shape.qkv_bias:
                names[p + f"self_attn.{part}_proj.bias"] = (out,)
        if shape.variant.qk_norm:
            names[p + "self_attn.q_norm.weight"] = names[p + "self_attn.k_norm.weight"] = (shape.head_dim,)
        names[p + "self_attn.o_proj.weight"] = (hidden, q)
        if shape.o_bias:
            names[p + "self_attn.o_proj.bias"] = (hidden,)
        names[p + "post_attention_layernorm.weight"] = (hidden,)
        for part, (out, n_in) in (("gate", (ffn, hidden)), ("up", (ffn, hidden)), ("down", (hidden, ffn))):
            names[p + f"mlp.{part}_proj.weight"] = (out, n_in)
            if shape.mlp_bias:
                names[p + f"mlp.{part}_proj.bias"] = (out,)
    names["model.norm.weight"] = (hidden,)
    if not tied:
        names["lm_head.weight"] = (shape.vocab, hidden)
    return names


def check_weights(weights: WeightStore, shape: Shape) -> None:
    """Compare a store with what the config promises; ConfigError names the first tensor that contradicts it."""
    tied = weights.aliases.get("lm_head.weight") is not None
    expected = expected_weights(shape, tied=tied)
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
    tables = _rotary_tables(g, shape, config)
    x = g.op("Gather", [g.weight("model.embed_tokens.weight", [shape.vocab, shape.hidden]), ids])
    x = _scaled(g, x, shape.embedding_scale)
    for i in range(shape.layers):
        x = _block(g, shape, i, x, positions, tables)
    x = _norm(g, shape, "model.norm.weight", x)
    picked = g.op("GatherND", [x, g.op("Unsqueeze", [wanted, _ints(g, -1)])], {"batch_dims": 1})
    logits = _linear(g, "lm_head", picked, shape.vocab, shape.hidden, bias=False)
    logits = _scaled(g, logits, 1 / shape.logits_divisor)
    g.output("logits", logits, ir.DataType.FLOAT, ["batch", "wanted", shape.vocab])
    return g.finish()


def _windows(c: Any, variant: Variant, context: int) -> Iterator[int | None]:
    """Yield each layer's window; a window at least as long as the context is none."""
    window = getattr(c, "sliding_window", None)
    kinds = getattr(c, "layer_types", None) or []
    for i in range(c.num_hidden_layers):
        by_layer = variant.windows == "by layer" and i < len(kinds) and kinds[i] == "sliding_attention"
        applies = variant.windows == "every layer" or by_layer
        yield window if applies and window is not None and window < context else None


def _block(
    g: GraphBuilder, s: Shape, i: int, x: ir.Value, positions: ir.Value, tables: tuple[ir.Value, ir.Value]
) -> ir.Value:
    p = f"model.layers.{i}."
    q_width, kv_width = s.heads * s.head_dim, s.kv_heads * s.head_dim
    h = _norm(g, s, p + "input_layernorm.weight", x)
    q = _linear(g, p + "self_attn.q_proj", h, q_width, s.hidden, bias=s.qkv_bias)
    k = _linear(g, p + "self_attn.k_proj", h, kv_width, s.hidden, bias=s.qkv_bias)
    v = _linear(g, p + "self_attn.v_proj", h, kv_width, s.hidden, bias=s.qkv_bias)
    if s.variant.qk_norm:
        q = _head_norm(g, s, p + "self_attn.q_norm.weight", q, s.heads)
        k = _head_norm(g, s, p + "self_attn.k_norm.weight", k, s.kv_heads)
    if s.ropes[i]:
        q = g.op("RotaryEmbedding", [q, *tables, positions], {"num_heads": s.heads})
        k = g.op("RotaryEmbedding", [k, *tables, positions], {"num_heads": s.kv_heads})
    y = _attention(g, s, i, (q, k, v), positions)
    y = _linear(g, p + "self_attn.o_proj", y, s.hidden, q_width, bias=s.o_bias)
    x = g.op("Add", [x, _scaled(g, y, s.residual_scale)])
    h = _norm(g, s, p + "post_attention_layernorm.weight", x)
    gate = _linear(g, p + "mlp.gate_proj", h, s.ffn, s.hidden, bias=s.mlp_bias)
    up = _linear(g, p + "mlp.up_proj", h, s.ffn, s.hidden, bias=s.mlp_bias)
    kind, attributes = _ACTIVATIONS[s.activation]
    activated = g.op(kind, [gate], attributes)
    if s.activation == "silu":
        activated = g.op("Mul", [gate, activated])
    down = _linear(g, p + "mlp.down_proj", g.op("Mul", [activated, up]), s.hidden, s.ffn, bias=s.mlp_bias)
    return g.op("Add", [x, _scaled(g, down, s.residual_scale)])


def _attention(
    g: GraphBuilder, s: Shape, i: int, qkv: tuple[ir.Value, ir.Value, ir.Value], positions: ir.Value
) -> ir.Value:
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


def _window_mask(g: GraphBuilder, past_key: ir.Value, positions: ir.Value, window: int) -> ir.Value:
    """Make a mask [B, 1, S, T] bool: key j is seen from position q when q − window < j ≤ q."""
    total = g.op("Add", [g.op("Shape", [past_key], {"start": 2, "end": 3}), g.op("Shape", [positions], {"start": 1})])
    keys = g.op("Range", [g.constant(np.int64(0)), g.op("Squeeze", [total]), g.constant(np.int64(1))])
    query = g.op("Unsqueeze", [positions, _ints(g, 1, 3)])
    near = g.op("Greater", [keys, g.op("Sub", [query, g.constant(np.int64(window))])])
    return g.op("And", [near, g.op("LessOrEqual", [keys, query])])


def _rotary_tables(g: GraphBuilder, s: Shape, config: Json) -> tuple[ir.Value, ir.Value]:
    """Compute cosine and sine tables [context, head_dim / 2] in the graph, from the inverse frequencies alone.

    An engine folds them when it loads; stored, they would be the largest float tensors of a 4-bit bundle.
    """
    inverse, factor = rotary_frequencies(config, s)
    steps = g.op("Range", [g.constant(np.float32(0)), g.constant(np.float32(s.context)), g.constant(np.float32(1))])
    angles = g.op("Mul", [g.op("Unsqueeze", [steps, _ints(g, 1)]), g.constant(inverse[None, :])])
    return _scaled(g, g.op("Cos", [angles]), factor), _scaled(g, g.op("Sin", [angles]), factor)


def rotary_frequencies(config: Json, shape: Shape) -> tuple[np.ndarray, float]:
    """Return inverse frequencies [head_dim / 2] float32 and the factor on cosine and sine, as transformers has them."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    c = framework_config(config)
    kind = c.rope_parameters["rope_type"]
    if kind == "default":
        base = c.rope_parameters["rope_theta"]
        steps = torch.arange(0, shape.head_dim, 2, dtype=torch.float) / shape.head_dim
        return (1.0 / (base**steps)).numpy(), 1.0
    inverse, factor = ROPE_INIT_FUNCTIONS[kind](c, torch.device("cpu"))
    return inverse.float().numpy(), float(factor)


def _linear(g: GraphBuilder, name: str, x: ir.Value, n_out: int, n_in: int, *, bias: bool) -> ir.Value:
    y = g.op("MatMul", [x, g.weight(f"{name}.weight", [n_in, n_out], transposed=True)])
    return g.op("Add", [y, g.weight(f"{name}.bias", [n_out])]) if bias else y


def _norm(g: GraphBuilder, s: Shape, name: str, x: ir.Value) -> ir.Value:
    width = s.head_dim if name.endswith(("q_norm.weight", "k_norm.weight")) else s.hidden
    weight = g.weight(name, [width])
    if s.variant.norm_plus_one:
        weight = g.op("Add", [weight, g.constant(np.float32(1))])
    return g.op("RMSNormalization", [x, weight], {"axis": -1, "epsilon": s.norm_eps})


def _head_norm(g: GraphBuilder, s: Shape, name: str, x: ir.Value, heads: int) -> ir.Value:
    split = g.op("Reshape", [x, _ints(g, 0, 0, heads, s.head_dim)])
    return g.op("Reshape", [_norm(g, s, name, split), _ints(g, 0, 0, heads * s.head_dim)])


def _scaled(g: GraphBuilder, x: ir.Value, factor: float) -> ir.Value:
    return x if factor == 1 else g.op("Mul", [x, g.constant(np.float32(factor))])


def _ints(g: GraphBuilder, *values: int) -> ir.Value:
    return g.constant(np.array(values, np.int64))
