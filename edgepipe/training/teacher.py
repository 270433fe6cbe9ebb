"""Ask the teacher, a decoder of transformers: how likely it finds a target after a source, and what it thinks inside.

A decoder reads source and target as one row, so a batch is laid out as arXiv:2501.16273's code does:

    [x left-padded to E ; y_1 … y_(D−1) right-padded]      positions count what isn't padding

The logit at the last source token, column E − 1, predicts y_1; those of columns E − 1 … E + D − 2 predict y_1 … y_D,
which the student's decoder predicts at its places 0 … D − 1. The losses cut both to the smaller vocabulary.
"""
# ruff: noqa: TID253  a teacher is a torch module: this file is imported only where one is asked

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from edgepipe.artifacts import TorchModel
from edgepipe.graph.reference import empty_module
from edgepipe.numerics.losses import IGNORED
from edgepipe.training.batches import Batch


@dataclass(frozen=True, slots=True)
class Teacher:
    """Hold a frozen decoder that scores and writes texts."""

    module: Any  # transformers' …ForCausalLM, on whatever device it was last asked
    fingerprint: str  # of its contents: what keeps scores and texts apart that several teachers gave
    name: str  # for people


class Judged(NamedTuple):
    """Hold what the teacher says of a batch, at the student's places."""

    logits: Tensor  # [B, D, V] at the places of `target`
    source_states: list[Tensor]  # layers + 1 of [B, N, H]: the stream before and after each block at the source
    target_states: list[Tensor]  # layers + 1 of [B, D, H] at the decoder's input


def open_teacher(model: TorchModel) -> Teacher:
    """Return a model of the lazy store as a teacher, all its weights in memory as float32."""
    module = empty_module(model.info.config, "sdpa")
    for name, leaf in module.named_modules():
        for part in dict(leaf.named_parameters(recurse=False)):
            value = np.require(model.weights.float32(f"{name}.{part}"), requirements=["C", "W"])
            # a copy in torch's own memory: products of matrices that lie elsewhere round differently, run by run
            leaf._parameters[part] = nn.Parameter(torch.from_numpy(value).clone(), requires_grad=False)
    module.tie_weights()
    pruned = "".join(record.key for record in model.history if record.stage == "prune")  # another teacher of that name
    return Teacher(freeze(module), model.info.fingerprint + pruned, model.info.name)


def freeze(module: Any) -> Any:
    """Return the module in evaluation mode, its parameters fixed."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module.eval()


@torch.no_grad()
def judge(teacher: Teacher, batch: Batch, *, states: bool = False) -> Judged:
    """Return what the teacher says of a batch's sources and targets (training/batches.py); states when asked for."""
    source, mask, target = batch["source"], batch["source_mask"], batch["target"]
    module = teacher.module.to(source.device)
    width, length = source.shape[1], target.shape[1]
    shift = left_shift(mask)
    known = target != IGNORED
    ids = torch.cat([source.gather(1, shift), target.masked_fill(~known, 0)], 1)[:, :-1]
    seen = torch.cat([mask.flip(1), known.long()], 1)[:, :-1]
    positions = (seen.cumsum(1) - 1).clamp_min(0)
    streams: list[Tensor] = []
    hook = _base(module).norm.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0])) if states else None
    try:
        found = module(
            input_ids=ids,
            attention_mask=seen,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=length,
            output_hidden_states=states,
        )
    finally:
        if hook is not None:
            hook.remove()
    if not states:
        return Judged(found.logits, [], [])
    # transformers' last one is normed; the stream that entered the norm is what a student's last block gives
    streams = [*found.hidden_states[:-1], streams[0]]
    back = shift.argsort(1)[..., None]
    sources = [s[:, :width].gather(1, back.expand(-1, -1, s.shape[-1])) for s in streams]
    return Judged(found.logits, sources, [s[:, width - 1 :] for s in streams])


def left_shift(mask: Tensor) -> Tensor:
    """Return the columns [B, N] that turn rows padded on the right into rows padded on the left."""
    count = mask.sum(1, keepdim=True)
    return (torch.arange(mask.shape[1], device=mask.device) + count) % mask.shape[1]


def _base(module: Any) -> Any:
    """Return the stack of blocks under the head, through adapters too."""
    return cast(Any, module.get_decoder() if hasattr(module, "get_decoder") else module.model)
