"""Adapt a teacher to the task before it teaches: low-rank adapters on its matrices, merged once they are trained.

    W' = W + (α / r) · B A         A [r, in] random, B [out, r] zero at first; only A and B are trained

The loss is the cross-entropy of the targets, sources left out. Source: Hu et al., LoRA (arXiv:2106.09685), by peft;
rank 16, α 32, dropout 0.05 on all of attention and MLP are the settings of arXiv:2501.16273.
"""
# ruff: noqa: TID253  a teacher is a torch module: this file is imported only where one is trained

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from edgepipe.artifacts import Json, TorchModel
from edgepipe.errors import TargetError
from edgepipe.numerics.losses import IGNORED, cross_entropy, masked_mean
from edgepipe.training.batches import Batch
from edgepipe.training.distil import joined
from edgepipe.training.loop import LoopData, LoopOptions, Place, Step, train
from edgepipe.training.teacher import Teacher, freeze, open_teacher
from edgepipe.weights import held_weight

_ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapters:
    """Say how large the adapters are."""

    rank: int = 16
    scale: int = 32  # α
    dropout: float = 0.05


def adapt_teacher(
    model: TorchModel, data: LoopData, adapters: Adapters, options: LoopOptions, place: Place
) -> tuple[TorchModel, Teacher, Json]:
    """Train a teacher on examples of source and target; return it as artifact and as module, and what happened.

    Raises TargetError when peft isn't there.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise TargetError('adapting a teacher needs peft: pip install "edgepipe[train]"') from None
    module = open_teacher(model).module
    torch.manual_seed(options.seed)  # peft draws A from torch's own numbers
    config: Any = LoraConfig(
        r=adapters.rank,
        lora_alpha=adapters.scale,
        lora_dropout=adapters.dropout,
        target_modules=list(_ADAPTED),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that will change
        wrapped = get_peft_model(module, config)
    record = train(wrapped, answers, data, options, place)
    merged: Any = wrapped.merge_and_unload()
    adapted = _with_matrices(model, merged)
    return adapted, Teacher(freeze(merged), adapted.info.fingerprint, adapted.info.name), record


def answers(module: nn.Module, batch: Batch, _step: int) -> Step:
    """Return the cross-entropy of the targets that a decoder of transformers gives after the sources."""
    ids, places = joined(batch)
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    # the head is applied where a target is predicted only: it is the largest product of a small model
    first, last = int(places[:, 0].min()), int(places[:, -1].max())
    logits = module(
        input_ids=ids, use_cache=False, logits_to_keep=torch.arange(first, min(last + 1, ids.shape[1]))
    ).logits
    logits = logits[rows, (places - first).clamp_max(logits.shape[1] - 1)]
    mask = batch["target"] != IGNORED
    right = (logits.argmax(-1) == batch["target"]).float()
    loss = masked_mean(cross_entropy(logits, batch["target"]), mask)
    return Step(loss, mask.sum(), {"accuracy": masked_mean(right, mask)})


def _with_matrices(model: TorchModel, module: nn.Module) -> TorchModel:
    """Return the artifact with the adapted matrices of a module; all others stay where they are."""
    changed, digest = {}, hashlib.sha256(model.info.fingerprint.encode())
    for name, value in sorted(module.state_dict().items()):
        if name.endswith(".weight") and name.split(".")[-2] in _ADAPTED:
            array = value.detach().cpu().numpy()
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
            changed[name] = held_weight(name, array)
    info = dataclasses.replace(model.info, fingerprint=digest.hexdigest())
    return dataclasses.replace(model, info=info, weights=model.weights.replace(changed))
