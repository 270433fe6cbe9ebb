"""Take turns at whole calls: a bundle that embeds or classifies runs a batch of inputs at once, and is done.

A call of texts goes from the texts to the output: tokenizing, then one run. Every call has other texts, cut from the
evaluation text to a number of tokens. Calls of images and sound run seeded arrays of the size the graph takes. An
encoder with exits runs all its layers: which texts leave says nothing here, since they are cut anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe.measuring.generation import cut_ids
from edgepipe.measuring.memory import peak_memory_bytes

Json = dict[str, Any]

SHAPES = ((1, 32), (1, 128), (8, 128))  # (batch, tokens) of calls with texts
BATCHES = (1, 8)  # of calls without
REPEATS = 4  # calls of one shape in a turn
_SECONDS = 16_000  # samples where sound may have any length


def open_calls(bundle: Path, text: str, threads: int | None, begun: float) -> tuple[Json, Callable[[Json], Json]]:
    """Load a bundle and run a first call; return what that took, and what takes turns.

    A turn asks {"call": which shape, "number": of the call, "of": how many there will be}.
    """
    from edgepipe.runtime import open_graphs
    from edgepipe.runtime.bundle import read_bundle
    from edgepipe.runtime.encoder import Encoder

    imported = time.perf_counter()
    opened = read_bundle(bundle)
    model = Encoder(opened, open_graphs(opened, threads, exit_threshold=1))
    loaded = time.perf_counter()
    after_load = peak_memory_bytes()
    shapes = call_shapes(model.context)
    text_ids = model.tokenizer.encode(text, add_special_tokens=False) if model.tokenizer is not None else []

    def call(shape: int, number: int, of: int) -> tuple[float, float]:
        """Run one call; return the ms of tokenizing and of the run."""
        batch, tokens = shapes[shape]
        if tokens is None:
            feeds, tokenized = _seeded(model.inputs, batch, number), 0.0
        else:
            assert model.tokenizer is not None
            cuts = [cut_ids(text_ids, number * batch + row, of * batch, tokens) for row in range(batch)]
            texts = [model.tokenizer.decode(ids) for ids in cuts]
            before = time.perf_counter()
            feeds = model.feeds(texts, tokens)
            tokenized = time.perf_counter() - before
        before = time.perf_counter()
        model.run(feeds)
        return 1e3 * tokenized, 1e3 * (time.perf_counter() - before)

    def turn(asked: Json) -> Json:
        tokenize_ms, run_ms = call(asked["call"], asked["number"], asked["of"])
        return {"tokenize_ms": tokenize_ms, "run_ms": run_ms, "memory_peak_bytes": peak_memory_bytes()}

    first = sum(call(len(shapes) - 1, 0, 1))
    ready: Json = {
        "import_ms": 1e3 * (imported - begun),
        "load_ms": 1e3 * (loaded - imported),
        "first_call_ms": first,
        "calls": [list(shape) for shape in shapes],
        "repeats": REPEATS,
        "memory_after_load_bytes": after_load,
    }
    return ready, turn


def call_shapes(context: int | None) -> tuple[tuple[int, int | None], ...]:
    """Return the (batch, tokens) of the calls, tokens None for inputs that aren't texts; shorter where texts are."""
    if context is None:
        return tuple((batch, None) for batch in BATCHES)
    return tuple(sorted({(batch, min(tokens, context)) for batch, tokens in SHAPES}))


def call_name(batch: int, tokens: int | None) -> str:
    """Name a shape as figures do: "8x128", or "8" for inputs that aren't texts."""
    return str(batch) if tokens is None else f"{batch}x{tokens}"


def _seeded(inputs: Mapping[str, tuple[str, tuple[int | str, ...]]], batch: int, seed: int) -> dict[str, np.ndarray]:
    """Make arrays of the shapes the graph takes; a free axis is the batch, or a second of sound."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(
            [size if isinstance(size, int) else batch if size == "batch" else _SECONDS for size in shape]
        ).astype(dtype)
        for name, (dtype, shape) in inputs.items()
    }
