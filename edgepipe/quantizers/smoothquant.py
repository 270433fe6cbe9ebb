"""SmoothQuant's statistics: how far each input channel of every matrix reaches over a calibration set.

The formula is in numerics/smoothing.py. Matrices that read one value (queries, keys, values) share their scales, so
that it is scaled and rounded once; which do is seen when the module runs, so no family's names are needed here.
neural-compressor's own SmoothQuant is not used: it wants intel_extension_for_pytorch.
"""
# ruff: noqa: TID253  statistics come from a torch module: this file is imported only where one runs

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from edgepipe.errors import StageError
from edgepipe.numerics.smoothing import column_scales
from edgepipe.quantizers.modules import run_batch
from edgepipe.quantizers.texts import Batch
from edgepipe.weights import WeightStore


def smoothing_scales(
    module: Any, weights: WeightStore, names: Sequence[str], batches: Sequence[Batch], alpha: float
) -> dict[str, np.ndarray]:
    """Return the column scales [in] of every named matrix that `module` multiplies by, as a Linear, in a batch.

    `module` computes the model of `weights` (quantizers/modules.py).
    """
    watch = _Watch(set(names))
    handles = [
        child.register_forward_pre_hook(watch.hook(f"{name}.weight"))
        for name, child in module.named_modules()
        if isinstance(child, torch.nn.Linear) and f"{name}.weight" in watch.names
    ]
    try:
        for batch in batches:
            watch.masks = [m.astype(bool) for m in (batch.attention_mask, batch.decoder_mask) if m is not None]
            watch.groups.clear()
            run_batch(module, batch)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, np.ndarray] = {}
    for group in watch.together():
        reached = np.max([watch.reached[name] for name in group], axis=0)
        if not np.isfinite(reached).all():
            raise StageError(f"over the calibration set, what {group[0]} reads isn't finite: it can't be smoothed")
        scales = column_scales(reached, [weights.float32(name) for name in group], alpha)
        found |= dict.fromkeys(group, scales)
    return found


class _Watch:
    """Gather the largest magnitude of each channel, and which matrices read the same tensor."""

    def __init__(self, names: set[str]) -> None:
        self.names = names
        self.reached: dict[str, np.ndarray] = {}  # [in] float32
        self.masks: list[np.ndarray] = []  # [rows, tokens] bool, of the batch that runs
        self.groups: list[tuple[Any, list[str]]] = []  # a tensor of this batch, while it lives, and who read it
        self._partners: dict[str, set[str]] = {}

    def hook(self, name: str) -> Callable[[Any, Any], None]:
        """Return what looks at the input of one matrix."""

        def look(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0]
            values = np.abs(self._kept(x.detach().float().numpy()).reshape(-1, x.shape[-1])).max(axis=0, initial=0)
            self.reached[name] = np.maximum(self.reached.get(name, values), values)
            readers = next((readers for tensor, readers in self.groups if tensor() is x), None)
            if readers is None:
                readers = []
                self.groups.append((weakref.ref(x), readers))
            readers.append(name)
            for reader in readers:
                self._partners.setdefault(reader, set()).update(readers)

        return look

    def _kept(self, x: np.ndarray) -> np.ndarray:
        """Return x without padding, where it is a state per token."""
        for mask in self.masks:
            if x.ndim == 3 and x.shape[:2] == mask.shape:
                kept: np.ndarray = x[mask]
                return kept
        return x

    def together(self) -> list[list[str]]:
        """Return the matrices by what they read, each once."""
        left = dict.fromkeys(self.reached)
        found = []
        while left:
            group, grown = {next(iter(left))}, set[str]()
            while group != grown:
                grown, group = group, {partner for name in group for partner in self._partners[name]}
            found.append(sorted(group))
            for name in group:
                left.pop(name, None)
        return found
