"""HQQ through neural-compressor: zero points that make the error sparse, by half-quadratic splitting, without data.

    minimize  ‖w − s·(q − z)‖ to the power 0.7, over z; q rounds w / s + z       s from the group's smallest and largest

Source: Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023; the iteration is
neural-compressor's, `neural_compressor.torch.algorithms.weight_only.hqq`. It groups along the first axis of what it is
given, so it is given our groups as columns. Its zero points are floats: they are rounded to the whole codes that ship,
and codes chosen anew.
"""
# ruff: noqa: TID253  the library works on tensors: this file is imported only where the method is asked for

from __future__ import annotations

import numpy as np
import torch

from edgepipe.artifacts import QuantizedTensor
from edgepipe.numerics.grids import Grid, in_groups, on_grid


def fit(weight: np.ndarray, grid: Grid) -> QuantizedTensor:
    """Quantize weight [out, in] with the zero points that HQQ finds."""
    from neural_compressor.torch.algorithms.weight_only.hqq.config import QTensorConfig
    from neural_compressor.torch.algorithms.weight_only.hqq.core import HQQTensorHandle

    blocks = in_groups(weight, grid.group)
    if not np.isfinite(blocks).all():
        raise ValueError("the weight has values that are not finite")
    empty = (blocks == 0).all(-1)  # it would divide by their range
    blocks[empty, 0] = 1
    columns = torch.from_numpy(blocks.reshape(-1, grid.group)).T.contiguous()
    options = QTensorConfig(nbits=grid.bits, group_size=grid.group, optimize=True, round_zero=False, pack=False)
    found = HQQTensorHandle.quantize(columns, options)
    shape = blocks.shape[:2]
    scale, zero = found.scale.numpy().reshape(shape), found.zero.numpy().reshape(shape)
    return on_grid(weight, np.where(empty, 0, scale), np.where(empty, 0, zero), grid, "hqq")
