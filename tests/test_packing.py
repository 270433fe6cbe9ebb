"""Packing from end to end, as properties: a matrix on any grid → the store's file → what ships → what a kernel reads.

Shapes, grids and values are drawn by hypothesis, always the same ones (conftest.py). tests/numerics/test_grids.py holds
rounding itself against its twin; here the rest: how far an element may move, whom an outlier hurts, what padding
does, what bytes there are, and that codes come back from each of the layouts.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepipe.artifacts import QuantizedTensor
from edgepipe.engines.onnxruntime.place_weights import place_weights
from edgepipe.engines.onnxruntime.planned import FILE_NAME, WeightsFile
from edgepipe.graph.dialect import GraphBuilder
from edgepipe.numerics.gptq import compensate
from edgepipe.numerics.grids import Grid, dequantize, pack, quantized_nbytes, round_to_nearest, row_group, unpack
from edgepipe.store import load_weights, save_weights
from edgepipe.weights import WeightStore
from tests.decoders import stored
from tests.reference import decode_naively, pack_naively, unpack_naively

OFFSETS = ("symmetric", "zero points", "minima")
KINDS = ("normal", "zeros", "a row of zeros", "a group of zeros", "outlier", "one sign", "constant")
SCALE_BYTES = 2  # float16
HALF = 2.0**-11  # of relative error when a scale is rounded to float16


@dataclasses.dataclass(frozen=True)
class Case:
    """Hold one matrix and the grid it goes on."""

    weight: np.ndarray  # [rows, columns] float32
    bits: int
    group: int  # 0: whole rows
    offset: str  # one of OFFSETS

    @property
    def width(self) -> int:
        """Return the elements of a group."""
        return self.group or row_group(self.weight.shape[1], self.bits)

    @property
    def groups(self) -> int:
        """Return the groups of a row."""
        return -(-self.weight.shape[1] // self.width)

    def tensor(self) -> QuantizedTensor:
        """Return the matrix on its grid; minima, which only imports have, as Q4_1 makes them of a group's least."""
        if self.offset != "minima":
            symmetric = self.offset == "symmetric"
            return round_to_nearest(self.weight, bits=self.bits, group=self.group, symmetric=symmetric)
        return with_minima(self.weight, self.bits, self.width)


def with_minima(weight: np.ndarray, bits: int, group: int) -> QuantizedTensor:
    """Put a matrix on a grid with float minima, scale and minimum in float16 before codes are chosen."""
    rows, columns = weight.shape
    blocks = np.zeros((rows, -(-columns // group) * group), np.float32)
    blocks[:, :columns] = weight
    blocks = blocks.reshape(rows, -1, group)
    minima = blocks.min(-1).astype(np.float16)
    scale = ((blocks.max(-1) - blocks.min(-1)) / (2**bits - 1)).astype(np.float16)
    steps = np.where(scale == 0, 1, scale).astype(np.float32)
    codes = np.clip(np.rint((blocks - minima.astype(np.float32)[..., None]) / steps[..., None]), 0, 2**bits - 1)
    return QuantizedTensor(
        shape=(rows, columns),
        bits=bits,
        group=group,
        codes=pack_naively(codes.reshape(rows, -1).astype(np.uint8), bits),
        scale=scale,
        minima=minima,
        source_grid="test",
    )


@st.composite
def cases(draw: st.DrawFn, *, rowwise: bool = True, kernels: bool = False) -> Case:
    """Draw a matrix and its grid; for kernels whole rows share a scale at 8 bits only, where something reads that."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 300))
    bits = draw(st.sampled_from([2, 4, 8]))
    offset = draw(st.sampled_from(OFFSETS))
    groups = [16, 32, 64, 128]
    if rowwise and offset != "minima" and (bits == 8 or not kernels):
        groups.append(0)
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    weight = rng.standard_normal((rows, columns)).astype(np.float32) * np.float32(draw(st.sampled_from([0.02, 1, 10])))
    group = draw(st.sampled_from(groups))
    kind = draw(st.sampled_from(KINDS))
    if kind == "zeros":
        weight[:] = 0
    elif kind == "a row of zeros":
        weight[rng.integers(rows)] = 0
    elif kind == "a group of zeros":
        weight[rng.integers(rows), : group or columns] = 0
    elif kind == "outlier":
        weight[rng.integers(rows), rng.integers(columns)] *= 1000
    elif kind == "one sign":
        weight = np.abs(weight) * np.float32(rng.choice([-1, 1]))
    elif kind == "constant":
        weight[:] = weight[0, 0]
    return Case(weight=weight, bits=bits, group=group, offset=offset)


def codes_of(tensor: QuantizedTensor) -> np.ndarray:
    """Return a tensor's codes [rows, groups · group], padding among them."""
    return unpack_naively(np.asarray(tensor.codes), tensor.bits)


def spoilt(tensor: QuantizedTensor) -> QuantizedTensor:
    """Return the tensor with other codes where its rows are padded to whole groups."""
    codes = codes_of(tensor)
    padding = codes[:, tensor.shape[1] :]
    padding[:] = np.random.default_rng(0).integers(0, 2**tensor.bits, padding.shape)
    return dataclasses.replace(tensor, codes=pack(codes, tensor.bits))


@given(cases())
@settings(max_examples=150)
def test_how_far_an_element_moves(case: Case) -> None:
    """Half a step, and what rounding the scale to float16 adds at the far ends.

    Only at one end of the symmetric grid it's more: codes reach 2^(b−1) steps to the side of the largest magnitude,
    which is on the grid, and one less to the other, so that an element there is cut by up to a step.
    """
    tensor = case.tensor()
    top, columns = 2**case.bits - 1, case.weight.shape[1]
    step = np.repeat(np.abs(tensor.scale.astype(np.float64)), case.width, axis=1)[:, :columns]
    moved = np.abs(dequantize(tensor) - case.weight.astype(np.float64))
    farthest = np.full_like(step, 0.5 + top * HALF) * step
    if case.offset == "symmetric":
        signed = np.repeat(tensor.scale.astype(np.float64), case.width, axis=1)[:, :columns]
        beyond = case.weight / signed > 2 ** (case.bits - 1) - 1
        farthest = np.where(beyond, step * (1 + top * HALF), farthest)
    if case.offset == "minima":  # the minimum is rounded to float16 as well; a range below its numbers is lost whole
        least = np.repeat(np.abs(tensor.minima.astype(np.float64)), case.width, axis=1)[:, :columns]  # type: ignore[union-attr]
        farthest += least * HALF + 2.0**-24 * top
    assert (moved <= farthest + 1e-6 * np.abs(case.weight)).all()
    assert (moved[(case.weight == 0).all(1)] == 0).all(), "a row of zeros is zeros"


def test_the_far_end_of_the_symmetric_grid_is_cut_by_a_whole_step() -> None:
    """The bound is reached: with −1 on code 0, 1 becomes 7/8."""
    tensor = round_to_nearest(np.array([[-1, 1] + [0.25] * 14], np.float32), bits=4, group=16, symmetric=True)
    np.testing.assert_array_equal(dequantize(tensor)[0, :3], [-1, 7 / 8, 0.25])


@given(cases(), st.sampled_from([-3e4, 3e4]), st.integers(0, 10**6))
@settings(max_examples=80)
def test_an_outlier_hurts_its_own_group_alone(case: Case, value: float, place: int) -> None:
    changed = case.weight.copy()
    row, column = divmod(place % changed.size, changed.shape[1])
    changed[row, column] = value
    before, after = case.tensor(), dataclasses.replace(case, weight=changed).tensor()
    same = np.ones((changed.shape[0], case.groups), bool)
    same[row, column // case.width] = False
    for part in ("scale", "zero_points", "minima"):
        if (held := getattr(before, part)) is not None:
            np.testing.assert_array_equal(getattr(after, part)[same], held[same])
    blocks = [codes_of(tensor).reshape(*same.shape, case.width) for tensor in (before, after)]
    np.testing.assert_array_equal(blocks[0][same], blocks[1][same])


@given(cases())
@settings(max_examples=100)
def test_codes_and_bytes_give_each_other_back(case: Case) -> None:
    """Codes → bytes → codes and the other way, by the twin; decoding too; and the bytes are those of the formula."""
    tensor = case.tensor()
    codes = codes_of(tensor)
    np.testing.assert_array_equal(unpack(tensor.codes, case.bits), codes)
    np.testing.assert_array_equal(pack(codes, case.bits), tensor.codes)
    np.testing.assert_array_equal(pack_naively(codes, case.bits), tensor.codes)
    np.testing.assert_array_equal(dequantize(tensor), decode_naively(tensor))
    offset_bytes = {"symmetric": 0, "zero points": 1, "minima": SCALE_BYTES}[case.offset]
    nbytes = case.weight.shape[0] * case.groups * (case.width * case.bits // 8 + SCALE_BYTES + offset_bytes)
    assert tensor.nbytes == nbytes
    assert nbytes == quantized_nbytes(case.weight.shape, bits=case.bits, group=case.group, offset_bytes=offset_bytes)


@given(cases(), cases())
@settings(max_examples=25)
def test_a_saved_store_gives_back_every_part(first: Case, second: Case) -> None:
    """Codes, scales and offsets bit for bit, the second behind the first, in a file of about their bytes."""
    held = {"first": first.tensor(), "second": second.tensor()}
    with tempfile.TemporaryDirectory() as folder:
        store = WeightStore({name: stored(name, value) for name, value in held.items()})
        save_weights(store, Path(folder), lambda *_: None)
        again = load_weights(Path(folder))
        size = (Path(folder) / "weights.bin").stat().st_size
        for name, value in held.items():
            found = again.load(name)
            assert isinstance(found, QuantizedTensor)
            for part in (field.name for field in dataclasses.fields(value)):
                np.testing.assert_array_equal(getattr(found, part), getattr(value, part), err_msg=part)
            del found
    whole = sum(value.nbytes for value in held.values())
    assert whole <= size < whole + 64 * 8  # each part starts on a cache line


def product(columns: int, rows: int) -> bytes:
    """Build y = −(x · Wᵀ) and rows = −W[ids] of one weight, in the portable dialect."""
    g = GraphBuilder("packing")
    x = g.input("x", ir.DataType.FLOAT, ["batch", "sequence", columns])
    ids = g.input("ids", ir.DataType.INT64, ["tables", "ids"])
    y = g.op("MatMul", [x, g.weight("w", [columns, rows], transposed=True)])
    g.output("y", g.op("Neg", [y]), ir.DataType.FLOAT, ["batch", "sequence", rows])
    gathered = g.op("Gather", [g.weight("w", [rows, columns]), ids])
    g.output("rows", g.op("Neg", [gathered]), ir.DataType.FLOAT, ["tables", "ids", columns])
    return g.finish()


def shipped(tensor: QuantizedTensor, x: np.ndarray, *, many_rows: bool) -> tuple[WeightsFile, np.ndarray, np.ndarray]:
    """Place a weight, write the file and run it; return what was planned, x · Wᵀ and all of W's rows."""
    graph = ir.from_proto(onnx.load_model_from_string(product(tensor.shape[1], tensor.shape[0])))
    file = WeightsFile()
    place_weights(graph.graph, WeightStore({"w": stored("w", tensor)}), file, 0, many_rows=many_rows)
    graph.graph.opset_imports.update({"": 23, "com.microsoft": 1})
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        file.write(Path(folder) / FILE_NAME, lambda _done, _total: None)
        (Path(folder) / "graph.onnx").write_bytes(ir.to_proto(graph).SerializeToString())
        session = ort.InferenceSession(f"{folder}/graph.onnx", options, providers=["CPUExecutionProvider"])
        y, rows = session.run(None, {"x": x, "ids": np.arange(tensor.shape[0], dtype=np.int64)[None]})
        del session
    return file, -y, -rows[0]


@given(cases(kernels=True), st.booleans())
@settings(max_examples=40)
def test_kernels_read_what_was_packed(case: Case, many_rows: bool) -> None:
    """A product and gathered rows of what ships are those of the decoded weight, whatever its padding holds.

    Products of 2- and 8-bit codes take x in two int8 parts, about 16 bits; gathered rows are exact. Kernels multiply by
    codes and take the middle's product away, so float32's rounding of that is left, even where all weights are zero.
    """
    tensor = spoilt(case.tensor())
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 3, case.weight.shape[1])).astype(np.float32)
    file, y, rows = shipped(tensor, x, many_rows=many_rows)
    decoded = decode_naively(tensor).astype(np.float64)
    np.testing.assert_allclose(rows, decoded, rtol=0, atol=1e-6 * np.abs(decoded).max())
    most = np.abs(x).max() * np.abs(decoded).sum(1).max()  # what a product can reach
    middle = np.abs(x).max() * np.abs(tensor.scale.astype(np.float32)).sum(1).max() * case.width * 2 ** (case.bits - 1)
    np.testing.assert_allclose(y, x @ decoded.T, rtol=0, atol=1e-4 * most + 1e-7 * middle)  # which kernels take away
    groups, offset = -(-case.weight.shape[1] // case.width), {"symmetric": 0, "minima": SCALE_BYTES}.get(case.offset)
    scales = groups * (SCALE_BYTES + (offset or 0))
    zeros = 0 if offset is not None else -(-groups * case.bits // 8)  # packed, each row to whole bytes
    nbytes = case.weight.shape[0] * (groups * case.width * case.bits // 8 + scales + zeros)
    assert sum(planned.nbytes for planned in file.tensors) == nbytes


@given(cases(rowwise=False))
@settings(max_examples=40)
def test_gptq_stays_on_the_grid_that_ships(case: Case) -> None:
    """A method's codes, scales and padding obey the rules of rounding: nothing but its choice of codes is its own."""
    symmetric = case.offset == "symmetric"
    rng = np.random.default_rng(2)
    x = rng.standard_normal((50, case.weight.shape[1]))
    grid = Grid(bits=case.bits, group=case.group, symmetric=symmetric)
    tensor = compensate(case.weight, (x.T @ x / 50).astype(np.float32), grid)
    assert (tensor.shape, tensor.bits, tensor.group) == (case.weight.shape, case.bits, case.group)
    assert tensor.nbytes == quantized_nbytes(
        case.weight.shape, bits=case.bits, group=case.group, offset_bytes=0 if symmetric else 1
    )
    np.testing.assert_array_equal(dequantize(tensor), decode_naively(tensor))
    zero = np.full(tensor.scale.shape, 2 ** (case.bits - 1)) if tensor.zero_points is None else tensor.zero_points
    padding = codes_of(tensor)[:, case.weight.shape[1] :]
    assert (padding == zero[:, -1:]).all()
    assert (dequantize(tensor)[(case.weight == 0).all(1)] == 0).all()


@given(cases(rowwise=False), st.sampled_from([np.nan, np.inf, -np.inf]), st.integers(0, 10**6))
@settings(max_examples=40)
def test_methods_refuse_what_is_not_finite(case: Case, value: float, place: int) -> None:
    """Rounding is in numerics/test_grids.py; that stages name the tensor in stages/test_quantize.py."""
    weight = case.weight.copy()
    weight.flat[place % weight.size] = value
    gram = np.eye(weight.shape[1], dtype=np.float32)
    with pytest.raises(ValueError, match="not finite"):
        compensate(weight, gram, Grid(bits=case.bits, group=case.group, symmetric=case.offset == "symmetric"))


def test_what_is_drawn_has_all_kinds() -> None:
    """Short last groups, whole ones, whole rows: every grid is met."""
    seen = set()

    @given(cases())
    @settings(max_examples=150)
    def look(case: Case) -> None:
        seen.add((case.bits, case.offset))
        seen.add(case.group)
        seen.add("short" if case.weight.shape[1] % case.width else "whole")

    look()
    assert seen == {(b, o) for b in (2, 4, 8) for o in OFFSETS} | {0, 16, 32, 64, 128, "short", "whole"}
