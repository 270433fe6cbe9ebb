"""The losses of encoder students against naive numpy twins."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edgepipe.students.files import make_student
from edgepipe.students.models import Encoder
from edgepipe.training.encoders import (
    IGNORED,
    contrastive_loss,
    mask_tokens,
    masked_next_token_loss,
    ranking_loss,
)
from tests.students.test_models import PLAIN, ids, padded


def rows(seed: int, count: int = 6, width: int = 5) -> torch.Tensor:
    """Return seeded embeddings."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine of two vectors."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_contrast(scale: float) -> None:
    """InfoNCE, written out."""
    a, b = rows(0), rows(1)
    total = 0.0
    for i in range(len(a)):
        scores = [math.exp(scale * cosine(a[i].numpy(), b[j].numpy())) for j in range(len(b))]
        total -= math.log(scores[i] / sum(scores))
    assert float(contrastive_loss(a, b, scale)) == pytest.approx(total / len(a), rel=1e-5)
    assert float(contrastive_loss(a, a, scale)) < float(contrastive_loss(a, b, scale))


def test_ranking() -> None:
    """CoSENT, written out; pairs of equal score say nothing of each other."""
    a, b, scores = rows(0), rows(1), torch.tensor([3.0, 1.0, 3.0, 0.0, 5.0, 2.0])
    total = 1.0
    for i in range(6):
        for j in range(6):
            if scores[i] > scores[j]:
                gap = cosine(a[j].numpy(), b[j].numpy()) - cosine(a[i].numpy(), b[i].numpy())
                total += math.exp(20 * gap)
    assert float(ranking_loss(a, b, scores)) == pytest.approx(math.log(total), rel=1e-5)
    assert float(ranking_loss(a, b, torch.ones(6))) == 0


def test_masking() -> None:
    """A fifth of the tokens after the first is chosen; most become the mask, some another token, some stay."""
    tokens, mask = ids(200, 40), padded([40] * 100 + [25] * 100, 40)
    inputs, labels = mask_tokens(tokens, mask, mask_id=7, vocab=200, generator=torch.Generator().manual_seed(0))
    chosen = labels != IGNORED
    assert not chosen[:, 0].any()
    assert not (chosen & (mask == 0)).any()
    assert torch.equal(labels[chosen], tokens[chosen])
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    assert float(chosen.sum() / mask[:, 1:].sum()) == pytest.approx(0.2, abs=0.02)
    assert float((inputs[chosen] == 7).float().mean()) == pytest.approx(0.8, abs=0.03)
    assert float((inputs[chosen] == tokens[chosen]).float().mean()) == pytest.approx(0.1, abs=0.03)
    again = mask_tokens(tokens, mask, mask_id=7, vocab=200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again[0], inputs)


def test_tokens_are_predicted_from_the_left() -> None:
    """The loss of a label at i is that of the state at i − 1."""
    encoder = make_student(PLAIN).eval()
    assert isinstance(encoder, Encoder)
    tokens, mask = ids(2, 8), padded([8, 5], 8)
    labels = torch.full_like(tokens, IGNORED)
    labels[0, 3], labels[0, 7], labels[1, 1] = 11, 12, 13
    with torch.inference_mode():
        loss = float(masked_next_token_loss(encoder, tokens, mask, labels))
        logits = encoder.token_logits(encoder.hidden(tokens, mask)[0])
        picked = [logits[0, 2].log_softmax(-1)[11], logits[0, 6].log_softmax(-1)[12], logits[1, 0].log_softmax(-1)[13]]
    assert loss == pytest.approx(-float(sum(picked)) / 3, rel=1e-5)
