"""CTranslate2's block: `generate_batch` with a callback that notes when each token came."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peer_blocks.block import Engine, Moments, Peer, Score, main


def open_generator(path: Path, threads: int, settings: dict[str, Any]) -> Engine:
    """Load a converted model; the whole prompt is forwarded at once (`include_prompt_in_result=False`)."""
    import ctranslate2

    generator = ctranslate2.Generator(
        str(path), device="cpu", compute_type=settings["compute_type"], inter_threads=1, intra_threads=threads
    )
    vocabulary = json.loads((path / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(prompt: list[int], new_tokens: int) -> tuple[Moments, list[int]]:
        start = [vocabulary[token] for token in prompt]
        moments: Moments = []
        ids: list[int] = []

        def note(step: Any) -> bool:
            moments.append(time.perf_counter() - begun)
            ids.append(int(step.token_id))
            return False

        begun = time.perf_counter()
        generator.generate_batch(
            [start],
            max_length=new_tokens,
            min_length=new_tokens,
            include_prompt_in_result=False,
            callback=note,
        )
        return moments, ids

    facts = {"version": ctranslate2.__version__, "compute_type": generator.compute_type}
    return Engine(generate=generate, facts=facts)


def score_generator(path: Path, threads: int, settings: dict[str, Any]) -> Score:
    """Score a window in one run."""
    import ctranslate2

    generator = ctranslate2.Generator(
        str(path), device="cpu", compute_type=settings["compute_type"], inter_threads=1, intra_threads=threads
    )

    def score(ids: list[int]) -> np.ndarray:
        found = np.asarray(generator.forward_batch([ids], return_log_probs=True))[0]
        return found[np.arange(len(ids) - 1), ids[1:]].astype(np.float64)

    return score


if __name__ == "__main__":
    main(Peer(open=open_generator, score=score_generator))
