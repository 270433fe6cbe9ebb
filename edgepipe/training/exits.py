"""Exits: an encoder that answers after fewer layers too, and gates that tell where that is right already.

    L = Σ_k l_k · L(student of its first l_k layers) / Σ_k l_k        all exits at every step, later ones count more

Norm, pooling and head are those of the whole student. Its gates come last, over examples that it wasn't trained on
(numerics/gates.py): other gates for another trade need the student only, not its training.
Source: ECO-M2F, arXiv:2404.15244: an exit at each layer, one head for all, weights that grow with depth.
"""
# ruff: noqa: TID253  this is training's side: imported only where a model is trained

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edgepipe.artifacts import Json
from edgepipe.numerics.gates import fit_gate, right_exits
from edgepipe.students.blocks import Stack
from edgepipe.students.models import Encoder, Gate
from edgepipe.training.batches import Batch
from edgepipe.training.encoder_data import Labels, Texts
from edgepipe.training.loop import Objective, Step


@contextlib.contextmanager
def at_depth(module: nn.Module, depth: int) -> Iterator[None]:
    """Let the stacks of a module compute with their first layers alone."""
    stacks = [part for part in module.modules() if isinstance(part, Stack)]
    for stack in stacks:
        stack.kept = depth
    try:
        yield
    finally:
        for stack in stacks:
            stack.kept = None


def at_exits(objective: Objective, depths: Sequence[int]) -> Objective:
    """Return an objective at all exits and all layers, each weighted by its layers."""

    def at_all(module: nn.Module, batch: Batch, step: int) -> Step:
        found = []
        for depth in depths:
            with at_depth(module, depth):
                found.append(objective(module, batch, step))
        loss = torch.stack([depth * one.loss for depth, one in zip(depths, found, strict=True)]).sum() / sum(depths)
        figures = {f"after {depth}": one.loss.detach() for depth, one in zip(depths, found, strict=True)}
        return Step(loss, found[-1].weight, figures)

    return at_all


def fit_gates(student: Encoder, examples: Texts | Labels, beta: float, rows: int) -> Json:
    """Fit the gates of a student to examples; return how many are right at each exit and what gates say of them.

    A classifier is right where its class is; an embedding as far as its cosine with that of all layers goes.
    """
    depths = np.array(student.config.depths)
    features, quality = _observed(student, examples, rows)
    right = right_exits(quality, depths, beta)
    record: Json = {"beta": beta, "examples": len(quality), "exits": []}
    with torch.no_grad():
        for number, gate in enumerate(cast(Sequence[Gate], student.gates)):
            weights, bias = fit_gate(features[number], right[:, number])
            gate.weight.copy_(torch.from_numpy(weights))
            gate.bias.fill_(bias)
            agrees = (features[number] @ weights + bias > 0) == right[:, number]
            record["exits"].append(
                {
                    "layers": int(depths[number]),
                    "quality": float(quality[:, number].mean()),
                    "right": float(right[:, number].mean()),
                    "told": float(agrees.mean()),
                }
            )
    return {**record, "quality": float(quality[:, -1].mean())}


def _observed(student: Encoder, examples: Texts | Labels, rows: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Return what each gate looks at [n, features], and the quality at every exit and after all layers [n, exits + 1].

    Texts of similar length run together.
    """
    device = student.embed_tokens.weight.device
    order = np.argsort(examples.lengths, kind="stable")
    seen: list[list[np.ndarray]] = []
    quality = []
    student.eval()
    for start in range(0, len(order), rows):
        batch = examples.collate([int(i) for i in order[start : start + rows]])
        with torch.inference_mode():
            answers, features = student.at_depths(batch["ids"].to(device), batch["mask"].to(device))
            if "label" in batch:
                reached = [answer.argmax(-1) == batch["label"].to(device) for answer in answers]
            else:
                reached = [functional.cosine_similarity(answer, answers[-1]) for answer in answers]
        quality.append(np.stack([one.float().cpu().numpy() for one in reached], 1))
        seen.append([one.float().cpu().numpy() for one in features])
    return [np.concatenate(part) for part in zip(*seen, strict=True)], np.concatenate(quality).astype(np.float64)
