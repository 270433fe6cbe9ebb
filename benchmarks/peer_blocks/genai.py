"""onnxruntime-genai's block: `append_tokens` and `generate_next_token` on what its builder wrote."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peer_blocks.block import CONTEXT, Engine, Moments, Peer, Score, log_softmax_at, main


def load_model(path: Path, threads: int) -> Any:
    """Load the model with a number of threads."""
    import onnxruntime_genai as og

    config = og.Config(str(path))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    return og.Model(config)


def open_model(path: Path, threads: int, settings: dict[str, Any]) -> Engine:
    """Load the model; a generator is made before the clock starts, and goes before the next one comes."""
    import onnxruntime_genai as og

    model = load_model(path, threads)

    def generate(prompt: list[int], new_tokens: int) -> tuple[Moments, list[int]]:
        parameters = og.GeneratorParams(model)
        least = len(prompt) + new_tokens + 1  # no end of text before
        parameters.set_search_options(do_sample=False, max_length=CONTEXT, min_length=least)
        generator = og.Generator(model, parameters)
        moments, ids = [], []
        begun = time.perf_counter()
        generator.append_tokens(prompt)
        while len(ids) < new_tokens:
            generator.generate_next_token()
            ids.append(int(generator.get_next_tokens()[0]))
            moments.append(time.perf_counter() - begun)
        return moments, ids

    return Engine(generate=generate, facts={"version": og.__version__})


def score_model(path: Path, threads: int, settings: dict[str, Any]) -> Score:
    """Score token by token: a model built for speed gives the last position's logits only."""
    import onnxruntime_genai as og

    model = load_model(path, threads)

    def score(ids: list[int]) -> np.ndarray:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, max_length=CONTEXT)
        generator = og.Generator(model, parameters)
        found = []
        for token, following in itertools.pairwise(ids):
            generator.append_tokens([token])
            logits = np.asarray(generator.get_output("logits"), np.float32)[0, -1:]
            found.append(log_softmax_at(logits, [following]))
        return np.concatenate(found)

    return score


if __name__ == "__main__":
    main(Peer(open=open_model, score=score_model))
