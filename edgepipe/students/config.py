"""What a student is made of: kind, the stacks of Llama-style blocks, and how they are joined. No torch.

A stack is described by a Llama-family config, as transformers writes them, so a student keeps what its teacher's family
does differently (biases, norms of queries and keys, scaled embeddings, rotary scaling). Two keys are edgepipe's own:
`nested_widths`, the FFN widths that it was trained to work at (training/nested.py), and `ffn_widths`, those of its
layers where they differ. Kinds:

    decoder           one causal stack: an ordinary model of the family, saved as one
    encoder           one stack without the causal mask, and a head: an embedding, or classes
    encoder-decoder   both, a cross-attention in every decoder block; Mu's and T5Gemma's shape (arXiv:2501.16273,
                      2504.06225)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgepipe.artifacts import Json
from edgepipe.errors import ConfigError
from edgepipe.graph.shape import VARIANTS, Shape, block_weights, check_exits, read_shape

Kind = Literal["encoder", "encoder-decoder"]
MODEL_TYPES: dict[str, Kind] = {
    "edgepipe_encoder": "encoder",
    "edgepipe_encoder_decoder": "encoder-decoder",
}
POOLINGS = ("mean", "last", "cls", "max", "latent")
_WINDOWS = ("sliding_window", "layer_types", "use_sliding_window", "max_window_layers")
_USUAL_CONTEXT = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentConfig:
    """Describe an encoder or encoder-decoder student; a decoder student is a plain model of its family."""

    kind: Kind
    encoder: Json  # a Llama-family config: width, heads, FFN, rotary positions, num_hidden_layers, vocab_size
    decoder: Json | None = None  # the same of the decoder; None without one
    gated: bool = True  # MLPs are gated (SwiGLU, GeGLU); else down(act(up·x)), as Mu's are
    causal_encoder: bool = False  # keep the teacher's causal mask in the encoder, for comparison
    centred_positions: bool = False  # the encoder's positions are pos − ⌊(n − 1) / 2⌋
    tie_embeddings: bool = True  # the output head is the decoder's embedding
    pooling: str = "mean"  # of an encoder's embedding or classes: mean, last, cls, max, latent
    normalize: bool = True  # embeddings have length 1
    latents: int = 512  # rows of the latent array that "latent" pooling attends to (arXiv:2405.17428)
    latent_heads: int = 8
    labels: tuple[str, ...] = ()  # of a classifier; empty: the encoder embeds
    exits: tuple[int, ...] = ()  # of an encoder: layers after which a text may leave, with a gate each

    def __post_init__(self) -> None:
        """Refuse parts that don't fit together."""
        if (self.decoder is None) != (self.kind == "encoder"):
            raise ConfigError(f"a student of kind {self.kind} with{'out' if self.decoder is None else ''} a decoder")
        if self.pooling not in POOLINGS:
            raise ConfigError(f"pooling: expected one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        if self.pooling == "latent" and (self.latents < 1 or self.encoder["hidden_size"] % self.latent_heads):
            raise ConfigError(
                f"{self.latent_heads} latent heads don't divide the hidden size of {self.encoder['hidden_size']}"
            )
        if len(self.labels) == 1:
            raise ConfigError("a classifier needs at least two labels")
        if self.exits:
            check_exits(self.exits, self.encoder["num_hidden_layers"])
        if self.decoder is not None and self.encoder["vocab_size"] != self.decoder["vocab_size"]:
            raise ConfigError(
                f"encoder and decoder read one vocabulary, not {self.encoder['vocab_size']} and "
                f"{self.decoder['vocab_size']} tokens"
            )

    @property
    def depths(self) -> tuple[int, ...]:
        """Return the layers of an encoder after which it may answer, all of them last."""
        return (*self.exits, int(self.encoder["num_hidden_layers"]))

    @property
    def gate_features(self) -> int:
        """Return how many numbers a gate looks at: the pooled states, and how sure a classifier is."""
        return int(self.encoder["hidden_size"]) + bool(self.labels)

    @property
    def shares_embedding(self) -> bool:
        """Say whether one table serves both stacks: they have one width."""
        return self.decoder is None or self.encoder["hidden_size"] == self.decoder["hidden_size"]

    def encoder_shape(self, context: int | None = None) -> Shape:
        """Return the encoder's facts; `context` tokens of source, None: as many as usual."""
        return self._shape(self.encoder, context)

    def decoder_shape(self, context: int | None = None) -> Shape:
        """Return the decoder's facts. Raises ConfigError when there is none."""
        if self.decoder is None:
            raise ConfigError("this student is an encoder and has no decoder")
        return self._shape(self.decoder, context)

    def _shape(self, stack: Json, context: int | None) -> Shape:
        shape = read_shape(stack, context, _USUAL_CONTEXT)
        widths = stack.get("ffn_widths")
        if widths is not None and not (
            isinstance(widths, list)
            and len(widths) == shape.layers
            and all(type(n) is int and 1 <= n <= shape.ffn for n in widths)
        ):
            raise ConfigError(
                f"a student's config.json says ffn_widths is {widths!r}; expected {shape.layers} whole numbers "
                f"from 1 to {shape.ffn}"
            )
        return dataclasses.replace(shape, gated=self.gated, ffns=tuple(widths or ()))

    def to_json(self) -> Json:
        """Return config.json of a saved student."""
        record = dataclasses.asdict(self)
        kind = record.pop("kind")
        model_type = next(name for name, known in MODEL_TYPES.items() if known == kind)
        for name, there in (("decoder", self.decoder is not None), ("exits", bool(self.exits))):
            if not there:
                del record[name]
        return {
            "model_type": model_type,
            **record,
            "labels": list(self.labels),
            **({"exits": list(self.exits)} if self.exits else {}),
            "vocab_size": self.encoder["vocab_size"],
        }


def has_exits(config: Json) -> bool:
    """Say whether a config.json is that of an encoder student, or a decoder, with exits."""
    known = is_student(config) or str(config.get("model_type")) in VARIANTS
    return known and bool(config.get("exits"))


def is_student(config: Json) -> bool:
    """Say whether a config.json is that of an encoder or encoder-decoder student."""
    return str(config.get("model_type")) in MODEL_TYPES  # a stranger's config may hold a list here


def student_task(config: Json) -> str:
    """Return the task of a student's config.json."""
    if MODEL_TYPES[config["model_type"]] == "encoder-decoder":
        return "text2text-generation"
    return "text-classification" if config.get("labels") else "feature-extraction"


def read_student(config: Json) -> StudentConfig:
    """Read a student's config.json; ConfigError when it is none, or a field is missing or of the wrong kind."""
    kind = MODEL_TYPES.get(str(config.get("model_type")))
    if kind is None:
        raise ConfigError(f"expected a student ({', '.join(MODEL_TYPES)}), got model_type {config.get('model_type')!r}")
    fields = {f.name: f for f in dataclasses.fields(StudentConfig)}
    given = {name: value for name, value in config.items() if name in fields and name != "kind"}
    for name in ("encoder", *(("decoder",) if kind == "encoder-decoder" else ())):
        if not isinstance(given.get(name), dict):
            raise ConfigError(f"a student's config.json has a table {name!r}, but this one has {given.get(name)!r}")
    for name, value in given.items():
        kinds = {"bool": bool, "int": int, "str": str}.get(str(fields[name].type))
        if kinds is not None and type(value) is not kinds:
            raise ConfigError(f"the student's config.json says {name} is {value!r}; expected {fields[name].type}")
    given["labels"] = tuple(str(label) for label in given.get("labels") or ())
    exits = given.get("exits") or ()
    if not (isinstance(exits, list | tuple) and all(type(number) is int for number in exits)):
        raise ConfigError(f"the student's config.json says exits is {exits!r}; expected whole numbers")
    given["exits"] = tuple(exits)
    return StudentConfig(kind=kind, **given)


def nested_widths(config: Json) -> tuple[int, ...]:
    """Return the FFN widths that a student was trained to work at, the whole one last; empty: one alone.

    `config` is a student's config.json, or that of one stack. Raises ConfigError when they aren't widths.
    """
    stack = config.get("encoder") or config
    found = stack.get("nested_widths")
    if found is None:
        return ()
    if not (isinstance(found, list) and all(type(n) is int and n > 0 for n in found) and found == sorted({*found})):
        raise ConfigError(f"a student's config.json says nested_widths is {found!r}; expected growing whole numbers")
    return tuple(found)


def without_windows(stack: Json) -> Json:
    """Return a stack's config that attends to everything: students have no sliding windows."""
    return {**{k: v for k, v in stack.items() if k not in _WINDOWS}, "sliding_window": None}


def student_weights(config: StudentConfig) -> dict[str, tuple[int, ...]]:
    """List every parameter of a student with its shape [out, in] or [n], in the names its files use."""
    encoder = config.encoder_shape()
    vocab, hidden = encoder.vocab, encoder.hidden
    names: dict[str, tuple[int, ...]] = {}
    embedding = "embed_tokens.weight" if config.shares_embedding else "encoder.embed_tokens.weight"
    names[embedding] = (vocab, hidden)
    for i in range(encoder.layers):
        names |= block_weights(encoder.at(i), f"encoder.layers.{i}.")
    names["encoder.norm.weight"] = (hidden,)
    if config.decoder is None:
        return names | _head_weights(config, hidden)
    decoder = config.decoder_shape()
    if not config.shares_embedding:
        names["decoder.embed_tokens.weight"] = (vocab, decoder.hidden)
    for i in range(decoder.layers):
        names |= block_weights(decoder.at(i), f"decoder.layers.{i}.")
        names |= cross_weights(decoder, f"decoder.layers.{i}.", hidden)
    names["decoder.norm.weight"] = (decoder.hidden,)
    if not config.tie_embeddings:
        names["lm_head.weight"] = (vocab, decoder.hidden)
    return names


def block_names(shape: Shape) -> tuple[str, ...]:
    """Return the names of one block's parameters, without a prefix."""
    return tuple(block_weights(shape, ""))


def cross_weights(shape: Shape, p: str, source_width: int) -> dict[str, tuple[int, ...]]:
    """List what cross-attention adds to one decoder block: a norm and four projections, two of the source's width."""
    own = block_weights(shape, "")
    names: dict[str, tuple[int, ...]] = {p + "cross_attention_layernorm.weight": (shape.hidden,)}
    for name, dims in own.items():
        if name.startswith("self_attn."):
            part = name.removeprefix("self_attn.")
            wide = part in ("k_proj.weight", "v_proj.weight")
            names[f"{p}cross_attn.{part}"] = (dims[0], source_width) if wide else dims
    return names


def _head_weights(config: StudentConfig, hidden: int) -> dict[str, tuple[int, ...]]:
    """List the parameters after an encoder's last norm."""
    names: dict[str, tuple[int, ...]] = {}
    if config.pooling == "latent":
        names["pooler.latents"] = (config.latents, hidden)
        names |= {f"pooler.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
        for part, (out, n_in) in (("up", (4 * hidden, hidden)), ("down", (hidden, 4 * hidden))):
            names |= {f"pooler.{part}_proj.weight": (out, n_in), f"pooler.{part}_proj.bias": (out,)}
    if config.labels:
        names |= {"classifier.weight": (len(config.labels), hidden), "classifier.bias": (len(config.labels),)}
    for i in range(len(config.exits)):
        names |= {f"gates.{i}.weight": (config.gate_features,), f"gates.{i}.bias": (1,)}
    return names


def embedding_names(config: StudentConfig) -> tuple[str, ...]:
    """Return the weights that are gathered from, or give logits over the vocabulary."""
    tables: tuple[str, ...] = ("embed_tokens.weight",)
    if not config.shares_embedding:
        tables = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    return (*tables, "lm_head.weight") if config.decoder is not None else tables


def head_alias(config: StudentConfig) -> dict[str, str]:
    """Return the alias of a tied output head."""
    if config.decoder is None or not config.tie_embeddings:
        return {}
    return {"lm_head.weight": "embed_tokens.weight" if config.shares_embedding else "decoder.embed_tokens.weight"}


def parameters(config: StudentConfig) -> int:
    """Count a student's parameters."""
    return sum(math.prod(dims) for dims in student_weights(config).values())


def twin(config: StudentConfig) -> Json:
    """Return the config of the decoder-only model of the same width whose parameters come closest to a student's.

    It has the layers of neither stack but as many as fit, one embedding, and the student's head tied or not.
    Raises ConfigError for a student whose MLPs aren't gated: the family has no such decoder.
    """
    if not config.gated:
        raise ConfigError("a decoder-only twin is a model of the Llama family, whose MLPs are gated: set gated to true")
    own = ("ffn_widths", "nested_widths")
    stack = {k: v for k, v in config.encoder.items() if k not in own} | {"tie_word_embeddings": config.tie_embeddings}
    shape = config.encoder_shape()
    block = sum(math.prod(dims) for dims in block_weights(shape, "").values())
    heads = 1 if config.tie_embeddings else 2
    rest = parameters(config) - heads * shape.vocab * shape.hidden - shape.hidden
    layers = max(1, round(rest / block))
    return with_layers(stack, [min(i, shape.layers - 1) for i in range(layers)])


def with_layers(stack: Json, layers: Sequence[int]) -> Json:
    """Return a stack's config with the named layers only; what a config says layer by layer follows."""
    changed = {**stack, "num_hidden_layers": len(layers)}
    for key in ("no_rope_layers", "ffn_widths"):
        if isinstance(stack.get(key), list):
            changed[key] = [stack[key][i] for i in layers]
    return changed
