"""The tensors a lowered graph ships: what each is made from, where it lies in the file, how it is written.

A `PlannedTensor` says which store entries it is made of and how; `WeightsFile` writes them one after another, so no
more than one is in memory, and two views of the same bytes (a tied embedding and head) share one place in the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from edgepipe.artifacts import QuantizedTensor
from edgepipe.errors import ContractError
from edgepipe.numerics.gguf_blocks import GRIDS
from edgepipe.numerics.grids import pack
from edgepipe.weights import WeightStore

FILE_NAME = "weights.bin"
# onnxruntime maps external data; Linux, macOS and Windows map whole pages, so a large tensor starts on one.
_PAGE_BYTES = 4096
_LARGE_BYTES = 65536  # below this, aligning to a page would waste more than it saves
_SMALL_ALIGNMENT = 64  # one cache line
_LEAST_BLOCK = 16  # of MatMulNBits and GatherBlockQuantized, whose blocks are powers of two
_MOST_IN_ROW = 256  # a larger block is slower than several
_ROW_BLOCKS = (128, 64, 32)  # what rows with one scale are cut into: all have fast kernels
_PADDED_BLOCK = 32  # of rows that none of them divides

_DTYPES: dict[str, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "uint8": ir.DataType.UINT8,
    "int8": ir.DataType.INT8,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """Describe one tensor of the weights file before it exists."""

    name: str  # unique: the store names it joins and the part it takes
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Return the bytes in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * _np_dtype(self.dtype).itemsize


def plan_float(weights: WeightStore, names: Sequence[str]) -> PlannedTensor:
    """Plan float weights joined along their first axis, in the dtype they are stored in."""
    names = [weights[n].name for n in names]  # a tied weight has one name in the file
    records = [weights[n] for n in names]
    dtypes = {r.dtype for r in records}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    rows = sum(r.shape[0] for r in records)

    def load() -> np.ndarray:
        return np.concatenate([np.asarray(weights.load(n)).astype(_np_dtype(dtype)) for n in names])

    return PlannedTensor(name="+".join(names), shape=(rows, *records[0].shape[1:]), dtype=dtype, load=load)


def middle_code(value: QuantizedTensor) -> int:
    """Return the code in the middle of a tensor's range: 2^(bits−1), or that of a narrower source kept with minima.

    MatMulNBits subtracts 2^(bits−1). The 5-bit codes of Q5_1 and Q5_K, 0 to 31, would all become about −112, and what
    the rounding of activations costs would be multiplied by that instead of by 8 on average.
    """
    source = GRIDS.get(value.source_grid)
    width = source.width if source is not None and value.minima is not None else value.bits
    return 1 << (width - 1)


def plan_part(weights: WeightStore, names: Sequence[str], part: str, sample: QuantizedTensor) -> PlannedTensor:
    """Plan one part ("codes", "scale", "zero_points", "minima") of quantized weights joined along their rows.

    `sample` is one of the tensors: all of them have its bits, group, kind of offset and middle code.
    """

    def take(value: QuantizedTensor) -> np.ndarray:
        array = np.asarray(getattr(value, part))
        if part == "codes":  # moved to the middle of their container
            shift = (1 << (value.bits - 1)) - middle_code(value)
            return array + np.uint8(shift) if shift else array
        if part == "zero_points":  # the kernel wants them packed like codes, each row padded to whole bytes
            array = pack(np.pad(array, ((0, 0), (0, -array.shape[1] % (8 // value.bits)))), value.bits)
        return array

    names = [weights[n].name for n in names]
    example = take(sample)
    rows = sum(weights[n].shape[0] for n in names)

    def load() -> np.ndarray:
        values = [weights.load(n) for n in names]
        return np.concatenate([take(v) for v in values if isinstance(v, QuantizedTensor)])

    name = f"{'+'.join(names)}:{part}"
    return PlannedTensor(name=name, shape=(rows, *example.shape[1:]), dtype=example.dtype.name, load=load)


def kernel_block(value: QuantizedTensor) -> int:
    """Return how many codes of a row a kernel is told to share a scale; 0 where it takes no such groups.

    That is the tensor's group, or where a whole row shares one scale a part of the row: the scale is repeated.
    """
    fits = value.group >= _LEAST_BLOCK and value.group & (value.group - 1) == 0
    if not value.has_rows or (fits and value.group <= _MOST_IN_ROW):
        return value.group if fits else 0
    return next((block for block in _ROW_BLOCKS if value.group % block == 0), _PADDED_BLOCK)


def plan_codes(weights: WeightStore, names: Sequence[str], sample: QuantizedTensor) -> PlannedTensor:
    """Plan the codes of quantized weights joined along their rows, each row filled up to whole blocks of the kernel."""
    planned = plan_part(weights, names, "codes", sample)
    block = kernel_block(sample)
    row_bytes = -(-sample.shape[1] // block) * block * sample.bits // 8 if block else 0
    short = row_bytes - planned.shape[1]
    if short <= 0:
        return planned
    middle = int(pack(np.full(8 // sample.bits, 1 << (sample.bits - 1), np.uint8), sample.bits)[0])

    def load() -> np.ndarray:
        return np.pad(planned.load(), ((0, 0), (0, short)), constant_values=middle)

    return replace(planned, shape=(planned.shape[0], row_bytes), load=load)


def plan_integers(weights: WeightStore, names: Sequence[str], sample: QuantizedTensor) -> PlannedTensor:
    """Plan the int8 matrix [in, out] of weights with one scale a row, joined along their rows: code − 128."""
    names = [weights[n].name for n in names]

    def load() -> np.ndarray:
        values = [weights.load(n) for n in names]
        codes = np.concatenate([np.asarray(v.codes) for v in values if isinstance(v, QuantizedTensor)])
        return (codes ^ np.uint8(128)).view(np.int8).T

    shape = (sample.shape[1], sum(weights[n].shape[0] for n in names))
    return PlannedTensor(name=f"{'+'.join(names)}:integers", shape=shape, dtype="int8", load=load)


def plan_columns(weights: WeightStore, name: str, sample: QuantizedTensor) -> PlannedTensor:
    """Plan the column scales [in] of a weight, which all weights share that read the same value."""
    name = weights[name].name

    def load() -> np.ndarray:
        value = weights.load(name)
        assert isinstance(value, QuantizedTensor)
        assert value.column_scale is not None
        return np.asarray(value.column_scale)

    return PlannedTensor(name=f"{name}:column_scale", shape=(sample.shape[1],), dtype="float16", load=load)


class WeightsFile:
    """Lay planned tensors out in one file; asking twice for the same tensor gives the same place."""

    def __init__(self) -> None:
        self._offsets: dict[str, int] = {}
        self._planned: list[PlannedTensor] = []
        self._end = 0

    @property
    def nbytes(self) -> int:
        """Return the size of the whole file."""
        return self._end

    @property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        """Return the tensors in file order."""
        return tuple(self._planned)

    def place(self, planned: PlannedTensor, shape: Sequence[int] | None = None) -> ir.ExternalTensor:
        """Give a tensor its place and return a reference to it, seen in `shape` when another one is wanted."""
        if planned.name not in self._offsets:
            alignment = _PAGE_BYTES if planned.nbytes >= _LARGE_BYTES else _SMALL_ALIGNMENT
            offset = -(-self._end // alignment) * alignment
            self._offsets[planned.name] = offset
            self._planned.append(planned)
            self._end = offset + planned.nbytes
        dims = tuple(shape or planned.shape)
        suffix = "" if dims == planned.shape else "@" + "x".join(map(str, dims))
        return ir.ExternalTensor(
            location=FILE_NAME,
            offset=self._offsets[planned.name],
            length=planned.nbytes,
            dtype=_DTYPES[planned.dtype],
            shape=ir.Shape(dims),
            name=planned.name + suffix,
        )

    def write(self, path: Path, progress: Callable[[int, int], None]) -> None:
        """Write the file; `progress` is told (bytes done, bytes in all)."""
        with path.open("wb") as file:
            for planned in self._planned:
                value = np.ascontiguousarray(planned.load())
                if value.nbytes != planned.nbytes or value.shape != planned.shape:
                    raise ContractError(
                        f"{planned.name}: planned {planned.shape} in {planned.nbytes} bytes, "
                        f"got {value.shape} in {value.nbytes}"
                    )
                file.seek(self._offsets[planned.name])
                file.write(value.view(np.uint8).reshape(-1).data)
                progress(self._offsets[planned.name] + planned.nbytes, self._end)
            file.flush()
            os.fsync(file.fileno())


def _np_dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))
