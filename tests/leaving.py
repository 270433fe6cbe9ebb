"""Decoders with exits in tiny, and what one computes, written out in numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe.artifacts import CompiledModel, OnnxModel, TorchModel
from edgepipe.graph.exits import exit_weights
from edgepipe.graph.shape import read_shape
from edgepipe.sources import open_model
from edgepipe.stages.compile import Compile
from edgepipe.stages.export import Export
from edgepipe.stages.quantize import Quantize
from edgepipe.weights import held_weight
from tests.decoders import CONTEXT, DECODERS, context
from tests.tiny_models import save_tiny_model

LAYERS, EXITS = 4, (1, 3)


def decoder(folder: Path, kind: str) -> TorchModel:
    """Return one of DECODERS with four layers."""
    path = folder / kind.replace(" ", "-")
    if not path.exists():
        model_type, changes = DECODERS[kind]
        longer: dict[str, Any] = {"num_hidden_layers": LAYERS}
        for name in ("layer_types", "no_rope_layers"):
            if name in changes:
                longer[name] = 2 * changes[name]
        save_tiny_model(path, model_type, **{**changes, **longer})
    return open_model(str(path))


def with_exits(model: TorchModel, exits: Sequence[int] = EXITS) -> TorchModel:
    """Give a decoder exits with random parameters."""
    config = {**model.info.config, "exits": list(exits)}
    shape, rng = read_shape(config, CONTEXT), np.random.default_rng(3)
    new = {
        name: held_weight(name, (0.1 * rng.standard_normal(size)).astype(np.float32))
        for name, size in exit_weights(shape, exits).items()
    }
    info = dataclasses.replace(model.info, config=config)
    return dataclasses.replace(model, info=info, weights=model.weights.replace(new))


def bundled(
    model: TorchModel,
    folder: Path,
    bits: int = 16,
    *,
    level: int = 0,
    cache: str = "float32",
    activations: str = "none",
) -> tuple[CompiledModel, OnnxModel, list[str]]:
    """Return a bundle in a new folder, the portable model it was made of, and what compile said."""
    notes: list[str] = []
    folder.mkdir(parents=True)
    ctx = context(folder, notes)
    if bits < 16:
        model = Quantize(bits=bits, activations=activations)(model, ctx)
    exported = Export(context=CONTEXT)(model, ctx)
    return Compile(accuracy_level=level, cache_dtype=cache)(exported, ctx), exported, notes


def naive_logits(model: TorchModel, ids: Sequence[int], ways: Sequence[int]) -> np.ndarray:
    """Return logits [n, vocab] of a plain Llama's ids one by one, each leaving at the exit that its way names.

    A way as large as the number of exits goes through all layers. Keys and values of skipped layers are made of the
    state at the exit. One head and one token at a time.
    """
    c, w = model.info.config, model.weights.float32
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    size, exits, layers = c["hidden_size"] // heads, [*c["exits"], c["num_hidden_layers"]], c["num_hidden_layers"]
    rates = 10000.0 ** (-np.arange(0, size, 2) / size)
    past: list[tuple[list[np.ndarray], list[np.ndarray]]] = [([], []) for _ in range(layers)]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x) + c["rms_norm_eps"]) * w(name)

    def rotated(x: np.ndarray, place: int) -> np.ndarray:  # [heads, size]
        low, high = np.split(x, 2, axis=1)
        cos, sin = np.cos(place * rates), np.sin(place * rates)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=1)

    def remember(x: np.ndarray, i: int, place: int) -> np.ndarray:
        """Write key and value of layer i for a state; return its normed state."""
        h = norm(x, f"model.layers.{i}.input_layernorm.weight")
        p = f"model.layers.{i}.self_attn."
        past[i][0].append(rotated((w(p + "k_proj.weight") @ h).reshape(kv_heads, size), place))
        past[i][1].append((w(p + "v_proj.weight") @ h).reshape(kv_heads, size))
        return h

    def layer(x: np.ndarray, i: int, place: int) -> np.ndarray:
        p = f"model.layers.{i}."
        h = remember(x, i, place)
        q = rotated((w(p + "self_attn.q_proj.weight") @ h).reshape(heads, size), place)
        keys, values = (np.stack(part) for part in past[i])  # [tokens, kv_heads, size]
        seen = []
        for head in range(heads):
            own = head * kv_heads // heads
            scores = np.exp(keys[:, own] @ q[head] / np.sqrt(size))
            seen.append(scores / scores.sum() @ values[:, own])
        x = x + w(p + "self_attn.o_proj.weight") @ np.concatenate(seen)
        h = norm(x, p + "post_attention_layernorm.weight")
        gate = w(p + "mlp.gate_proj.weight") @ h
        return x + w(p + "mlp.down_proj.weight") @ (gate / (1 + np.exp(-gate)) * (w(p + "mlp.up_proj.weight") @ h))

    rows = []
    for place, (token, way) in enumerate(zip(ids, ways, strict=True)):
        x = w("model.embed_tokens.weight")[token]
        for i in range(exits[way]):
            x = layer(x, i, place)
        for i in range(exits[way], layers):
            remember(x, i, place)
        if way < len(exits) - 1:
            x = x + w(f"exits.{way}.translate.weight") @ x + w(f"exits.{way}.translate.bias")
        rows.append(w("lm_head.weight") @ norm(x, "model.norm.weight"))
    return np.stack(rows)
