"""A loss of several means, over different things: what each counts in one run, so that runs add up to the whole batch.

The loop multiplies a run's loss by the run's weight w, sums, and divides by the whole batch's W: right for means over
what w counts. A mean over other things (sampled tokens, a source's states), n of the batch's N in this run, must count

    f = (n / N) / (w / W)

in it, for Σ w · f · mean / W = Σ n · mean / N. The numbers must be known before the first run, so what an objective
draws of its own (samples) is drawn then: that is `Prepare`.
"""
# ruff: noqa: TID253  counts are tensors: this file is imported only where a model is trained

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from edgepipe.training.batches import Batch

_FACTOR = "factor of {}"
WEIGHT = "weight"

Counts = Mapping[str, Tensor]  # WEIGHT, and the name of every other mean → how many things it is over, in one run

# prepare(module, batch, whole, step): `whole` is the batch that this one is a part of. It returns the part with what
# was drawn for it, and its counts; the same names in every run and process, none where all means are over the weight.
Prepare = Callable[[nn.Module, Batch, Batch, int], tuple[Batch, Counts]]


def with_factors(parts: Sequence[tuple[Batch, Counts]], total: Callable[[Tensor], Tensor]) -> list[Batch]:
    """Return a process's runs with what each mean counts in them; `total` sums over all processes."""
    names = sorted(parts[0][1])
    if not names:
        return [batch for batch, _ in parts]
    own = torch.stack([torch.stack([counts[name].float() for name in names]) for _, counts in parts])  # [runs, means]
    share = own / total(own.sum(0)).clamp_min(1)
    factors = share / share[:, names.index(WEIGHT), None].clamp_min(1e-9)
    return [
        {**batch, **{_FACTOR.format(name): row[i] for i, name in enumerate(names)}}
        for (batch, _), row in zip(parts, factors, strict=True)
    ]


def factor(batch: Batch, name: str) -> Tensor | float:
    """Return what a mean counts in this run; 1 where it stands alone."""
    return batch.get(_FACTOR.format(name), 1.0)
