"""Ternary matrices: every weight is −1, 0 or 1 times one number of the whole matrix.

    scale = max(ε, m(|W|)), m the median or the mean; ε 1e-5
    level = clip(round(W / scale), −1, 1)

The scale is rounded to float16 before levels are chosen, so the shipped grid is the one they were rounded to. A matrix
is kept in 2 bits a weight, the scale once a row, which is how kernels take it: 2 + 16 / width bits per weight. The
median of an even number of values is the lower of the two in the middle, as in torch.
Source: "When are 1.58 bits enough?", arXiv:2411.05882, and its authors' BitLinear.
"""

from __future__ import annotations

import numpy as np

from edgepipe.artifacts import QuantizedTensor
from edgepipe.numerics.grids import pack, row_group

MEASURES = ("median", "mean")
EPSILON = 1e-5
LARGEST = 65504.0  # of float16
SOURCE_GRID = "ternary"
_BITS = 2
_MIDDLE = 1 << (_BITS - 1)  # the code of zero


def ternary_scale(weight: np.ndarray, measure: str) -> np.float16:
    """Return the one scale of a matrix, as it ships."""
    magnitudes = np.abs(np.asarray(weight, np.float32)).ravel()
    if measure == "mean":
        found = magnitudes.mean(dtype=np.float64)  # the order of the sum must not show
    else:
        place = (magnitudes.size - 1) // 2
        found = np.partition(magnitudes, place)[place]
    return np.float16(np.clip(np.float32(found), EPSILON, LARGEST))


def round_to_ternary(weight: np.ndarray, measure: str) -> QuantizedTensor:
    """Return weight [out, in] on its ternary grid. Raises ValueError when a weight isn't finite."""
    values = np.asarray(weight, np.float32)
    if not np.isfinite(values).all():
        raise ValueError("the weight has values that are not finite")
    rows, columns = values.shape
    scale = ternary_scale(values, measure)
    codes = np.full((rows, row_group(columns, _BITS)), _MIDDLE, np.uint8)
    codes[:, :columns] = np.clip(np.rint(values / np.float32(scale)), -1, 1).astype(np.int8) + _MIDDLE
    return QuantizedTensor(
        shape=(rows, columns),
        bits=_BITS,
        group=codes.shape[1],
        codes=pack(codes, _BITS),
        scale=np.full((rows, 1), scale, np.float16),
        source_grid=SOURCE_GRID,
    )
