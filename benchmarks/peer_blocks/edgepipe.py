"""edgepipe's block: a bundle through the decoder that `edgepipe.runtime.load` uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peer_blocks.block import CONTEXT, Engine, Peer, Score, by_steps, main


def open_bundle(path: Path, threads: int, settings: dict[str, Any]) -> Engine:
    """Load a bundle; it has no settings of its own at run time."""
    from edgepipe.runtime.bundle import read_bundle
    from edgepipe.runtime.onnxruntime import open_decoder

    bundle = read_bundle(path)
    decoder = open_decoder(bundle.path, bundle.manifest, threads)
    if decoder.context != CONTEXT:
        raise ValueError(f"every engine should hold {CONTEXT} tokens, but the bundle holds {decoder.context}")
    cache = decoder.new_cache(1)
    past = 0

    def step(ids: list[int]) -> np.ndarray:
        nonlocal past
        last = np.array([[len(ids) - 1]], np.int64)
        logits = decoder.run(cache, np.array([ids], np.int64), np.array([past]), np.array([len(ids)]), last)
        past += len(ids)
        row: np.ndarray = logits[0, 0]
        return row

    def first(prompt: list[int]) -> np.ndarray:
        nonlocal past
        past = 0
        return step(prompt)

    return Engine(generate=by_steps(first, lambda token: step([token])))


def score_bundle(path: Path, threads: int, settings: dict[str, Any]) -> Score:
    """Score through the same runtime."""
    from edgepipe.runtime import load

    return load(path, threads=threads, callers=1).token_logprobs


if __name__ == "__main__":
    main(Peer(open=open_bundle, score=score_bundle))
