"""Examples of texts, of pairs and of labels as the loop takes them, and what encoders are trained for on each.

    Texts.collate    ids [B, N]   mask [B, N]
    Pairs.collate    ids [2B, N]  mask [2B, N], the first texts before the second ones; scores [B] where there are some
    Labels.collate   ids [B, N]   mask [B, N]   label [B]

The losses themselves are in encoders.py. In-batch negatives are those of one run: of `rows` examples where a batch is
divided, and of one process where there are several.
"""
# ruff: noqa: TID253  a batch is of tensors: this file is imported only where a model is trained

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edgepipe.errors import ConfigError
from edgepipe.students.models import Encoder
from edgepipe.training.batches import Batch, encode, length_mask, pad
from edgepipe.training.data import TrainingData
from edgepipe.training.encoders import contrastive_loss, mask_tokens, masked_next_token_loss, ranking_loss
from edgepipe.training.loop import Objective, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Hold texts as ids [n] of [N] int32."""

    ids: Sequence[np.ndarray]
    pad: int

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each text [n]."""
        return np.array([len(row) for row in self.ids])

    def collate(self, chosen: Sequence[int]) -> Batch:
        """Return the batch of these texts."""
        rows = [self.ids[i] for i in chosen]
        return {"index": torch.tensor(list(chosen)), "ids": pad(rows, self.pad), "mask": length_mask(rows)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Hold pairs of texts that belong together, or were scored."""

    first: Sequence[np.ndarray]
    second: Sequence[np.ndarray]
    scores: np.ndarray | None  # [n] float32
    pad: int

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each pair [n]."""
        return np.array([len(a) + len(b) for a, b in zip(self.first, self.second, strict=True)])

    def collate(self, chosen: Sequence[int]) -> Batch:
        """Return the batch of these pairs."""
        rows = [*(self.first[i] for i in chosen), *(self.second[i] for i in chosen)]
        batch = {"index": torch.tensor(list(chosen)), "ids": pad(rows, self.pad), "mask": length_mask(rows)}
        return batch if self.scores is None else {**batch, "scores": torch.from_numpy(self.scores[list(chosen)])}


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """Hold texts and the number of each one's label."""

    texts: Texts
    labels: np.ndarray  # [n] int64

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each text [n]."""
        return self.texts.lengths

    def collate(self, chosen: Sequence[int]) -> Batch:
        """Return the batch of these texts."""
        return {**self.texts.collate(chosen), "label": torch.from_numpy(self.labels[list(chosen)])}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Say how texts become ids."""

    files: Mapping[str, bytes]  # the tokenizer's
    limit: int  # tokens of a text
    cut: bool  # cut longer ones, and say how many; else they are refused
    pad: int
    note: Callable[[str], None]

    def ids(self, data: TrainingData, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of one text of each record."""
        return encode(data, texts, self.files, self.limit, self.cut, self.note)


def read_texts(data: TrainingData, reading: Reading) -> Texts:
    """Return all texts of the data: both of a pair, sources and targets too."""
    both = [text for record in data.records for text in (record.first, record.second) if text]
    doubled = TrainingData(
        name=data.name,
        form=data.form,
        records=tuple(r for r in data.records for text in (r.first, r.second) if text),
        sha256=data.sha256,
    )
    return Texts(ids=reading.ids(doubled, both), pad=reading.pad)


def read_pairs(data: TrainingData, reading: Reading) -> Pairs:
    """Return the data's pairs; scores count when every pair has one."""
    if data.form not in ("pairs", "source-target"):
        raise ConfigError(f"{data.name}: expected pairs of texts, but it holds {data.form}")
    first, second = (reading.ids(data, [getattr(r, side) for r in data.records]) for side in ("first", "second"))
    scored = data.form == "pairs" and all(record.value for record in data.records)
    scores = np.array([float(r.value) for r in data.records], np.float32) if scored else None
    return Pairs(first=first, second=second, scores=scores, pad=reading.pad)


def label_names(data: TrainingData) -> tuple[str, ...]:
    """Return the labels of the data, sorted; ConfigError when there are fewer than two."""
    names = tuple(sorted({record.value for record in data.records}))
    if data.form != "labels" or len(names) < 2:
        raise ConfigError(f"{data.name}: expected texts with at least two different labels, but it has {len(names)}")
    return names


def read_labels(data: TrainingData, names: Sequence[str], reading: Reading) -> Labels:
    """Return texts and the place of their label among `names`; ConfigError names the line of an unknown one."""
    places = {name: number for number, name in enumerate(names)}
    for record in data.records:
        if record.value not in places:
            raise ConfigError(f"{record.place}: the label {record.value!r} is none of {', '.join(names)}")
    texts = Texts(ids=reading.ids(data, [r.first for r in data.records]), pad=reading.pad)
    return Labels(texts=texts, labels=np.array([places[r.value] for r in data.records], np.int64))


def masked(*, mask_id: int, vocab: int) -> Objective:
    """Return masked next-token prediction over `Texts`."""

    def objective(module: nn.Module, batch: Batch, _step: int) -> Step:
        inputs, labels = mask_tokens(batch["ids"], batch["mask"], mask_id=mask_id, vocab=vocab)
        count = (labels >= 0).sum()
        if not count:  # a batch of one-token texts
            return Step(module(batch["ids"], batch["mask"]).sum() * 0, 0, {})
        return Step(masked_next_token_loss(cast(Encoder, module), inputs, batch["mask"], labels), count, {})

    return objective


def unsupervised(module: nn.Module, batch: Batch, _step: int) -> Step:
    """Contrast each of `Texts` with itself under other dropout."""
    first, second = (module(batch["ids"], batch["mask"]) for _ in range(2))
    return Step(contrastive_loss(first, second), len(first), {})


def supervised(module: nn.Module, batch: Batch, _step: int) -> Step:
    """Contrast the texts of `Pairs`, or rank the pairs by their scores."""
    first, second = module(batch["ids"], batch["mask"]).chunk(2)
    if "scores" in batch:
        return Step(ranking_loss(first, second, batch["scores"]), len(first), {})
    return Step(contrastive_loss(first, second), len(first), {})


def classified(module: nn.Module, batch: Batch, _step: int) -> Step:
    """Return the cross-entropy of `Labels`, and the share of right ones."""
    logits = module(batch["ids"], batch["mask"]).float()
    right = (logits.argmax(-1) == batch["label"]).float().mean()
    return Step(functional.cross_entropy(logits, batch["label"]), len(logits), {"accuracy": right})
