"""Grids: packing loses nothing, rounding is the naive twin's, code for code, and no value ends up on a worse point."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepipe.artifacts import QuantizedTensor
from edgepipe.numerics import grids
from edgepipe.numerics.grids import dequantize, pack, quantized_nbytes, round_to_nearest, unpack
from tests.reference import decode_naively, pack_naively, product_by_group_sums, round_naively, unpack_naively


def weights() -> dict[str, np.ndarray]:
    """Matrices [out, in] with what rounding trips over."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((7, 100), np.float32)
    lopsided = -np.abs(rng.standard_normal((3, 64), np.float32)) * 3
    ties = np.tile(np.array([1, -1, 0.5, -0.5], np.float32), (2, 16))
    zeros = normal.copy()
    zeros[2] = 0
    zeros[3, :32] = 0
    return {
        "ragged": normal,
        "one row": rng.standard_normal((1, 33), np.float32),
        "one column": rng.standard_normal((5, 1), np.float32),
        "whole groups": rng.standard_normal((4, 128), np.float32),
        "zeros": zeros,
        "all negative": lopsided,
        "all positive": -lopsided,
        "ties": ties,
        "huge": normal * np.float32(98e3 / np.abs(normal).max()),  # as far as two bits reach
        "tiny": normal * np.float32(1e-7),
        "subnormal scales": normal * np.float32(2e-4),
        "outlier": np.where(np.arange(100) == 40, np.float32(-900), normal),
    }


WEIGHTS = weights()
USUAL = ("ragged", "one row", "one column", "whole groups", "zeros", "all negative", "all positive", "ties", "outlier")


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(1, 4), (3, 64), (2, 124)])
def test_packing_is_the_twins_and_unpacking_gives_back(bits: int, shape: tuple[int, int]) -> None:
    codes = np.random.default_rng(1).integers(0, 2**bits, shape, dtype=np.uint8)
    packed = pack(codes, bits)
    np.testing.assert_array_equal(packed, pack_naively(codes, bits))
    np.testing.assert_array_equal(unpack(packed, bits), codes)
    np.testing.assert_array_equal(unpack_naively(packed, bits), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_takes_any_leading_axes(bits: int) -> None:
    codes = np.random.default_rng(2).integers(0, 2**bits, (2, 3, 8), dtype=np.uint8)
    np.testing.assert_array_equal(unpack(pack(codes, bits), bits), codes)
    assert pack(codes, bits).shape == (2, 3, bits)


BITS, GROUPS = st.sampled_from([2, 4, 8]), st.sampled_from([16, 32, 64, 128])


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 140),
    bits=BITS,
    group=GROUPS,
    symmetric=st.booleans(),
    kind=st.sampled_from(["normal", "zeros", "a row of zeros", "outlier", "one sign"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_any_matrix_is_rounded_and_packed_as_the_twin_does(
    rows: int, columns: int, bits: int, group: int, symmetric: bool, kind: str, seed: int
) -> None:
    """Any shape, the last group short or not, rows of zeros, one outlier: codes, scales, bytes and decoded values."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    if kind == "zeros":
        weight[:] = 0
    elif kind == "a row of zeros":
        weight[rng.integers(rows)] = 0
    elif kind == "outlier":
        weight[rng.integers(rows), rng.integers(columns)] = rng.choice([-1e3, 1e3])
    elif kind == "one sign":
        weight = np.abs(weight)
    expected = round_naively(weight, bits, group, symmetric)
    got = round_to_nearest(weight, bits=bits, group=group, symmetric=symmetric)
    np.testing.assert_array_equal(got.scale, expected.scale)
    np.testing.assert_array_equal(got.codes, pack_naively(expected.codes, bits))
    np.testing.assert_array_equal(unpack(got.codes, bits), expected.codes)
    np.testing.assert_array_equal(dequantize(got), decode_naively(got))
    assert got.nbytes == quantized_nbytes((rows, columns), bits=bits, group=group, offset_bytes=0 if symmetric else 1)
    assert (dequantize(got)[(weight == 0).all(axis=1)] == 0).all()


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 70),
    bits=BITS,
    group=GROUPS,
    symmetric=st.booleans(),
    value=st.sampled_from([np.nan, np.inf, -np.inf]),
    place=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_one_value_that_is_not_finite_is_refused_anywhere(
    rows: int, columns: int, bits: int, group: int, symmetric: bool, value: float, place: int
) -> None:
    weight = np.ones((rows, columns), np.float32)
    weight.flat[place % weight.size] = value
    with pytest.raises(ValueError, match="not finite"):
        round_to_nearest(weight, bits=bits, group=group, symmetric=symmetric)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_float16_scales_do_not_reach_is_refused(bits: int, symmetric: bool) -> None:
    """Up to the limit both ends come back to half a step; beyond, they would be cut in silence."""
    limit = 65504 * (2**bits - 1) / 2
    weight = np.array([[limit, -limit, 0, 0] * 8], np.float32) * np.float32(0.9999)
    moved = np.abs(dequantize(round_to_nearest(weight, bits=bits, group=32, symmetric=symmetric)) - weight)
    assert moved.max() <= limit / (2**bits - 1) * 2 * (1 if symmetric else 0.51)
    with pytest.raises(ValueError, match=f"values reach .*, and {bits}-bit codes with float16 scales hold up to"):
        round_to_nearest(weight * np.float32(1.001), bits=bits, group=32, symmetric=symmetric)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (2, 16), (4, 32), (4, 16), (8, 32), (8, 128)])
@pytest.mark.parametrize("name", WEIGHTS)
def test_rounding_is_the_twins(name: str, bits: int, group: int, symmetric: bool) -> None:
    weight = WEIGHTS[name]
    expected = round_naively(weight, bits, group, symmetric)
    got = round_to_nearest(weight, bits=bits, group=group, symmetric=symmetric)
    assert (got.shape, got.bits, got.group, got.minima) == (weight.shape, bits, group, None)
    np.testing.assert_array_equal(got.scale, expected.scale)
    assert got.scale.dtype == np.float16
    np.testing.assert_array_equal(got.codes, pack_naively(expected.codes, bits))
    if symmetric:
        assert got.zero_points is None
    else:
        np.testing.assert_array_equal(got.zero_points, expected.zero_points)
    np.testing.assert_array_equal(dequantize(got), decode_naively(got))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", USUAL)
def test_no_point_of_the_grid_is_nearer(name: str, bits: int, symmetric: bool) -> None:
    """Inside the grid an element moves by half a step at most; the outermost ones by less than a whole one."""
    weight = WEIGHTS[name]
    tensor = round_to_nearest(weight, bits=bits, group=32, symmetric=symmetric)
    step = np.repeat(np.abs(tensor.scale.astype(np.float64)), 32, axis=1)[:, : weight.shape[1]]
    error = np.abs(dequantize(tensor) - weight.astype(np.float64))
    codes = unpack(tensor.codes, bits)[:, : weight.shape[1]]
    outermost = (codes == 0) | (codes == 2**bits - 1)
    slack = 1e-6 * np.abs(weight)  # dequantize and the division round to float32
    assert (error <= np.where(outermost, step * 1.1, step / 2) + slack).all()
    padding = unpack(tensor.codes, bits)[:, weight.shape[1] :]
    zero = tensor.zero_points if tensor.zero_points is not None else np.full_like(tensor.scale, 1 << (bits - 1))
    assert (padding == zero[:, -1:].astype(np.uint8)).all()


def test_the_largest_magnitude_lies_on_the_symmetric_grid_with_either_sign() -> None:
    """Code 0 is the only one eight steps from the middle, so it's the extreme's; then 11 bits of scale decide."""
    for extreme in (-3.3, 3.3):
        weight = np.zeros((1, 32), np.float32)
        weight[0, 5], weight[0, 6] = extreme, -extreme / 3
        tensor = round_to_nearest(weight, bits=4, group=32, symmetric=True)
        assert unpack(tensor.codes, 4)[0, 5] == 0
        assert dequantize(tensor)[0, 5] == pytest.approx(extreme, rel=2**-11)


def test_zeros_stay_zeros() -> None:
    for symmetric in (True, False):
        tensor = round_to_nearest(WEIGHTS["zeros"], bits=4, group=32, symmetric=symmetric)
        assert (dequantize(tensor)[WEIGHTS["zeros"] == 0] == 0).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_any_float_type_is_read(dtype: type) -> None:
    weight = WEIGHTS["ragged"].astype(dtype)
    got = round_to_nearest(weight, bits=4, group=32, symmetric=False)
    expected = round_to_nearest(weight.astype(np.float32), bits=4, group=32, symmetric=False)
    np.testing.assert_array_equal(got.codes, expected.codes)
    np.testing.assert_array_equal(got.scale, expected.scale)


@pytest.mark.parametrize("at_once", [1, 300, 128 * 7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_size_of_a_part_changes_nothing(monkeypatch: pytest.MonkeyPatch, at_once: int, symmetric: bool) -> None:
    """Rows are rounded one, two or seven at a time."""
    weight = WEIGHTS["ragged"]
    whole = round_to_nearest(weight, bits=4, group=32, symmetric=symmetric)
    monkeypatch.setattr(grids, "_ELEMENTS_AT_ONCE", at_once)
    parts = round_to_nearest(weight, bits=4, group=32, symmetric=symmetric)
    np.testing.assert_array_equal(parts.codes, whole.codes)
    np.testing.assert_array_equal(parts.scale, whole.scale)
    np.testing.assert_array_equal(parts.zero_points, whole.zero_points)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_in_a_later_part_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    monkeypatch.setattr(grids, "_ELEMENTS_AT_ONCE", 1)
    weight = WEIGHTS["ragged"].copy()
    weight[-1, -1] = value
    with pytest.raises(ValueError, match="not finite"):
        round_to_nearest(weight, bits=4, group=32, symmetric=True)


@pytest.mark.parametrize("shape", [(7, 100), (1, 1), (4, 128)])
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (2, 128), (4, 16), (4, 32), (8, 64), (8, 128)])
def test_planned_bytes_are_the_tensors(shape: tuple[int, int], bits: int, group: int) -> None:
    weight = np.ones(shape, np.float32)
    for symmetric, offset_bytes in ((True, 0), (False, 1)):
        tensor = round_to_nearest(weight, bits=bits, group=group, symmetric=symmetric)
        assert tensor.nbytes == quantized_nbytes(shape, bits=bits, group=group, offset_bytes=offset_bytes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scale_dtype", [np.float16, np.float32])
def test_minima(bits: int, scale_dtype: type) -> None:
    """Decoding is the twin's, and a product may be split into symmetric codes and group sums."""
    rng = np.random.default_rng(3)
    tensor = QuantizedTensor(
        shape=(6, 90),
        bits=bits,
        group=32,
        codes=pack(rng.integers(0, 2**bits, (6, 96), dtype=np.uint8), bits),
        scale=rng.uniform(-0.1, 0.1, (6, 3)).astype(scale_dtype),
        minima=rng.standard_normal((6, 3)).astype(scale_dtype),
    )
    np.testing.assert_array_equal(dequantize(tensor), decode_naively(tensor))
    x = rng.standard_normal((2, 90))
    whole = x @ dequantize(tensor).T.astype(np.float64)
    np.testing.assert_allclose(product_by_group_sums(x, tensor), whole, rtol=0, atol=1e-6 * np.abs(whole).max())


@pytest.mark.parametrize("deviation", [0.02, 0.002, 0.0003])
def test_small_weights_lose_no_more_than_large_ones(deviation: float) -> None:
    """Scales of 8-bit grids get as small as float16 goes: a floor at its normal numbers would cost ten times more."""
    weight = deviation * np.random.default_rng(5).standard_normal((64, 128)).astype(np.float32)
    tensor = round_to_nearest(weight, bits=8, group=32, symmetric=True)
    assert np.sqrt(np.square(dequantize(tensor) - weight).mean()) < 0.009 * deviation


@pytest.mark.parametrize(("columns", "bits"), [(7, 8), (96, 8), (6, 4), (7, 4)])
def test_whole_rows_share_a_scale(columns: int, bits: int) -> None:
    weight = np.random.default_rng(columns).standard_normal((5, columns)).astype(np.float32)
    value = round_to_nearest(weight, bits=bits, group=0, symmetric=True)
    expected = round_naively(weight, bits, value.group, True)
    assert value.scale.shape == (5, 1)
    np.testing.assert_array_equal(unpack(value.codes, bits), expected.codes)
    np.testing.assert_array_equal(value.scale, expected.scale)
    assert value.nbytes == quantized_nbytes((5, columns), bits=bits, group=0)
    assert value.has_integer_rows == (bits == 8)
