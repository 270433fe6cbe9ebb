"""Weights of models outside the families edgepipe builds itself: read by transformers, under its own names.

Checkpoints of one architecture come under several names (with a prefix of the class they were saved from, or as an
older release called its parts). transformers knows them all, so its loader gives the names; safetensors only, no remote
code, nothing downloaded. The model is held in memory as it is stored, where the Llama family is read tensor by tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe.artifacts import Json
from edgepipe.errors import ConfigError
from edgepipe.graph.tasks import TASKS
from edgepipe.sources.facts import compress_extra, read_json
from edgepipe.weights import Weight, WeightStore

_POOLINGS = {  # of sentence-transformers' 1_Pooling/config.json
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameworkWeights:
    """Hold what transformers read from a directory."""

    weights: WeightStore
    embeddings: tuple[str, ...]  # names of the matrices that are gathered from, or give logits over a vocabulary


def read_framework(directory: Path, config: Json, task: str) -> FrameworkWeights:
    """Read a directory's weights under the names of the class that computes `task`.

    Raises ConfigError when transformers has no such class for the model, or the files lack a weight of it.
    """
    with compress_extra("opening a model"):
        import safetensors  # noqa: F401  what transformers reads the files with
        import torch
        import transformers
    auto = getattr(transformers, TASKS[task].auto_class)
    try:
        with _quiet():
            module, found = auto.from_pretrained(
                str(directory),
                dtype="auto",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (ValueError, KeyError, OSError, RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{directory} can't be opened for {task} by transformers: {reason}") from error
    missing = set(found["missing_keys"])
    if missing and task != "feature-extraction":  # an encoder may lack the pooler that training used
        raise ConfigError(
            f"{directory} has no {min(missing)}, which {task} needs ({config.get('model_type')}): the checkpoint was "
            f"saved for another task, name it with --task"
        )
    weights, aliases = _store(module, missing, torch)
    heads = [m.weight for m in module.modules() if isinstance(m, torch.nn.Embedding)]
    output = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    if output is not None:
        heads.append(output.weight)
    by_identity = {id(p): name for name, p in module.named_parameters()}
    names = sorted({by_identity[id(weight)] for weight in heads if id(weight) in by_identity})
    return FrameworkWeights(weights=WeightStore(weights, aliases), embeddings=tuple(names))


def _store(module: Any, missing: set[str], torch: Any) -> tuple[dict[str, Weight], dict[str, str]]:
    """Describe a module's parameters and float buffers; one that has several names is stored under its first."""
    weights: dict[str, Weight] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    kept = set(module.state_dict())
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        if name not in kept or name in missing or not tensor.is_floating_point():
            continue
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        dtype = str(tensor.dtype).removeprefix("torch.")
        weights[name] = Weight(
            name=name,
            shape=tuple(tensor.shape),
            dtype=dtype,
            nbytes=tensor.numel() * tensor.element_size(),
            load=partial(_values, tensor.detach(), dtype, torch),
        )
    return weights, aliases


def _values(tensor: Any, dtype: str, torch: Any) -> np.ndarray:
    """Return a tensor's values without a copy; numpy has bfloat16 from ml_dtypes only."""
    if dtype == "bfloat16":
        import ml_dtypes

        halves: np.ndarray = tensor.contiguous().view(torch.uint16).numpy()
        return halves.view(ml_dtypes.bfloat16)
    values: np.ndarray = tensor.numpy()
    return values


def read_sentence_settings(directory: Path) -> Json | None:
    """Return {"pooling", "normalize", "max_tokens"} of a sentence-transformers directory, None when it isn't one.

    Raises ConfigError for a pooling that edgepipe has no graph for.
    """
    modules_path = directory / "modules.json"
    if not modules_path.is_file():
        return None
    # modules.json holds a list: read_json takes objects
    kinds = [str(module.get("type", "")) for module in _read_list(modules_path)]
    folders = {str(m.get("type", "")).rpartition(".")[2]: str(m.get("path", "")) for m in _read_list(modules_path)}
    known = {"Transformer", "Pooling", "Normalize"}
    odd = [kind for kind in kinds if kind.rpartition(".")[2] not in known]
    if odd:
        raise ConfigError(f"{modules_path} has a module {odd[0]}, but edgepipe builds {', '.join(sorted(known))}")
    settings: Json = {"pooling": "mean", "normalize": "Normalize" in folders, "max_tokens": None}
    pooling_path = directory / folders.get("Pooling", "1_Pooling") / "config.json"
    if pooling_path.is_file():
        pooling = read_json(pooling_path)
        chosen = [mode for mode, on in pooling.items() if mode.startswith("pooling_mode_") and on is True]
        if len(chosen) != 1 or chosen[0] not in _POOLINGS:
            raise ConfigError(f"{pooling_path} asks for {', '.join(chosen) or 'no pooling'}; edgepipe builds one of "
                              f"{', '.join(_POOLINGS.values())}")  # fmt: skip
        settings["pooling"] = _POOLINGS[chosen[0]]
    limits_path = directory / "sentence_bert_config.json"
    limits = read_json(limits_path) if limits_path.is_file() else {}
    if isinstance(tokens := limits.get("max_seq_length"), int):
        settings["max_tokens"] = tokens
    if limits.get("do_lower_case"):
        raise ConfigError(f"{limits_path} asks for small letters before the tokenizer, which edgepipe doesn't do: let "
                          "the tokenizer's normalizer do it and take do_lower_case out")  # fmt: skip
    return settings


def _read_list(path: Path) -> list[Json]:
    import json

    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); take the file from its source again") from error
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ConfigError(f"{path} should hold a list of objects; take the file from its source again")
    return value


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' tables of unused weights to itself: what matters of them becomes an error here."""
    from transformers.utils import logging as framework_logging

    words: Any = framework_logging
    logger = logging.getLogger("transformers")
    level, bars = logger.level, words.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    words.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            words.enable_progress_bar()
