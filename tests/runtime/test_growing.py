"""Decoders whose cache grows: answers are transformers' own, whole, streamed, in batches, from a rewound cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe.errors import ConfigError
from edgepipe.graph.framework import build_module, fill_module
from edgepipe.runtime import Model, load
from edgepipe.runtime.growing import GrowingDecoder, Row
from edgepipe.sources import open_model
from edgepipe.verify import verify_bundle
from edgepipe.weights import Weight, WeightStore

PROMPTS = ["The river carried the timber", "Mill", "Every spring the water rose, and every spring somebody said it."]
TOKENS = 12


@pytest.fixture(scope="module")
def bundles(family_bundle: Callable[..., Path]) -> dict[str, Path]:
    """Make bundles with 16-bit weights: near ties are as torch has them."""
    return {name: family_bundle(name, bits=16) for name in ("t5", "gpt2")}


@pytest.fixture(scope="module", params=["t5", "gpt2"])
def pair(request: pytest.FixtureRequest, bundles: dict[str, Path], family_dir: Callable[[str], Path]) -> Any:
    """Load a bundle, and transformers' model with the weights as they are in it."""
    source = open_model(str(family_dir(request.param)))
    module = build_module(source.info)
    halves = {
        name: _half(weight) if len(weight.shape) > 1 else weight
        for name, weight in ((name, source.weights[name]) for name in source.weights)
    }
    fill_module(module, WeightStore(halves, source.weights.aliases))
    model = load(bundles[request.param], threads=1)
    assert isinstance(model, Model)
    return model, module


def _half(weight: Weight) -> Weight:
    return dataclasses.replace(weight, load=lambda: weight.load().astype(np.float16))


def theirs(module: Any, model: Model, prompt: str) -> list[int]:
    """Return transformers' greedy answer, without what it begins with and without the end token."""
    import torch

    ids = torch.tensor([model.encode(prompt)])
    given = {"do_sample": False, "num_beams": 1, "max_new_tokens": TOKENS, "attention_mask": torch.ones_like(ids)}
    found: list[int] = module.generate(ids, **given)[0].tolist()
    answer = found[1:] if module.config.is_encoder_decoder else found[ids.shape[1] :]
    ends = set(model.manifest["model"]["eos_token_ids"])
    return answer[: next((i for i, token in enumerate(answer) if token in ends), len(answer))]


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_bundles_are_verified(name: str, bundles: dict[str, Path]) -> None:
    """One graph or two, whose cache has no fixed size."""
    checks = verify_bundle(bundles[name])["checks"]
    assert [check for check in checks if check["ok"] is not True] == []


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_answers_are_transformers_own(pair: Any, prompt: str) -> None:
    """Token by token, up to the same end."""
    model, module = pair
    answer = model.generate(prompt, max_new_tokens=TOKENS)
    assert list(answer.token_ids) == theirs(module, model, prompt)
    assert answer.prompt_tokens == len(model.encode(prompt))


def test_a_stream_and_a_batch_give_the_same(pair: Any) -> None:
    """Rows of any lengths, each with its own source."""
    model, _ = pair
    alone = [model.generate(prompt, max_new_tokens=TOKENS) for prompt in PROMPTS]
    assert len({one.token_ids for one in alone}) > 1
    assert [one.token_ids for one in model.generate(PROMPTS, max_new_tokens=TOKENS)] == [o.token_ids for o in alone]
    for prompt, one in zip(PROMPTS, alone, strict=True):
        assert "".join(model.generate(prompt, max_new_tokens=TOKENS, stream=True)) == one.text


def test_a_cache_that_is_reused_changes_nothing(pair: Any) -> None:
    """A prefix is kept where a prompt is continued; behind an encoder the next source replaces everything."""
    model, _ = pair
    long = PROMPTS[2]
    fresh = model.generate(long, max_new_tokens=TOKENS, reuse_prefix=False)
    again = model.generate(long, max_new_tokens=TOKENS)
    assert again.token_ids == fresh.token_ids
    assert (again.reused_tokens > 0) == (model.manifest["task"] == "text-generation")
    other = model.generate(PROMPTS[0], max_new_tokens=TOKENS)
    assert other.token_ids == model.generate(PROMPTS[0], max_new_tokens=TOKENS, reuse_prefix=False).token_ids


def test_a_source_is_not_scored(bundles: dict[str, Path]) -> None:
    """There is no log-probability of what an encoder reads."""
    model = load(bundles["t5"])
    assert isinstance(model, Model)
    for call in (model.logits, model.token_logprobs):
        with pytest.raises(ConfigError, match="answers a source: it scores no text by itself"):
            call("The river")
    with pytest.raises(ConfigError, match=r"shorten it to 128 .that is what its encoder reads"):
        model.generate("river " * 500)


def test_log_probabilities_are_torch_s(bundles: dict[str, Path], family_dir: Callable[[str], Path]) -> None:
    """All positions at once, in chunks over a growing cache."""
    import torch

    model = load(bundles["gpt2"])
    assert isinstance(model, Model)
    source = open_model(str(family_dir("gpt2")))
    module = build_module(source.info)
    fill_module(module, source.weights)
    ids = np.random.default_rng(0).integers(2, 384, 100)
    with torch.inference_mode():
        logits = module(torch.from_numpy(ids)[None]).logits[0]
    expected = torch.log_softmax(logits, -1)[torch.arange(99), torch.from_numpy(ids[1:])].numpy()
    assert np.abs(model.token_logprobs(ids) - expected).max() < 0.05  # 16-bit weights


class Counting:
    """A graph whose logits say which ids it saw behind which past: it counts, so rows and rewinds can be told."""

    def __init__(self) -> None:
        self.pasts: list[int] = []

    def run(self, feeds: Any) -> dict[str, np.ndarray]:
        """Append the ids to the keys; score id + tokens so far."""
        ids, key = feeds["input_ids"], feeds["past_key.0"]
        self.pasts.append(key.shape[2])
        new = ids.astype(np.float32)[:, None, :, None]
        both = np.concatenate([key, new], axis=2)
        sums = key.sum() + np.cumsum(ids, axis=1)
        return {"logits": np.stack([sums, ids], -1).astype(np.float32), "present_key.0": both, "present_value.0": both}


def test_rows_keep_their_own_past_and_can_be_rewound() -> None:
    """Each row of a ragged batch sees its own tokens; a smaller past forgets the rest."""
    graph = Counting()
    sizes = {"layers": 1, "kv_heads": 1, "head_dim": 1, "context": 8, "vocab_size": 2}
    decoder = GrowingDecoder(graph, None, sizes)
    cache = decoder.new_cache(2)
    assert all(isinstance(row, Row) for row in cache)
    ids = np.array([[1, 2, 3], [10, 20, 0]])
    logits = decoder.run(cache, ids, np.array([0, 0]), np.array([3, 2]), np.array([[2], [1]]))
    assert logits[:, 0, 0].tolist() == [6, 30]
    step = decoder.run(cache, np.array([[4], [30]]), np.array([3, 2]), np.array([1, 1]), np.array([[0], [0]]))
    assert step[:, 0, 0].tolist() == [10, 60]
    rewound = decoder.run(cache, np.array([[5], [7]]), np.array([1, 0]), np.array([1, 1]), np.array([[0], [0]]))
    assert rewound[:, 0, 0].tolist() == [6, 7]
    assert graph.pasts == [0, 0, 3, 2, 1, 0]
    assert decoder.cache_bytes == 2 * 4 * 8
