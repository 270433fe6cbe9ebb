"""Weights that a bundle stores deflated, because masks made that smaller: unpacked into memory when it is opened.

The stored file is one zlib stream (RFC 1950) of the file that the graphs name. onnxruntime takes the bytes in its
place, and copies what its kernels don't repack; they can go when the graphs are open.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe.errors import ContractError

MOST_RATIO = 1032  # deflate can't make anything smaller than by this
_AGAIN = "the bundle is damaged, copy or build it again"
_PIECE = 1 << 16  # bytes that are read at a time: unpacked, at most MOST_RATIO times as many


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpacked:
    """Hold a file of weights in memory."""

    name: str  # as the graphs call it
    content: np.ndarray  # [bytes] uint8


def unpack_weights(path: Path, manifest: Mapping[str, Any]) -> Unpacked | None:
    """Return the weights of the bundle in `path` if it stores them deflated; None when the graphs read the file itself.

    Raises ContractError when the file isn't what the manifest says.
    """
    weights = manifest.get("weights", {})
    promised = weights.get("unpacked")
    if promised is None:
        return None
    name, content = weights["file"], np.empty(promised["bytes"], np.uint8)
    stream, filled = zlib.decompressobj(), 0
    try:
        with (path / name).open("rb") as file:
            while piece := file.read(_PIECE):
                part = stream.decompress(piece)
                if stream.unused_data or filled + len(part) > len(content):
                    raise ContractError(f"{name} holds more than the {len(content)} bytes it should: {_AGAIN}")
                content[filled : filled + len(part)] = np.frombuffer(part, np.uint8)
                filled += len(part)
    except (zlib.error, OSError) as error:
        raise ContractError(f"{name} can't be unpacked ({error}): {_AGAIN}") from None
    if filled < len(content) or not stream.eof:
        raise ContractError(f"{name} ends after {filled} of the {len(content)} bytes it should hold: {_AGAIN}")
    return Unpacked(name=promised["file"], content=content)
