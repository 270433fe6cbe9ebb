"""Masks: which weights of a matrix become zero, and what the others can do about it.

    magnitude    |w|
    wanda        |w| · √mean(x²) of the input it meets, compared within a row     arXiv:2306.11695, eq. 1
    sparsegpt    w² / [H⁻¹]_jj as columns are passed; those that are left make up for each zero     arXiv:2301.00774

A pattern is a share of each row (magnitude: of the matrix), or N of every M neighbours of a row that are kept.
SparseGPT is GPTQ (gptq.py) with the mask in the place of the grid: it chooses for 128 columns at a time, or for M; a
block of columns then ends with a whole pattern.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgepipe.artifacts import StageRecord
from edgepipe.errors import ConfigError
from edgepipe.numerics.gptq import inverse_factor

_MOST_NEIGHBOURS = 64
_BLOCK = 128  # columns that SparseGPT chooses for at a time, as its authors have it


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """Say how much of a matrix becomes zero: a share, or all but `kept` of every `of` neighbours."""

    share: float  # of the weights that become zero
    kept: int = 0
    of: int = 0  # 0: no pattern, any weight may go

    @property
    def name(self) -> str:
        """Return "2:4", or the share in percent."""
        return f"{self.kept}:{self.of}" if self.of else f"{self.share:.0%}"


def parse_pattern(sparsity: float, pattern: str) -> Pattern | None:
    """Read a share or "N:M"; None when neither is asked for. Raises ConfigError."""
    if pattern:
        found = re.fullmatch(r"(\d+):(\d+)", pattern)
        kept, of = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 0 < kept < of <= _MOST_NEIGHBOURS:
            raise ConfigError(
                f"prune.pattern: expected N:M, N of M neighbours kept, as in 2:4 or 4:8, got {pattern!r}: N from 1 to "
                f"M − 1, M up to {_MOST_NEIGHBOURS}"
            )
        if sparsity:
            raise ConfigError("prune.sparsity and prune.pattern: give one of them")
        return Pattern(share=1 - kept / of, kept=kept, of=of)
    if not 0 <= sparsity < 1:
        raise ConfigError(f"prune.sparsity: expected a share from 0 to below 1, got {sparsity:g}")
    return Pattern(share=sparsity) if sparsity else None


def pattern_of(history: Sequence[StageRecord]) -> Pattern | None:
    """Return the masks that a model of this history has; None of one without."""
    asked = [record.options for record in history if record.stage == "prune"]
    return parse_pattern(asked[-1]["sparsity"], asked[-1]["pattern"]) if asked else None


def keep_mask(scores: np.ndarray, pattern: Pattern, *, by_row: bool = True) -> np.ndarray:
    """Return which weights stay [out, in] bool, those with the largest scores; the first among equals.

    A pattern of neighbours needs a width that is a multiple of them.
    """
    rows, columns = scores.shape
    if pattern.of:
        return _largest(scores.reshape(-1, pattern.of), pattern.kept).reshape(rows, columns)
    lines = scores if by_row else scores.reshape(1, -1)
    kept = lines.shape[1] - round(pattern.share * lines.shape[1])
    return _largest(lines, kept).reshape(rows, columns)


def _largest(lines: np.ndarray, kept: int) -> np.ndarray:
    order = np.argsort(-lines, axis=1, kind="stable")[:, :kept]
    mask = np.zeros(lines.shape, bool)
    np.put_along_axis(mask, order, True, axis=1)
    return mask


def wanda_scores(weight: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Return |w| · √mean(x²) [out, in]; `squares` [in] is the mean of x²."""
    scores: np.ndarray = np.abs(weight) * np.sqrt(squares)
    return scores


def without(weight: np.ndarray, gram: np.ndarray, pattern: Pattern) -> np.ndarray:
    """Return a weight [out, in] float32 by SparseGPT, for inputs whose mean x xᵀ is `gram` [in, in].

    Raises ValueError for values that are not finite, LinAlgError where the damped gram matrix has no inverse.
    """
    values = weight.astype(np.float32)  # a copy, which the corrections go into
    if not (np.isfinite(values).all() and np.isfinite(gram).all()):
        raise ValueError("the weight or its inputs have values that are not finite")
    factor = inverse_factor(gram)
    diagonal = np.diag(factor)
    columns = values.shape[1]
    block = _BLOCK // pattern.of * pattern.of if pattern.of else _BLOCK
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        mask = np.ones((len(values), stop - start), bool)
        if not pattern.of:
            mask = keep_mask(np.square(values[:, start:stop] / diagonal[start:stop]), pattern, by_row=False)
        errors = np.zeros((len(values), stop - start), np.float32)
        for i in range(start, stop):
            if pattern.of and i % pattern.of == 0:
                those = slice(i, i + pattern.of)
                mask[:, i - start : i - start + pattern.of] = keep_mask(
                    np.square(values[:, those] / diagonal[those]), pattern
                )
            error = np.where(mask[:, i - start], 0, values[:, i]) / factor[i, i]
            values[:, i] = np.where(mask[:, i - start], values[:, i], 0)
            values[:, i + 1 : stop] -= error[:, None] * factor[i, i + 1 : stop]
            errors[:, i - start] = error
        values[:, stop:] -= errors @ factor[start:stop, stop:]
        values[:, start:stop] *= mask
    return values
