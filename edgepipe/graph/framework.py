"""Every family without a builder: transformers' own exporter traces the model, passes bring it into the dialect.

    feature-extraction, …-classification …   graph `model`
    text-generation                          graph `decoder`: the cache grows by concatenation
    text2text-generation                     graph `encoder` (its outputs are the cross-attention keys and values of all
                                             decoder layers) and graph `decoder`

`transformers.exporters` (5.23, experimental) traces with torch.export and patches what torch can't trace. Its own split
of a generating model repeats each weight per graph and freezes lengths, so the split is ours (modules.py), and each
part goes through its exporter with the dimensions that vary named.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgepipe.artifacts import ModelInfo
from edgepipe.errors import ConfigError, StageError
from edgepipe.graph.adopt import adopt
from edgepipe.graph.dialect import OPSET
from edgepipe.graph.reference import framework_config
from edgepipe.graph.tasks import TASKS
from edgepipe.weights import WeightStore

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Hold one graph to be: the torch module that computes it, and an example of what it is given."""

    name: str  # of the graph
    module: Any  # torch.nn.Module: forward(**example) → dict of named tensors
    example: dict[str, Any]  # tensors, or lists of (key, value) per layer
    varying: dict[str, dict[int, str]]  # input → axis → name of the dimension that isn't fixed


def check_model(info: ModelInfo) -> None:
    """Raise ConfigError unless transformers has a class for the model and its task; nothing is built."""
    import transformers

    config = framework_config(info.config)
    auto: Any = getattr(transformers, TASKS[info.task].auto_class)
    if type(config) not in auto._model_mapping:
        raise ConfigError(
            f"transformers {transformers.__version__} has no class for {info.task} of model_type {config.model_type!r}"
        )


def build_module(info: ModelInfo) -> Any:
    """Return transformers' module for a model's task, in float32 and with weights that mean nothing yet."""
    import torch
    import transformers

    config = framework_config(info.config)
    auto = getattr(transformers, TASKS[info.task].auto_class)
    try:
        with quiet():
            module = auto.from_config(config, dtype=torch.float32).eval()
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"transformers has no {info.task} for model_type {config.model_type!r}: {reason}") from error
    for layer, heads in (info.config.get("pruned_heads") or {}).items():
        _take_heads(module, int(layer), len(heads))
    return module


def _take_heads(module: Any, layer: int, count: int) -> None:
    """Take heads out of one attention of a model like BERT: its class makes as many as the width has room for.

    Their number follows from the width of the projections when it runs, so only these change.
    """
    import torch

    found = (part for name, part in module.named_modules() if name.endswith(f"encoder.layer.{layer}.attention"))
    attention = next(found, None)
    if attention is None:
        raise ConfigError(f"config.json prunes heads of layer {layer}, which the model hasn't")
    width = (attention.self.num_attention_heads - count) * attention.self.attention_head_size
    if width < 1:
        raise ConfigError(f"config.json prunes all heads of layer {layer}")
    for name in ("query", "key", "value"):
        setattr(attention.self, name, torch.nn.Linear(getattr(attention.self, name).in_features, width))
    attention.output.dense = torch.nn.Linear(width, attention.output.dense.out_features)
    attention.self.num_attention_heads -= count
    attention.self.all_head_size = width


def fill_module(module: Any, weights: WeightStore) -> None:
    """Give a module the values of a store, decoded to float32; what the store hasn't, stays as it is."""
    import torch

    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, tensor in tensors.items():
        if name in weights:
            value = torch.from_numpy(np.require(weights.float32(name), requirements=["C", "W"]))
            if value.shape != tensor.shape:
                raise ConfigError(f"{name} should be {list(tensor.shape)}, but the weights hold {list(value.shape)}")
            tensor.data.copy_(value)


def trace(part: Part, whole: Any, weights: WeightStore) -> bytes:
    """Export one part of the module `whole`, whose names are those of `weights`, and return it in the dialect.

    Raises StageError when the framework can't trace it, ConfigError when it reads a weight that the store lacks.
    """
    import torch
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    shapes = {name: _shape_of(value, part.varying.get(name, {})) for name, value in part.example.items()}
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=OPSET, optimize=False)
    try:
        with quiet(), torch.inference_mode(False), torch.no_grad():
            exporter: Any = OnnxExporter
            traced, _ = exporter().export_program(part.module, dict(part.example), config)
    except Exception as error:  # torch.export raises dozens of classes
        other = "; --set export.exporter=optimum might (docs/optimum.md)" if part.name == "model" else ""
        raise StageError(
            f"the framework's exporter can't trace the graph {part.name}: {_reason(error)}{other}"
        ) from error
    return adopt(traced, part.name, weights, _names(part.module, whole), dims_of(part))


def _reason(error: BaseException) -> str:
    """Return the first line of what an exporter's error goes back to; the outer ones give advice to its developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line[:300]}"


def _shape_of(value: Any, varying: dict[int, str]) -> Any:
    """Return torch.export's description of which axes of an example vary, in the example's structure."""
    import torch

    if isinstance(value, list):  # [(key, value), …]
        return [tuple(_shape_of(one, varying) for one in pair) for pair in value]
    return {axis: torch.export.Dim.DYNAMIC for axis in varying}


def _names(module: Any, whole: Any) -> dict[str, str]:
    """Map the names of a traced part to those of the whole model, for all that a checkpoint holds.

    Buffers that a module computes from its config (rotary tables) are in no checkpoint, and stay constants.
    """
    held = set(whole.state_dict())
    known = {id(t): name for name, t in [*whole.named_parameters(), *whole.named_buffers()] if name in held}
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: known[id(tensor)] for name, tensor in tensors if id(tensor) in known}


def dims_of(part: Part) -> dict[str, list[int | str]]:
    """Return the shape of every flat input, varying axes by name."""
    dims: dict[str, list[int | str]] = {}
    for name, value in part.example.items():
        varying = part.varying.get(name, {})
        flat = flatten({name: value})
        for key, tensor in flat.items():
            dims[key] = [varying.get(axis, size) for axis, size in enumerate(tensor.shape)]
    return dims


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"past": [(k, v), …]} as {"past_key.0": k, "past_value.0": v, …}; tensors stay as they are."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, list):
            for layer, pair in enumerate(value):
                for kind, tensor in zip(("key", "value"), pair, strict=True):
                    flat[f"{name}_{kind}.{layer}"] = tensor
        else:
            flat[name] = value
    return flat


def nest(values: Arrays) -> dict[str, Any]:
    """Undo `flatten`, as torch tensors."""
    import torch

    nested: dict[str, Any] = {}
    for name, value in values.items():
        tensor = torch.from_numpy(np.ascontiguousarray(value))
        head, _, layer = name.rpartition(".")
        for kind in ("key", "value"):
            if head.endswith(f"_{kind}"):
                pairs = nested.setdefault(head.removesuffix(f"_{kind}"), {})
                pairs.setdefault(int(layer), {})[kind] = tensor
                break
        else:
            nested[name] = tensor
    return {
        name: [(pair["key"], pair["value"]) for _, pair in sorted(value.items())] if isinstance(value, dict) else value
        for name, value in nested.items()
    }


def run_part(part: Part, feeds: Arrays) -> dict[str, np.ndarray]:
    """Run a part in torch on flat arrays and return its outputs by name: what its graph must agree with."""
    import torch

    with torch.inference_mode():
        outputs = part.module(**nest(feeds))
    return {name: tensor.numpy() for name, tensor in outputs.items()}


def whole_logits(module: Any, ids: np.ndarray, source: Arrays | None) -> np.ndarray:
    """Return transformers' logits [batch, sequence, vocab] for ids [batch, sequence] in one run without a cache."""
    import torch

    feeds = {"input_ids": torch.from_numpy(ids)}
    if source is not None:
        feeds = {name: torch.from_numpy(value) for name, value in source.items()}
        feeds["decoder_input_ids"] = torch.from_numpy(ids)
    with torch.inference_mode():
        logits: np.ndarray = module(**feeds, use_cache=False).logits.numpy()
    return logits


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' notes to developers (version drift, missing torchvision, progress) off the screen."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        yield
