"""Which tensors a channel runs through: a table per family, and the stacks of blocks of one model.

A row says of one tensor of a block what each of its axes is:

    hidden            the residual stream; one choice for the whole model
    ffn               channels of this block's MLP
    NAME.queries      query heads of the block's attention NAME, head by head
    NAME.keys         its key and value heads; a key/value head and the query heads that read it are one group
    -                 nothing that is pruned (tokens, positions, classes, places in a head)

Whatever is removed of an axis is removed from every tensor that has it, so no row needs to know another. A family that
isn't here is refused: guessing from the shapes would cut the wrong thing where two sizes are equal by chance.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from edgepipe.artifacts import Json, TorchModel
from edgepipe.errors import ConfigError
from edgepipe.graph.reference import framework_config
from edgepipe.graph.shape import VARIANTS, Shape, read_shape
from edgepipe.students.config import MODEL_TYPES, StudentConfig, is_student, read_student

Axes = Mapping[str, tuple[str, ...]]
HIDDEN, FFN, FIXED = "hidden", "ffn", "-"


def _attention(name: str) -> dict[str, tuple[str, ...]]:
    """Return the rows of one attention of a Llama-like block."""
    queries, keys = f"{name}.queries", f"{name}.keys"
    rows: dict[str, tuple[str, ...]] = {}
    for part, axis in (("q", queries), ("k", keys), ("v", keys)):
        rows |= {f"{name}.{part}_proj.weight": (axis, HIDDEN), f"{name}.{part}_proj.bias": (axis,)}
    rows |= {f"{name}.q_norm.weight": (FIXED,), f"{name}.k_norm.weight": (FIXED,)}
    return rows | {f"{name}.o_proj.weight": (HIDDEN, queries), f"{name}.o_proj.bias": (HIDDEN,)}


# transformers' Llama family, and the blocks that students are built of
_LLAMA: Axes = {
    "input_layernorm.weight": (HIDDEN,),
    **_attention("self_attn"),
    "post_attention_layernorm.weight": (HIDDEN,),
    "mlp.gate_proj.weight": (FFN, HIDDEN),
    "mlp.gate_proj.bias": (FFN,),
    "mlp.up_proj.weight": (FFN, HIDDEN),
    "mlp.up_proj.bias": (FFN,),
    "mlp.down_proj.weight": (HIDDEN, FFN),
    "mlp.down_proj.bias": (HIDDEN,),
}
_CROSSED: Axes = {**_LLAMA, "cross_attention_layernorm.weight": (HIDDEN,), **_attention("cross_attn")}
_LLAMA_OUTSIDE: Axes = {
    "model.embed_tokens.weight": (FIXED, HIDDEN),
    "model.norm.weight": (HIDDEN,),
    "lm_head.weight": (FIXED, HIDDEN),
}
_STUDENT_OUTSIDE: Axes = {
    "embed_tokens.weight": (FIXED, HIDDEN),
    "encoder.norm.weight": (HIDDEN,),
    "decoder.norm.weight": (HIDDEN,),
    "lm_head.weight": (FIXED, HIDDEN),
    "classifier.weight": (FIXED, HIDDEN),
    "classifier.bias": (FIXED,),
}

# BERT and those that share its blocks; names outside of them may have a prefix (bert.embeddings …)
_BERTS = ("bert", "roberta", "xlm-roberta", "camembert")
_BERT: Axes = {
    "attention.self.query.weight": ("attention.queries", HIDDEN),
    "attention.self.query.bias": ("attention.queries",),
    "attention.self.key.weight": ("attention.keys", HIDDEN),
    "attention.self.key.bias": ("attention.keys",),
    "attention.self.value.weight": ("attention.keys", HIDDEN),
    "attention.self.value.bias": ("attention.keys",),
    "attention.output.dense.weight": (HIDDEN, "attention.queries"),
    "attention.output.dense.bias": (HIDDEN,),
    "attention.output.LayerNorm.weight": (HIDDEN,),
    "attention.output.LayerNorm.bias": (HIDDEN,),
    "intermediate.dense.weight": (FFN, HIDDEN),
    "intermediate.dense.bias": (FFN,),
    "output.dense.weight": (HIDDEN, FFN),
    "output.dense.bias": (HIDDEN,),
    "output.LayerNorm.weight": (HIDDEN,),
    "output.LayerNorm.bias": (HIDDEN,),
}
_BERT_OUTSIDE: Axes = {
    "embeddings.word_embeddings.weight": (FIXED, HIDDEN),
    "embeddings.position_embeddings.weight": (FIXED, HIDDEN),
    "embeddings.token_type_embeddings.weight": (FIXED, HIDDEN),
    "embeddings.LayerNorm.weight": (HIDDEN,),
    "embeddings.LayerNorm.bias": (HIDDEN,),
    "pooler.dense.weight": (HIDDEN, HIDDEN),
    "pooler.dense.bias": (HIDDEN,),
    "classifier.weight": (FIXED, HIDDEN),
    "classifier.bias": (FIXED,),
    "classifier.dense.weight": (HIDDEN, HIDDEN),
    "classifier.dense.bias": (HIDDEN,),
    "classifier.out_proj.weight": (FIXED, HIDDEN),
    "classifier.out_proj.bias": (FIXED,),
    "qa_outputs.weight": (FIXED, HIDDEN),
    "qa_outputs.bias": (FIXED,),
}
_BERT_BLOCKS = re.compile(r"^(.*encoder\.layer\.)\d+\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Hold one stack of equal blocks, and the table of what depends on what in it."""

    name: str  # "" of a model with one stack, "encoder" or "decoder": what messages and configs call it
    prefix: str  # block i's tensors begin with it and "i."
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    axes: Axes  # tensor within a block → its axes
    attentions: Mapping[str, str]  # attention → the matrix whose columns are its query heads
    ffn_output: str  # the matrix whose columns are the MLP's channels

    def size(self, axis: str) -> int | None:
        """Return the elements of an axis; None of one that isn't pruned."""
        if axis.endswith(".queries"):
            return self.heads * self.head_dim
        if axis.endswith(".keys"):
            return self.kv_heads * self.head_dim
        return {HIDDEN: self.hidden, FFN: self.ffn}.get(axis)


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """Hold a model's stacks, and the tensors outside of them."""

    kind: str  # "llama", "bert", "student"
    stacks: tuple[Stack, ...]
    outside: Axes  # by the tensor's whole name; those whose axes aren't known have no entry


def anatomy_of(model: TorchModel) -> Anatomy:
    """Return what can be pruned of a model; ConfigError for a family without a table, or a tensor that isn't in it."""
    config = model.info.config
    if is_student(config):
        found = _student(model, read_student(config))
    elif config.get("model_type") in VARIANTS and model.info.task == "text-generation":
        stack = _llama_stack("", "model.layers.", read_shape(config, None), _LLAMA)
        found = Anatomy(kind="llama", stacks=(stack,), outside=_named(model, _LLAMA_OUTSIDE))
    elif config.get("model_type") in _BERTS:
        found = _bert(model, config)
    else:
        raise ConfigError(
            f"prune has no table for {config.get('model_type')!r} as {model.info.task}: it takes decoders of the Llama "
            f"family ({', '.join(VARIANTS)}), encoders like BERT ({', '.join(_BERTS)}) and students "
            f"({', '.join(MODEL_TYPES)})"
        )
    for stack in found.stacks:
        _check(model, stack)
    return found


def kept_heads(config: Json) -> int:
    """Return the heads of a model like BERT: those of its config, without the ones that `pruned_heads` lists."""
    c = framework_config(config)
    return int(c.num_attention_heads) - max(map(len, (config.get("pruned_heads") or {}).values()), default=0)


def _llama_stack(name: str, prefix: str, shape: Shape, axes: Axes) -> Stack:
    attentions = {"self_attn": "self_attn.o_proj.weight", "cross_attn": "cross_attn.o_proj.weight"}
    return Stack(
        name=name,
        prefix=prefix,
        layers=shape.layers,
        hidden=shape.hidden,
        ffn=shape.ffn,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        axes=axes,
        attentions={key: matrix for key, matrix in attentions.items() if matrix in axes},
        ffn_output="mlp.down_proj.weight",
    )


def _student(model: TorchModel, config: StudentConfig) -> Anatomy:
    if any("ffn_widths" in (stack or {}) for stack in (config.encoder, config.decoder)):
        raise ConfigError(
            f"prune: the layers of {model.info.name} have widths of their own already: cut the model it was made of"
        )
    stacks = [_llama_stack("encoder", "encoder.layers.", config.encoder_shape(), _LLAMA)]
    if config.decoder is not None:
        stacks.append(_llama_stack("decoder", "decoder.layers.", config.decoder_shape(), _CROSSED))
    return Anatomy(kind="student", stacks=tuple(stacks), outside=_named(model, _STUDENT_OUTSIDE))


def _bert(model: TorchModel, config: Json) -> Anatomy:
    prefixes = {found[1] for name in model.weights if (found := _BERT_BLOCKS.match(name))}
    if len(prefixes) != 1:
        raise ConfigError(f"prune expects one stack of blocks in {model.info.name}, but it has {len(prefixes)}")
    c = framework_config(config)
    heads = kept_heads(config)
    stack = Stack(
        name="",
        prefix=prefixes.pop(),
        layers=c.num_hidden_layers,
        hidden=c.hidden_size,
        ffn=c.intermediate_size,
        heads=heads,
        kv_heads=heads,
        head_dim=c.hidden_size // c.num_attention_heads,
        axes=_BERT,
        attentions={"attention": "attention.output.dense.weight"},
        ffn_output="output.dense.weight",
    )
    return Anatomy(kind="bert", stacks=(stack,), outside=_named(model, _BERT_OUTSIDE))


def _named(model: TorchModel, table: Axes) -> Axes:
    """Return the rows of a table that the model has, by whole names."""
    found = {}
    for name in model.weights:
        row = next((axes for end, axes in table.items() if name == end or name.endswith(f".{end}")), None)
        if row is not None and len(row) == len(model.weights[name].shape):
            found[name] = row
    return found


def _check(model: TorchModel, stack: Stack) -> None:
    """Compare a stack's tensors with its table: names, numbers of axes and their sizes."""
    for name in model.weights:
        if not name.startswith(stack.prefix):
            continue
        number, _, part = name.removeprefix(stack.prefix).partition(".")
        axes, shape = stack.axes.get(part), model.weights[name].shape
        if axes is None or not number.isdecimal() or int(number) >= stack.layers:
            raise ConfigError(f"prune doesn't know what {name} of {model.info.name} depends on")
        sizes = [stack.size(axis) for axis in axes]
        if len(axes) != len(shape) or any(s is not None and s != n for s, n in zip(sizes, shape, strict=True)):
            raise ConfigError(f"config.json promises {name} {sizes}, but the weights hold {list(shape)}")
