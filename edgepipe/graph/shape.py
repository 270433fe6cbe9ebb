"""The Llama family's facts: a table of what its variants do differently, and a model's shape read from its config.

Source: Touvron et al., arXiv:2302.13971, and the model files of transformers 5.23.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgepipe.artifacts import Json
from edgepipe.errors import ConfigError
from edgepipe.graph.reference import framework_config


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


ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")

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
    gated: bool  # the MLP is down(act(gate·x) ⊙ up·x); a student's may be down(act(up·x))
    attention_scale: float
    embedding_scale: float
    residual_scale: float
    logits_divisor: float
    windows: tuple[int | None, ...]  # attention window of each layer in tokens
    ropes: tuple[bool, ...]  # whether each layer rotates queries and keys
    ffns: tuple[int, ...] = ()  # of each layer of a student whose layers differ; empty: all have `ffn`

    def at(self, layer: int) -> Shape:
        """Return the facts of one layer."""
        return dataclasses.replace(self, ffn=self.ffns[layer], ffns=()) if self.ffns else self


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
        gated=True,
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
    if c.hidden_act not in ACTIVATIONS:
        raise ConfigError(f"activation {c.hidden_act!r} is not supported; known: {', '.join(ACTIVATIONS)}")
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


def _windows(c: Any, variant: Variant, context: int) -> Iterator[int | None]:
    """Yield each layer's window; a window at least as long as the context is none."""
    window = getattr(c, "sliding_window", None)
    kinds = getattr(c, "layer_types", None) or []
    for i in range(c.num_hidden_layers):
        by_layer = variant.windows == "by layer" and i < len(kinds) and kinds[i] == "sliding_attention"
        applies = variant.windows == "every layer" or by_layer
        yield window if applies and window is not None and window < context else None


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


def check_exits(exits: Sequence[int], layers: int) -> None:
    """Refuse exits that don't stand between layers."""
    if sorted({*exits}) != [*exits] or not 1 <= exits[0] <= exits[-1] < layers:
        raise ConfigError(f"exits: expected growing numbers of layers from 1 to below all {layers}, got {[*exits]}")


def block_weights(shape: Shape, p: str) -> dict[str, tuple[int, ...]]:
    """List the parameters of one block, `p` before each name, with their shapes [out, in] or [n]."""
    hidden, ffn = shape.hidden, shape.ffn
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    names: dict[str, tuple[int, ...]] = {}
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
        if part == "gate" and not shape.gated:
            continue
        names[p + f"mlp.{part}_proj.weight"] = (out, n_in)
        if shape.mlp_bias:
            names[p + f"mlp.{part}_proj.bias"] = (out,)
    return names
