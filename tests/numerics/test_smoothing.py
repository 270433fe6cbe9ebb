"""SmoothQuant's scales: those of the naive twin, exact in float, and worth their trouble where a channel sticks out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edgepipe.numerics.grids import dequantize, round_to_nearest
from edgepipe.numerics.smoothing import column_scales, smoothed
from tests.reference import column_scales_naively, integer_product_naively


def layer(outlier: float = 60.0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return inputs [40, 13] whose channel 4 sticks out, channel 7 is always zero, and two matrices that read them."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((40, 13)).astype(np.float32)
    x[:, 4] *= outlier
    x[:, 7] = 0
    weights = [rng.standard_normal((rows, 13)).astype(np.float32) / 8 for rows in (5, 9)]
    for weight in weights:
        weight[:, 2] = 0
    return x, weights


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.85, 1.0])
def test_scales_are_the_twins(alpha: float) -> None:
    x, weights = layer()
    reached = np.abs(x).max(axis=0)
    got = column_scales(reached, weights, alpha)
    np.testing.assert_allclose(got, column_scales_naively(reached, weights, alpha), rtol=1e-3)
    assert got.dtype == np.float16
    assert (got[[2, 7]] == 1).all()


@pytest.mark.parametrize("reached", [0.0, 1e-30, 1e30])
def test_scales_stay_finite(reached: float) -> None:
    got = column_scales(np.array([reached, 1.0]), [np.array([[1e-20, 1.0]])], 0.5)
    assert np.isfinite(got).all()
    assert (got > 0).all()


def test_smoothing_is_exact_in_float() -> None:
    """The rounding of the scales is no error: the matrix is divided by the rounded ones."""
    x, weights = layer()
    scales = column_scales(np.abs(x).max(axis=0), weights, 0.5)
    for weight in weights:
        got = (x * scales.astype(np.float32)) @ smoothed(weight, scales).T
        np.testing.assert_allclose(got, x @ weight.T, rtol=1e-5, atol=1e-5)


def test_a_channel_that_sticks_out_costs_less() -> None:
    x, weights = layer()
    weight, scales = weights[0], column_scales(np.abs(x).max(axis=0), weights, 0.5)
    plain = round_to_nearest(weight, bits=8, group=0, symmetric=True)
    smooth = round_to_nearest(smoothed(weight, scales), bits=8, group=0, symmetric=True)
    smooth = dataclasses.replace(smooth, column_scale=scales)
    expected = x @ weight.T
    errors = [float(np.square(integer_product_naively(x, w) - expected).mean()) for w in (plain, smooth)]
    assert errors[1] < errors[0] / 3
    np.testing.assert_allclose(dequantize(smooth), weight, atol=0.02)
