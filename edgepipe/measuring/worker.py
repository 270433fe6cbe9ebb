"""Measure one bundle in a process of its own, so that memory is the runtime's and nothing else's.

    python -m edgepipe.measuring.worker speed BUNDLE TEXT THREADS ROUNDS      → one JSON document on stdout
    python -m edgepipe.measuring.worker perplexity BUNDLE TEXT THREADS TOKENS    TOKENS: at most, 0 = all

TTFT: from the prompt's text to the first token's id (tokenizing, one run over the prompt, argmax), a different prompt
every time, nothing reused. Time per output token: from id to id, greedy. Memory: the peak of the whole process (VmHWM).
Perplexity: exp of the mean negative log-likelihood over windows of the text, each window starting from nothing.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe.measuring.parent import end_with_parent

PROMPT_TOKENS = 128
NEW_TOKENS = 64
_WARM_UP_TOKENS = 4


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process: VmHWM where /proc has it, else ru_maxrss."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def measure_speed(bundle: Path, text: str, threads: int | None, rounds: int) -> dict[str, Any]:
    """Return raw samples of one process: load, TTFT and time per output token in ms, memory in bytes."""
    started = time.perf_counter()
    from edgepipe.runtime.bundle import read_bundle
    from edgepipe.runtime.onnxruntime import open_decoder
    from edgepipe.runtime.tokenizer import Tokenizer

    imported = time.perf_counter()
    opened = read_bundle(bundle)
    tokenizer = Tokenizer(opened.tokenizer)
    decoder = open_decoder(opened.path, opened.manifest, threads)
    loaded = time.perf_counter()
    after_load = peak_memory_bytes()
    new_tokens = min(NEW_TOKENS, decoder.context // 2)
    prompt_tokens = min(PROMPT_TOKENS, decoder.context - new_tokens)
    prompts = _prompts(tokenizer, text, prompt_tokens, rounds + 1)
    cache = decoder.new_cache(1)

    def step(ids: list[int], past: int) -> int:
        array = np.array([ids], np.int64)
        last = np.array([[len(ids) - 1]], np.int64)
        logits = decoder.run(cache, array, np.array([past]), np.array([len(ids)]), last)
        return int(logits[0, 0].argmax())

    ttft_ms, token_ms = [], []
    for number, prompt in enumerate(prompts):
        begun = time.perf_counter()
        # a cut inside a letter, or a first token that the tokenizer adds, makes more tokens than were cut
        ids = tokenizer.encode(prompt)[:prompt_tokens]
        token = step(ids, 0)
        first = time.perf_counter()
        times = []
        for i in range(_WARM_UP_TOKENS if number == 0 else new_tokens):
            before = time.perf_counter()
            token = step([token], len(ids) + i)
            times.append(1e3 * (time.perf_counter() - before))
        if number:  # the first prompt warms caches and is not counted
            ttft_ms.append(1e3 * (first - begun))
            token_ms.append(times)
    return {
        "import_ms": 1e3 * (imported - started),
        "load_ms": 1e3 * (loaded - imported),
        "ttft_ms": ttft_ms,
        "token_ms": token_ms,
        "prompt_tokens": len(ids),
        "memory_after_load_bytes": after_load,
        "memory_peak_bytes": peak_memory_bytes(),
    }


def measure_perplexity(bundle: Path, text: str, threads: int | None, tokens: int) -> dict[str, Any]:
    """Return the perplexity of a text through the bundle's runtime, with the tokens it was counted over."""
    from edgepipe.measuring.quality import WINDOW_TOKENS, cut_windows, perplexity, score_windows
    from edgepipe.runtime import load

    model = load(bundle, threads=threads, callers=1)
    ids = model.encode(text)[: tokens or None]
    window = min(WINDOW_TOKENS, model.context)
    rows = score_windows(model, cut_windows(ids, window))
    return {"perplexity": perplexity(rows), "tokens": int(rows[:, 1].sum()), "window_tokens": window}


def _prompts(tokenizer: Any, text: str, tokens: int, count: int) -> list[str]:
    """Cut `count` different prompts of about `tokens` tokens from the text, going round when it is short."""
    ids = tokenizer.encode(text)
    while len(ids) < tokens + count:
        ids = ids + ids
    stride = max(1, (len(ids) - tokens) // count)
    return [tokenizer.decode(ids[i * stride : i * stride + tokens]) for i in range(count)]


def main(arguments: list[str]) -> None:
    """Run one measurement and print it as JSON."""
    kind, bundle, text_file, threads = arguments[:4]
    text = Path(text_file).read_text(encoding="utf-8")
    chosen = int(threads) or None
    if kind == "speed":
        result = measure_speed(Path(bundle), text, chosen, int(arguments[4]))
    else:
        result = measure_perplexity(Path(bundle), text, chosen, int(arguments[4]))
    print(json.dumps(result))


if __name__ == "__main__":
    end_with_parent()
    main(sys.argv[1:])
