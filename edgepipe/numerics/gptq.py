"""GPTQ: round a matrix column by column, and let the columns that are left make up for each error.

    minimize  Σ_rows Δw · H · Δwᵀ        H = mean of x xᵀ over the inputs of the layer, [in, in]

With U the upper Cholesky factor of H⁻¹, rounding column i with the error e = (w_i − q_i) / U_ii moves every later
column j by −e · U_ij. A group's grid is chosen when its first column is reached, from weights that already carry the
corrections, and on the grid that ships: scales in float16, the whole range of codes. A weight that is exactly zero was
pruned: it stays zero, and the columns behind it make up for that too.
Source: Frantar et al., arXiv:2210.17323, algorithm 1. `docs/quantize.md` says why this isn't the library's.
"""

from __future__ import annotations

import numpy as np

from edgepipe.artifacts import QuantizedTensor
from edgepipe.numerics.grids import Grid, group_grid, nearest, on_grid

DAMPING = 0.01  # of H's mean diagonal, added to it: as the authors have it


def inverse_factor(gram: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """Return U [in, in] float32, upper, with Uᵀ·U the inverse of the damped gram matrix.

    An input that is always zero takes no part. Raises LinAlgError where even the damped matrix has no inverse.
    """
    damped = gram.astype(np.float64)
    diagonal = np.einsum("ii->i", damped)  # a view
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    return np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)


def compensate(weight: np.ndarray, gram: np.ndarray, grid: Grid) -> QuantizedTensor:
    """Quantize weight [out, in] for inputs whose mean x xᵀ is `gram` [in, in]."""
    values = weight.astype(np.float32)  # a copy, which the corrections go into
    if not (np.isfinite(values).all() and np.isfinite(gram).all()):
        raise ValueError("the weight or its inputs have values that are not finite")
    alive = values != 0
    factor = inverse_factor(gram)
    rows, columns = values.shape
    scales, zeros = [], []
    points = np.empty_like(values)
    for start in range(0, columns, grid.group):
        stop = min(start + grid.group, columns)
        scale, zero = group_grid(values[:, start:stop] * alive[:, start:stop], grid)
        errors = np.empty((rows, stop - start), np.float32)
        for i in range(start, stop):
            column = values[:, i : i + 1]
            points[:, i : i + 1] = nearest(column, scale, zero, grid.bits) * alive[:, i : i + 1]
            errors[:, i - start] = ((column - points[:, i : i + 1]) / factor[i, i])[:, 0]
            values[:, i + 1 : stop] -= errors[:, i - start, None] * factor[i, i + 1 : stop]
        values[:, stop:] -= errors @ factor[start:stop, stop:]
        scales.append(scale)
        zeros.append(zero)
    return on_grid(points, np.concatenate(scales, 1), np.concatenate(zeros, 1), grid, "gptq")
