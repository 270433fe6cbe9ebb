"""What training minimizes: cross-entropy, divergences from a teacher, hidden states. Functions on torch tensors.

Logits are [..., V] (mostly [B, D, V]) of student s and teacher t, p = softmax(t / T), q = softmax(s / T). Every loss
comes per position, [...] float32, and `masked_mean` averages it over the positions that count; padding is never among
them. (The code released with arXiv:2501.16273 averages over padding too.)

    cross_entropy       −log softmax(s)[target]
    forward KL          T² Σ_v p (log p − log q)      KL(teacher ‖ student): q covers all that p does
    reverse KL          T² Σ_v q (log q − log p)      KL(student ‖ teacher): q keeps to what p likes (arXiv:2306.08543)
    mixture             (1 − r) · forward + r · reverse
    top-k               the same over k tokens and one bucket "other" with what is left of the mass
    hidden states       mean (s_i − t_i)² or 1 − cos(s, t)

T²: the gradient of KL by s is (q − p) / T, and q − p itself shrinks with 1 / T; without the factor a higher T would
weaken the teacher beside the cross-entropy (Hinton, Vinyals, Dean, arXiv:1503.02531, section 2).

The bucket: renormalizing the k scores instead would teach the student to give nothing to the rest, so it would become
surer than its teacher. With the bucket a student equal to the teacher has loss 0 and no gradient, and by the
data-processing inequality the loss is at most that over the whole vocabulary.
"""
# ruff: noqa: TID253  functions on tensors: this file is imported only where a model is trained

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100  # a target that is padding
_LEAST_LOG_PROB = -30.0  # of a teacher in the reverse KL: what it gives no mass at all would cost infinitely much


@dataclass(frozen=True, slots=True)
class TopK:
    """Hold a teacher's k most likely tokens at every position."""

    log_probs: Tensor  # [..., k] log p at the temperature they were taken at
    ids: Tensor  # [..., k] int64, different ones at each position
    log_rest: Tensor  # [...] log of the mass of all others; −inf: there are none. Its own number: 1 − Σ p would cancel


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Average values [...] where mask [...] is not 0; 0 when it is 0 everywhere."""
    weight = mask.to(values.dtype)
    return (values * weight).sum() / weight.sum().clamp_min(1)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return −log softmax(logits)[target] [...]; 0 where target [...] is IGNORED."""
    losses = functional.cross_entropy(
        logits.float().flatten(0, -2), target.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(target.shape)


def divergence(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, reverse: float = 0.0) -> Tensor:
    """Return the mixture of forward and reverse KL [...] of logits cut to the smaller vocabulary; `reverse` in [0, 1].

    Models of one family may pad their vocabularies to different sizes; tokens that only one of them has are left out.
    """
    shared = min(student.shape[-1], teacher.shape[-1])
    log_p = functional.log_softmax(teacher[..., :shared].float() / temperature, -1)
    log_q = functional.log_softmax(student[..., :shared].float() / temperature, -1)
    return _mixed(log_p, log_q, reverse) * temperature**2


def top_k(logits: Tensor, k: int, *, vocab: int, temperature: float = 1.0) -> TopK:
    """Return the k most likely of the first `vocab` tokens, with log p over all of these at the temperature."""
    log_p = functional.log_softmax(logits[..., :vocab].float() / temperature, -1)
    found = log_p.topk(min(k, log_p.shape[-1]), -1)
    log_rest = log_p.scatter(-1, found.indices, -torch.inf).logsumexp(-1)
    return TopK(found.values, found.indices, log_rest)


def top_k_divergence(
    student: Tensor, teacher: TopK, *, vocab: int, temperature: float = 1.0, reverse: float = 0.0
) -> Tensor:
    """Return `divergence` over the teacher's k tokens and the bucket of all others among the first `vocab` [...].

    `vocab` and `temperature` must be those that the teacher's scores were taken with.
    """
    scaled = student[..., :vocab].float() / temperature
    total = scaled.logsumexp(-1, keepdim=True)
    log_q = scaled.gather(-1, teacher.ids) - total
    log_p = teacher.log_probs.float()
    if scaled.shape[-1] > teacher.ids.shape[-1]:
        others = scaled.scatter(-1, teacher.ids, -torch.inf).logsumexp(-1, keepdim=True)
        log_q = torch.cat([log_q, others - total], -1)
        log_p = torch.cat([log_p, teacher.log_rest.float()[..., None]], -1)
    return _mixed(log_p, log_q, reverse) * temperature**2


def _mixed(log_p: Tensor, log_q: Tensor, reverse: float) -> Tensor:
    """Return (1 − r) KL(p ‖ q) + r KL(q ‖ p) over the last axis."""
    loss = torch.zeros(log_p.shape[:-1], device=log_p.device)
    if reverse < 1:
        loss = loss + (1 - reverse) * _kl(log_p, log_q)
    if reverse > 0:
        loss = loss + reverse * _kl(log_q, log_p.clamp_min(_LEAST_LOG_PROB))
    return loss


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return Σ p (log p − log q); terms with p = 0 are 0."""
    p = log_p.exp()
    there = p > 0
    return torch.where(there, p * (torch.where(there, log_p, 0.0) - torch.where(there, log_q, 0.0)), 0.0).sum(-1)


def hidden_loss(student: Tensor, teacher: Tensor, *, cosine: bool = False) -> Tensor:
    """Return the distance of states [..., H] at every position [...]: mean squared error over H, or 1 − cosine.

    A student of another width is projected first (training/distil.py). Source: TinyBERT (arXiv:1909.10351) for the
    squared error with a learned projection, DistilBERT (arXiv:1910.01108) for the cosine.
    """
    if cosine:
        return 1 - functional.cosine_similarity(student.float(), teacher.float(), dim=-1, eps=1e-8)
    return (student.float() - teacher.float()).square().mean(-1)
