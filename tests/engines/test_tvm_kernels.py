"""The kernels that are written by hand, each beside the same in numpy, on sizes that fill no tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgepipe.numerics.grids import dequantize, round_to_nearest
from tests.decoders import stored, with_minima

pytest.importorskip("tvm", reason="TVM isn't here: pip install 'edgepipe[tvm]'")

import tvm
from tvm import te, tirx

from edgepipe.engines.native import level_here
from edgepipe.engines.tvm import attention as attentions
from edgepipe.engines.tvm import functions, packed, products
from edgepipe.engines.tvm.norms import norm
from edgepipe.engines.tvm.tiling import Tiling
from edgepipe.weights import WeightStore

CODES = {
    "4 bits": lambda value: round_to_nearest(value, bits=4, group=32, symmetric=True),
    "4 bits, zero points": lambda value: round_to_nearest(value, bits=4, group=16, symmetric=False),
    "4 bits, minima": lambda value: with_minima(value, bits=4),
    "8 bits": lambda value: round_to_nearest(value, bits=8, group=32, symmetric=True),
    "8 bits, whole rows": lambda value: round_to_nearest(value, bits=8, group=0, symmetric=True),
    "2 bits": lambda value: round_to_nearest(value, bits=2, group=32, symmetric=True),
}

FAST = ("4 bits", "4 bits, minima", "8 bits")  # the others are slow tests


def tensor(array: np.ndarray) -> Any:
    """Return an array as TVM takes it."""
    return tvm.runtime.tensor(np.ascontiguousarray(array))


def compiled(**kernels: Any) -> Any:
    """Compile kernels for this machine; they are called by their names."""
    named = {name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()}
    return tvm.compile(tvm.IRModule(named), target=tvm.target.Target(level_here().target()))


def random(*shape: int) -> np.ndarray:
    """Return seeded normal numbers."""
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("rows", [1, 11])
@pytest.mark.parametrize(
    "grid", [*FAST, *(pytest.param(grid, marks=pytest.mark.slow) for grid in CODES if grid not in FAST)]
)
def test_products_and_gathers_of_codes(grid: str, rows: int) -> None:
    """In float the product is exact; with activations of 8 bits it is off by what 8 bits cost."""
    value = CODES[grid](random(52, 80))
    weights = WeightStore({"w": stored("w", value)})
    w = packed.codes_of(value)
    known, block = (1, 1) if rows == 1 else (None, 4)
    kernels = {
        "sums": products.group_sums(w.columns, w.group, known),
        "exact": products.codes_product(w, known, Tiling(rows=block), integers=""),
        "gather": products.gather_codes(w, None),
    }
    if level_here().byte_products:
        kernels["rounded"] = products.rounded(w.columns, w.group, known)
        kernels["integers"] = products.codes_product(w, known, Tiling(rows=block), integers=level_here().byte_products)
    library = compiled(**kernels)
    parts = [tensor(planned.load()) for planned in packed.plan_codes(weights, "w", w)]
    decoded = dequantize(value)
    x = np.zeros((rows, w.columns), np.float32)
    x[:, :80] = random(rows, 80)
    expected = x[:, :80] @ decoded.T
    y, sums = tensor(np.zeros((rows, 52), np.float32)), tensor(np.zeros((rows, w.groups), np.float32))
    library["sums"](tensor(x), sums)
    library["exact"](tensor(x), sums, *parts, y)
    assert np.abs(y.numpy() - expected).max() < 1e-5 * np.abs(expected).max()
    if level_here().byte_products:
        codes, steps = tensor(np.zeros(x.shape, np.int8)), tensor(np.zeros((rows, w.groups), np.float32))
        library["rounded"](tensor(x), codes, steps, sums)
        library["integers"](codes, steps, sums, *parts, y)
        assert 1e-5 < np.abs(y.numpy() - expected).max() / np.abs(expected).max() < 2e-2
    ids = np.array([0, 17, 51, -1, 52, 1 << 40, -1 << 40])  # one beyond the table reads its nearest row
    found = tensor(np.zeros((7, 80), np.float32))
    library["gather"](tensor(ids), *parts, found)
    assert np.abs(found.numpy() - decoded[[0, 17, 51, 51, 51, 51, 0]]).max() < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("rows", "out"), [(1, 20), (13, 20), (13, 144)])
def test_products_of_floats(dtype: str, rows: int, out: int) -> None:
    """Narrow and wide tiles, none of them full, in each stored dtype."""
    import ml_dtypes

    value = random(out, 40).astype(getattr(ml_dtypes, dtype, dtype))
    w = packed.floats_of((out, 40), dtype)
    known = rows if rows == 1 else None
    library = compiled(product=products.float_product(w, known, Tiling(rows=1 if rows == 1 else 4)))
    weight = packed.plan_floats(WeightStore({"w": stored("w", value)}), "w", w).load()
    weight = np.ascontiguousarray(weight).view(products.stored_dtype(dtype))
    x, y = random(rows, 40), tensor(np.zeros((rows, out), np.float32))
    library["product"](tensor(x), tensor(weight), y)
    expected = x @ value.astype(np.float32).T
    assert np.abs(y.numpy() - expected).max() < 1e-5 * np.abs(expected).max()


def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, hidden: np.ndarray) -> np.ndarray:
    """Compute attention of [B, H, S, D] in float64; `hidden` is added to the scores."""
    repeat = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, repeat, axis=1).astype(np.float64) for x in (k, v))
    scores = q.astype(np.float64) @ k.transpose(0, 1, 3, 2) * scale + hidden
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    found: np.ndarray = weights / weights.sum(axis=-1, keepdims=True) @ v
    return found


def flat(x: np.ndarray) -> np.ndarray:
    """Return heads [B, H, S, D] side by side [B, S, H · D]."""
    b, h, s, d = x.shape
    return x.transpose(0, 2, 1, 3).reshape(b, s, h * d)


@pytest.mark.parametrize("head_dim", [pytest.param(16, marks=pytest.mark.slow), 20])
def test_attention(head_dim: int) -> None:
    """A mask of padding over grouped heads that lie side by side; a float mask and causality over heads apart."""
    batch, tokens = tirx.Var("batch", "int64"), tirx.Var("tokens", "int64")
    padded = attentions.Attention(
        heads=4, kv_heads=2, head_dim=head_dim, scale=0.3, layout="flat", kv_layout="flat", mask="bool"
    )
    causal = attentions.Attention(
        heads=2,
        kv_heads=2,
        head_dim=head_dim,
        scale=0.3,
        layout="heads",
        kv_layout="heads",
        mask="float32",
        causal=True,
    )
    library = compiled(
        padded=attentions.attention(padded, batch, tokens, tokens, [batch, 1, 1, tokens]),
        causal=attentions.attention(causal, batch, tokens, tokens, [1, 1, tokens, tokens]),
    )
    q, k, v = random(2, 4, 21, head_dim), random(2, 2, 21, head_dim), random(2, 2, 21, head_dim) + 1
    mask = np.ones((2, 1, 1, 21), bool)
    mask[1, ..., 15:] = False
    y = tensor(np.zeros((2, 21, 4 * head_dim), np.float32))
    library["padded"](*(tensor(flat(x)) for x in (q, k, v)), tensor(mask), y)
    assert np.abs(y.numpy() - flat(attended(q, k, v, 0.3, np.where(mask, 0, -np.inf)))).max() < 1e-5
    added = random(1, 1, 21, 21)
    y = tensor(np.zeros((2, 2, 21, head_dim), np.float32))
    library["causal"](*(tensor(x) for x in (q[:, :2], k, v)), tensor(added), y)
    later = np.where(np.tri(21) > 0, 0, -np.inf)
    assert np.abs(y.numpy() - attended(q[:, :2], k, v, 0.3, added + later)).max() < 1e-5


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-5), ("float16", 3e-3)])
@pytest.mark.parametrize("window", [pytest.param(0, marks=pytest.mark.slow), 5])
def test_attention_over_a_cache(window: int, dtype: str, allowed: float) -> None:
    """A prompt, single tokens, several tokens at once: the same as all of them together."""
    a = attentions.Attention(
        heads=4,
        kv_heads=2,
        head_dim=16,
        scale=0.3,
        layout="flat",
        kv_layout="heads",
        kv_dtype=dtype,
        cached=True,
        causal=True,
        window=window,
    )
    library = compiled(
        prompt=attentions.attention(a, 1, tirx.Var("tokens", "int64"), 64, None),
        step=attentions.attention(a, 1, 1, 64, None),
        append=attentions.append(2, 16, 64, None, dtype),
    )
    q, k, v = random(1, 4, 21, 16), random(1, 2, 21, 16), random(1, 2, 21, 16) + 1
    caches = [tensor(np.zeros((1, 2, 64, 16), dtype)) for _ in range(2)]
    pieces = []
    for start, end in [(0, 13), (13, 14), (14, 15), (15, 21)]:
        places = tensor(np.arange(start, end)[None])
        for new, cache in zip((k, v), caches, strict=True):
            library["append"](tensor(flat(new[:, :, start:end])), places, cache)
        y = tensor(np.zeros((1, end - start, 64), np.float32))
        library["step" if end == start + 1 else "prompt"](tensor(flat(q[:, :, start:end])), *caches, places, y)
        pieces.append(y.numpy())
    at = np.arange(21)
    seen = (at[None] <= at[:, None]) & ((at[None] > at[:, None] - window) if window else True)
    expected = flat(attended(q, k, v, 0.3, np.where(seen, 0, -np.inf)))
    assert np.abs(np.concatenate(pieces, axis=1) - expected).max() < allowed


@pytest.mark.parametrize("width", [48, 100, 33])
def test_norms(width: int) -> None:
    """Widths of whole vectors, of parts, and of none."""
    library = compiled(
        layer=norm(width, 1e-5, None, centred=True, bias=True), rms=norm(width, 1e-5, 1, centred=False, bias=False)
    )
    x, weight, bias = random(5, width) + 1, random(width), random(width)
    y = tensor(np.zeros_like(x))
    library["layer"](tensor(x), tensor(weight), tensor(bias), y)
    centred = x - x.mean(axis=1, keepdims=True)
    expected = centred / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5) * weight + bias
    assert np.abs(y.numpy() - expected).max() < 1e-5
    y = tensor(np.zeros_like(x[:1]))
    library["rms"](tensor(x[:1]), tensor(weight), y)
    assert np.abs(y.numpy() - x[:1] / np.sqrt(np.square(x[:1]).mean() + 1e-5) * weight).max() < 1e-5


def erf(x: np.ndarray) -> np.ndarray:
    """Return the error function by the standard library."""
    import math

    return np.vectorize(math.erf)(x)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (functions.exp, np.exp),
        (functions.erf, erf),
        (functions.tanh, np.tanh),
        (functions.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
        (functions.gelu, lambda x: x / 2 * (1 + erf(x / np.sqrt(2)))),
    ],
)
def test_functions(ours: Callable[[Any], Any], theirs: Callable[[np.ndarray], np.ndarray]) -> None:
    """As good as float32 lets them be, from far left to far right."""
    x = np.concatenate([np.linspace(-20, 20, 4001), [0.0, 1e-6, -1e-6]]).astype(np.float32)
    given = te.placeholder(x.shape, "float32", name="given")
    computed = te.compute(x.shape, lambda i: ours(given(i)), name="computed")
    library = compiled(f=te.create_prim_func([given, computed]))
    y = tensor(np.zeros_like(x))
    library["f"](tensor(x), y)
    expected = theirs(x.astype(np.float64))
    assert (np.abs(y.numpy() - expected) <= 1e-6 * np.maximum(np.abs(expected), 1)).all()
