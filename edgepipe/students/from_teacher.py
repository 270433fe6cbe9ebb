"""Build a student from a Llama-family teacher: which layers, which channels, where cross-attention comes from.

A layer of the student is a copy of a layer of the teacher. Layers are spaced evenly from the first to the last by
default (DistilBERT's choice made general); an encoder keeps the weights and drops the causal mask; cross-attention
starts from the same layer's self-attention, its norm too (arXiv:2504.06225: "balanced"), or from random numbers, to be
trained alone for the first steps ("unbalanced"). A narrower student keeps the channels whose weights are largest:

    residual channel c     Σ over all matrices that read or write c of w²
    key/value group h      Σ of w² over its rows of q, k, v and its columns of o
    FFN neuron j           ‖gate_j‖ · ‖up_j‖ · ‖down_j‖ (0 when any of the three is dead)

after Minitron (arXiv:2407.14679), which scores by activations; weights need no data. Values are read one teacher
tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgepipe.artifacts import Json, TorchModel
from edgepipe.errors import ConfigError
from edgepipe.graph.reference import framework_config
from edgepipe.graph.shape import VARIANTS, Shape, read_shape
from edgepipe.students.config import (
    StudentConfig,
    block_names,
    with_layers,
    without_windows,
)
from edgepipe.weights import WeightStore

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
DEPTH_SHARE = 0.4  # of the teacher's layers a student has when nothing is said: SmolLM2's 30 → 8 + 4
ENCODER_SHARE = 2 / 3  # of an encoder-decoder's layers (arXiv:2501.16273)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentPlan:
    """Say what student is made of a teacher; 0 and empty take the default."""

    kind: str  # decoder, encoder, encoder-decoder
    encoder_layers: int = 0
    decoder_layers: int = 0
    encoder_from: tuple[int, ...] = ()  # the teacher's layers that become the encoder's, first layer 0; spaced evenly
    decoder_from: tuple[int, ...] = ()
    hidden: int = 0  # width of the residual stream; 0: the teacher's
    ffn: int = 0
    nested: tuple[int, ...] = ()  # narrower FFN widths that it is to work at too
    exits: tuple[int, ...] = ()  # of an encoder: layers after which texts may leave
    kv_heads: int = 0  # key/value heads kept, each with its queries
    causal_encoder: bool = False
    centred_positions: bool = False
    cross: str = "copy"  # cross-attention from the layer's self-attention (copy), or random
    scratch: bool = False  # the same student with random weights
    pooling: str = "mean"
    normalize: bool = True
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptChannels:
    """Hold which of the teacher's channels a student keeps, in the student's order."""

    hidden: np.ndarray  # [hidden] of the residual stream
    groups: Mapping[int, np.ndarray] = field(default_factory=dict)  # teacher's layer → [kv_heads]
    ffn: Mapping[int, np.ndarray] = field(default_factory=dict)  # teacher's layer → [ffn]


def spread(count: int, layers: int) -> tuple[int, ...]:
    """Choose `count` of the layers 0 … layers − 1, spaced evenly, first and last among them (one: the first)."""
    if not 1 <= count <= layers:
        raise ConfigError(f"a student of {count} layers can't be made of a teacher's {layers}: take 1 to {layers}")
    return tuple(round(i * (layers - 1) / max(1, count - 1)) for i in range(count))


def plan_student(config: Json, plan: StudentPlan) -> StudentConfig | Json:
    """Return the config of the student that `plan` makes of a teacher with this config.

    A decoder student's is a plain Llama-family config. Raises ConfigError when the teacher is of another family, or
    the plan asks for more than it has.
    """
    if config.get("model_type") not in VARIANTS:
        raise ConfigError(
            f"a student is made of a Llama-family teacher ({', '.join(VARIANTS)}), "
            f"but this one is of type {config.get('model_type')!r}"
        )
    shape = read_shape(config, None)
    encoder_from, decoder_from = chosen_layers(shape, plan)
    stack = without_windows(_narrowed(config, shape, plan))
    if plan.kind == "decoder":
        return with_layers(stack, decoder_from)
    encoder = with_layers(stack, encoder_from)
    if plan.kind == "encoder":
        return StudentConfig(
            kind="encoder",
            encoder=encoder,
            causal_encoder=plan.causal_encoder,
            centred_positions=plan.centred_positions,
            pooling=plan.pooling,
            normalize=plan.normalize,
            labels=plan.labels,
            exits=plan.exits,
            latent_heads=math.gcd(8, encoder["hidden_size"]),
        )
    return StudentConfig(
        kind="encoder-decoder",
        encoder=encoder,
        decoder=with_layers(stack, decoder_from),
        causal_encoder=plan.causal_encoder,
        centred_positions=plan.centred_positions,
        tie_embeddings=bool(stack["tie_word_embeddings"]),
    )


def chosen_layers(shape: Shape, plan: StudentPlan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return which of the teacher's layers become the encoder's and the decoder's."""
    both = max(2, round(DEPTH_SHARE * shape.layers))
    if plan.kind == "encoder-decoder":
        encoder = plan.encoder_layers or max(1, round(ENCODER_SHARE * both))
        decoder = plan.decoder_layers or max(1, both - round(ENCODER_SHARE * both))
    else:
        encoder, decoder = plan.encoder_layers or both, plan.decoder_layers or both
    chosen = []
    for name, count, asked, given in (
        ("encoder", encoder, plan.encoder_layers, plan.encoder_from),
        ("decoder", decoder, plan.decoder_layers, plan.decoder_from),
    ):
        if wrong := [i for i in given if not 0 <= i < shape.layers]:
            raise ConfigError(f"the {name}'s layer {wrong[0]} is none of the teacher's 0 to {shape.layers - 1}")
        if given and asked not in (0, len(given)):
            raise ConfigError(f"{len(given)} layers are named for the {name}, but it is to have {asked}")
        chosen.append(given or spread(count, shape.layers))
    return chosen[0], chosen[1]


def _narrowed(config: Json, shape: Shape, plan: StudentPlan) -> Json:
    """Return the teacher's config with the plan's widths, sizes written out that a config may leave to defaults."""
    for name, asked, had in (
        ("hidden", plan.hidden, shape.hidden),
        ("ffn", plan.ffn, shape.ffn),
        ("kv_heads", plan.kv_heads, shape.kv_heads),
    ):
        if not 0 <= asked <= had:
            raise ConfigError(f"{name}: a student of width {asked} can't be made of a teacher's {had}")
    kv_heads, ffn = plan.kv_heads or shape.kv_heads, plan.ffn or shape.ffn
    if plan.nested and (sorted({*plan.nested}) != [*plan.nested] or not 1 <= plan.nested[0] <= plan.nested[-1] < ffn):
        raise ConfigError(f"nested: expected growing widths from 1 to below the whole {ffn}, got {[*plan.nested]}")
    return {
        **config,
        **({"nested_widths": [*plan.nested, ffn]} if plan.nested else {}),
        "hidden_size": plan.hidden or shape.hidden,
        "intermediate_size": ffn,
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * (shape.heads // shape.kv_heads),
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": bool(framework_config(config).tie_word_embeddings),
    }


def config_of(teacher: TorchModel) -> Json:
    """Return a teacher's config that says of its output head what its weights say."""
    return {**teacher.info.config, "tie_word_embeddings": _HEAD in teacher.weights.aliases}


def student_values(teacher: TorchModel, plan: StudentPlan, config: StudentConfig | Json) -> dict[str, np.ndarray]:
    """Return the weights that a student takes from its teacher, by the student's names, float32.

    What is not among them starts at random: cross-attention where the plan says so, heads that no teacher has.
    Shapes [out, in] or [n] are those of `students.config.student_weights`, or of the family for a decoder.
    """
    shape = read_shape(teacher.info.config, None)
    encoder_from, decoder_from = chosen_layers(shape, plan)
    used = sorted(
        {*(encoder_from if plan.kind != "decoder" else ()), *(decoder_from if "decoder" in plan.kind else ())}
    )
    kept = choose_channels(teacher.weights, shape, plan, used)
    copy = _Copier(teacher.weights, shape, kept)
    if plan.kind == "decoder":
        values = copy.stack("model.", decoder_from, cross=False)
        values[_EMBEDDING] = copy.table(_EMBEDDING)
        if not bool(_config(config)["tie_word_embeddings"]):
            values[_HEAD] = copy.table(_HEAD, scaled=False)
        return values
    values = copy.stack("encoder.", encoder_from, cross=False)
    values["embed_tokens.weight"] = copy.table(_EMBEDDING)
    if plan.kind == "encoder-decoder":
        values |= copy.stack("decoder.", decoder_from, cross=plan.cross == "copy")
        if isinstance(config, StudentConfig) and not config.tie_embeddings:
            values[_HEAD] = copy.table(_HEAD, scaled=False)
    return values


def choose_channels(weights: WeightStore, shape: Shape, plan: StudentPlan, layers: Sequence[int]) -> KeptChannels:
    """Choose the channels a narrower student keeps; all of them where the plan doesn't narrow.

    Those of an FFN come in the order of the teacher's; where narrower widths are nested in it, what matters most first.
    """
    hidden, ffn, groups = plan.hidden or shape.hidden, plan.ffn or shape.ffn, plan.kv_heads or shape.kv_heads
    kept_groups = {i: np.arange(shape.kv_heads) for i in layers}
    kept_ffn = {i: np.arange(shape.ffn) for i in layers}
    residual = np.zeros(shape.hidden)
    if plan.nested or (hidden, ffn, groups) != (shape.hidden, shape.ffn, shape.kv_heads):
        residual += np.square(weights.float32(_EMBEDDING), dtype=np.float64).sum(0)
        for i in layers:
            channels, neurons, heads = _importance(weights, shape, f"model.layers.{i}.")
            residual += channels
            first = np.argsort(-neurons, kind="stable")[:ffn]
            kept_ffn[i], kept_groups[i] = first if plan.nested else np.sort(first), largest(heads, groups)
    return KeptChannels(hidden=largest(residual, hidden), groups=kept_groups, ffn=kept_ffn)


def _importance(weights: WeightStore, shape: Shape, p: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return how much one layer's weights use each residual channel, FFN neuron and key/value group."""
    square = {
        part: np.square(weights.float32(f"{p}{part}_proj.weight"), dtype=np.float64)
        for part in (*(f"self_attn.{x}" for x in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
    }
    writes = ("self_attn.o", "mlp.down")
    channels = sum(s.sum(1) if part in writes else s.sum(0) for part, s in square.items())
    neurons = np.sqrt(square["mlp.gate"].sum(1) * square["mlp.up"].sum(1) * square["mlp.down"].sum(0))
    heads = sum(
        s.sum(0 if part == "self_attn.o" else 1).reshape(shape.kv_heads, -1).sum(1)
        for part, s in square.items()
        if part.startswith("self_attn.")
    )
    return np.asarray(channels), neurons, np.asarray(heads)


def largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the largest scores, ascending; the first among equals."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _config(config: StudentConfig | Json) -> Json:
    return config.encoder if isinstance(config, StudentConfig) else config


class _Copier:
    """Read the teacher's tensors, cut to the channels that are kept."""

    def __init__(self, weights: WeightStore, shape: Shape, kept: KeptChannels) -> None:
        self._weights, self._shape, self._kept = weights, shape, kept

    def table(self, name: str, *, scaled: bool = True) -> np.ndarray:
        """Return an embedding or head [vocab, hidden]; Gemma multiplies it by √hidden, which a narrower one changes."""
        value = self._weights.float32(name)[:, self._kept.hidden]
        narrower = scaled and self._shape.variant.scaled_embedding and len(self._kept.hidden) != self._shape.hidden
        return value * np.float32(math.sqrt(self._shape.hidden / len(self._kept.hidden))) if narrower else value

    def stack(self, prefix: str, layers: Sequence[int], *, cross: bool) -> dict[str, np.ndarray]:
        """Return the blocks and the last norm of one stack."""
        values = {prefix + "norm.weight": self._weights.float32("model.norm.weight")[self._kept.hidden]}
        for i, layer in enumerate(layers):
            block = {name: self._cut(layer, name) for name in block_names(self._shape)}
            values |= {f"{prefix}layers.{i}.{name}": value for name, value in block.items()}
            if cross:
                crossed = {
                    name.replace("self_attn.", "cross_attn."): value
                    for name, value in block.items()
                    if name.startswith("self_attn.")
                }
                crossed["cross_attention_layernorm.weight"] = block["input_layernorm.weight"]
                values |= {f"{prefix}layers.{i}.{name}": value.copy() for name, value in crossed.items()}
        return values

    def _cut(self, layer: int, name: str) -> np.ndarray:
        """Return one tensor of a teacher's layer with the rows and columns that are kept."""
        whole = self._weights.float32(f"model.layers.{layer}.{name}")
        s, kept = self._shape, self._kept
        queries = spans(kept.groups[layer], s.heads // s.kv_heads * s.head_dim)
        keys = spans(kept.groups[layer], s.head_dim)
        part = name.split(".")[-2].removesuffix("_proj")
        rows = {"q": queries, "k": keys, "v": keys, "gate": kept.ffn[layer], "up": kept.ffn[layer]}
        columns = {"o": queries, "down": kept.ffn[layer]}
        if part in ("q_norm", "k_norm"):  # one weight per place in a head
            return whole
        value: np.ndarray = whole[rows.get(part, kept.hidden)]
        if value.ndim == 2:
            value = value[:, columns.get(part, kept.hidden)]
        return value


def spans(groups: np.ndarray, width: int) -> np.ndarray:
    """Return the indices of all elements of groups that are `width` long."""
    indices: np.ndarray = (groups[:, None] * width + np.arange(width)).ravel()
    return indices
