"""Round activations token by token: every row of the last axis gets a scale of its own when the model runs.

    signed        extreme = the value of the largest magnitude, with its sign
                  scale = −extreme / 2^(b−1)           level = clip(round(x / scale), −2^(b−1), 2^(b−1) − 1)
    zero points   low, high = min(x, 0), max(x, 0)     zero = round(−low / scale)
                  scale = (high − low) / (2^b − 1)     level = clip(round(x / scale), −zero, 2^b − 1 − zero)
    largest       scale = max|x| / (2^(b−1) − 1)       level = clip(round(x / scale), −2^(b−1), 2^(b−1) − 1)

A value is level · scale, so a token has 2^b different ones at most. The first two are the grids of weights (grids.py)
with a token for a group and a scale in float32. They are the symmetric and asymmetric grids of arXiv:2301.12017, whose
code (DeepSpeed) cuts the largest value by up to a step; here the sign, or one step less, keeps it. The third is
BitLinear's (arXiv:2411.05882). Training rounds the same way in torch (quantizers/fake.py), to the bit.
"""

from __future__ import annotations

import numpy as np

from edgepipe.artifacts import TokenGrid

TINY = 1e-20  # a token whose values are all smaller is zero: its scale would be no normal number


def round_tokens(x: np.ndarray, grid: TokenGrid) -> tuple[np.ndarray, np.ndarray]:
    """Return levels [..., n] and scales [..., 1] of x [..., n], all float32: what x is rounded to is their product."""
    x = np.asarray(x, np.float32)
    half, top = np.float32(1 << (grid.bits - 1)), np.float32((1 << grid.bits) - 1)
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    if grid.form == "zero points":
        low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
        scale = _never_zero((high - low) / top)
        zero = np.rint(-low / scale)
        return np.clip(np.rint(x / scale), -zero, top - zero), scale
    extreme = np.where(high > -low, high, low)
    scale = _never_zero(extreme / -half if grid.form == "signed" else np.abs(extreme) / (half - np.float32(1)))
    return np.clip(np.rint(x / scale), -half, half - np.float32(1)), scale


def _never_zero(scale: np.ndarray) -> np.ndarray:
    """Return scales with 1 for those of tokens of zeros."""
    return np.where(np.abs(scale) < np.float32(TINY), np.float32(1), scale)
