"""Time one engine in a process of its own; the last line of stdout is a JSON document.

    python benchmarks/genai_block.py ENGINE PATH THREADS SEED      ENGINE: edgepipe or genai

One prompt warms the engine up and the next ones count. Prompts are fixed token ids, a new one each time; both engines
get the same. TTFT: from ids to the first new id. Time per output token: from id to id. Greedy, end of text suppressed.
Making a cache or a generator happens before the clock starts, and both hold `CONTEXT` tokens.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe.measuring.memory import peak_memory_bytes

PROMPT_TOKENS = 128
NEW_TOKENS = 64
PROMPTS = 3
CONTEXT = 2048
_FIRST_PLAIN_ID = 100  # below lie special tokens
_VOCABULARY = 49152

Next = Callable[[], int]
Start = Callable[[list[int]], tuple[Next, Next]]  # ids → (what gives the first new id, what gives every later one)


def open_edgepipe(path: Path, threads: int) -> Start:
    """Load a bundle as the runtime does and return what starts a prompt on it."""
    from edgepipe.runtime.bundle import read_bundle
    from edgepipe.runtime.onnxruntime import open_decoder

    bundle = read_bundle(path)
    decoder = open_decoder(bundle.path, bundle.manifest, threads)
    if decoder.context != CONTEXT:
        raise ValueError(f"both engines should hold {CONTEXT} tokens, but the bundle holds {decoder.context}")
    ends = bundle.manifest["model"]["eos_token_ids"]
    cache = decoder.new_cache(1)

    def start(prompt: list[int]) -> tuple[Next, Next]:
        past, last = 0, 0

        def step(ids: list[int]) -> int:
            nonlocal past, last
            array = np.array([ids], np.int64)
            position = np.array([[len(ids) - 1]], np.int64)
            logits = decoder.run(cache, array, np.array([past]), np.array([len(ids)]), position)
            logits[0, 0, ends] = -np.inf
            past += len(ids)
            last = int(logits[0, 0].argmax())
            return last

        return lambda: step(prompt), lambda: step([last])

    return start


def open_genai(path: Path, threads: int) -> Start:
    """Load onnxruntime-genai's model and return what starts a prompt on it."""
    import onnxruntime_genai as og

    config = og.Config(str(path))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def start(prompt: list[int]) -> tuple[Next, Next]:
        parameters = og.GeneratorParams(model)
        least = PROMPT_TOKENS + NEW_TOKENS + 1  # no end of text before
        parameters.set_search_options(do_sample=False, max_length=CONTEXT, min_length=least)
        generator = og.Generator(model, parameters)
        ids = np.array([prompt], np.int32)

        def following() -> int:
            generator.generate_next_token()
            return int(generator.get_next_tokens()[0])

        def first() -> int:
            generator.append_tokens(ids)
            return following()

        return first, following

    return start


def measure(engine: str, path: Path, threads: int, seed: int) -> dict[str, Any]:
    """Return one block's raw samples: times in ms, memory in bytes, and the ids each prompt gave."""
    prompts = np.random.default_rng(seed).integers(_FIRST_PLAIN_ID, _VOCABULARY, (PROMPTS + 1, PROMPT_TOKENS))
    begun = time.perf_counter()
    start = open_edgepipe(path, threads) if engine == "edgepipe" else open_genai(path, threads)
    load_ms = 1e3 * (time.perf_counter() - begun)
    after_load = peak_memory_bytes()
    ttft_ms, token_ms, tokens = [], [], []
    for number, prompt in enumerate(prompts):
        first, following = start(prompt.tolist())
        before = time.perf_counter()
        ids = [first()]
        times = [1e3 * (time.perf_counter() - before)]
        for _ in range(NEW_TOKENS):
            before = time.perf_counter()
            ids.append(following())
            times.append(1e3 * (time.perf_counter() - before))
        if number:  # the first prompt touches memory and warms caches
            ttft_ms.append(times[0])
            token_ms.append(times[1:])
            tokens.append(ids)
        del first, following  # with them goes genai's generator: two at once would count its cache twice
    return {
        "load_ms": load_ms,
        "ttft_ms": ttft_ms,
        "token_ms": token_ms,
        "tokens": tokens,
        "memory_after_load_bytes": after_load,
        "memory_peak_bytes": peak_memory_bytes(),
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
