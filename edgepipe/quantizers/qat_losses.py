"""What a model on its grid learns from itself in floats: logits, hidden states and attention maps, all places paired.

    L = w_logits · L_logits + w_hidden · L_hidden + w_attention · L_attention + w_targets · L_targets

    logits      KL(teacher ‖ student) over tokens or classes; of an embedding 1 − cosine
    hidden      Σ (s − t)² / Σ t² over what each block gives, mean over blocks: the squared error of
                arXiv:2301.12017, without a block's scale, which differs a thousandfold within a pre-norm model
    attention   Σ over keys (s − t)² of the maps, mean over queries, heads and layers, where the module gives maps
    targets     cross-entropy of the data's own labels, targets or next tokens; without a teacher the only one

Padding counts for nothing. Each is a mean over its own things (rows, tokens of the source, tokens of the answer).
"""
# ruff: noqa: TID253  losses are of tensors: this file is imported only where a model is trained

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgepipe.numerics.losses import IGNORED, cross_entropy, divergence, masked_mean
from edgepipe.quantizers.fake import Dial
from edgepipe.quantizers.layers import first_tensor
from edgepipe.training.batches import Batch
from edgepipe.training.loop import Objective, Step
from edgepipe.training.parts import WEIGHT, Counts, Prepare, factor

_SOURCE, _ANSWER, _ROWS = "source", "answer", "rows"  # what a loss is a mean over (training/parts.py)
_DECODER = "decoder"  # part of the names of blocks and maps behind an encoder
_MAPS = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """Say how much each loss counts."""

    logits: float
    hidden: float
    attention: float
    targets: float

    @property
    def asks(self) -> bool:
        """Say whether there is anything to ask a teacher."""
        return bool(self.logits or self.hidden or self.attention)


class Watched:
    """Hold a module and what its blocks gave in the last run."""

    def __init__(self, module: Any, *, states: bool, maps: bool, pooling: str) -> None:
        """Watch the outermost numbered modules; `maps` asks for attention, where the module can say it."""
        self.module, self.pooling = module, pooling
        self.states: dict[str, Tensor] = {}
        self.maps = maps and hasattr(module, "set_attn_implementation")
        if self.maps:
            module.set_attn_implementation("eager")  # others never make the maps
        for name in _blocks(module) if states else ():
            module.get_submodule(name).register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def keep(_module: Any, _given: Any, output: Any) -> None:
            self.states[name] = first_tensor(output)

        return keep

    def run(self, module: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return logits or embeddings, the blocks' states [B, T, H] and the attention maps [B, heads, Q, K] by name."""
        self.states.clear()
        more = {"output_attentions": True} if self.maps else {}
        found = module(**_feeds(batch), **more)
        if isinstance(found, tuple) and not hasattr(found, "logits"):
            found = found[0]
        maps = {
            f"{kind}.{layer}": one
            for kind in _MAPS
            for layer, one in enumerate(getattr(found, kind, None) or ())
            if one is not None and self.maps
        }
        return self._outputs(found, batch), dict(self.states), maps

    def _outputs(self, found: Any, batch: Batch) -> Tensor:
        """Return logits [B, T, V] or [B, C], or embeddings [B, H]."""
        if isinstance(found, Tensor):
            return found
        logits: Tensor | None = getattr(found, "logits", None)
        if logits is not None:
            return logits
        states: Tensor = found.last_hidden_state
        if self.pooling == "cls":
            return states[:, 0]
        weight = batch["mask"][..., None].to(states.dtype)
        return (states * weight).sum(1) / weight.sum(1)


def _blocks(module: Any) -> list[str]:
    """Return the names of the outermost numbered modules."""
    found = []
    for name, _ in module.named_modules():
        *parents, last = name.split(".")
        if last.isdecimal() and not any(part.isdecimal() for part in parents):
            found.append(name)
    return found


def _feeds(batch: Batch) -> dict[str, Tensor]:
    """Return a batch as the tensors that a module's `forward` takes."""
    if "source" not in batch:
        return {"input_ids": batch["ids"], "attention_mask": batch["mask"]}
    return {
        "input_ids": batch["source"],
        "attention_mask": batch["source_mask"],
        "decoder_input_ids": batch["decoder_input"],
    }


def taught(
    student: Watched, teacher: Watched | None, weights: LossWeights, dial: Dial, *, strength_steps: int, embeds: bool
) -> Objective:
    """Return the objective; rounding grows to its whole strength within the first `strength_steps`.

    `embeds`: outputs [B, H] are embeddings, not logits of classes.
    """

    def objective(module: nn.Module, batch: Batch, step: int) -> Step:
        dial.strength = min(1.0, step / strength_steps) if step and strength_steps else 1.0
        output, states, maps = student.run(module, batch)
        losses: dict[str, Tensor] = {}
        if teacher is not None:
            with torch.no_grad():
                asked = teacher.run(teacher.module.to(output.device), batch)
            if weights.logits:
                losses["logits"] = weights.logits * _logits_loss(output, asked[0], batch, embeds=embeds)
            if weights.hidden:
                losses["hidden"] = weights.hidden * _hidden_loss(states, asked[1], batch)
            if maps:
                losses["attention"] = weights.attention * _attention_loss(maps, asked[2], batch)
        if weights.targets:
            losses["targets"] = weights.targets * _targets_loss(output, batch)
        weight = _counts(batch, per_token=output.dim() == 3)[WEIGHT]
        return Step(torch.stack(list(losses.values())).sum(), weight, losses)

    return objective


def counting(per_token: bool) -> Prepare:
    """Return what comes before a step's runs: how many things each mean is over; `per_token`: outputs are of tokens."""

    def prepare(_module: nn.Module, batch: Batch, _whole: Batch, _step: int) -> tuple[Batch, Counts]:
        return batch, _counts(batch, per_token=per_token)

    return prepare


def _counts(batch: Batch, *, per_token: bool) -> dict[str, Tensor]:
    """Return how many things each mean is over; the weight is that of outputs: rows, or tokens of the last stack."""
    found = {_ROWS: batch["index"].new_tensor(len(batch["index"])), _SOURCE: _mask(batch, _SOURCE).sum()}
    if "target" in batch:
        found[_ANSWER] = _mask(batch, _DECODER).sum()
    return {**found, WEIGHT: found[(_ANSWER if "target" in batch else _SOURCE) if per_token else _ROWS]}


def _of_answer(batch: Batch, name: str) -> bool:
    """Say whether a block or a map of this name is about the answer's tokens: in a decoder behind an encoder."""
    return "target" in batch and bool({_DECODER, "cross"} & set(re.split(r"[._]", name)))


def _mask(batch: Batch, name: str) -> Tensor:
    """Return the mask [B, T] of the tokens that a block or a map of this name is about."""
    if _of_answer(batch, name):
        return batch["target"] != IGNORED
    return batch["source_mask" if "source" in batch else "mask"]


def _factor(batch: Batch, name: str) -> Tensor | float:
    return factor(batch, _ANSWER if _of_answer(batch, name) else _SOURCE)


def _logits_loss(student: Tensor, teacher: Tensor, batch: Batch, *, embeds: bool) -> Tensor:
    if student.dim() == 2:
        near = functional.cosine_similarity(student.float(), teacher.float())
        return (1 - near).mean() if embeds else divergence(student, teacher).mean()
    return masked_mean(divergence(student, teacher), _mask(batch, _DECODER))


def _hidden_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch) -> Tensor:
    distances = []
    for name, state in student.items():
        mask, other = _mask(batch, name), teacher[name].float()
        size = masked_mean(other.square().mean(-1), mask)
        error = masked_mean((state.float() - other).square().mean(-1), mask)
        distances.append(error / size.clamp_min(1e-12) * _factor(batch, name))
    return torch.stack(distances).mean()


def _attention_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch) -> Tensor:
    distances = []
    for name, maps in student.items():
        error = (maps.float() - teacher[name].float()).square().sum(-1).mean(1)  # [B, Q]
        distances.append(masked_mean(error, _mask(batch, name)) * _factor(batch, name))
    return torch.stack(distances).mean()


def _targets_loss(output: Tensor, batch: Batch) -> Tensor:
    """Return the cross-entropy of labels, of an answer's tokens, or of the next tokens of texts."""
    if "label" in batch:
        return functional.cross_entropy(output.float(), batch["label"])
    if "target" in batch:
        return masked_mean(cross_entropy(output, batch["target"]), batch["target"] != IGNORED)
    wanted = batch["ids"].masked_fill(batch["mask"] == 0, IGNORED)[:, 1:]
    return masked_mean(cross_entropy(output[:, :-1], wanted), wanted != IGNORED)
