"""GPTQ and AWQ on arrays: the naive twins' results, less lost than by rounding to nearest, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from edgepipe.artifacts import QuantizedTensor
from edgepipe.numerics.awq import choose_scales, cut, loss
from edgepipe.numerics.gptq import compensate, inverse_factor
from edgepipe.numerics.grids import Grid, dequantize, on_grid, round_to_nearest, unpack
from tests.reference import cut_naively, gptq_naively, lost_naively, round_naively

SHAPES = [(5, 64), (3, 40), (1, 17), (4, 33), (2, 1)]  # whole groups; the last group short; one column
GRIDS = [
    Grid(bits=bits, group=group, symmetric=symmetric)
    for bits, group, symmetric in ((2, 32, True), (2, 16, False), (4, 32, True), (4, 32, False), (8, 16, True))
]


def case(shape: tuple[int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return a weight [out, in] and inputs [n, in] that go together in a few directions, as real ones do."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((shape[1], shape[1])) * np.exp(-np.arange(shape[1]) / 6)
    inputs = rng.standard_normal((200, shape[1])) @ mixed.T
    return rng.standard_normal(shape).astype(np.float32), inputs.astype(np.float32)


def gram_of(inputs: np.ndarray) -> np.ndarray:
    gram: np.ndarray = inputs.T @ inputs / len(inputs)
    return gram


def error_of(tensor: QuantizedTensor, weight: np.ndarray) -> np.ndarray:
    error: np.ndarray = dequantize(tensor) - weight
    return error


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gptq_is_the_twins(shape: tuple[int, int], grid: Grid) -> None:
    """A value near the border between two codes may fall to the other side and move those behind it: few do."""
    weight, inputs = case(shape)
    gram = gram_of(inputs)
    tensor = compensate(weight, gram, grid)
    expected = gptq_naively(weight, gram, grid.bits, grid.group, grid.symmetric)
    far = np.abs(dequantize(tensor) - expected) > 1e-3 * np.abs(weight).max()
    assert far.mean() <= 0.02
    assert (tensor.shape, tensor.bits, tensor.group, tensor.source_grid) == (shape, grid.bits, grid.group, "gptq")
    assert tensor.scale.dtype == np.float16
    assert (tensor.zero_points is None) == grid.symmetric


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_gptq_and_awq_lose_is_less_than_rounding_loses(grid: Grid) -> None:
    for seed in range(3):
        weight, inputs = case((24, 96), seed)
        gram = gram_of(inputs)
        plain = round_to_nearest(weight, bits=grid.bits, group=grid.group, symmetric=grid.symmetric)
        before = lost_naively(error_of(plain, weight), inputs)
        assert lost_naively(error_of(compensate(weight, gram, grid), weight), inputs) < 0.8 * before
        assert lost_naively(error_of(cut(weight, gram, grid), weight), inputs) <= 1.02 * before
        if grid.bits == 2 and grid.symmetric:
            assert lost_naively(error_of(cut(weight, gram, grid), weight), inputs) < 0.9 * before


def test_the_factor_is_that_of_the_inverse() -> None:
    _, inputs = case((1, 20))
    gram = gram_of(inputs)
    factor = inverse_factor(gram, damping=0.1).astype(np.float64)
    damped = gram + 0.1 * np.diag(gram).mean() * np.eye(20)
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(20), atol=1e-4)
    assert (np.tril(factor, -1) == 0).all()


def test_an_input_that_is_always_zero_harms_nothing() -> None:
    weight, inputs = case((4, 64))
    inputs[:, [3, 40]] = 0
    tensor = compensate(weight, gram_of(inputs), GRIDS[2])
    assert np.isfinite(dequantize(tensor)).all()
    assert np.abs(error_of(tensor, weight)[:, [3, 40]]).max() < 0.6 * np.abs(tensor.scale.astype(np.float32)).max()
    zero = compensate(np.zeros((2, 40), np.float32), gram_of(inputs[:, :40]), GRIDS[2])
    assert (dequantize(zero) == 0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_awqs_ranges_are_the_twins(shape: tuple[int, int], grid: Grid) -> None:
    """Two ranges that lose the same but for rounding may be told apart either way."""
    weight, inputs = case(shape, 1)
    gram = gram_of(inputs)
    tensor = cut(weight, gram, grid)
    expected = cut_naively(weight, gram, grid.bits, grid.group, grid.symmetric)
    lost, least = loss(error_of(tensor, weight), gram), loss((expected - weight).astype(np.float32), gram)
    assert lost == pytest.approx(least, rel=2e-2, abs=1e-9)
    assert (np.abs(dequantize(tensor) - expected) > 1e-3 * np.abs(weight).max()).mean() <= 0.05
    assert tensor.source_grid == "awq"


def test_the_loss_is_that_of_the_outputs() -> None:
    weight, inputs = case((3, 20))
    assert loss(weight, gram_of(inputs)) == pytest.approx(lost_naively(weight, inputs), rel=1e-4)


def test_scales_spare_what_large_inputs_meet() -> None:
    """One input is fifty times as large: its column is scaled up, and the outputs lose less for it."""
    weight, inputs = case((16, 64), 2)
    inputs[:, 7] *= 50
    gram, magnitude, grid = gram_of(inputs), np.abs(inputs).mean(0), GRIDS[2]
    scales = choose_scales([weight], gram, magnitude, [grid])
    assert scales[7] == scales.max() > 1

    def lost(t: np.ndarray) -> float:
        plain = round_to_nearest(weight * t, bits=4, group=32, symmetric=True)
        return lost_naively(dequantize(plain) / t - weight, inputs)

    assert lost(scales) < 0.7 * lost(np.ones(64, np.float32))


def test_scales_stay_one_where_nothing_is_gained() -> None:
    weight = np.zeros((4, 32), np.float32)
    np.testing.assert_array_equal(choose_scales([weight], np.eye(32, dtype=np.float32), np.ones(32), [GRIDS[2]]), 1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    weight, inputs = case((2, 40))
    gram = gram_of(inputs)
    weight[1, 39] = value
    for method in (compensate, cut):
        with pytest.raises(ValueError, match="not finite"):
            method(weight, gram, GRIDS[2])
        with pytest.raises(ValueError, match="not finite"):
            method(np.ones_like(weight), gram * np.float32(value), GRIDS[2])
    with pytest.raises(ValueError, match="not finite"):
        on_grid(weight, np.ones((2, 2), np.float32), None, GRIDS[2], "test")


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_are_chosen_for_the_scales_that_ship(grid: Grid) -> None:
    """Scales and zero points of any precision: they are rounded first, then each weight takes the nearest code."""
    weight, _ = case((3, 70))
    expected = round_naively(weight, grid.bits, grid.group, grid.symmetric)
    wide = expected.scale.astype(np.float32) * np.float32(1 + 2**-13)  # rounds to the same float16
    tensor = on_grid(weight, wide, expected.zero_points + 0.3, grid, "test")
    np.testing.assert_array_equal(tensor.scale, expected.scale)
    np.testing.assert_array_equal(unpack(tensor.codes, grid.bits), expected.codes)
    if not grid.symmetric:
        np.testing.assert_array_equal(tensor.zero_points, expected.zero_points)
