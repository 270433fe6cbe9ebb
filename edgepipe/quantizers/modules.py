"""The torch module of any model, and how a batch of calibration texts goes through it.

module_of    TorchModel → transformers' module, or a student's, in float32 and filled
block_layers which matrices a method on whole layers works on
run_batch    one batch through it, whatever its task
swapped      other values in some of its parameters, for a while
answers      what an encoder-decoder writes to its sources: real decoding steps to calibrate its decoder with
"""
# ruff: noqa: TID253  calibration runs a torch module: this file is imported only where that is done

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from edgepipe.artifacts import TorchModel
from edgepipe.graph.framework import build_module, fill_module
from edgepipe.graph.tasks import GENERATION
from edgepipe.quantizers.texts import Batch
from edgepipe.students.config import is_student
from edgepipe.students.files import read_bare
from edgepipe.weights import WeightStore


def module_of(model: TorchModel) -> Any:
    """Return the module that computes a model, all its weights in memory as float32, parameters fixed.

    Raises ConfigError when transformers has no class for it. What the store lacks (an unused head) is
    random, and seeded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module: Any = read_bare(model.info.config) if is_student(model.info.config) else build_module(model.info)
    fill_module(module, model.weights)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    if model.info.task in GENERATION and hasattr(module, "config") and hasattr(module.config, "use_cache"):
        module.config.use_cache = False  # a whole text at once: keys and values would only be copied
    return module.eval()


def block_layers(model: TorchModel) -> tuple[str, ...]:
    """Return the weights of the linear layers inside of numbered blocks, embeddings left out; no value is read.

    Poolers, classifiers and output heads stand outside of them.
    """
    if is_student(model.info.config):
        module: Any = read_bare(model.info.config)
    else:
        with torch.device("meta"):
            module = build_module(model.info)
    names = []
    for path, layer in module.named_modules():
        name = f"{path}.weight"
        inside = isinstance(layer, nn.Linear) and any(part.isdecimal() for part in path.split("."))
        if inside and name in model.weights and name not in model.info.embeddings:
            names.append(model.weights[name].name)
    return tuple(dict.fromkeys(names))


def feeds(batch: Batch) -> dict[str, torch.Tensor]:
    """Return a batch as the tensors that a module's `forward` takes."""
    found = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.decoder_input_ids is not None:
        found["decoder_input_ids"] = batch.decoder_input_ids
    return {name: torch.from_numpy(value) for name, value in found.items()}


@torch.no_grad()
def run_batch(module: Any, batch: Batch) -> Any:
    """Send a batch through a module and return what it gives; hooks see everything on the way."""
    return module(**feeds(batch))


def slots_of(module: Any, weights: WeightStore) -> dict[str, list[torch.Tensor]]:
    """Return the module's own tensors by the name of the weight that fills them; a tied one may fill several."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name in weights:
            found.setdefault(weights[name].name, []).append(tensor)
    return found


@contextlib.contextmanager
def swapped(slots: Mapping[str, list[torch.Tensor]], values: Mapping[str, np.ndarray]) -> Iterator[None]:
    """Give the tensors of some weights other values (float32), and their own ones back at the end."""
    kept = [(tensor, tensor.data) for name in values for tensor in slots.get(name, ())]
    try:
        for name, value in values.items():
            for tensor in slots.get(name, ()):
                tensor.data = torch.from_numpy(np.require(value, requirements=["C", "W"]))
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


@torch.no_grad()
def answers(module: Any, batch: Batch, *, start: int, ends: frozenset[int], tokens: int) -> Batch:
    """Return the batch with the likeliest answer to each row as the decoder's input [rows, tokens at most].

    What follows an end is masked out: a decoder never gets that far.
    """
    inputs = feeds(batch)
    ids = torch.full((len(batch.input_ids), 1), start, dtype=torch.int64)
    alive = torch.ones_like(ids)
    while ids.shape[1] < tokens and bool(alive[:, -1].any()):
        logits = logits_of(module(**inputs, decoder_input_ids=ids))[:, -1]
        chosen = logits.argmax(-1, keepdim=True)
        ended = torch.isin(chosen, torch.tensor(sorted(ends), dtype=torch.int64))
        ids = torch.cat([ids, chosen], 1)
        alive = torch.cat([alive, alive[:, -1:] * (~ended).long()], 1)
    return Batch(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        decoder_input_ids=ids.numpy(),
        decoder_mask=np.asarray(alive.numpy(), np.int64),
    )


def logits_of(output: Any) -> Any:
    """Return logits [rows, tokens, vocabulary] of what a generator's module gives."""
    return (output[0] if isinstance(output, tuple) and not hasattr(output, "logits") else output).logits
