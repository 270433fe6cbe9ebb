"""The header of a GGUF file, with every count and offset checked against the file before it is believed.

A damaged or hostile file ends in one sentence, not in a loop over 2^60 elements. (gguf's own GGUFReader trusts its
counts, and takes 8 s for a 49,152-token vocabulary.) Block sizes come from the `gguf` package.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepipe.errors import ConfigError

# Far above any model published: the largest vocabularies have 262,144 tokens and about as many merges.
_MOST_KEYS = 1 << 16
_MOST_TENSORS = 1 << 16
_MOST_ELEMENTS = 1 << 22  # of all metadata arrays together
_MOST_DIMENSIONS = 4

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Say where one tensor lies in the file."""

    name: str
    shape: tuple[int, ...]  # slowest dimension first, as in torch
    type: int  # ggml type
    type_name: str  # "Q4_1", "F32" …
    start: int  # bytes from the start of the file
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Hold everything of a GGUF file but its tensors' values."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Read metadata and the tensor table; ConfigError when anything does not fit the file."""
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _parse(path, _Cursor(data))
    except (
        OSError,
        ValueError,
        struct.error,
    ) as error:  # ValueError: an empty file, bad UTF-8
        raise damaged(path, str(error)) from error


def damaged(path: Path, what: str) -> ConfigError:
    """Say what is wrong with a GGUF file."""
    return ConfigError(f"{path} is not a GGUF file that can be read: {what}; take the file from its source again")


class _Cursor:
    """Walk through a mapped file; ValueError at its end, before anything is allocated."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0
        self.elements = 0

    def take(self, size: int) -> int:
        """Step over `size` bytes and return where they start."""
        start = self.position
        if size > len(self.data) - start:
            raise ValueError(f"it is truncated: {size} bytes wanted at byte {start} of {len(self.data)}")
        self.position = start + size
        return start

    def unpack(self, layout: str) -> tuple[Any, ...]:
        """Read little-endian values."""
        layout = "<" + layout
        return struct.unpack_from(layout, self.data, self.take(struct.calcsize(layout)))

    def string(self) -> str:
        """Read a length and that many bytes of UTF-8."""
        size = int(self.unpack("Q")[0])
        start = self.take(size)
        return self.data[start : start + size].decode("utf-8")

    def value(self, kind: int) -> Any:
        """Read one metadata value: a scalar, a string, or a flat array of either."""
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"metadata of the unknown type {kind}")
        kind, count = self.unpack("IQ")
        self.elements += count
        if self.elements > _MOST_ELEMENTS:
            raise ValueError(f"its metadata arrays claim {self.elements} elements (at most {_MOST_ELEMENTS})")
        if kind in _SCALARS:
            return list(self.unpack(f"{count}{_SCALARS[kind]}"))
        if kind != _STRING:
            raise ValueError(f"a metadata array of the unknown type {kind}")
        return [self.string() for _ in range(count)]


def _parse(path: Path, cursor: _Cursor) -> Header:
    magic, version, tensor_count, key_count = cursor.unpack("4sIQQ")
    if magic != b"GGUF":
        raise ValueError(f"it starts with {magic!r} instead of b'GGUF'")
    if version not in (2, 3):
        raise ValueError(f"it is version {version} (or big-endian), and versions 2 and 3 in little-endian are read")
    if tensor_count > _MOST_TENSORS or key_count > _MOST_KEYS:
        raise ValueError(f"it claims {tensor_count} tensors and {key_count} metadata keys")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"the metadata key {key!r} comes twice")
        metadata[key] = cursor.value(cursor.unpack("I")[0])
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
        raise ValueError(f"general.alignment is {alignment!r}")
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for info in infos:
        end = data_start + info.start + info.nbytes
        if info.name in tensors:
            raise ValueError(f"the tensor {info.name!r} comes twice")
        if end > len(cursor.data):
            raise ValueError(f"it is truncated: the tensor {info.name!r} ends at byte {end} of {len(cursor.data)}")
        tensors[info.name] = dataclasses.replace(info, start=data_start + info.start)
    return Header(path=path, metadata=metadata, tensors=tensors)


def _tensor_info(cursor: _Cursor) -> TensorInfo:
    """Read one entry of the tensor table; its `start` still counts from the start of the data."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.string()
    (dimensions,) = cursor.unpack("I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise ValueError(f"the tensor {name!r} claims {dimensions} dimensions")
    shape = tuple(reversed(cursor.unpack(f"{dimensions}Q")))
    kind, offset = cursor.unpack("IQ")
    if kind not in set(GGMLQuantizationType):
        raise ValueError(f"the tensor {name!r} has the unknown type {kind}")
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if math.prod(shape) == 0 or shape[-1] % block:
        raise ValueError(f"the tensor {name!r} of shape {list(shape)} does not consist of whole blocks of {block}")
    return TensorInfo(
        name=name,
        shape=shape,
        type=kind,
        type_name=GGMLQuantizationType(kind).name,
        start=offset,
        nbytes=math.prod(shape) // block * block_bytes,
    )
