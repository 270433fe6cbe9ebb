"""What a module says to a batch, one row per prediction, and how far two modules' rows are apart.

    distributions   logits of tokens or classes       KL(p_reference ‖ p), in nats
    embeddings      a sentence encoder's vectors      1 − cosine
    states          anything else                     ‖x − reference‖² / ‖reference‖²

Rows that are padding don't count, nor does what follows the end of an answer.
"""
# ruff: noqa: TID253  outputs are tensors: this file is imported only where a module runs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edgepipe.artifacts import ModelInfo
from edgepipe.graph.modules import one_graph
from edgepipe.quantizers.layers import first_tensor, kept_rows
from edgepipe.quantizers.modules import feeds, logits_of
from edgepipe.quantizers.texts import Batch
from edgepipe.students.config import is_student

DISTRIBUTIONS, EMBEDDINGS, STATES = "distributions", "embeddings", "states"
UNITS = {DISTRIBUTIONS: "KL in nats", EMBEDDINGS: "1 − cosine", STATES: "relative square error"}
_REFERENCE_BYTES = 256 << 20  # of the float model's rows, which are kept: of a large vocabulary not every position
_AT_ONCE = 64  # rows compared in float64
_BROKEN = 1e9  # the distance of a row that isn't finite: far beyond any other, and still a number


def kind_of(info: ModelInfo) -> str:
    """Return as what a model's outputs are compared."""
    if info.task == "feature-extraction":
        return EMBEDDINGS
    return STATES if info.task == "question-answering" else DISTRIBUTIONS


@torch.no_grad()
def rows_of(module: Any, info: ModelInfo, batch: Batch) -> Tensor:
    """Return what a module says to a batch [n, width] float32, one row a text, or a token that counts."""
    if info.task == "feature-extraction" and not is_student(info.config):
        settings = info.sentence or {}
        pooling = str(settings.get("pooling") or "mean")
        embedding: Tensor = one_graph(module, ("last_hidden_state",), pooling)(**feeds(batch))["embedding"]
        return embedding
    output = module(**feeds(batch))
    if isinstance(output, Tensor):  # a student's encoder
        return output
    values = first_tensor(output) if kind_of(info) == STATES else logits_of(output)
    if values.dim() == 3 and batch.decoder_mask is not None:
        return values[torch.from_numpy(batch.decoder_mask) > 0]
    return kept_rows(values, batch) if values.dim() == 3 else values


def reference_rows(module: Any, info: ModelInfo, batches: Sequence[Batch]) -> tuple[list[Tensor], int]:
    """Return the rows of every batch, and the step that thins them out where all would take too much memory."""
    found: list[Tensor] = []
    step = 1
    for batch in batches:
        rows = rows_of(module, info, batch)
        if not found:
            expected = rows.numel() * rows.element_size() * len(batches)
            step = max(1, -(-expected // _REFERENCE_BYTES))
        found.append(rows[::step].clone())
    return found, step


def distances(kind: str, rows: Tensor, reference: Tensor) -> Tensor:
    """Return how far each row [n, width] is from its reference: [n] float64, at least 0; that of NaN is large."""
    parts = [
        _distances(kind, rows[first : first + _AT_ONCE].double(), reference[first : first + _AT_ONCE].double())
        for first in range(0, len(rows), _AT_ONCE)
    ]
    found = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
    return torch.nan_to_num(found, nan=_BROKEN, posinf=_BROKEN).clamp_min(0)


def _distances(kind: str, rows: Tensor, reference: Tensor) -> Tensor:
    if kind == DISTRIBUTIONS:
        ours, theirs = rows.log_softmax(-1), reference.log_softmax(-1)
        return torch.nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    if kind == EMBEDDINGS:
        return 1 - torch.nn.functional.cosine_similarity(rows, reference, dim=-1)
    gone: Tensor = (rows - reference).square().sum(-1) / reference.square().sum(-1).clamp_min(1e-30)
    return gone
