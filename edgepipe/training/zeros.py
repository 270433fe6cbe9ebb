"""Masks survive training: what was pruned to zero stays there.

A gradient that is zero where the weight is moves neither AdamW's averages nor the weight, and decay of a zero is zero.
"""
# ruff: noqa: TID253  this watches a module's training: it is imported only where that is done

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgepipe.weights import WeightStore


def keep_zeros(module: nn.Module, weights: WeightStore, *, on_grids: bool) -> None:
    """Let every matrix be zero, before and while the module is trained, where the weight of its name is exactly zero.

    `on_grids` says whether that counts for weights on a grid too: without masks, their zeros are only rounding's.
    """
    for name, parameter in module.named_parameters():
        if parameter.ndim != 2 or name not in weights or (weights[name].grid is not None and not on_grids):
            continue
        alive = torch.from_numpy(weights.float32(name) != 0).to(parameter.device)
        if not bool(alive.all()):
            parameter.data *= alive
            hooked: Any = parameter  # torch gives this method no types
            hooked.register_hook(lambda gradient, alive=alive: gradient * alive.to(gradient))
