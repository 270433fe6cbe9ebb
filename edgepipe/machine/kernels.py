"""The kernels of onnxruntime that a bundle needs, each on small random cases beside the same in numpy (float64).

    python -m edgepipe.machine.kernels NAME…        a child of the doctor: two JSON lines per name (`children.py`)

The lowering (`edgepipe/engines/onnxruntime/`) uses these operators and no others of com.microsoft. Sizes are small but
ragged, and cover one row and several, every group size, and blocks wide enough for the vector paths. int8 activations
are chosen on the grid that the kernel rounds to, so that its result must be the reference's and not only near it. Which
instructions onnxruntime takes can be neither seen nor chosen from outside; it goes by what the CPU reports.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from edgepipe.machine.child import attempt_all
from edgepipe.machine.children import WORKS, WRONG
from edgepipe.machine.onnx_bytes import BFLOAT16, FLOAT, FLOAT16, Array, Node, graph_bytes
from edgepipe.runtime.onnxruntime import run_graph

_MICROSOFT = "com.microsoft"
_SEED = 7
_GROUPS = (16, 32, 64, 128)  # block sizes that `quantize.group` allows
_ROWS = (1, 7)  # a step, a prompt
_CLOSE = 2e-5  # float32 sums of some hundred terms, of the largest result
_CLOSE_HALF = 2e-3  # results that are rounded to float16 on the way

Pair = tuple[np.ndarray, np.ndarray]  # what came, what should have come


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """Name one kernel's cases: each gives what onnxruntime computes and what is right."""

    cases: Callable[[], Iterator[Pair]]
    tolerance: float = _CLOSE  # largest difference ÷ largest result


def difference(came: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference as a share of the largest right result; infinite for other shapes and NaN."""
    if came.shape != expected.shape or not np.isfinite(came).all():
        return float("inf")
    return float(np.abs(came.astype(np.float64) - expected).max()) / float(np.abs(expected).max())


def check_kernel(kernel: Kernel) -> tuple[str, str]:
    """Run a kernel's cases; return WORKS or WRONG and the largest difference."""
    worst = max(difference(came, expected) for came, expected in kernel.cases())
    said = f"largest difference {worst:.1e} of the largest result"
    return (WORKS, said) if worst <= kernel.tolerance else (WRONG, f"{said}, expected {kernel.tolerance:.0e} at most")


# ---------------------------------------------------------------------------------------------------------------------
# weights on a grid


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return codes [..., n] with as many to a byte as fit, the earliest one in its lowest bits."""
    per_byte = 8 // bits
    short = -codes.shape[-1] % per_byte
    codes = np.concatenate([codes, np.zeros_like(codes[..., :short])], axis=-1)
    packed: np.ndarray = np.bitwise_or.reduce([codes[..., i::per_byte] << i * bits for i in range(per_byte)])
    return packed


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weight:
    """Hold a random quantized matrix and its float64 values [rows, columns]."""

    codes: np.ndarray  # [rows, columns · bits / 8] uint8
    scale: np.ndarray  # [rows, groups] float32, representable in float16 as a bundle's are
    zeros: np.ndarray | None  # [rows, groups · bits / 8] uint8, rows padded to whole bytes
    values: np.ndarray


def _weight(random: np.random.Generator, rows: int, groups: int, group: int, bits: int, with_zeros: bool) -> _Weight:
    codes = random.integers(0, 1 << bits, (rows, groups, group), np.uint8)
    scale = random.uniform(0.01, 0.1, (rows, groups)).astype(np.float16).astype(np.float32)
    zeros = random.integers(0, 1 << bits, (rows, groups), np.uint8) if with_zeros else None
    middle = np.float64(1 << (bits - 1)) if zeros is None else zeros[..., None].astype(np.float64)
    return _Weight(
        codes=_pack(codes.reshape(rows, -1), bits),
        scale=scale,
        zeros=None if zeros is None else _pack(zeros, bits),
        values=((codes - middle) * scale[..., None]).reshape(rows, -1),
    )


def _matmul(bits: int, level: int, with_zeros: bool) -> Iterator[Pair]:
    """Multiply by a matrix of 37 columns with every group size, for one row and for several."""
    random = np.random.default_rng(_SEED)
    out, groups = 37, 3
    for group in _GROUPS:
        weight = _weight(random, out, groups, group, bits, with_zeros)
        bias = random.standard_normal(out).astype(np.float32)
        constants: dict[str, Array] = {
            "codes": weight.codes.reshape(out, groups, -1),
            "scale": weight.scale,
            "bias": bias,
        }
        if weight.zeros is not None:
            constants["zeros"] = weight.zeros
        node = Node(
            op_type="MatMulNBits",
            inputs=["x", "codes", "scale", "zeros" if weight.zeros is not None else "", "", "bias"],
            outputs=["y"],
            domain=_MICROSOFT,
            attributes={"K": groups * group, "N": out, "bits": bits, "block_size": group, "accuracy_level": level},
        )
        for rows in _ROWS:
            x = _on_int8_grid(random, rows, groups, group)
            yield _run(node, {"x": x}, constants), x @ weight.values.T + bias


def _on_int8_grid(random: np.random.Generator, rows: int, groups: int, group: int) -> np.ndarray:
    """Make [rows, groups · group] float32 where each group is a step times whole numbers, ±127 among them."""
    codes = random.integers(-127, 128, (rows, groups, group))
    codes[..., 0] = 127
    step = 2.0 ** random.integers(-8, -5, (rows, groups, 1))
    return (codes * step).reshape(rows, -1).astype(np.float32)


def _gather(bits: int) -> Iterator[Pair]:
    """Look up rows of a quantized table, ids repeated."""
    random = np.random.default_rng(_SEED)
    for group in _GROUPS:
        for with_zeros in (False, True):
            table = _weight(random, 11, 3, group, bits, with_zeros)
            ids = random.integers(0, 11, (2, 5))
            constants: dict[str, Array] = {"codes": table.codes, "scale": table.scale}
            if table.zeros is not None:
                constants["zeros"] = table.zeros
            node = Node(
                op_type="GatherBlockQuantized",
                inputs=["codes", "ids", "scale", "zeros" if with_zeros else ""],
                outputs=["y"],
                domain=_MICROSOFT,
                attributes={"bits": bits, "block_size": group, "gather_axis": 0, "quantize_axis": 1},
            )
            yield _run(node, {"ids": ids}, constants), table.values[ids]


# ---------------------------------------------------------------------------------------------------------------------
# weights that are floats, norms, activation


def _fused_matmul() -> Iterator[Pair]:
    """Multiply by float16, bfloat16 and float32 weights behind a Cast."""
    random = np.random.default_rng(_SEED)
    for rows in _ROWS:
        for element in (FLOAT16, BFLOAT16, FLOAT):
            weight = random.standard_normal((37, 96)).astype(np.float32)
            stored, values = _stored(weight, element)
            x = random.standard_normal((rows, 96)).astype(np.float32)
            nodes = [
                Node(op_type="Cast", inputs=["weight"], outputs=["wide"], attributes={"to": FLOAT}),
                Node(
                    op_type="FusedMatMul",
                    inputs=["x", "wide"],
                    outputs=["y"],
                    domain=_MICROSOFT,
                    attributes={"transB": 1},
                ),
            ]
            graph = graph_bytes(nodes, {"x": x}, {"weight": stored}, {"y": (FLOAT, 2)})
            yield run_graph(graph, {"x": x}, {})["y"], x.astype(np.float64) @ values.T


def _stored(weight: np.ndarray, element: int) -> tuple[Array, np.ndarray]:
    """Return a float32 array as it is stored in an element type, and the float64 values that are left of it."""
    if element == FLOAT16:
        return weight.astype(np.float16), weight.astype(np.float16).astype(np.float64)
    if element == BFLOAT16:  # the upper halves of floats; numpy has no such type
        upper = (weight.view(np.uint32) >> 16).astype(np.uint16)
        return (BFLOAT16, upper), (upper.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return weight, weight.astype(np.float64)


def _norms() -> Iterator[Pair]:
    """Normalise by the root mean square, with and without an addition before."""
    random = np.random.default_rng(_SEED)
    scale = random.standard_normal(72).astype(np.float32)
    a, b = (random.standard_normal((1, 5, 72)).astype(np.float32) for _ in range(2))
    epsilon = 1e-5
    node = Node(
        op_type="SimplifiedLayerNormalization",
        inputs=["a", "scale"],
        outputs=["y"],
        attributes={"axis": -1, "epsilon": epsilon},
    )
    yield _run(node, {"a": a}, {"scale": scale}), _normalised(a, scale, epsilon)
    node = Node(
        op_type="SkipSimplifiedLayerNormalization",
        inputs=["a", "b", "scale"],
        outputs=["y", "", "", "sum"],
        domain=_MICROSOFT,
        attributes={"epsilon": epsilon},
    )
    feeds = {"a": a, "b": b}
    came = run_graph(graph_bytes([node], feeds, {"scale": scale}, {"y": (FLOAT, 3), "sum": (FLOAT, 3)}), feeds, {})
    both = a.astype(np.float64) + b
    yield came["sum"], both
    yield came["y"], _normalised(both, scale, epsilon)


def _normalised(x: np.ndarray, scale: np.ndarray, epsilon: float) -> np.ndarray:
    x = x.astype(np.float64)
    result: np.ndarray = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * scale
    return result


def _quick_gelu() -> Iterator[Pair]:
    x = np.random.default_rng(_SEED).standard_normal((3, 75)).astype(np.float32) * 4
    node = Node(op_type="QuickGelu", inputs=["x"], outputs=["y"], domain=_MICROSOFT, attributes={"alpha": 1.0})
    yield _run(node, {"x": x}, {}), x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64)))


# ---------------------------------------------------------------------------------------------------------------------
# attention

_NO_FLASH = "ORT_GQA_DISABLE_FLASH_ATTENTION"
_HEADS, _KV_HEADS, _HEAD_DIM, _CONTEXT = 4, 2, 16, 24


def _attention(dtype: str) -> Iterator[Pair]:
    """Run a prompt of 7 tokens and a step behind it, over one cache that is written in place; then with a window."""
    for window in (-1, 3):
        yield from _attention_within(dtype, window)


def _attention_without_flash() -> Iterator[Pair]:
    """Do the same with onnxruntime's other implementation, which an environment variable of its own asks for."""
    before = os.environ.get(_NO_FLASH)
    os.environ[_NO_FLASH] = "1"  # read when a session is made
    try:
        yield from _attention("float32")
    finally:
        if before is None:
            del os.environ[_NO_FLASH]
        else:
            os.environ[_NO_FLASH] = before


def _attention_within(dtype: str, window: int) -> Iterator[Pair]:
    random = np.random.default_rng(_SEED)
    width = (_HEADS + 2 * _KV_HEADS) * _HEAD_DIM
    angles = np.outer(np.arange(_CONTEXT), 100.0 ** -(np.arange(_HEAD_DIM // 2) / (_HEAD_DIM // 2)))
    tables = {"cos": np.cos(angles).astype(dtype), "sin": np.sin(angles).astype(dtype)}
    cache = {f"past_{kind}": np.zeros((1, _KV_HEADS, _CONTEXT, _HEAD_DIM), dtype) for kind in ("key", "value")}
    packed = random.standard_normal((1, 8, width)).astype(dtype)
    node = Node(
        op_type="GroupQueryAttention",
        inputs=["packed", "", "", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos", "sin"],
        outputs=["y", "present_key", "present_value"],
        domain=_MICROSOFT,
        attributes={
            "num_heads": _HEADS,
            "kv_num_heads": _KV_HEADS,
            "scale": _HEAD_DIM**-0.5,
            "do_rotary": 1,
            "local_window_size": window,
        },
    )
    element = FLOAT if dtype == "float32" else FLOAT16
    expected = _attended(packed[0].astype(np.float64), tables, window)
    for start, end in ((0, 7), (7, 8)):
        feeds = {
            "packed": packed[:, start:end].copy(),
            **cache,
            "seqlens_k": np.array([end - 1], np.int32),
            "total_sequence_length": np.array([end], np.int32),
        }
        graph = graph_bytes(
            [node], feeds, {**tables}, {name: (element, 3 if name == "y" else 4) for name in node.outputs}
        )
        in_place = {"present_key": "past_key", "present_value": "past_value"}
        yield run_graph(graph, feeds, in_place)["y"][0], expected[start:end]


def _attended(packed: np.ndarray, tables: dict[str, np.ndarray], window: int) -> np.ndarray:
    """Return causal attention with rotated queries and keys: packed [tokens, width] → [tokens, heads · head_dim].

    A token sees itself and the window − 1 tokens before it; −1: all of them.
    """
    tokens = len(packed)
    heads = packed.reshape(tokens, -1, _HEAD_DIM)
    cos, sin = (tables[name][:tokens, None].astype(np.float64) for name in ("cos", "sin"))
    low, high = np.split(heads[:, : _HEADS + _KV_HEADS], 2, axis=-1)
    rotated = np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    seen = np.tri(tokens, dtype=bool)
    if window > 0:
        seen &= ~np.tri(tokens, k=-window, dtype=bool)
    result = np.empty((tokens, _HEADS, _HEAD_DIM))
    for head in range(_HEADS):
        of = head * _KV_HEADS // _HEADS
        scores = rotated[:, head] @ rotated[:, _HEADS + of].T * _HEAD_DIM**-0.5
        scores[~seen] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        result[:, head] = weights / weights.sum(axis=-1, keepdims=True) @ heads[:, _HEADS + _KV_HEADS + of]
    return result.reshape(tokens, -1)


def _whole_attention() -> Iterator[Pair]:
    """Let 5 and 70 tokens of two texts see each other, then with padding at the end of the second."""
    random = np.random.default_rng(_SEED)
    for tokens in (5, 70):
        width = _HEADS * _HEAD_DIM
        feeds = {name: random.standard_normal((2, tokens, width)).astype(np.float32) for name in "qkv"}
        padded = np.stack([np.ones(tokens, np.int32), np.arange(tokens, dtype=np.int32) < tokens - 2])
        for inputs, mask in ((["q", "k", "v"], np.ones_like(padded)), (["q", "k", "v", "", "mask"], padded)):
            node = Node(
                op_type="MultiHeadAttention",
                inputs=inputs,
                outputs=["y"],
                domain=_MICROSOFT,
                attributes={"num_heads": _HEADS, "scale": _HEAD_DIM**-0.5},
            )
            given = {**feeds, "mask": mask} if "mask" in inputs else feeds
            yield _run(node, given, {}), _seen_both_ways(feeds, mask)


def _seen_both_ways(feeds: dict[str, np.ndarray], mask: np.ndarray) -> np.ndarray:
    """Return attention of q [rows, tokens, width] to all k and v where mask [rows, tokens] is 1."""
    q, k, v = (x.astype(np.float64).reshape(*x.shape[:2], _HEADS, _HEAD_DIM) for x in feeds.values())
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * _HEAD_DIM**-0.5
    scores = np.where(mask[:, None, None] == 1, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: np.ndarray = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(axis=-1, keepdims=True), v)
    return result.reshape(feeds["q"].shape)


def _run(node: Node, feeds: dict[str, np.ndarray], constants: dict[str, Array]) -> np.ndarray:
    """Run a graph of one node whose output is y, float32, of the first input's dimensions or one more (a Gather)."""
    dimensions = next(iter(feeds.values())).ndim + (node.op_type == "GatherBlockQuantized")
    return run_graph(graph_bytes([node], feeds, constants, {"y": (FLOAT, dimensions)}), feeds, {})["y"]


KERNELS: dict[str, Kernel] = {
    "MatMulNBits 2 bits, float32": Kernel(cases=lambda: _matmul(2, 0, False)),
    "MatMulNBits 2 bits, float32, zero points": Kernel(cases=lambda: _matmul(2, 0, True)),
    "MatMulNBits 2 bits, int8": Kernel(cases=lambda: _matmul(2, 4, False)),
    "MatMulNBits 2 bits, int8, zero points": Kernel(cases=lambda: _matmul(2, 4, True)),
    "MatMulNBits 4 bits, float32": Kernel(cases=lambda: _matmul(4, 0, False)),
    "MatMulNBits 4 bits, float32, zero points": Kernel(cases=lambda: _matmul(4, 0, True)),
    "MatMulNBits 4 bits, int8": Kernel(cases=lambda: _matmul(4, 4, False)),
    "MatMulNBits 4 bits, int8, zero points": Kernel(cases=lambda: _matmul(4, 4, True)),
    "MatMulNBits 8 bits, float32": Kernel(cases=lambda: _matmul(8, 0, False)),
    "MatMulNBits 8 bits, float32, zero points": Kernel(cases=lambda: _matmul(8, 0, True)),
    "MatMulNBits 8 bits, int8": Kernel(cases=lambda: _matmul(8, 4, False)),
    "MatMulNBits 8 bits, int8, zero points": Kernel(cases=lambda: _matmul(8, 4, True)),
    "GatherBlockQuantized 2 bits": Kernel(cases=lambda: _gather(2)),
    "GatherBlockQuantized 4 bits": Kernel(cases=lambda: _gather(4)),
    "GatherBlockQuantized 8 bits": Kernel(cases=lambda: _gather(8)),
    "FusedMatMul on float16, bfloat16, float32": Kernel(cases=_fused_matmul),
    "SkipSimplifiedLayerNormalization": Kernel(cases=_norms),
    "QuickGelu": Kernel(cases=_quick_gelu),
    "GroupQueryAttention, float32 cache": Kernel(cases=lambda: _attention("float32")),
    "GroupQueryAttention, float32 cache, not flash": Kernel(cases=_attention_without_flash),
    "GroupQueryAttention, float16 cache": Kernel(cases=lambda: _attention("float16"), tolerance=_CLOSE_HALF),
    "MultiHeadAttention": Kernel(cases=_whole_attention),
}

if __name__ == "__main__":
    attempt_all(sys.argv[1:], lambda name: check_kernel(KERNELS[name]))
