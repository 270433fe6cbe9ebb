"""Nested FFNs: one training, a family of students. Each width is the first channels of the next.

    L = Σ m L(student whose MLPs have their first m channels) / Σ m     all widths m at every step,
    L = L(student at one width, drawn for the step)                     or one

A width counts as much as it has channels: with equal shares the narrow ones, which share their channels with all
others, took from the whole width more than they gained. Held-out data are always judged at all widths. What is cut out
later (stage prune, importance nested) computes what the student computed here. Source: MatFormer, arXiv:2310.07707; the
paper draws a width per step and leaves the shares open ("λ"), a public reproduction (RAIVNLab/MatFormer-OLMo) sums all.
"""
# ruff: noqa: TID253  this is training's side: imported only where a model is trained

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from edgepipe.students.blocks import Mlp
from edgepipe.training.batches import Batch
from edgepipe.training.loop import Objective, Step


@contextlib.contextmanager
def at_width(module: nn.Module, width: int) -> Iterator[None]:
    """Let the MLPs of a module compute with their first channels alone."""
    parts = [part for part in module.modules() if isinstance(part, Mlp)]
    for part in parts:
        part.kept = width if width < part.up_proj.out_features else None
    try:
        yield
    finally:
        for part in parts:
            part.kept = None


def nested(objective: Objective, widths: Sequence[int], *, every: bool, seed: int) -> Objective:
    """Return an objective at all widths of a student, or at one that is drawn: the same in all runs of a step."""

    def at_all(module: nn.Module, batch: Batch, step: int) -> Step:
        drawn = int(np.random.default_rng([seed, step]).integers(len(widths)))
        losses: list[Tensor] = []
        figures: dict[str, Tensor] = {}
        weight: Tensor | int = 0
        for width in widths if every else (widths[drawn],):
            with at_width(module, width):
                found = objective(module, batch, step)
            losses.append(found.loss)
            weight = found.weight
            if every:
                figures[f"width {width}"] = found.loss.detach()
            else:
                figures = dict(found.figures)
        shares = torch.tensor(widths if every else (1,), dtype=losses[0].dtype)
        return Step((shares * torch.stack(losses)).sum() / shares.sum(), weight, figures)

    return at_all
