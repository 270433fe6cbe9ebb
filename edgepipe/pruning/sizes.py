"""How much of each stack stays, and what the config says of it then; what can't be is refused with what could.

A ratio is rounded to whole key/value groups, and FFN channels to a multiple of 32 where the model's width is one: those
are quantize's groups and the kernels' blocks, and a width between costs as much as the next multiple.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from edgepipe.artifacts import Json
from edgepipe.errors import ConfigError
from edgepipe.graph.reference import framework_config
from edgepipe.graph.shape import VARIANTS
from edgepipe.pruning.families import Anatomy, Stack
from edgepipe.students.config import read_student

_STEP = 32  # FFN channels


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Say what is to be left; 0: FFN and groups as the ratio says, all layers, the whole width."""

    ratio: float = 0.0  # share of FFN channels and key/value groups removed
    ffn: int = 0
    ffn_widths: tuple[int, ...] = ()  # of each layer that is kept, an encoder's first, in place of one number
    kv_heads: int = 0
    hidden: int = 0
    layers: int = 0  # of the encoder where there is a decoder behind it
    decoder_layers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Hold what one stack has left."""

    layers: int
    ffns: tuple[int, ...]  # of each layer
    kv_heads: int
    hidden: int

    @property
    def ffn(self) -> int:
        """Return the widest layer's FFN channels."""
        return max(self.ffns)


def sizes_of(anatomy: Anatomy, wanted: Wanted, name: str, config: Json) -> tuple[Sizes, ...]:
    """Return the sizes of every stack; ConfigError names what can't be, and the nearest that can."""
    if wanted.decoder_layers and len(anatomy.stacks) == 1:
        raise ConfigError(f"prune.decoder_layers is for encoder-decoders, and {name} has one stack: use prune.layers")
    counts = []
    for number, stack in enumerate(anatomy.stacks):
        layers = wanted.decoder_layers if number else wanted.layers
        option = "decoder_layers" if number else "layers"
        counts.append(_count(option, layers or stack.layers, stack.layers, name))
    widths = _widths(anatomy, counts, wanted, name)
    found = []
    for stack, layers, ffns in zip(anatomy.stacks, counts, widths, strict=True):
        found.append(
            Sizes(
                layers=layers,
                ffns=ffns,
                kv_heads=_groups(stack, wanted, name),
                hidden=_count("hidden", wanted.hidden or stack.hidden, stack.hidden, name),
            )
        )
    if any(size.hidden != stack.hidden for size, stack in zip(found, anatomy.stacks, strict=True)):
        _check_hidden(anatomy, found, name, config)
    return tuple(found)


def _count(option: str, asked: int, had: int, name: str) -> int:
    if asked > had:
        raise ConfigError(f"prune.{option}: {asked} of {name}'s {had} can't be kept: the most is {had}")
    return asked


def _widths(anatomy: Anatomy, counts: Sequence[int], wanted: Wanted, name: str) -> list[tuple[int, ...]]:
    """Return the FFN channels that each layer of each stack keeps."""
    if not wanted.ffn_widths:
        pairs = zip(anatomy.stacks, counts, strict=True)
        return [(_channels(stack, wanted, name),) * layers for stack, layers in pairs]
    if len(wanted.ffn_widths) != sum(counts):
        raise ConfigError(
            f"prune.ffn_widths: expected {sum(counts)} numbers, one for each layer that is kept of {name}, but got "
            f"{len(wanted.ffn_widths)}"
        )
    if len({*wanted.ffn_widths}) > 1 and anatomy.kind != "student":
        raise ConfigError(
            f"prune.ffn_widths: {name}'s config has one width for all layers: the nearest possible is "
            f"prune.ffn={round(sum(wanted.ffn_widths) / len(wanted.ffn_widths))}"
        )
    left = list(wanted.ffn_widths)
    found = []
    for stack, layers in zip(anatomy.stacks, counts, strict=True):
        own, left = left[:layers], left[layers:]
        if min(own) < 1:
            raise ConfigError(f"prune.ffn_widths: {min(own)} channels of a layer can't be kept: the least is 1")
        found.append(tuple(_count("ffn_widths", width, stack.ffn, name) for width in own))
    return found


def _channels(stack: Stack, wanted: Wanted, name: str) -> int:
    if wanted.ffn:
        return _count("ffn", wanted.ffn, stack.ffn, name)
    step = _step(stack)
    kept = round(stack.ffn * (1 - wanted.ratio) / step) * step
    return kept or _refuse_ratio(f"{stack.ffn} FFN channels", "ffn", stack, wanted, name)


def _groups(stack: Stack, wanted: Wanted, name: str) -> int:
    if wanted.kv_heads:
        return _count("kv_heads", wanted.kv_heads, stack.kv_heads, name)
    kept = round(stack.kv_heads * (1 - wanted.ratio))
    return kept or _refuse_ratio(f"{stack.kv_heads} key/value groups", "kv_heads", stack, wanted, name)


def _step(stack: Stack) -> int:
    return _STEP if stack.ffn % _STEP == 0 else 1


def _refuse_ratio(what: str, option: str, stack: Stack, wanted: Wanted, name: str) -> NoReturn:
    """Refuse a ratio that leaves nothing, and name the largest one, in thousandths, that leaves something of both."""
    parts = [] if wanted.ffn or wanted.ffn_widths else [stack.ffn / _step(stack)]
    parts += [] if wanted.kv_heads else [stack.kv_heads]
    fitting = (n / 1000 for n in range(1000, -1, -1) if all(round(count * (1 - n / 1000)) for count in parts))
    raise ConfigError(
        f"prune.ratio: {wanted.ratio:g} would remove all {what} of {name}: the nearest possible is "
        f"{next(fitting, 0.0):g}, or say prune.{option}"
    )


def _check_hidden(anatomy: Anatomy, sizes: Sequence[Sizes], name: str, config: Json) -> None:
    """Refuse a width that the model's class can't have."""
    stack, size = anatomy.stacks[0], sizes[0]
    if len({one.hidden for one in anatomy.stacks}) > 1:
        raise ConfigError(
            f"prune.hidden: encoder and decoder of {name} are {' and '.join(str(s.hidden) for s in anatomy.stacks)} "
            "wide: only stacks of one width become narrower together"
        )
    if anatomy.kind == "llama" and VARIANTS[config["model_type"]].scaled_embedding:
        raise ConfigError(f"prune.hidden: {config['model_type']} scales its embedding by the width: leave hidden out")
    if anatomy.kind == "bert":
        _check_bert_hidden(stack, size, name)
    if anatomy.kind == "student" and (heads := read_student(config)).pooling == "latent":
        raise ConfigError(f"prune.hidden: {name} pools by {heads.latents} latents of the whole width: leave hidden out")


def _check_bert_hidden(stack: Stack, size: Sizes, name: str) -> None:
    """Refuse a width that isn't made of whole heads: BERT's class divides it by them."""
    least = size.kv_heads * stack.head_dim
    if size.hidden % stack.head_dim or size.hidden < least:
        nearest = max(least, round(size.hidden / stack.head_dim) * stack.head_dim)
        raise ConfigError(
            f"prune.hidden: {size.hidden} isn't possible for {name}, whose width is a multiple of its heads' "
            f"{stack.head_dim} and takes the {size.kv_heads} heads that are kept: the nearest possible is {nearest}"
        )


def check_outside(anatomy: Anatomy, sizes: Sequence[Sizes], names: Sequence[str]) -> None:
    """Refuse a narrower stream where a tensor outside of the blocks isn't in the table."""
    if all(size.hidden == stack.hidden for size, stack in zip(sizes, anatomy.stacks, strict=True)):
        return
    inside = tuple(stack.prefix for stack in anatomy.stacks)
    unknown = [name for name in names if not name.startswith(inside) and name not in anatomy.outside]
    if unknown:
        raise ConfigError(f"prune.hidden: nothing says how {unknown[0]} depends on the width: leave hidden out")


def pruned_config(config: Json, anatomy: Anatomy, sizes: Sequence[Sizes], layers: Sequence[Sequence[int]]) -> Json:
    """Return the config of the smaller model; `layers` are those that each stack keeps."""
    if anatomy.kind == "bert":
        return _bert_config(config, anatomy.stacks[0], sizes[0])
    if anatomy.kind == "llama":
        return _llama_config(config, anatomy.stacks[0], sizes[0], layers[0])
    changed = {
        stack.name: _student_config(config[stack.name], stack, size, kept)
        for stack, size, kept in zip(anatomy.stacks, sizes, layers, strict=True)
    }
    return {**config, **changed}


def _student_config(config: Json, stack: Stack, size: Sizes, layers: Sequence[int]) -> Json:
    """Return the config of a student's stack, whose layers may differ."""
    changed = _llama_config(config, stack, size, layers)
    return changed if len({*size.ffns}) == 1 else {**changed, "ffn_widths": list(size.ffns)}


def _llama_config(config: Json, stack: Stack, size: Sizes, layers: Sequence[int]) -> Json:
    """Return a config of the Llama family; what it says layer by layer, or leaves to be derived, is written out.

    A nested student that was cut is no longer nested: what was chosen by weights has another order.
    """
    c = framework_config(config)
    changed = {
        **{key: value for key, value in config.items() if key != "nested_widths"},
        "hidden_size": size.hidden,
        "intermediate_size": size.ffn,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.kv_heads * (stack.heads // stack.kv_heads),
        "num_key_value_heads": size.kv_heads,
        "head_dim": stack.head_dim,
    }
    if size.layers < stack.layers:
        for key in ("layer_types", "no_rope_layers"):
            said = getattr(c, key, None)
            if isinstance(said, list):
                changed[key] = [said[i] for i in layers]
        if "max_window_layers" in config:
            changed["max_window_layers"] = min(config["max_window_layers"], size.layers)
    if config["model_type"] == "llama" and size.hidden % changed["num_attention_heads"]:
        return _as_mistral(changed, c, stack, size)
    return changed


def _as_mistral(changed: Json, c: Any, stack: Stack, size: Sizes) -> Json:
    """Return a Llama's config as Mistral's, which computes the same without biases or windows.

    Llama's class refuses heads that don't divide the width, even where heads have a size of their own; Mistral's
    doesn't. What the two classes might assume differently is written out.
    """
    if c.attention_bias or c.mlp_bias:
        each = stack.heads // stack.kv_heads
        fitting = [n for n in range(1, stack.kv_heads + 1) if size.hidden % (n * each) == 0]
        nearest = min(fitting, key=lambda n: abs(n - size.kv_heads), default=0)
        instead = f"the nearest possible is prune.kv_heads={nearest}" if nearest else "choose another prune.hidden"
        raise ConfigError(
            f"prune.kv_heads: {size.kv_heads} groups are {size.kv_heads * each} query heads, which don't divide the "
            f"width of {size.hidden}, and transformers' Llama with biases refuses that: {instead}"
        )
    gone = ("attention_bias", "mlp_bias", "rope_theta", "rope_scaling", "pretraining_tp")
    written = ("max_position_embeddings", "rms_norm_eps", "hidden_act", "tie_word_embeddings", "rope_parameters")
    return {
        **{key: value for key, value in changed.items() if key not in gone},
        **{key: getattr(c, key) for key in written},
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
    }


def _bert_config(config: Json, stack: Stack, size: Sizes) -> Json:
    """Return BERT's config. Its class makes heads of hidden / heads elements: fewer are listed as `pruned_heads`.

    transformers 4 read such a list (layer → heads that are gone) before it loaded weights; only their number counts.
    """
    heads = size.hidden // stack.head_dim
    gone = list(range(size.kv_heads, heads))
    changed = {
        **{key: value for key, value in config.items() if key != "pruned_heads"},
        "hidden_size": size.hidden,
        "intermediate_size": size.ffn,
        "num_hidden_layers": size.layers,
        "num_attention_heads": heads,
    }
    return {**changed, "pruned_heads": {str(i): gone for i in range(size.layers)}} if gone else changed
