"""Run a student's torch module on arrays, with the weights of a store: what its graphs must agree with."""
# ruff: noqa: TID253  a student is a torch module: this file is imported only where one is run

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from edgepipe.students.config import StudentConfig
from edgepipe.students.files import bare_student
from edgepipe.students.models import Encoder, EncoderDecoder
from edgepipe.weights import WeightStore

_KINDS = ("key", "value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """Hold what an encoder-decoder computes for a padded batch of sources, without a cache."""

    crossed: dict[str, np.ndarray]  # cross_key.i, cross_value.i [B, kv_heads, N, head_dim] float32
    logits: np.ndarray  # [B, S, vocab] float32


def filled_student(config: StudentConfig, weights: WeightStore, context: int | None) -> Encoder | EncoderDecoder:
    """Return a student's module with the values of a store, decoded to float32."""
    student = bare_student(config, context).eval()
    assert isinstance(student, Encoder | EncoderDecoder)
    with torch.no_grad():
        for name, tensor in student.state_dict().items():
            tensor.copy_(torch.from_numpy(np.require(weights.float32(name), requirements=["C", "W"])))
    return student


def answered(student: EncoderDecoder, ids: np.ndarray, mask: np.ndarray, target: np.ndarray) -> Answered:
    """Run sources `ids` [B, N] under `mask` [B, N] and the whole `target` [B, S]."""
    source, seen = torch.from_numpy(ids), torch.from_numpy(mask)
    with torch.inference_mode():
        state = student.start(source, seen)
        logits, _ = student.step(state, torch.from_numpy(target))
    pairs = [
        (f"{kind}.{i}", value) for i, kv in enumerate(state.source) for kind, value in zip(_KINDS, kv, strict=True)
    ]
    return Answered(crossed={f"cross_{name}": value.numpy() for name, value in pairs}, logits=logits.numpy())


def encoded(student: Encoder, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return embeddings [B, hidden] or logits [B, labels] float32 of texts `ids` [B, N] under `mask` [B, N]."""
    with torch.inference_mode():
        found: np.ndarray = student(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    return found


def encoded_at_exits(student: Encoder, ids: np.ndarray, mask: np.ndarray) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Return, for every exit and after all layers, embeddings or logits, and the log odds [B] of its gate, if any."""
    with torch.inference_mode():
        answers, features = student.at_depths(torch.from_numpy(ids), torch.from_numpy(mask))
        gates = [gate(seen).numpy() for gate, seen in zip(student.gates, features, strict=True)]
    return [(answer.numpy(), gate) for answer, gate in zip(answers, (*gates, None), strict=True)]
