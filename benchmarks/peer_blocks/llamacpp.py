"""llama.cpp's block, through the low-level functions of llama-cpp-python: no copy of logits, no Python sampler."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peer_blocks.block import CONTEXT, VOCABULARY, Engine, Peer, Score, by_steps, log_softmax_at, main

FILE = "model.gguf"
_ERROR = 4  # ggml's level: what lies below would fill the log with every tensor


def open_context(path: Path, threads: int, settings: dict[str, Any]) -> Any:
    """Load the GGUF file in a folder and make a context of CONTEXT tokens."""
    import llama_cpp as lc

    lc.llama_log_set(_say_errors(), None)
    lc.llama_backend_init()
    model = lc.llama_model_load_from_file(str(path / FILE).encode(), lc.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp couldn't load {path / FILE}")
    parameters = lc.llama_context_default_params()
    parameters.n_ctx = CONTEXT
    parameters.n_threads = parameters.n_threads_batch = threads
    parameters.flash_attn_type = settings["flash_attention"]
    context = lc.llama_init_from_model(model, parameters)
    if not context:
        raise RuntimeError("llama.cpp couldn't make a context")
    return context


@functools.cache
def _say_errors() -> Any:
    """Return a callback for llama.cpp's log that lets errors through; kept alive, since C calls it."""
    import llama_cpp as lc

    @lc.llama_log_callback
    def say(level: int, text: bytes, _data: Any) -> None:
        if level >= _ERROR:
            sys.stderr.write(text.decode(errors="replace"))

    return say


def open_gguf(path: Path, threads: int, settings: dict[str, Any]) -> Engine:
    """Load a GGUF file; only the last token of a run gets logits."""
    import llama_cpp as lc

    context = open_context(path, threads, settings)
    memory = lc.llama_get_memory(context)

    def step(ids: list[int]) -> np.ndarray:
        tokens = (lc.llama_token * len(ids))(*ids)
        if (code := lc.llama_decode(context, lc.llama_batch_get_one(tokens, len(ids)))) != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        return np.ctypeslib.as_array(lc.llama_get_logits_ith(context, -1), (VOCABULARY,))

    def first(prompt: list[int]) -> np.ndarray:
        lc.llama_memory_clear(memory, True)
        return step(prompt)

    facts = {"version": lc.__version__, "system": lc.llama_print_system_info().decode().strip(" |")}
    return Engine(generate=by_steps(first, lambda token: step([token])), facts=facts)


def score_gguf(path: Path, threads: int, settings: dict[str, Any]) -> Score:
    """Score a window in one run, with logits for every position."""
    import llama_cpp as lc

    context = open_context(path, threads, settings)

    def score(ids: list[int]) -> np.ndarray:
        lc.llama_memory_clear(lc.llama_get_memory(context), True)
        batch = lc.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        if (code := lc.llama_decode(context, batch)) != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        logits = np.ctypeslib.as_array(lc.llama_get_logits(context), (len(ids), VOCABULARY))
        found = log_softmax_at(logits[:-1], ids[1:])
        lc.llama_batch_free(batch)
        return found

    return score


if __name__ == "__main__":
    main(Peer(open=open_gguf, score=score_gguf))
