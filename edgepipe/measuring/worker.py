"""Measure in a process of its own, so that memory is the runtime's and nothing else's.

    python -m edgepipe.measuring.worker KIND BUNDLE TEXT THREADS [NUMBER…]

Every kind prints one line of JSON when it is ready; kinds that take turns then answer every line on stdin with another:

    speed        load the bundle, run a first prompt; then prompts and bursts of tokens (generation.py), or calls of a
                 bundle that embeds or classifies (calls.py); NUMBERs: tokens of the headline's prompt, of its output
    index        make ready; then the fixed piece of work of the machine-speed index (index.py)
    memory       the same process without the model: packages and tokenizer alone
    limits       what this machine can read at the bundle's size, and multiply (peaks.py)
    perplexity   exp of the mean negative log-likelihood over windows of the text; NUMBER: tokens at most (0: all)
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_BEGUN = time.perf_counter()  # before numpy and the engine are imported: a cold start pays for them

GENERATION = ("text-generation", "text2text-generation")  # as runtime.bundle has them: imported only when timed
TURNS = ("speed", "index")  # kinds that answer questions

Json = dict[str, Any]
Turn = Callable[[Json], Json]


def task_of(bundle: Path) -> str:
    """Return a bundle's task; its manifest is checked when the bundle is opened."""
    return str(json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["task"])


def measure_perplexity(bundle: Path, text: str, threads: int | None, tokens: int) -> Json:
    """Return the perplexity of a text through the bundle's runtime, with the tokens it was counted over."""
    from edgepipe.errors import ConfigError
    from edgepipe.measuring.quality import WINDOW_TOKENS, cut_windows, perplexity, score_windows
    from edgepipe.runtime import Model, load

    model = load(bundle, threads=threads, callers=1)
    if not isinstance(model, Model):
        raise ConfigError(f"{model.name} is for {model.manifest['task']}: perplexity is of models that continue a text")
    ids = model.encode(text)[: tokens or None]
    window = min(WINDOW_TOKENS, model.context)
    rows = score_windows(model, cut_windows(ids, window))
    return {"perplexity": perplexity(rows), "tokens": int(rows[:, 1].sum()), "window_tokens": window}


def open_block(
    kind: str, bundle: Path, text: str, threads: int | None, numbers: Sequence[int]
) -> tuple[Json, Turn | None]:
    """Return what a kind says when it is ready, and what takes its turns, if it has any."""
    if kind == "speed":
        if task_of(bundle) in GENERATION:
            from edgepipe.measuring.generation import Lengths, open_generation

            prompt, output = numbers
            return open_generation(bundle, text, threads, _BEGUN, Lengths(prompt=prompt, output=output))
        from edgepipe.measuring.calls import open_calls

        return open_calls(bundle, text, threads, _BEGUN)
    if kind == "index":
        from edgepipe.measuring.index import open_index

        return open_index(bundle, threads)
    if kind == "memory":
        from edgepipe.measuring.generation import memory_without_model

        return memory_without_model(bundle), None
    if kind == "limits":
        from edgepipe.measuring.peaks import measure_peaks

        return measure_peaks(bundle, threads), None
    return measure_perplexity(bundle, text, threads, numbers[0]), None


def main(arguments: list[str]) -> None:
    """Print what is ready, then answer turns until stdin ends."""
    kind, bundle, text_file, threads = arguments[:4]
    text = Path(text_file).read_text(encoding="utf-8")
    ready, turn = open_block(kind, Path(bundle), text, int(threads) or None, [int(n) for n in arguments[4:]])
    print(json.dumps(ready), flush=True)
    if turn is not None:
        for line in sys.stdin:
            print(json.dumps(turn(json.loads(line))), flush=True)


if __name__ == "__main__":
    if sys.argv[1] not in TURNS:  # those read stdin themselves, and end when it does
        from edgepipe.measuring.parent import end_with_parent

        end_with_parent()
    main(sys.argv[1:])
