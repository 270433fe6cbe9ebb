"""Find the scales of an int8 cache: the exact graphs run over some texts, and what their cache then holds is looked at.

    scale = max|x| / 127   per layer, key head and channel, over all tokens
    keys of the decoder    max of √(x_d² + x_{d+D/2}²) for both channels of a pair that rotates

A rotary position turns such a pair, so a channel's own maximum over short texts says little of later positions; the
pair's length is the same at all of them. Behind an encoder the decoder writes its likeliest answers to the texts, so
that keys and values of source and answer are those of real decoding steps.
One scale for all tokens costs no memory, and keys have channels that are large at every token, which a scale a token
would give all of its range to: Liu et al., "KIVI", arXiv:2402.02750; the operator takes no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgepipe.artifacts import OnnxModel
from edgepipe.errors import StageError
from edgepipe.runtime.onnxruntime import Cache, Decoder, open_decoder

ANSWER_TOKENS = 32  # as long as the answers that methods of quantization look at
_LARGEST = 127.0  # code; the operator would take −128 too, which is worth nothing here
_TINY = 1e-8  # a channel of zeros has a scale as well


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheScales:
    """Hold what was found."""

    scales: Mapping[str, np.ndarray]  # key.i, value.i, cross_key.i, cross_value.i → [kv_heads, 1, head_dim] float32
    rows: Sequence[Sequence[int]]  # the ids that were looked at
    read: Sequence[Sequence[int]]  # those that the decoder has read: the rows, or behind an encoder its answers


def observe_cache(
    model: OnnxModel,
    directory: Path,
    files: Mapping[str, str],
    rows: Sequence[Sequence[int]],
    progress: Callable[[int, int], None],
) -> CacheScales:
    """Return the scales over rows of ids: texts for a decoder, sources behind an encoder.

    `files` names the exact graphs in `directory`, lowered with a float32 cache, beside their weights. `progress` is
    told (rows done, rows in all). StageError where a key or value isn't finite.
    """
    manifest = {"graphs": dict(files), "model": model.spec, "cache": {"dtype": "float32"}}
    decoder = open_decoder(directory, manifest, None)
    cache = decoder.new_cache(1)
    largest: dict[str, np.ndarray] = {}
    read = []
    for done, row in enumerate(rows):
        progress(done, len(rows))
        ids = list(row[: decoder.context])
        if "encoder" in files:
            decoder.read_source(cache, 0, np.array([row[: model.spec["source_context"]]], np.int64))
            ids = _answer(decoder, cache, model)
        else:
            _step(decoder, cache, ids, 0)
        read.append(ids)
        for name, array in cache.held(len(ids)).items():
            found = _sizes(name, array)
            if not np.isfinite(found).all():
                raise StageError(f"over the calibration texts, {name} has values that are not finite: it has no scale")
            largest[name] = np.maximum(largest.get(name, _TINY), found)
    return CacheScales(
        scales={n: np.asarray(x / _LARGEST, np.float32) for n, x in largest.items()}, rows=rows, read=read
    )


def _sizes(name: str, array: np.ndarray) -> np.ndarray:
    """Return how large each channel of [1, kv_heads, tokens, head_dim] gets. → [kv_heads, 1, head_dim]"""
    sizes = np.abs(array[0])
    if name.startswith("key"):
        half = sizes.shape[-1] // 2
        sizes = np.tile(np.hypot(sizes[..., :half], sizes[..., half:]), 2)
    largest: np.ndarray = sizes.max(1, keepdims=True)
    return largest


def _answer(decoder: Decoder, cache: Cache, model: OnnxModel) -> list[int]:
    """Let the decoder write its likeliest answer to the source that was read; return what it has read of it."""
    ids = list(model.spec["decoder_prefix_ids"])
    most = min(ANSWER_TOKENS, decoder.context)
    chosen = _step(decoder, cache, ids, 0)
    while len(ids) < most and chosen not in model.info.eos_token_ids:
        ids.append(chosen)
        chosen = _step(decoder, cache, ids[-1:], len(ids) - 1)
    return ids


def _step(decoder: Decoder, cache: Cache, ids: list[int], past: int) -> int:
    """Run ids after `past` tokens; return the likeliest next one."""
    count = len(ids)
    last = np.array([[count - 1]], np.int64)
    return int(decoder.run(cache, np.array([ids], np.int64), np.array([past]), np.array([count]), last)[0, 0].argmax())
