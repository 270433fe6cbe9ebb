"""Sampling: the same filters as transformers, reproducible draws, one sentence for values out of range."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from edgepipe.errors import ConfigError, ContractError
from edgepipe.runtime.sampling import (
    Sampling,
    choose_token,
    filter_logits,
    keep_top_k,
    keep_top_p,
    log_softmax,
    penalize_repetition,
    random_generator,
)


def _logits(seed: int, size: int = 997) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 4, size).astype(np.float32)


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3])
def test_penalty_equals_transformers(penalty: float) -> None:
    """Match RepetitionPenaltyLogitsProcessor, repeated ids included."""
    logits = _logits(1)
    seen = [3, 3, 500, 996, 0, 3]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), torch.tensor(logits)[None])[0]
    np.testing.assert_array_equal(penalize_repetition(logits, seen, penalty), expected.numpy())


@pytest.mark.parametrize("top_k", [1, 5, 50, 997, 2000])
def test_top_k_equals_transformers(top_k: int) -> None:
    """Match TopKLogitsWarper, ties at the border included."""
    logits = np.round(_logits(2))  # many equal values
    expected = TopKLogitsWarper(top_k)(torch.zeros(1, 1, dtype=torch.long), torch.tensor(logits)[None])[0]
    np.testing.assert_array_equal(keep_top_k(logits, top_k), expected.numpy())


@pytest.mark.parametrize("scale", [1.0, 0.1])
@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999, 1.0])
def test_top_p_equals_transformers(top_p: float, scale: float) -> None:
    """Match TopPLogitsWarper on peaked and on nearly flat logits, where many tokens are kept."""
    logits = _logits(3, 5000) * np.float32(scale)
    expected = TopPLogitsWarper(top_p)(torch.zeros(1, 1, dtype=torch.long), torch.tensor(logits)[None])[0]
    np.testing.assert_array_equal(np.isfinite(keep_top_p(logits, top_p)), np.isfinite(expected.numpy()))


@pytest.mark.parametrize("seed", range(20))
def test_order_equals_transformers(seed: int) -> None:
    """Apply penalty, temperature, top-k and top-p in transformers' order."""
    logits, seen = _logits(seed), [1, 2, 3, seed]
    scores, ids = torch.tensor(logits)[None], torch.tensor([seen])
    for step in (
        RepetitionPenaltyLogitsProcessor(1.2),
        TemperatureLogitsWarper(1.7),
        TopKLogitsWarper(40),
        TopPLogitsWarper(0.8),
    ):
        scores = step(ids, scores)
    ours = filter_logits(logits, seen, Sampling(temperature=1.7, top_k=40, top_p=0.8, repetition_penalty=1.2))
    assert 1 < np.isfinite(ours).sum() < 40
    np.testing.assert_allclose(ours, scores[0].numpy(), rtol=1e-6)


def test_draws_follow_the_distribution() -> None:
    """Draw tokens as often as their probabilities say, and never one of probability 0."""
    logits = np.array([2.0, 1.0, -np.inf, 0.0, -1.0], np.float32)
    generator, sampling = random_generator(7), Sampling(temperature=1.0)
    draws = np.array([choose_token(logits, [], sampling, generator) for _ in range(20_000)])
    shares = np.bincount(draws, minlength=5) / len(draws)
    np.testing.assert_allclose(
        shares, np.exp(log_softmax(logits)), atol=0.012
    )  # 3.4 standard deviations of the largest
    assert shares[2] == 0


def test_greedy_takes_the_largest_and_draws_nothing() -> None:
    """Take the argmax at temperature 0 and leave the generator where it was."""
    generator = random_generator(3)
    logits = _logits(4)
    assert choose_token(logits, [], Sampling(), generator) == int(logits.argmax())
    assert generator.random() == random_generator(3).random()


def test_penalty_changes_the_greedy_choice() -> None:
    """Apply the penalty at temperature 0 too."""
    logits = np.array([1.0, 3.0, 2.9], np.float32)
    assert choose_token(logits, [1], Sampling(repetition_penalty=1.5), random_generator(0)) == 2


def test_small_temperature_is_nearly_greedy() -> None:
    """Survive temperatures whose quotient would overflow float32."""
    logits = _logits(5)
    sampling = Sampling(temperature=1e-40)
    assert choose_token(logits, [], sampling, random_generator(0)) == int(logits.argmax())


def test_seeds_repeat_and_rows_differ() -> None:
    """Give equal numbers for equal seed + row, other ones otherwise."""
    assert random_generator(5).random() == random_generator(5).random()
    assert random_generator(5, 1).random() == random_generator(6).random() != random_generator(5).random()
    assert random_generator(None).random() != random_generator(None).random()


def test_log_softmax_equals_torch_on_large_logits() -> None:
    """Stay exact where exp would overflow."""
    logits = _logits(6) * 100
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()
    np.testing.assert_allclose(log_softmax(logits), expected, rtol=1e-12)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(wrong: float) -> None:
    """Say that the model is broken instead of choosing token 0."""
    logits = _logits(7)
    logits[10] = wrong
    with pytest.raises(ContractError, match="not numbers"):
        choose_token(logits, [], Sampling(), random_generator(0))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "warm"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
    ],
)
def test_values_out_of_range_are_refused(option: str, value: Any) -> None:
    """Name the option and the value in one sentence."""
    with pytest.raises(ConfigError, match=option):
        Sampling(**{option: value})


@pytest.mark.parametrize("seed", [-1, 1.5, True, "x"])
def test_wrong_seeds_are_refused(seed: Any) -> None:
    """Refuse what PCG64 would take differently or not at all."""
    with pytest.raises(ConfigError, match="seed"):
        random_generator(seed)
