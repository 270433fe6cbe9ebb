"""Keep a teacher's scores on disk: of every target token the k most likely, computed once.

    key.json                 what decides the scores: teacher, examples, k, temperature, vocabulary, precision
    shard-00000/ …           log_probs.npy [tokens, k] float16 · ids.npy [tokens, k] int32 · rest.npy [tokens] float16

A token's row holds log p of its k likeliest and of all others together (numerics/losses.py). A shard holds the targets
of 512 examples, one after another, and appears whole or not at all; a run that was killed goes on after the last one.
Scores are memory-mapped when they are read. float16 is off by at most 0.1 % of a log p.
"""
# ruff: noqa: TID253  scores are computed with torch: this file is imported only where a model is trained

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from edgepipe.artifacts import Json
from edgepipe.errors import ConfigError
from edgepipe.numerics.losses import IGNORED, TopK, top_k
from edgepipe.store import cache_key, publish, read_json, tidy, write_json
from edgepipe.training.batches import Seq2Seq
from edgepipe.training.precision import choose_precision
from edgepipe.training.processes import device, mine, shared, wait_for_all
from edgepipe.training.teacher import Teacher, judge

_SHARD = 512  # examples: minutes of work at most, and few files
_SHARD_NAME = r"shard-\d{5}"
_KEY = "key.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOptions:
    """Say what is kept of the teacher's distribution."""

    k: int = 32  # tokens kept of each distribution
    temperature: float = 1.0  # of the distribution; the loss must use the same
    vocab: int = 0  # the student's tokens: scores are over these alone
    rows: int = 16  # examples the teacher reads at once
    precision: str = "auto"  # of the teacher's products: auto, bf16, no; auto: bf16 where the machine gains by it


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Hold the opened scores of all targets."""

    shards: tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]  # log_probs, ids, rest
    offsets: np.ndarray  # [n] first row of each example, within its shard
    lengths: np.ndarray  # [n] tokens of each target
    temperature: float

    def at(self, index: Sequence[int], device: torch.device) -> TopK:
        """Return the scores of these examples' targets, [B, D, k], [B, D, k] and [B, D]; zeros at padding."""
        longest = int(self.lengths[list(index)].max())
        k = self.shards[0][0].shape[1]
        log_probs = np.zeros((len(index), longest, k), np.float16)
        ids = np.tile(np.arange(k, dtype=np.int32), (len(index), longest, 1))  # different ones, as TopK wants them
        rest = np.zeros((len(index), longest), np.float16)
        for row, example in enumerate(index):
            first, count = self.offsets[example], self.lengths[example]
            stored = self.shards[example // _SHARD]
            log_probs[row, :count] = stored[0][first : first + count]
            ids[row, :count] = stored[1][first : first + count]
            rest[row, :count] = stored[2][first : first + count]
        found = (torch.from_numpy(array).to(device) for array in (log_probs, ids.astype(np.int64), rest))
        return TopK(*found)


def keep_scores(
    teacher: Teacher, examples: Seq2Seq, options: ScoreOptions, folder: Path, progress: Callable[[str, int, int], None]
) -> Scores:
    """Return the teacher's scores of all targets, computed where they don't lie in `folder` yet.

    Several processes share the work; they need one disk. Raises ConfigError for options out of range.
    """
    if options.k < 1 or options.temperature <= 0 or options.vocab < 1:
        raise ConfigError("scores: expected k and vocab of at least 1, and a temperature above 0")
    precision = choose_precision(options.precision, device())
    kept = (options.k, options.temperature, options.vocab, precision)
    key = {"key": cache_key(teacher.fingerprint, examples_hash(examples), kept)}
    place = shared(lambda: str(_claim(folder, key)))
    work = _Work(teacher, examples, options, precision == "bf16")
    count = -(-len(examples.sources) // _SHARD)
    for number in mine(count):
        path = Path(place) / f"shard-{number:05}"
        if not path.exists():
            _write(path, work, number, progress)
    wait_for_all()
    return _open(Path(place), examples, count, options)


def examples_hash(examples: Seq2Seq) -> str:
    """Hash sources and targets as ids: data, tokenizer and limits are all in them."""
    digest = hashlib.sha256()
    for rows in (examples.sources, examples.targets):
        digest.update(np.array([len(row) for row in rows], np.int64).tobytes())
        digest.update(np.concatenate(rows).astype(np.int32).tobytes())
    return digest.hexdigest()


def check_folder(folder: Path) -> None:
    """Refuse a place for scores that holds something else: what is no shard of ours is nobody's to clear away."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(
            f"distill.scores: {folder} is a file: expected a directory that is new, empty or holds scores"
        )
    if folder.is_dir() and not (folder / _KEY).is_file() and any(folder.iterdir()):
        raise ConfigError(f"distill.scores: {folder} holds other things than scores: name a new directory or empty it")


def _claim(folder: Path, key: Json) -> Path:
    """Clear away what belongs to other scores, and return the folder."""
    check_folder(folder)
    tidy(folder, _SHARD_NAME)
    try:
        same = read_json(folder / _KEY) == key
    except (OSError, ValueError):
        same = False
    if not same:
        for path in folder.iterdir() if folder.is_dir() else ():
            if re.fullmatch(_SHARD_NAME, path.name):
                shutil.rmtree(path)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _KEY, key)
    return folder


class _Work(NamedTuple):
    """Hold what scoring needs."""

    teacher: Teacher
    examples: Seq2Seq
    options: ScoreOptions
    short: bool  # products in bfloat16

    def scores(self, rows: Sequence[int]) -> tuple[TopK, Tensor]:
        """Return the scores of examples, and their targets."""
        place = device()
        batch = {name: value.to(place) for name, value in self.examples.collate(rows).items()}
        with torch.autocast(place.type, torch.bfloat16, enabled=self.short):
            logits = judge(self.teacher, batch).logits
        options = self.options
        return top_k(logits, options.k, vocab=options.vocab, temperature=options.temperature), batch["target"]


def _write(path: Path, work: _Work, number: int, progress: Callable[[str, int, int], None]) -> None:
    """Score one shard's examples, those of like length together."""
    total = len(work.examples.sources)
    chosen = np.arange(number * _SHARD, min((number + 1) * _SHARD, total))
    order = chosen[np.argsort(work.examples.lengths[chosen], kind="stable")]
    found: dict[int, tuple[np.ndarray, ...]] = {}
    for first in range(0, len(order), work.options.rows):
        rows = order[first : first + work.options.rows].tolist()
        scores, target = work.scores(rows)
        for row, example in enumerate(rows):
            mask = target[row] != IGNORED
            parts = (scores.log_probs[row][mask].half(), scores.ids[row][mask].int(), scores.log_rest[row][mask].half())
            found[example] = tuple(part.cpu().numpy() for part in parts)
        progress("the teacher scores", number * _SHARD + first + len(rows), total)
    staged = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    for part, name in enumerate(("log_probs", "ids", "rest")):
        np.save(staged / f"{name}.npy", np.concatenate([found[example][part] for example in chosen.tolist()]))
    publish(staged, path)


def _open(folder: Path, examples: Seq2Seq, count: int, options: ScoreOptions) -> Scores:
    shards = []
    for number in range(count):
        path = folder / f"shard-{number:05}"
        log_probs, ids, rest = (np.load(path / f"{name}.npy", mmap_mode="r") for name in ("log_probs", "ids", "rest"))
        shards.append((log_probs, ids, rest))
    lengths = np.array([len(target) for target in examples.targets])
    before = np.cumsum(lengths) - lengths
    offsets = before - before[np.arange(len(lengths)) // _SHARD * _SHARD]
    return Scores(shards=tuple(shards), offsets=offsets, lengths=lengths, temperature=options.temperature)
