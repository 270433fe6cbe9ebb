"""Masks on arrays: the naive twins' results, exact zeros on every grid, and what SparseGPT wins back."""

from __future__ import annotations

import numpy as np
import pytest

from edgepipe.numerics.gptq import compensate
from edgepipe.numerics.grids import Grid, dequantize, pin_zeros, round_to_nearest
from edgepipe.numerics.sparsity import Pattern, keep_mask, wanda_scores, without
from tests.numerics.test_methods import GRIDS, case, gram_of
from tests.reference import lost_naively, masked_naively, sparsegpt_naively

HALF, TWO, FOUR = Pattern(share=0.5), Pattern(share=0.5, kept=2, of=4), Pattern(share=0.5, kept=4, of=8)


@pytest.mark.parametrize("pattern", [HALF, TWO, FOUR, Pattern(share=0.3), Pattern(share=0.75, kept=1, of=4)])
def test_masks_are_the_twins(pattern: Pattern) -> None:
    weight, inputs = case((7, 40))
    squares = np.square(inputs).mean(0)
    scores = wanda_scores(weight, squares)
    assert scores[3, 5] == pytest.approx(abs(weight[3, 5]) * np.sqrt(np.mean(inputs[:, 5] ** 2)), rel=1e-5)
    expected = masked_naively(scores, pattern.share, pattern.kept, pattern.of)
    assert np.array_equal(keep_mask(scores, pattern), expected)


def test_equal_scores_leave_the_first() -> None:
    assert keep_mask(np.ones((1, 8)), TWO).tolist() == [[True, True, False, False] * 2]


def test_a_share_of_a_whole_matrix_is_that_of_all_its_weights() -> None:
    scores = np.arange(40.0).reshape(4, 10)
    mask = keep_mask(scores, Pattern(share=0.5), by_row=False)
    assert mask.sum() == 20
    assert mask[2:].all()


@pytest.mark.parametrize("pattern", [TWO, FOUR], ids=lambda p: p.name)
def test_sparsegpt_is_the_twins(pattern: Pattern) -> None:
    weight, inputs = case((5, 64))
    expected = sparsegpt_naively(weight, gram_of(inputs), pattern.kept, pattern.of)
    got = without(weight, gram_of(inputs), pattern)
    assert np.array_equal(got == 0, expected == 0)
    assert np.abs(got - expected).max() < 1e-2 * np.abs(weight).max()


@pytest.mark.parametrize(("kept", "of", "columns"), [(1, 3, 159), (2, 5, 160), (24, 48, 192)])
def test_sparsegpt_takes_patterns_that_do_not_divide_its_block(kept: int, of: int, columns: int) -> None:
    weight, inputs = case((5, columns))
    got = without(weight, gram_of(inputs), Pattern(share=1 - kept / of, kept=kept, of=of))
    assert ((got != 0).reshape(-1, of).sum(1) == kept).all()
    expected = sparsegpt_naively(weight, gram_of(inputs), kept, of)
    assert np.abs(got - expected).max() < 1e-2 * np.abs(weight).max()


@pytest.mark.parametrize("pattern", [HALF, TWO, FOUR], ids=lambda p: p.name)
def test_sparsegpt_loses_less_than_choosing_alone(pattern: Pattern) -> None:
    for seed in range(3):
        weight, inputs = case((24, 160), seed)
        wanda = weight * keep_mask(wanda_scores(weight, np.square(inputs).mean(0)), pattern)
        magnitude = weight * keep_mask(np.abs(weight), pattern)
        surgeon = without(weight, gram_of(inputs), pattern)
        assert abs((surgeon == 0).mean() - 0.5) < 0.01
        lost = [lost_naively(one - weight, inputs) for one in (surgeon, wanda, magnitude)]
        assert lost[0] < min(lost[1:])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_zeros_are_exact_on_every_grid(grid: Grid) -> None:
    """Rounding to nearest keeps them by itself, GPTQ because it knows; a learned code is put right."""
    weight, inputs = case((6, 64))
    weight = weight * keep_mask(np.abs(weight), TWO)
    plain = round_to_nearest(weight, bits=grid.bits, group=grid.group, symmetric=grid.symmetric)
    assert (dequantize(plain)[weight == 0] == 0).all()
    tuned = dequantize(compensate(weight, gram_of(inputs), grid))
    assert (tuned[weight == 0] == 0).all()
    assert (tuned != 0).any()
    other = round_to_nearest(weight + 0.3, bits=grid.bits, group=grid.group, symmetric=grid.symmetric)
    pinned = pin_zeros(other, weight == 0)
    assert (dequantize(pinned)[weight == 0] == 0).all()
    assert np.array_equal(dequantize(pinned)[weight != 0], dequantize(other)[weight != 0])
