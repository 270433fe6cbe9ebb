"""SmoothQuant: move the difficulty of outliers from activations to weights, channel by channel.

    y = x · Wᵀ = (x / s) · (W · s)ᵀ        s_j = max|x_j|^α / max|w_j|^(1−α)

Exact in float for any s. With α = 0.5 the largest values of a channel are alike on both sides; larger ones leave the
activations more even. Kernels multiply x by 1/s, so that is what is kept (`column_scale`), in float16: its rounding is
no error, since s is taken from the rounded value.
Source: Xiao et al., arXiv:2211.10438, equation 4. The authors fold 1/s into the norm before the matrix. Here it belongs
to the matrix: a post-norm encoder's norm feeds the residual too, where nothing may be folded in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_LEAST = np.float32(1e-5)  # of a channel's largest value: one that is always zero would divide by it
_BOUND = np.float32(2.0**12)  # of 1/s and s, well inside float16


def column_scales(activations: np.ndarray, weights: Sequence[np.ndarray], alpha: float) -> np.ndarray:
    """Return 1/s [in] float16 for the matrices [out, in] that read one value, whose channels reach `activations` [in].

    A channel that is zero on either side keeps a scale of 1.
    """
    reached = np.asarray(activations, np.float32)
    columns = np.max([np.abs(np.asarray(w, np.float32)).max(axis=0) for w in weights], axis=0)
    factors = np.maximum(reached, _LEAST) ** np.float32(alpha) / np.maximum(columns, _LEAST) ** np.float32(1 - alpha)
    scales = np.clip(1 / factors, 1 / _BOUND, _BOUND)
    return np.where((reached > 0) & (columns > 0), scales, np.float32(1)).astype(np.float16)


def smoothed(weight: np.ndarray, column_scale: np.ndarray) -> np.ndarray:
    """Return W · s [out, in] float32: what is put on a grid."""
    divided: np.ndarray = np.asarray(weight, np.float32) / column_scale.astype(np.float32)
    return divided
