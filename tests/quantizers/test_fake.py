"""Fake quantization: the naive twins' grids to the bit, in numpy and torch; gradients pass straight through."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgepipe.artifacts import TokenGrid
from edgepipe.numerics.grids import dequantize, quantized_nbytes, round_to_nearest, unpack
from edgepipe.numerics.ternary import round_to_ternary
from edgepipe.numerics.tokens import round_tokens
from edgepipe.quantizers.fake import Faked, fake_layers, on_rows, on_ternary, on_tokens, straight_through
from tests.reference import decode_naively, round_token_naively, ternary_naively

FORMS = ("signed", "zero points", "largest")
SHAPES = [(1, 1), (5, 7), (3, 64), (8, 33), (16, 100)]


def ragged(shape: tuple[int, int], seed: int = 0, huge: float = 1e6) -> np.ndarray:
    """Return rows of every kind: zeros, one sign alone, tiny and huge ones, two extremes of the same magnitude."""
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    rows = [x[0] * 0, np.abs(x[1 % len(x)]), -np.abs(x[2 % len(x)]), x[3 % len(x)] * 1e-25, x[4 % len(x)] * huge]
    for i, row in enumerate(rows[: len(x) - 1]):
        x[i + 1] = row
    x[-1, 0], x[-1, -1] = 40, -40
    return x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [4, 8])
def test_tokens_are_the_twins_to_the_bit(bits: int, form: str, shape: tuple[int, int]) -> None:
    x, grid = ragged(shape), TokenGrid(bits=bits, form=form)  # type: ignore[arg-type]
    levels, scale = round_tokens(x, grid)
    for row, found, one in zip(x, levels, scale, strict=True):
        expected, expected_scale = round_token_naively(row.tolist(), bits, form)
        assert found.tolist() == expected
        assert one == expected_scale
    np.testing.assert_array_equal(on_tokens(torch.from_numpy(x), grid).numpy(), levels * scale)
    assert max(len(set(row.tolist())) for row in levels) <= 2**bits
    kept = np.abs(x).max(axis=-1) >= 1e-15
    lost = np.abs(levels * scale - x).max(axis=-1)[kept]
    steps = 1.0001 if form == "signed" else 0.5001  # of the sign that isn't the extreme's, the last level is missing
    assert (lost <= steps * np.abs(scale[kept, 0])).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_are_the_grid_that_ships_to_the_bit(bits: int, shape: tuple[int, int]) -> None:
    w = ragged(shape, seed=bits, huge=2e4)  # as far as two bits reach
    shipped = dequantize(round_to_nearest(w, bits=bits, group=0, symmetric=True))
    np.testing.assert_array_equal(on_rows(torch.from_numpy(w), bits).numpy(), shipped)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("measure", ["median", "mean"])
def test_ternary_is_the_twin_to_the_bit(measure: str, shape: tuple[int, int]) -> None:
    w = ragged(shape, seed=3)
    value = round_to_ternary(w, measure)
    levels, scale = ternary_naively(w, measure)
    np.testing.assert_array_equal(decode_naively(value), levels * np.float32(scale))
    np.testing.assert_array_equal(dequantize(value), levels * np.float32(scale))
    np.testing.assert_array_equal(on_ternary(torch.from_numpy(w), measure).numpy(), levels * np.float32(scale))
    assert value.nbytes == quantized_nbytes(shape, bits=2, group=0)
    assert set(np.unique(unpack(value.codes, 2))) <= {1, 2, 3}
    assert (unpack(value.codes, 2)[:, shape[1] :] == 2).all(), "what fills a row up is zero"


def test_a_ternary_matrix_of_zeros_and_one_that_is_not_finite() -> None:
    assert not dequantize(round_to_ternary(np.zeros((3, 5), np.float32), "median")).any()
    for bad in (np.nan, np.inf):
        w = np.ones((3, 5), np.float32)
        w[1, 2] = bad
        with pytest.raises(ValueError, match="not finite"):
            round_to_ternary(w, "mean")


def test_ternary_bits_per_weight() -> None:
    """Two bits and the scales: well below 2.2 at any width that a model has."""
    for width in (128, 384, 576, 1536):
        value = round_to_ternary(np.random.default_rng(0).standard_normal((64, width), np.float32), "median")
        assert 8 * value.nbytes / (64 * width) == 2 + 16 / width < 2.2


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_gradients_pass_straight_through(strength: float) -> None:
    """The value moves towards the rounded one, and the gradient is that of the value, beyond the grid's ends too."""
    v = torch.tensor([0.3, -7.0, 100.0], requires_grad=True)
    found = straight_through(v, torch.tensor([0.0, -8.0, 7.0]), strength)
    torch.testing.assert_close(found, v + strength * (torch.tensor([0.0, -8.0, 7.0]) - v))
    (found * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert v.grad is not None and v.grad.tolist() == [1, 2, 3]


@pytest.mark.parametrize("normalizes", [False, True])
def test_a_faked_layer_multiplies_what_ships(normalizes: bool) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(24, 8), nn.Linear(8, 4))
    grid = TokenGrid(bits=8, form="largest")
    faked = Faked(ternary="median", tokens=grid, normalizes=normalizes)
    dial = fake_layers(module, ["0.weight"], faked)
    x = torch.randn(2, 3, 24)
    read = functional.layer_norm(x, (24,)) if normalizes else x
    first, second = (module.get_submodule(name) for name in "01")
    weight = torch.from_numpy(dequantize(round_to_ternary(first.weight.detach().numpy(), "median")))
    expected = functional.linear(on_tokens(read, grid), weight, first.bias)
    torch.testing.assert_close(module(x), functional.linear(expected, second.weight, second.bias))
    dial.strength = 0.0
    torch.testing.assert_close(first(x), functional.linear(read, first.weight, first.bias))
    module(x).sum().backward()
    assert first.weight.grad is not None and first.weight.grad.abs().sum() > 0
