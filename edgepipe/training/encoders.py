"""What turns a causal decoder's layers into an encoder of texts: the losses of LLM2Vec's three steps, and of classes.

    masked next-token prediction   a fifth of the tokens is masked; token i is predicted from the state at i − 1, where
                                   the decoder it came from predicted it (arXiv:2404.05961, section 2)
    unsupervised contrast          each text twice with other dropout; its two embeddings among those of the batch,
                                   cosine · 20 (SimCSE, arXiv:2104.08821, eq. 1, temperature 0.05)
    supervised pairs               the same between two texts that mean the same; with scores, whichever pair was
                                   scored higher should have the higher cosine (CoSENT, Su 2022)
    classes                        cross-entropy

Tensors: B texts of N tokens, H width; ids and masks [B, N] int64, padding on the right.
"""
# ruff: noqa: TID253  losses are torch functions: this file is imported only where something trains

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from edgepipe.numerics.losses import IGNORED
from edgepipe.students.models import Encoder

MASK_SHARE = 0.2  # of tokens, LLM2Vec's choice
COSINE_SCALE = 20.0  # 1 / temperature


def mask_tokens(
    ids: Tensor,
    attention_mask: Tensor,
    *,
    mask_id: int,
    vocab: int,
    generator: torch.Generator | None = None,
    share: float = MASK_SHARE,
) -> tuple[Tensor, Tensor]:
    """Mask a share of the tokens after each row's first; return inputs [B, N] and labels [B, N], IGNORED elsewhere.

    Of those chosen 80 % become the mask token, 10 % another token and 10 % stay (BERT's collator). The first token has
    no state before it to be predicted from. Without a generator torch's own is used, which a training loop seeds.
    """
    chance, kind = (torch.rand(ids.shape, generator=generator).to(ids.device) for _ in range(2))
    others = torch.randint(0, vocab, ids.shape, generator=generator).to(ids.device)
    chosen = (chance < share) & attention_mask.bool()
    chosen[:, 0] = False
    inputs = torch.where(chosen & (kind < 0.8), mask_id, ids)
    inputs = torch.where(chosen & (kind >= 0.8) & (kind < 0.9), others, inputs)
    return inputs, torch.where(chosen, ids, IGNORED)


def masked_next_token_loss(encoder: Encoder, inputs: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of the labels, each from the state one place to its left."""
    states, _ = encoder.hidden(inputs, attention_mask)
    wanted = labels[:, 1:] != IGNORED
    logits = encoder.token_logits(states[:, :-1][wanted])
    return functional.cross_entropy(logits.float(), labels[:, 1:][wanted])


def contrastive_loss(first: Tensor, second: Tensor, scale: float = COSINE_SCALE) -> Tensor:
    """Return InfoNCE of embeddings [B, H]: row i of `first` belongs to row i of `second` and to no other.

    loss = −1/B Σ_i log( exp(s·cos(a_i, b_i)) / Σ_j exp(s·cos(a_i, b_j)) )
    """
    cosines = functional.normalize(first.float(), dim=-1) @ functional.normalize(second.float(), dim=-1).T
    return functional.cross_entropy(scale * cosines, torch.arange(len(first), device=first.device))


def ranking_loss(first: Tensor, second: Tensor, scores: Tensor, scale: float = COSINE_SCALE) -> Tensor:
    """Return CoSENT's loss of embeddings [B, H] and scores [B].

    loss = log(1 + Σ exp(s·(cos_j − cos_i))) over all i, j with score_i > score_j

    Scores only order the pairs, so it doesn't matter what scale people gave them on.
    """
    cosines = scale * functional.cosine_similarity(first.float(), second.float())
    gaps = cosines[None, :] - cosines[:, None]  # [i, j]
    kept = scores[:, None] > scores[None, :]
    return torch.logsumexp(torch.cat([gaps.new_zeros(1), gaps[kept]]), 0)
