"""Which graphs a task needs, what each is given, and the facts of the model that a runtime must know.

Sizes come from the config and from one run of the module; limits of length from the positions it was made for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from edgepipe.artifacts import Json, ModelInfo
from edgepipe.errors import ConfigError
from edgepipe.graph.dialect import weight_name
from edgepipe.graph.framework import Part
from edgepipe.graph.modules import cached_decoder, cross_encoder, one_graph
from edgepipe.graph.tasks import TASKS

POOLINGS = ("mean", "cls", "last", "max")
_USUAL_CONTEXT = 2048  # tokens of a decoder's cache when nobody asks for more
_USUAL_SOURCE = 512  # tokens of a source, or of an encoder's text, without positions that end

# Sizes of the traced example: they differ from each other and from 1, which the tracer would take for constants.
_BATCH, _SOURCE, _NEW, _PAST = 2, 9, 3, 5
_CHECK_SIZES = {"batch": 3, "sequence": 13, "source": 11, "past": 6, "samples": 17_000}  # others than those traced
_AUDIO_SAMPLES = 16_000  # one second, for models that hear waves


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Hold the parts of a model and the facts of it that go into the bundle's manifest."""

    parts: tuple[Part, ...]
    spec: Json


def plan_parts(info: ModelInfo, module: Any, *, context: int, pooling: str, normalize: bool | None) -> Plan:
    """Plan the graphs of a model for its task.

    `context` 0 takes the usual; `pooling` "" and `normalize` None take what the model's own files say.
    Raises ConfigError for inputs that edgepipe can't feed, or a context beyond the model's positions.
    """
    if info.task == "text2text-generation":
        return _plan_source_and_answer(info, module, context)
    if info.task == "text-generation":
        return _plan_decoder(info, module, context)
    return _plan_one_graph(info, module, context, pooling, normalize)


def _plan_one_graph(info: ModelInfo, module: Any, context: int, pooling: str, normalize: bool | None) -> Plan:
    core = module.get_encoder() if getattr(module.config, "is_encoder_decoder", False) else module
    kind = core.main_input_name
    if kind not in _EXAMPLES:
        raise ConfigError(f"the model takes {kind}; edgepipe feeds {', '.join(_EXAMPLES)}")
    reads_text = kind == "input_ids"
    settings = info.sentence or {}
    embeds = info.task == "feature-extraction" and reads_text
    chosen = (pooling or str(settings.get("pooling") or "mean")) if embeds else None
    unit = bool(settings.get("normalize", True) if normalize is None else normalize) if embeds else False
    wrapped = one_graph(core, TASKS[info.task].outputs, chosen, unit).eval()
    example, varying = _EXAMPLES[kind](core, module.config)
    part = Part(name="model", module=wrapped, example=example, varying=varying)
    limit = positions_of(module.config) if reads_text else None
    usual = settings.get("max_tokens") or limit or _USUAL_SOURCE
    labels = module.config.id2label if info.task.endswith("-classification") else None
    spec: Json = {
        "context": _limited(context, min(usual, limit or usual), limit) if reads_text else None,
        "vocab_size": module.config.vocab_size if reads_text else None,
        "hidden_size": getattr(module.config, "hidden_size", None),
        "layers": getattr(module.config, "num_hidden_layers", None),
        "pooling": chosen,
        "normalize": unit if embeds else None,
        "labels": None if labels is None else [str(labels[i]) for i in sorted(labels)],
        "pad_token_id": getattr(module.config, "pad_token_id", None) if reads_text else None,
    }
    return Plan(parts=(part,), spec=spec)


def _text_example(core: Any, config: Any) -> tuple[dict[str, Any], dict[str, dict[int, str]]]:
    import torch

    ids = torch.arange(_BATCH * _SOURCE).reshape(_BATCH, _SOURCE) % config.vocab_size
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "token_type_ids" in inspect.signature(core.forward).parameters and getattr(config, "type_vocab_size", 0) > 1:
        example["token_type_ids"] = torch.zeros_like(ids)
    return example, {name: {0: "batch", 1: "sequence"} for name in example}


def _image_example(_: Any, config: Any) -> tuple[dict[str, Any], dict[str, dict[int, str]]]:
    import torch

    size = getattr(config, "image_size", None)
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list | tuple) else None
    if sides is None or len(sides) != 2:
        raise ConfigError(f"config.json of a model of images should have an image_size, but has {size!r}")
    return {"pixel_values": torch.zeros(_BATCH, getattr(config, "num_channels", 3), *sides)}, {
        "pixel_values": {0: "batch"}
    }


def _sound_example(_: Any, config: Any) -> tuple[dict[str, Any], dict[str, dict[int, str]]]:
    import torch

    bins, frames = getattr(config, "num_mel_bins", None), 2 * getattr(config, "max_source_positions", 0)
    if not bins or not frames:
        raise ConfigError("config.json of a model of sound should have num_mel_bins and max_source_positions")
    return {"input_features": torch.zeros(_BATCH, bins, frames)}, {"input_features": {0: "batch"}}


def _wave_example(_: Any, __: Any) -> tuple[dict[str, Any], dict[str, dict[int, str]]]:
    import torch

    return {"input_values": torch.zeros(_BATCH, _AUDIO_SAMPLES)}, {"input_values": {0: "batch", 1: "samples"}}


_EXAMPLES: dict[str, Callable[[Any, Any], tuple[dict[str, Any], dict[str, dict[int, str]]]]] = {
    "input_ids": _text_example,
    "pixel_values": _image_example,
    "input_features": _sound_example,
    "input_values": _wave_example,
}


def _plan_decoder(info: ModelInfo, module: Any, context: int) -> Plan:
    import torch

    with torch.inference_mode():
        result = module(input_ids=torch.ones(1, 2, dtype=torch.int64), use_cache=True)
    past = _pairs(getattr(result, "past_key_values", None), _PAST)
    example = {"input_ids": _new_ids(module.config), "past": past}
    varying = {"input_ids": {0: "batch", 1: "sequence"}, "past": {0: "batch", 2: "past"}}
    part = Part(
        name="decoder", module=cached_decoder(module, has_source=False).eval(), example=example, varying=varying
    )
    limit = positions_of(module.config)
    spec = _generation_spec(info, module.config, past)
    spec["context"] = _limited(context, min(limit or _USUAL_CONTEXT, _USUAL_CONTEXT), limit)
    return Plan(parts=(part,), spec=spec)


def _plan_source_and_answer(info: ModelInfo, module: Any, context: int) -> Plan:
    import torch

    config = module.config
    if module.main_input_name != "input_ids":
        raise ConfigError(f"the model's source is {module.main_input_name}; text2text-generation takes text")
    start = config.decoder_start_token_id
    if start is None:
        raise ConfigError("config.json has no decoder_start_token_id, which every answer begins with")
    source = torch.ones(1, 2, dtype=torch.int64)
    with torch.inference_mode():
        caches = module(input_ids=source, decoder_input_ids=source, use_cache=True).past_key_values
    past, cross = _pairs(caches.self_attention_cache, _PAST), _pairs(caches.cross_attention_cache, _SOURCE)
    text, text_varying = _text_example(module, config)
    text = {name: text[name] for name in ("input_ids", "attention_mask")}
    encoder = Part(
        name="encoder",
        module=cross_encoder(module, start).eval(),
        example=text,
        varying={name: text_varying[name] for name in text},
    )
    decoder = Part(
        name="decoder",
        module=cached_decoder(module, has_source=True).eval(),
        example={
            "input_ids": _new_ids(config),
            "encoder_attention_mask": text["attention_mask"],
            "cross": cross,
            "past": past,
        },
        varying={
            "input_ids": {0: "batch", 1: "sequence"},
            "encoder_attention_mask": {0: "batch", 1: "source"},
            "cross": {0: "batch", 2: "source"},
            "past": {0: "batch", 2: "past"},
        },
    )
    limit = positions_of(config)
    usual = min(limit or _USUAL_SOURCE, _USUAL_CONTEXT)
    spec = _generation_spec(info, config, past)
    spec["context"] = spec["source_context"] = _limited(context, usual, limit)
    forced = info.config.get("forced_bos_token_id")
    spec["decoder_prefix_ids"] = [start] if forced is None else [start, forced]
    return Plan(parts=(encoder, decoder), spec=spec)


def _generation_spec(info: ModelInfo, config: Any, past: list[tuple[Any, Any]]) -> Json:
    key = past[0][0]
    return {
        "layers": len(past),
        "heads": config.num_attention_heads,
        "kv_heads": key.shape[1],
        "head_dim": key.shape[3],
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "bos_token_id": info.bos_token_id,
        "eos_token_ids": list(info.eos_token_ids),
    }


def _new_ids(config: Any) -> Any:
    import torch

    return torch.arange(_BATCH * _NEW).reshape(_BATCH, _NEW) % config.vocab_size


def _pairs(cache: Any, tokens: int) -> list[tuple[Any, Any]]:
    """Return zeros in the shape of a cache's keys and values, `tokens` long; ConfigError for another kind of cache."""
    import torch

    layers = getattr(cache, "layers", None)
    if not layers or any(getattr(layer, "keys", None) is None or layer.keys.dim() != 4 for layer in layers):
        raise ConfigError("the model's cache isn't keys and values of every layer, and edgepipe keeps no other state")
    shapes = {(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers}
    if len(shapes) > 1 or any(key != value for _, key, value in shapes):
        raise ConfigError("the model's layers keep keys and values of different sizes, which edgepipe can't yet")
    ((heads, width, _),) = shapes
    return [(torch.zeros(_BATCH, heads, tokens, width), torch.zeros(_BATCH, heads, tokens, width)) for _ in layers]


def positions_of(config: Any) -> int | None:
    """Return the tokens a model has positions for; None where they are relative and never end."""
    if getattr(config, "relative_attention_num_buckets", None) and config.model_type in ("t5", "mt5", "umt5", "longt5"):
        return None
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    # RoBERTa and its kin count positions from the padding id on, which takes that many and one more away
    offset = (
        config.pad_token_id + 1 if config.model_type in _OFFSET_POSITIONS and config.pad_token_id is not None else 0
    )
    return positions - offset


_OFFSET_POSITIONS = (
    *("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "esm", "data2vec-text", "ibert"),
    *("roberta-prelayernorm", "xlm-roberta-xl", "xmod"),
)


def _limited(asked: int, usual: int, limit: int | None) -> int:
    if asked and limit is not None and asked > limit:
        raise ConfigError(f"--context {asked} is more than the {limit} positions this model was made for")
    return asked or usual


def used_weights(graphs: Mapping[str, bytes]) -> set[str]:
    """Return the names of the weights that any of some graphs reads."""
    protos = [onnx.load_model_from_string(graph).graph for graph in graphs.values()]
    named = (weight_name(value.name) for proto in protos for value in proto.input)
    return {found[0] for found in named if found is not None}


def ends_of(graph: bytes) -> Json:
    """Return a graph's inputs and outputs by name: dtype, and shape with a name for an axis that varies."""
    proto = onnx.load_model_from_string(graph).graph
    inputs = [value for value in proto.input if weight_name(value.name) is None]
    return {"inputs": _described(inputs), "outputs": _described(list(proto.output))}


def _described(values: list[onnx.ValueInfoProto]) -> dict[str, Json]:
    found = {}
    for value in values:
        tensor = value.type.tensor_type
        dims = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "any" for dim in tensor.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        found[value.name] = {"dtype": dtype, "shape": dims}
    return found


def seeded_feeds(inputs: Mapping[str, Json], vocab_size: int | None, seed: int) -> dict[str, np.ndarray]:
    """Make seeded inputs for a graph from their description, in other sizes than it was traced with; some padding."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, np.ndarray] = {}
    for name, facts in inputs.items():
        shape = [_CHECK_SIZES[size] if isinstance(size, str) else size for size in facts["shape"]]
        if name.endswith("attention_mask"):
            feeds[name] = padding(shape)
        elif name == "token_type_ids":
            feeds[name] = rng.integers(0, 2, shape)
        elif name == "input_ids":
            feeds[name] = rng.integers(0, vocab_size or 1, shape)
        else:
            feeds[name] = rng.standard_normal(shape).astype(facts["dtype"])
    return feeds


def padding(shape: list[int]) -> np.ndarray:
    """Return a mask [rows, tokens] int64 whose later rows end in padding."""
    lengths = np.maximum(shape[1] - 4 * np.arange(shape[0]), 1)
    return (np.arange(shape[1])[None] < lengths[:, None]).astype(np.int64)
