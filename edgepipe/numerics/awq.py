"""AWQ: spare the weights that large inputs meet, by scales between layers and by ranges that cut outliers.

    scales   W·diag(t), and 1/t goes into what computes x:  t = mean|x|^a / mean(|w| ÷ group's largest)^(1−a), of 20 a
             the one whose rounded matrices lose least on the inputs
    ranges   a group's largest element is cut to r of itself, r from 1 down to ½: what loses least on its inputs

The loss is the exact one on the calibration, from the gram matrix H of the inputs: Σ_rows Δw · H · Δwᵀ.
Source: Lin et al., arXiv:2306.00978, sections 3.2 and 4.1; ranges as in the authors' code. `docs/quantize.md` says why
this isn't the library's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgepipe.artifacts import QuantizedTensor
from edgepipe.numerics.grids import Grid, group_grid, in_groups, nearest, on_grid

_EXPONENTS = np.arange(20) / 20
_RANGES = np.linspace(1, 0.5, 11)
_ELEMENTS_AT_ONCE = 1 << 22  # bounds the memory of a search


def choose_scales(
    weights: Sequence[np.ndarray], gram: np.ndarray, magnitude: np.ndarray, grids: Sequence[Grid]
) -> np.ndarray:
    """Return t [in] float32 for matrices [out, in] that share their inputs; ones where nothing is gained.

    magnitude [in] is the mean of |x|.
    """
    share = np.concatenate([_share(w, grid.group) for w, grid in zip(weights, grids, strict=True)]).mean(0)
    best, lowest = np.ones(len(magnitude), np.float32), np.inf
    for exponent in (None, *_EXPONENTS):
        if exponent is None:
            scales = best
        else:
            raw = np.maximum(magnitude**exponent / np.maximum(share, 1e-8) ** (1 - exponent), 1e-4)
            scales = (raw / np.sqrt(raw.max() * raw.min())).astype(np.float32)
        lost = sum(loss(_rounded(w * scales, grid) / scales - w, gram) for w, grid in zip(weights, grids, strict=True))
        if lost < lowest:
            best, lowest = scales, lost
    return best


def loss(error: np.ndarray, gram: np.ndarray) -> float:
    """Return Σ_rows Δw · H · Δwᵀ."""
    return float(np.einsum("oi,oi->", error @ gram, error))


def cut(weight: np.ndarray, gram: np.ndarray, grid: Grid) -> QuantizedTensor:
    """Quantize weight [out, in] with each group's range as it loses least on inputs whose mean x xᵀ is `gram`."""
    blocks = in_groups(weight, grid.group)
    if not (np.isfinite(blocks).all() and np.isfinite(gram).all()):
        raise ValueError("the weight or its inputs have values that are not finite")
    rows, groups, width = blocks.shape
    padded = np.zeros((groups * width, groups * width), np.float32)
    padded[: len(gram), : len(gram)] = gram
    local = np.ascontiguousarray(np.einsum("gigj->gij", padded.reshape(groups, width, groups, width)))
    scales, zeros = np.empty((rows, groups), np.float32), np.empty((rows, groups), np.float32)
    step = max(1, _ELEMENTS_AT_ONCE // (groups * width))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        scales[part], zeros[part] = _best_ranges(blocks[part], local, grid)
    return on_grid(weight, scales, zeros, grid, "awq")


def _best_ranges(blocks: np.ndarray, local: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and zero [rows, groups] of blocks [rows, groups, group]; local [groups, group, group]."""
    lowest = np.full(blocks.shape[:2], np.inf, np.float32)
    scales, zeros = np.empty_like(lowest), np.empty_like(lowest)
    low, high = np.minimum(blocks.min(-1, keepdims=True), 0), np.maximum(blocks.max(-1, keepdims=True), 0)
    for ratio in _RANGES.astype(np.float32):
        scale, zero = group_grid(np.clip(blocks, low * ratio, high * ratio), grid)
        error = nearest(blocks, scale, zero, grid.bits) - blocks
        moved = np.matmul(error.transpose(1, 0, 2), local).transpose(1, 0, 2)
        lost = np.einsum("rgi,rgi->rg", moved, error)
        better = lost < lowest
        lowest = np.where(better, lost, lowest)
        scales, zeros = np.where(better, scale[..., 0], scales), np.where(better, zero[..., 0], zeros)
    return scales, zeros


def _share(weight: np.ndarray, group: int) -> np.ndarray:
    """Return |w| as a share of its group's largest [out, in]."""
    blocks = np.abs(in_groups(weight, group))
    share = blocks / np.maximum(blocks.max(-1, keepdims=True), 1e-12)
    shares: np.ndarray = share.reshape(len(weight), -1)[:, : weight.shape[1]]
    return shares


def _rounded(weight: np.ndarray, grid: Grid) -> np.ndarray:
    """Return the values that round-to-nearest gives."""
    blocks = in_groups(weight, grid.group)
    scale, zero = group_grid(blocks, grid)
    values: np.ndarray = nearest(blocks, scale, zero, grid.bits).reshape(len(weight), -1)[:, : weight.shape[1]]
    return values
