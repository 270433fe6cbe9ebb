"""Turn records into token ids, and choose the examples of a step: a pure function of (seed, step).

`batch_at` runs through shuffled examples without end, one permutation after another: an epoch each. The whole batches
of an epoch, a few at a time, are sorted by length and cut anew, and their order is shuffled, so rows of a batch are
about equally long and little is padding. A batch that an epoch ends in takes the rest from the next one. No batch holds
an example twice where there are twice as many examples as a batch takes (with fewer it may hold some twice): contrast
would push copies apart. Nothing is remembered: a resumed run asks for the step it is at.

Rows are padded on the right. A batch is a dict of tensors; `index` [B] says which examples they are.

    Seq2Seq.collate   source [B, N]   source_mask [B, N]   decoder_input [B, D] = start, y_1 … y_(D−1)
                      target [B, D] = y_1 … y_D with eos, IGNORED at padding
"""
# ruff: noqa: TID253  a batch is of tensors: this file is imported only where a model is trained

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import tokenizers
import torch
from torch import Tensor

from edgepipe.errors import ConfigError
from edgepipe.numerics.losses import IGNORED
from edgepipe.training.data import TrainingData

Batch = dict[str, Tensor]
_POOL_BATCHES = 32  # whole batches, at most, that are sorted together: enough to fill rows, few enough to stay random


class Examples(Protocol):
    """What the loop draws from."""

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each example [n]."""

    def collate(self, chosen: Sequence[int]) -> Batch:
        """Return the batch of the examples with these indices, `index` among its tensors."""


def batch_at(lengths: np.ndarray, size: int, seed: int, step: int) -> np.ndarray:
    """Return the indices [size] of the examples of a step, counted from 0."""
    count = len(lengths)
    first, end = step * size, (step + 1) * size
    epoch = first // count
    if (end - 1) // count != epoch:
        epochs = range(epoch, (end - 1) // count + 1)
        return np.concatenate([_order(count, size, seed, e) for e in epochs])[first - epoch * count :][:size]
    begins = -(-epoch * count // size)  # the step of the epoch's first whole batch
    whole = (epoch + 1) * count // size - begins
    pools = np.array_split(np.arange(whole), -(-whole // _POOL_BATCHES))
    number, pool = next((i, pool) for i, pool in enumerate(pools) if step - begins <= pool[-1])
    held = (begins + int(pool[0])) * size - epoch * count
    order = _order(count, size, seed, epoch)[held : held + len(pool) * size]
    chosen = order[np.argsort(lengths[order], kind="stable")].reshape(len(pool), size)
    batches = np.random.default_rng([seed, epoch, 1, number]).permutation(len(pool))
    found: np.ndarray = chosen[batches[step - begins - int(pool[0])]]
    return found


def _order(count: int, size: int, seed: int, epoch: int) -> np.ndarray:
    """Return an epoch's order [count]; what the batch it begins in holds already of the epoch before comes later."""
    order = _permutation(count, seed, epoch)
    held = epoch * count % size
    window = min(2 * size, count - size)  # the epoch's own end stays as it is: the next one looks at that
    if not held or window <= 0:
        return order
    late = np.isin(order[:window], _permutation(count, seed, epoch - 1)[-held:])
    return np.concatenate([order[:window][~late], order[:window][late], order[window:]])


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, 0]).permutation(count)


def pad(rows: Sequence[np.ndarray], value: int) -> Tensor:
    """Return rows of ids as one tensor [B, longest] int64, padded on the right."""
    padded = np.full((len(rows), max(len(row) for row in rows)), value, np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return torch.from_numpy(padded)


def length_mask(rows: Sequence[np.ndarray]) -> Tensor:
    """Return the mask [B, longest] int64 of rows padded on the right."""
    lengths = torch.tensor([len(row) for row in rows])
    return (torch.arange(int(lengths.max())) < lengths[:, None]).long()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Say how long an example may be, and what happens to one that is longer."""

    source: int  # tokens of a source or text
    target: int  # tokens of a target, eos included
    cut: bool = False  # cut what is longer, and say how many; else a ConfigError names file and line


@dataclass(frozen=True, slots=True, kw_only=True)
class Seq2Seq:
    """Hold sources and targets as ids."""

    sources: Sequence[np.ndarray]  # [n] of [N] int32
    targets: Sequence[np.ndarray]  # [n] of [D] int32, eos at the end
    start: int  # the decoder's first token
    pad: int  # any id: it is masked

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each example [n]."""
        return np.array([len(x) + len(y) for x, y in zip(self.sources, self.targets, strict=True)])

    def collate(self, chosen: Sequence[int]) -> Batch:
        """Return the batch of these examples."""
        sources, targets = [self.sources[i] for i in chosen], [self.targets[i] for i in chosen]
        shifted = [np.concatenate([[self.start], y[:-1]]) for y in targets]
        return {
            "index": torch.tensor(list(chosen)),
            "source": pad(sources, self.pad),
            "source_mask": length_mask(sources),
            "decoder_input": pad(shifted, self.pad),
            "target": pad(targets, IGNORED),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Special:
    """Hold the ids that a sequence-to-sequence student needs."""

    start: int
    eos: int
    pad: int


def seq2seq(
    data: TrainingData, files: Mapping[str, bytes], limits: Limits, special: Special, note: Callable[[str], None]
) -> Seq2Seq:
    """Return the examples of source and target, or of texts cut in two: the second half follows from the first.

    `files` are the tokenizer's. A target is written without special tokens and ends with eos. (Halves: PrefixLM, as in
    arXiv:2504.06225.) Raises ConfigError for a record that is too long or has nothing to learn, by file and line.
    """
    if data.form == "source-target":
        sources = encode(data, [r.first for r in data.records], files, limits.source, limits.cut, note)
        room = limits.target - 1
        targets = encode(data, [r.second for r in data.records], files, room, limits.cut, note, special_tokens=False)
    elif data.form == "text":
        room = 2 * min(limits.source, limits.target - 1)
        texts = encode(data, [r.first for r in data.records], files, room, limits.cut, note)
        for text, record in zip(texts, data.records, strict=True):
            if len(text) < 2:
                raise ConfigError(f"{record.place}: expected a text of at least 2 tokens, but it has {len(text)}")
        halves = [np.array_split(text, 2) for text in texts]
        sources, targets = [half[0] for half in halves], [half[1] for half in halves]
    else:
        raise ConfigError(f"{data.name}: expected sources and targets, or texts, but it holds {data.form}")
    ended = [np.append(target, special.eos).astype(np.int32) for target in targets]
    return Seq2Seq(sources=sources, targets=ended, start=special.start, pad=special.pad)


def encode(
    data: TrainingData,
    texts: Sequence[str],
    files: Mapping[str, bytes],
    limit: int,
    cut: bool,
    note: Callable[[str], None],
    *,
    special_tokens: bool = True,
) -> list[np.ndarray]:
    """Return the ids [N] int32 of one text of each record; longer than `limit`: cut with a note, or a ConfigError."""
    tokenizer = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    rows = tokenizer.encode_batch_fast(list(texts), add_special_tokens=special_tokens)
    found = [np.array(row.ids, np.int32) for row in rows]
    long = [i for i, ids in enumerate(found) if len(ids) > limit]
    if long and not cut:
        record = data.records[long[0]]
        raise ConfigError(
            f"{record.place}: expected at most {limit} tokens, but a text of it has {len(found[long[0]])}: shorten it, "
            "raise the limit, or let long texts be cut"
        )
    for i, ids in enumerate(found):
        if not len(ids):
            raise ConfigError(f"{data.records[i].place}: expected a text, but the tokenizer makes no token of it")
    if long:
        tokenizer.enable_truncation(limit)  # leaves room for an end token, which a plain cut would take away
        cut_rows = tokenizer.encode_batch([texts[i] for i in long], add_special_tokens=special_tokens)
        for i, row in zip(long, cut_rows, strict=True):
            found[i] = np.array(row.ids, np.int32)
        note(f"{len(long)} of {len(found)} texts of {data.name} have more than {limit} tokens and were cut there.")
    return found
