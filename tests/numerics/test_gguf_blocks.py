"""GGUF grids: an imported tensor decodes to what gguf's own decoder gives, bit for bit, and has the bytes promised."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as decode_gguf
from gguf.quants import quantize as encode_gguf

from edgepipe.artifacts import QuantizedTensor
from edgepipe.numerics.gguf_blocks import GRIDS, GgufGrid, import_blocks
from edgepipe.numerics.grids import dequantize, unpack
from tests.reference import decode_naively

ROWS = 5
HALVES = {  # where a block keeps its float16 numbers: anything else in it may be any bits
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
ENCODED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # what the gguf package can also write
MINIMA = {"Q4_1", "Q5_1", "Q4_K", "Q5_K"}


def random_blocks(grid: GgufGrid, columns: int) -> np.ndarray:
    """Make random bytes whose scales are ordinary numbers of either sign. → flat uint8"""
    rng = np.random.default_rng(grid.block_bytes)
    blocks = rng.integers(0, 256, (ROWS * columns // grid.block, grid.block_bytes), dtype=np.uint8)
    for start in HALVES[grid.name]:
        scale = rng.uniform(-2, 2, (len(blocks), 1)).astype(np.float16)
        blocks[:, start : start + 2] = scale.view(np.uint8)
    return blocks.reshape(-1)


def expected(raw: np.ndarray, grid: GgufGrid, columns: int) -> np.ndarray:
    """Decode with the gguf package. → [rows, columns] float32"""
    blocks = raw.reshape(ROWS, columns // grid.block * grid.block_bytes)
    decoded: np.ndarray = decode_gguf(blocks, GGMLQuantizationType[grid.name])
    return decoded


def test_the_table_is_ggmls() -> None:
    assert set(GRIDS) == set(HALVES)
    for name, grid in GRIDS.items():
        assert (grid.block, grid.block_bytes) == GGML_QUANT_SIZES[GGMLQuantizationType[name]]
        assert grid.name == name
        assert str(grid.width) == name[1]
        assert grid.minima == (name in MINIMA)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("blocks_per_row", [1, 3])
def test_random_blocks_decode_to_ggufs_values(name: str, blocks_per_row: int) -> None:
    grid = GRIDS[name]
    columns = blocks_per_row * grid.block
    raw = random_blocks(grid, columns)
    tensor = import_blocks(raw, (ROWS, columns), grid)
    values = expected(raw, grid, columns)
    assert np.isfinite(values).all() and len(np.unique(values)) > columns / 2
    np.testing.assert_array_equal(dequantize(tensor), values)
    np.testing.assert_array_equal(decode_naively(tensor), values)


@pytest.mark.parametrize("name", ENCODED)
def test_encoded_weights_decode_to_ggufs_values(name: str) -> None:
    grid = GRIDS[name]
    weight = np.random.default_rng(0).standard_normal((ROWS, 96), np.float32)
    raw = encode_gguf(weight, GGMLQuantizationType[name]).reshape(-1)
    tensor = import_blocks(raw, (ROWS, 96), grid)
    np.testing.assert_array_equal(dequantize(tensor), expected(raw, grid, 96))
    assert np.abs(dequantize(tensor) - weight).max() < 4 * 2.0 / (2**grid.width - 1)


@pytest.mark.parametrize("name", GRIDS)
def test_the_tensor_is_what_the_grid_promises(name: str) -> None:
    grid = GRIDS[name]
    columns = 2 * grid.block
    tensor = import_blocks(random_blocks(grid, columns), (ROWS, columns), grid)
    assert isinstance(tensor, QuantizedTensor)
    assert (tensor.shape, tensor.bits, tensor.group) == ((ROWS, columns), grid.bits, grid.group)
    assert (tensor.source_grid, tensor.zero_points) == (name, None)
    assert tensor.nbytes == grid.nbytes((ROWS, columns))
    assert tensor.scale.dtype == grid.scale_dtype
    assert tensor.scale.shape == (ROWS, columns // grid.group)
    assert (tensor.minima is not None) == grid.minima
    if tensor.minima is not None:
        assert (tensor.minima.dtype, tensor.minima.shape) == (tensor.scale.dtype, tensor.scale.shape)
    codes = unpack(tensor.codes, tensor.bits)
    assert np.ptp(codes) < 2**grid.width  # in the container, but no wider than the source
    assert len(np.unique(codes)) > 2 ** (grid.width - 1)


def test_bytes_that_do_not_fit_are_refused() -> None:
    grid = GRIDS["Q4_0"]
    raw = random_blocks(grid, 64)
    with pytest.raises(ValueError, match="Q4_0: 180 bytes do not hold 5 × 96 elements"):
        import_blocks(raw, (ROWS, 96), grid)
    with pytest.raises(ValueError, match="do not hold 10 × 33"):
        import_blocks(raw, (10, 33), grid)
