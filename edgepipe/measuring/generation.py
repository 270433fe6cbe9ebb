"""Take turns at text generation: TTFT at several prompt lengths, then time per output token.

A prompt is text. Its TTFT goes from the text to the first token's id: tokenizing, then the first step (the prompt's
tokens in the runtime's chunks, and the largest logit). Every prompt is another one, and the cache starts empty each
time. Output tokens are greedy, from id to id, after the headline's prompt. They come in short bursts, so that
other processes can be measured between them; the first token of a burst finds cold caches and isn't counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe.measuring.memory import peak_memory_bytes

Json = dict[str, Any]

PROMPT_TOKENS = (32, 128, 512)
BURST_TOKENS = 5  # of which the first isn't counted
_WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Say what a turn is made of: the prompt that is the headline, and how many tokens follow it."""

    prompt: int = 128  # tokens; prompts of PROMPT_TOKENS are timed beside it
    output: int = 80  # tokens, in bursts


def bursts_for(context: int, output: int) -> tuple[int, int]:
    """Return how many bursts a turn has and how many tokens each: bursts of 5, less where half the context is less."""
    room = max(1, min(output, context // 2))
    tokens = min(BURST_TOKENS, room)
    return room // tokens, tokens


def prompt_lengths(context: int, lengths: Lengths) -> tuple[int, ...]:
    """Return the prompt lengths that leave room for the output, in the order of a turn: what decodes comes last."""
    bursts, tokens = bursts_for(context, lengths.output)
    return source_lengths(context - bursts * tokens, lengths)


def source_lengths(context: int, lengths: Lengths) -> tuple[int, ...]:
    """Return the lengths of sources, in the order of a turn: what is answered comes last."""
    headline = min(lengths.prompt, context)
    return (*sorted({min(length, context) for length in PROMPT_TOKENS} - {headline}), headline)


def shared_prompt(models: Iterable[Json], lengths: Lengths) -> int:
    """Return the headline's tokens that bundles have room for, all of them; `models` is what their manifests say."""
    return min(_lengths(model, model["context"], lengths)[-1] for model in models)


def _lengths(model: Json, context: int, lengths: Lengths) -> tuple[int, ...]:
    """Return the lengths a bundle is timed with: of sources where an encoder reads them, else of prompts."""
    if "decoder_prefix_ids" in model:
        return source_lengths(model["source_context"], lengths)
    return prompt_lengths(context, lengths)


def open_generation(
    bundle: Path, text: str, threads: int | None, begun: float, wanted: Lengths
) -> tuple[Json, Callable[[Json], Json]]:
    """Load a bundle and run its first prompt; return what that took, and what takes turns.

    A turn begins with {"prompts": number, "of": how many turns there will be}: one prompt of every length; each
    {"tokens": n} after it continues by n tokens. `begun` is when the process began, on the clock of time.perf_counter.
    """
    from edgepipe.runtime import open_graphs
    from edgepipe.runtime.bundle import read_bundle
    from edgepipe.runtime.text_generation import PROMPT_CHUNK
    from edgepipe.runtime.tokenizer import Tokenizer

    imported = time.perf_counter()
    opened = read_bundle(bundle)
    assert opened.tokenizer is not None, "read_bundle has looked"
    tokenizer = Tokenizer(opened.tokenizer)
    decoder = open_graphs(opened, threads)
    prefix = opened.manifest["model"].get("decoder_prefix_ids")  # of an answer to a source that an encoder reads
    loaded = time.perf_counter()
    after_load = peak_memory_bytes()
    cache = decoder.new_cache(1)
    lengths = _lengths(opened.manifest["model"], decoder.context, wanted)
    text_ids = tokenizer.encode(text)
    token, past = 0, 0  # the last token, and how many the cache holds

    def step(ids: list[int], past: int) -> int:
        """Run ids after `past` tokens; return the id with the largest logit."""
        logits = np.empty(0, np.float32)
        for start in range(0, len(ids), PROMPT_CHUNK):
            chunk = ids[start : start + PROMPT_CHUNK]
            last = np.array([[len(chunk) - 1]], np.int64)
            array = np.array([chunk], np.int64)
            logits = decoder.run(cache, array, np.array([past + start]), np.array([len(chunk)]), last)
        return int(logits[0, -1].argmax())

    def prompt(number: int, of: int, length: int) -> tuple[float, float, int]:
        """Run the number-th of many prompts; return the ms of tokenizing and of the first step, and the first id."""
        written = tokenizer.decode(cut_ids(text_ids, number, of, length))
        before = time.perf_counter()
        # a cut inside a letter, or a first token that the tokenizer adds, makes more tokens than were cut
        ids = tokenizer.encode(written)[:length]
        encoded = time.perf_counter()
        if prefix is None:
            token = step(ids, 0)
        else:
            decoder.read_source(cache, 0, np.array([ids], np.int64))
            token = step(prefix, 0)
        return 1e3 * (encoded - before), 1e3 * (time.perf_counter() - encoded), token

    def decode(count: int) -> list[float]:
        """Continue greedily; return the ms of each token."""
        nonlocal token, past
        times = []
        for _ in range(count):
            before = time.perf_counter()
            token = step([token], past)
            times.append(1e3 * (time.perf_counter() - before))
            past += 1
        return times

    def turn(asked: Json) -> Json:
        nonlocal token, past
        if "tokens" in asked:
            times = decode(asked["tokens"])
            return {"token_ms": times[1:] or times, "memory_peak_bytes": peak_memory_bytes()}
        ttft: dict[str, list[float]] = {}
        for place, length in enumerate(lengths):
            # one more than the turns: the first prompt of every process is the last of them
            number, of = asked["prompts"] * len(lengths) + place, (asked["of"] + 1) * len(lengths)
            tokenize_ms, first_step_ms, token = prompt(number, of, length)
            ttft[str(length)] = [tokenize_ms, first_step_ms]
        past = start
        return {"ttft": ttft}

    tokenize_ms, first_step_ms, token = prompt(len(lengths) - 1, len(lengths), lengths[-1])
    start = lengths[-1] if prefix is None else len(prefix)
    past = start
    bursts, burst_tokens = bursts_for(decoder.context, wanted.output)
    decode(min(_WARM_UP_TOKENS, bursts * burst_tokens))
    ready: Json = {
        "import_ms": 1e3 * (imported - begun),
        "load_ms": 1e3 * (loaded - imported),
        "first_token_ms": tokenize_ms + first_step_ms,
        "prompt_tokens": list(lengths),
        "bursts": bursts,
        "burst_tokens": burst_tokens,
        "memory_after_load_bytes": after_load,
    }
    return ready, turn


def cut_ids(ids: list[int], number: int, of: int, length: int) -> list[int]:
    """Return the number-th of `of` different cuts of `length` ids, going round the text when it is short."""
    start = number * max(1, (len(ids) - length) // of)
    while len(ids) < start + length:
        ids = ids + ids
    return ids[start : start + length]


def memory_without_model(bundle: Path) -> Json:
    """Import what a process with a model imports and open the tokenizer; return the memory of that alone."""
    import edgepipe.runtime
    from edgepipe.runtime.bundle import read_bundle
    from edgepipe.runtime.tokenizer import Tokenizer

    opened = read_bundle(bundle)
    if opened.manifest["engine"] == "tvm":
        from edgepipe.runtime.tvm import open_package

        open_package()
    else:
        import edgepipe.runtime.onnxruntime  # noqa: F401
    file = opened.tokenizer
    if file is not None:
        Tokenizer(file).encode("A first text makes the tokenizer build what it needs.")
    return {"memory_bytes": peak_memory_bytes()}
