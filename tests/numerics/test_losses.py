"""Losses against plain loops over one position at a time, on ragged shapes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edgepipe.numerics.losses import (
    IGNORED,
    TopK,
    cross_entropy,
    divergence,
    hidden_loss,
    masked_mean,
    top_k,
    top_k_divergence,
)
from tests.reference import (
    bucketed_naively,
    cosine_distance_naively,
    cross_entropy_naively,
    softmax_naively,
    teacher_divergence_naively,
)

SHAPES = [(1, 1, 2), (2, 3, 7), (3, 1, 33)]


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return seeded logits that are far from uniform."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy(shape: tuple[int, ...]) -> None:
    """−log of the target's probability, 0 at padding."""
    s = logits(*shape)
    target = torch.randint(0, shape[-1], shape[:-1], generator=torch.Generator().manual_seed(1))
    target[-1, -1] = IGNORED
    got = cross_entropy(s, target)
    for at in np.ndindex(*shape[:-1]):
        expected = 0.0 if target[at] == IGNORED else cross_entropy_naively(s[at].numpy(), int(target[at]))
        assert math.isclose(float(got[at]), expected, abs_tol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("reverse", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("wider", [0, 4])
def test_divergence(shape: tuple[int, ...], temperature: float, reverse: float, wider: int) -> None:
    """Both directions and their mixture; a teacher's extra tokens are left out."""
    s, t = logits(*shape), logits(*shape[:-1], shape[-1] + wider, seed=1)
    got = divergence(s, t, temperature=temperature, reverse=reverse)
    for at in np.ndindex(*shape[:-1]):
        expected = teacher_divergence_naively(s[at].numpy(), t[at].numpy()[: shape[-1]], temperature, reverse)
        assert math.isclose(float(got[at]), expected, rel_tol=1e-4, abs_tol=1e-5)


def test_temperature_keeps_the_gradient_in_proportion() -> None:
    """With T² the gradient at a high temperature tends to that of matching logits, (s − t) / V, not to 0."""
    s, t = logits(1, 11) / 3, logits(1, 11, seed=1) / 3
    s, t = s - s.mean(), t - t.mean()
    s.requires_grad_()
    divergence(s, t, temperature=200.0).sum().backward()
    assert s.grad is not None
    assert torch.allclose(s.grad, (s.detach() - t) / 11, atol=1e-3)


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("reverse", [0.0, 0.5])
def test_top_k(k: int, temperature: float, reverse: float) -> None:
    """K tokens and one bucket; with k = V the divergence over the whole vocabulary."""
    s, t = logits(2, 3, 7), logits(2, 3, 7, seed=1)
    kept = top_k(t, k, vocab=7, temperature=temperature)
    got = top_k_divergence(s, kept, vocab=7, temperature=temperature, reverse=reverse)
    for at in np.ndindex(2, 3):
        expected = bucketed_naively(s[at].numpy(), t[at].numpy(), k, temperature, reverse)
        assert math.isclose(float(got[at]), expected, rel_tol=1e-4, abs_tol=1e-5)
    whole = divergence(s, t, temperature=temperature, reverse=reverse)
    assert (got <= whole + 1e-5).all()
    if k == 7:
        assert torch.allclose(got, whole, atol=1e-5)


def test_top_k_of_a_smaller_vocabulary() -> None:
    """Scores are taken over the student's tokens alone."""
    t = logits(1, 9)
    found = top_k(t, 20, vocab=5)
    assert found.ids.shape == (1, 5)
    assert torch.allclose(found.log_probs.exp().sum(), torch.tensor(1.0))


@pytest.mark.parametrize("k", [2, 7])
def test_top_k_of_a_larger_student(k: int) -> None:
    """Tokens that the teacher doesn't have are left out, as `divergence` leaves them out."""
    s, t = logits(2, 3, 11), logits(2, 3, 7, seed=1)
    kept = top_k(t, k, vocab=7)
    got = top_k_divergence(s, kept, vocab=7)
    assert torch.equal(got, top_k_divergence(s[..., :7], kept, vocab=7))
    assert torch.allclose(got, divergence(s, t), atol=1e-5) == (k == 7)


@pytest.mark.parametrize("reverse", [0.0, 1.0])
def test_top_k_of_oneself_is_nothing(reverse: float) -> None:
    """A student that equals its teacher has no loss and no gradient, however little of the mass the k hold.

    Renormalizing would pull at it: that is why there is a bucket.
    """
    t = logits(2, 50) / 6
    s = t.clone().requires_grad_()
    loss = top_k_divergence(s, top_k(t, 3, vocab=50), vocab=50, reverse=reverse).sum()
    loss.backward()
    assert s.grad is not None
    assert abs(float(loss.detach())) < 1e-5
    assert s.grad.abs().max() < 1e-5


def test_top_k_in_float16() -> None:
    """Scores rounded for the disk give nearly the same loss, and finite gradients."""
    t = logits(4, 30) * 4
    s = logits(4, 30, seed=1).requires_grad_()
    found = top_k(t, 10, vocab=30)
    stored = TopK(found.log_probs.half(), found.ids, found.log_rest.half())
    for reverse in (0.0, 1.0):
        loss = top_k_divergence(s, stored, vocab=30, reverse=reverse)
        assert torch.allclose(loss, top_k_divergence(s, found, vocab=30, reverse=reverse), rtol=2e-2, atol=2e-2)
        loss.sum().backward()
        assert s.grad is not None
        assert s.grad.isfinite().all()


def test_padding_counts_for_nothing() -> None:
    """The mean of two rows of 3 and 1 positions is over 4, whatever stands at the others."""
    values = torch.tensor([[1.0, 2.0, 3.0], [6.0, 1e9, -1e9]])
    assert float(masked_mean(values, torch.tensor([[1, 1, 1], [1, 0, 0]]))) == 3.0
    assert float(masked_mean(values, torch.zeros(2, 3))) == 0.0


def test_hidden_states() -> None:
    """Mean squared error over the width, or one minus the cosine."""
    s, t = logits(2, 3, 5), logits(2, 3, 5, seed=1)
    for at in np.ndindex(2, 3):
        a, b = s[at].numpy(), t[at].numpy()
        assert math.isclose(
            float(hidden_loss(s, t)[at]), sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / 5, rel_tol=1e-5
        )
        assert math.isclose(float(hidden_loss(s, t, cosine=True)[at]), cosine_distance_naively(a, b), abs_tol=1e-5)


def test_naive_softmax_is_one() -> None:
    """The twins' own foundation adds up."""
    assert math.isclose(sum(softmax_naively(np.array([1.0, -2.0, 40.0]), 1.5)), 1.0)
