"""What a figure could be at best: bytes that must be read and multiply-adds that must be done, over what was measured.

A token can't be faster than reading, once, everything that it needs, nor than its multiply-adds at the machine's peak;
the larger of the two is the limit (a roofline). Bytes and multiply-adds follow from the manifest alone: no noise.
Source: Williams, Waterman and Patterson, Roofline (2009).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_NEAR = 0.5  # a figure at less than this share of its limit is limited by something else: overhead
_CACHE_BYTES = {"float32": 4, "float16": 2, "int8": 1}  # of one element of a key or value
_LEVEL = re.compile(rb"accuracy_level\x18(.)", re.DOTALL)
_INTEGERS = re.compile(rb"\x22.(?:MatMulInteger|MatMulIntegerToFloat|DynamicQuantizeMatMul|QLinearMatMul)", re.DOTALL)
_INT8 = 4  # MatMulNBits' accuracy level of int8 activations
_HEAD_PART = "embedding and head"  # as the manifest's parts name it
_ENCODER = "encoder: "  # before the name of a part that is read once for a source, not for every token
_CROSS_BYTES = {"int8": 1}  # of one element of a key or value of the source, by the cache's dtype; else 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Say what a decoder reads and multiplies."""

    weight_bytes: int  # read for every step: all weights, of an embedding only the rows that are looked up
    step_multiply_adds: int  # of one token in all matrices but the head
    head_multiply_adds: int  # of one position's logits
    position_multiply_adds: int  # of one token's attention, per position that it looks at
    position_bytes: int  # keys and values of one position, all layers


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceWork:
    """Say what a source costs, once, and at every step of the decoder behind its encoder."""

    weight_bytes: int  # read once: the encoder's layers, and the projections to the decoder's keys and values
    token_multiply_adds: int  # of one token of the source in those matrices
    pair_multiply_adds: int  # of the encoder's attention, per pair of tokens
    token_bytes: int  # keys and values of one token of the source, all layers of the decoder
    step_multiply_adds: int  # of one step's attention, per token of the source


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Hold a figure beside what could be at best."""

    tokens: int  # positions that the step saw, or prompt tokens
    bytes: int
    multiply_adds: int
    read_ms: float
    compute_ms: float
    measured_ms: float

    def to_json(self) -> dict[str, Any]:
        """Return it as figures keep it: the limit, its share of what was measured, and what limits."""
        limit_ms = max(self.read_ms, self.compute_ms)
        share = limit_ms / self.measured_ms
        by = "overhead" if share < _NEAR else "reading" if self.read_ms >= self.compute_ms else "arithmetic"
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "multiply_adds": self.multiply_adds,
            "read_ms": self.read_ms,
            "compute_ms": self.compute_ms,
            "limit_ms": limit_ms,
            "measured_ms": self.measured_ms,
            "share": share,
            "limited_by": by,
        }


def on_processor(manifest: Mapping[str, Any]) -> bool:
    """Say whether a bundle runs on the processor, whose bandwidth and peaks are measured; not on a GPU or an NPU."""
    return manifest["engine"] != "qnn" and "gpu" not in manifest.get("library", {})


def bytes_per_run(manifest: Mapping[str, Any]) -> int:
    """Return the weight bytes that one run reads: a token's, or a call's of a model without a cache."""
    if manifest["task"] == "text-generation" or has_source(manifest):
        return decoder_work(manifest).weight_bytes
    parts = manifest["weights"]["parts"]
    return sum(int(part["bytes"]) for part in parts if part["part"] != _HEAD_PART) or int(manifest["weights"]["bytes"])


def has_source(manifest: Mapping[str, Any]) -> bool:
    """Say whether a bundle is a decoder behind an encoder, whose sizes its manifest tells: that of a student."""
    return "encoder_heads" in manifest["model"]


def source_work(manifest: Mapping[str, Any]) -> SourceWork:
    """Return what a source costs from the manifest of a decoder behind an encoder."""
    model = manifest["model"]
    element = _CROSS_BYTES.get(manifest["cache"]["dtype"], 4)
    parts = [part for part in manifest["weights"]["parts"] if part["part"].startswith(_ENCODER)]
    matrices = [part for part in parts if part["part"].removeprefix(_ENCODER) in ("attention", "mlp")]
    return SourceWork(
        weight_bytes=sum(part["bytes"] for part in parts),
        token_multiply_adds=sum(part["parameters"] for part in matrices),
        pair_multiply_adds=2 * model["encoder_layers"] * model["encoder_heads"] * model["encoder_head_dim"],
        token_bytes=2 * model["layers"] * model["kv_heads"] * model["head_dim"] * element,
        step_multiply_adds=2 * model["layers"] * model["heads"] * model["head_dim"],
    )


def decoder_work(manifest: Mapping[str, Any]) -> Work:
    """Return the work of a decoder from its manifest, without that of an encoder before it."""
    model = manifest["model"]
    parts = [part for part in manifest["weights"]["parts"] if not part["part"].startswith(_ENCODER)]
    head = model["vocab_size"] * model["hidden_size"]
    matrices = sum(part["parameters"] for part in parts if part["part"] in ("attention", "mlp"))
    element = _CACHE_BYTES[manifest["cache"]["dtype"]]
    return Work(
        weight_bytes=sum(part["bytes"] for part in parts) - _untouched_bytes(parts, head),
        step_multiply_adds=matrices,
        head_multiply_adds=head,
        position_multiply_adds=2 * model["layers"] * model["heads"] * model["head_dim"],
        position_bytes=2 * model["layers"] * model["kv_heads"] * model["head_dim"] * element,
    )


def _untouched_bytes(parts: list[Mapping[str, Any]], head: int) -> int:
    """Return the bytes of an embedding that isn't the head as well: of it, one row a token is read.

    Where both are stored differently the larger counts as the embedding, so that the limit stays a limit.
    """
    ends = [part for part in parts if part["part"] == _HEAD_PART]
    rest = sum(part["parameters"] for part in ends) - head
    if rest <= 0:
        return 0  # tied: the head reads it whole
    if len(ends) == 1:
        return int(ends[0]["bytes"] * rest // (rest + head))
    return max(int(part["bytes"]) for part in ends)


def precision(graph: bytes) -> str:
    """Return the arithmetic of most of a lowered graph's products: "int8" where activations are rounded to it.

    A product over packed weights says so in its attribute accuracy_level, written here as protobuf does: the name,
    then field 3, the integer. One of integers has an operator of its own: field 4 of a node, its length, its name. All
    others compute in float32.
    """
    levels = [level[0] for level in _LEVEL.findall(graph)]
    integers = len(_INTEGERS.findall(graph))
    return "int8" if 2 * (levels.count(_INT8) + integers) > max(len(levels) + integers, 1) else "float32"


def answer_limit(
    work: Work, source: SourceWork, positions: int, tokens: int, peaks: Mapping[str, Any], arithmetic: str, ms: float
) -> Limit:
    """Return the limit of one output token that looks at `positions` of the answer and `tokens` of the source."""
    nbytes = work.weight_bytes + positions * work.position_bytes + tokens * source.token_bytes
    adds = work.step_multiply_adds + work.head_multiply_adds
    adds += positions * work.position_multiply_adds + tokens * source.step_multiply_adds
    return _limit(positions, nbytes, adds, peaks, arithmetic, ms)


def source_limit(
    work: Work, source: SourceWork, tokens: int, peaks: Mapping[str, Any], arithmetic: str, ms: float
) -> Limit:
    """Return the limit of reading a source of `tokens` tokens at once, and of the first step after it."""
    first = answer_limit(work, source, 1, tokens, peaks, arithmetic, ms)
    nbytes = first.bytes + source.weight_bytes + tokens * source.token_bytes
    adds = first.multiply_adds + tokens * source.token_multiply_adds + tokens * tokens * source.pair_multiply_adds
    return _limit(tokens, nbytes, adds, peaks, arithmetic, ms)


def token_limit(work: Work, positions: int, peaks: Mapping[str, Any], arithmetic: str, measured_ms: float) -> Limit:
    """Return the limit of one output token that looks at `positions` positions, its own included."""
    nbytes = work.weight_bytes + positions * work.position_bytes
    adds = work.step_multiply_adds + work.head_multiply_adds + positions * work.position_multiply_adds
    return _limit(positions, nbytes, adds, peaks, arithmetic, measured_ms)


def prefill_limit(work: Work, tokens: int, chunk: int, peaks: Mapping[str, Any], arithmetic: str, ms: float) -> Limit:
    """Return the limit of a prompt's first step: weights once per chunk, every token in every matrix, one head.

    Each token looks at itself and those before it; what a kernel computes beyond that and throws away isn't counted.
    """
    chunks = -(-tokens // chunk)
    seen = tokens * (tokens + 1) // 2
    nbytes = chunks * work.weight_bytes + tokens * work.position_bytes
    adds = tokens * work.step_multiply_adds + work.head_multiply_adds * chunks + seen * work.position_multiply_adds
    return _limit(tokens, nbytes, adds, peaks, arithmetic, ms)


def call_limit(
    manifest: Mapping[str, Any], batch: int, tokens: int, peaks: Mapping[str, Any], arithmetic: str, ms: float
) -> Limit:
    """Return the limit of one call of an encoder: weights once, every token in every matrix, each looking at all."""
    model, parts = manifest["model"], manifest["weights"]["parts"]
    matrices = [part for part in parts if part["part"] in ("attention", "mlp")]
    adds = batch * tokens * sum(part["parameters"] for part in matrices)
    adds += 2 * batch * tokens * tokens * model["layers"] * model["hidden_size"]
    return _limit(tokens, bytes_per_run(manifest), adds, peaks, arithmetic, ms)


def _limit(
    tokens: int, nbytes: int, multiply_adds: int, peaks: Mapping[str, Any], arithmetic: str, measured_ms: float
) -> Limit:
    return Limit(
        tokens=tokens,
        bytes=nbytes,
        multiply_adds=multiply_adds,
        read_ms=1e3 * nbytes / peaks["read_bytes_per_second"],
        compute_ms=1e3 * multiply_adds / peaks["multiply_adds_per_second"][arithmetic],
        measured_ms=measured_ms,
    )
