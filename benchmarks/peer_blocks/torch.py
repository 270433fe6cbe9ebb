"""torch's block: transformers' own model of the float checkpoint, eager. The baseline, not a product for devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peer_blocks.block import Engine, Peer, Score, by_steps, log_softmax_at, main


def load_module(path: Path, threads: int, settings: dict[str, Any]) -> Any:
    """Load the checkpoint in the dtype that the settings name."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, settings["dtype"])).eval()


def open_module(path: Path, threads: int, settings: dict[str, Any]) -> Engine:
    """Load the module; logits are computed for the last position only, keys and values are kept."""
    import torch
    from transformers import DynamicCache

    module = load_module(path, threads, settings)
    cache: Any = None

    def step(ids: list[int]) -> np.ndarray:
        out = module(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        row: np.ndarray = out.logits[0, -1].float().numpy()
        return row

    def first(prompt: list[int]) -> np.ndarray:
        nonlocal cache
        cache = DynamicCache(config=module.config)
        return step(prompt)

    facts = {"version": torch.__version__, "dtype": str(module.dtype)}
    return Engine(generate=by_steps(first, lambda token: step([token])), facts=facts)


def score_module(path: Path, threads: int, settings: dict[str, Any]) -> Score:
    """Score a window in one run."""
    import torch

    module = load_module(path, threads, settings)

    def score(ids: list[int]) -> np.ndarray:
        logits = module(torch.tensor([ids])).logits[0, :-1].float().numpy()
        return log_softmax_at(logits, ids[1:])

    return score


if __name__ == "__main__":
    main(Peer(open=open_module, score=score_module))
