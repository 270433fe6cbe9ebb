"""Let the teacher write what a student is trained with: targets for given sources, or texts of its own.

    targets    sequence-level distillation (arXiv:1606.07947): the teacher's answer to every source, greedy by default
    texts      for want of data: the teacher goes on from its first token, sampling

Both are a .jsonl with its provenance beside it (.json: teacher, options, versions, counts), written in parts that
appear whole or not at all; a run that was killed goes on after the last part. Each part has a seed of its own.
"""
# ruff: noqa: TID253  texts are written by a torch module: this file is imported only where one is asked

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

from edgepipe.artifacts import Json
from edgepipe.errors import ConfigError, StageError
from edgepipe.store import cache_key, read_json, versions, write_json, write_text
from edgepipe.training.batches import pad
from edgepipe.training.data import TrainingData, read_data
from edgepipe.training.processes import device, shared
from edgepipe.training.teacher import Teacher

_PART = 128  # texts: minutes of work at most


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """Say how the teacher writes."""

    tokens: int = 64  # of a target or text, at most
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # tokens that are sampled from; 0: all
    rows: int = 16  # texts that are written at once
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        if self.tokens < 1 or self.rows < 1 or self.temperature < 0 or self.top_k < 0 or self.seed < 0:
            raise ConfigError("writing: expected tokens and rows of at least 1, the other numbers at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """Say who writes, with which tokenizer, and where."""

    teacher: Teacher
    files: Mapping[str, bytes]  # the tokenizer's
    eos: Sequence[int]  # what ends a text
    folder: Path  # this writing's own
    progress: Callable[[str, int, int], None]


def write_targets(
    data: TrainingData, sources: Sequence[np.ndarray], writing: Writing, options: WriteOptions
) -> TrainingData:
    """Return the data with the teacher's targets: one for each different source. `sources` are the records' ids.

    Of a text the source is its first half (batches.py), not the record's text: what the ids say is written down.
    Raises StageError when the teacher has nothing to say to any source.
    """
    decoder = tokenizers.Tokenizer.from_buffer(writing.files["tokenizer.json"])
    halves = data.form == "text"
    different = {
        decoder.decode([int(i) for i in ids]) if halves else record.first: ids
        for record, ids in zip(data.records, sources, strict=True)
    }
    origin: Json = {"data": {"name": data.name, "sha256": data.sha256}}
    return _written("targets", list(different), list(different.values()), origin, writing, options)


def write_texts(count: int, start: int, writing: Writing, options: WriteOptions) -> TrainingData:
    """Return `count` texts that the teacher writes from its token `start` on; blank ones are left out."""
    if options.temperature == 0:
        raise ConfigError("writing: texts of a teacher's own are sampled, so the temperature must be above 0")
    return _written("texts", [""] * count, [np.array([start], np.int32)] * count, {}, writing, options)


def _written(
    name: str, sources: list[str], prompts: Sequence[np.ndarray], origin: Json, writing: Writing, options: WriteOptions
) -> TrainingData:
    """Read what was written as any other file; of several processes the first one writes."""
    return read_data(shared(lambda: _write(name, sources, prompts, origin, writing, options)))


def _write(
    name: str, sources: list[str], prompts: Sequence[np.ndarray], origin: Json, writing: Writing, options: WriteOptions
) -> str:
    """Write part after part, join them, and return the file's path."""
    digest = hashlib.sha256(b"".join(np.append(ids, -1).astype(np.int32).tobytes() for ids in prompts)).hexdigest()
    key = cache_key(writing.teacher.fingerprint, digest, asdict(options), sorted(writing.eos))
    folder, whole = writing.folder, writing.folder / f"{name}.jsonl"
    about = folder / f"{name}.json"
    if not (_is(about, key) and whole.exists()):
        plan = folder / f"{name}-key.json"
        if not _is(plan, key):
            for path in folder.glob(f"{name}-part-*.jsonl"):
                path.unlink()
            folder.mkdir(parents=True, exist_ok=True)
            write_json(plan, {"key": key})
        parts = [folder / f"{name}-part-{number:05}.jsonl" for number in range(-(-len(prompts) // _PART))]
        for number, path in enumerate(parts):
            if not path.exists():
                chosen = slice(number * _PART, (number + 1) * _PART)
                write_text(path, _part(sources[chosen], prompts[chosen], number, writing, options))
            writing.progress(f"the teacher writes {name}", min((number + 1) * _PART, len(prompts)), len(prompts))
        text = "".join(path.read_text(encoding="utf-8") for path in parts)
        if not text:
            raise StageError(f"the teacher {writing.teacher.name} wrote no {name}: its first token is always an end")
        write_text(whole, text)
        teacher = {"name": writing.teacher.name, "fingerprint": writing.teacher.fingerprint}
        counts = {"asked": len(prompts), "written": text.count("\n")}
        write_json(
            about,
            {"key": key, "teacher": teacher, "options": asdict(options), "versions": versions(), **counts, **origin},
        )
        for path in [*parts, plan]:
            path.unlink()
    return str(whole)


def _is(path: Path, key: str) -> bool:
    """Say whether a file of ours belongs to this writing."""
    try:
        return bool(read_json(path)["key"] == key)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _part(
    sources: Sequence[str], prompts: Sequence[np.ndarray], number: int, writing: Writing, options: WriteOptions
) -> str:
    """Return one part's lines; prompts of like length are answered together."""
    tokenizer = tokenizers.Tokenizer.from_buffer(writing.files["tokenizer.json"])
    torch.manual_seed(int(np.random.SeedSequence([options.seed, number]).generate_state(1)[0]))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, str] = {}
    for first in range(0, len(order), options.rows):
        rows = order[first : first + options.rows]
        for i, ids in zip(
            rows, generate(writing.teacher.module, [prompts[i] for i in rows], writing.eos, options), strict=True
        ):
            found[i] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    lines = []
    for i, source in enumerate(sources):
        if found[i]:
            record = {"source": source, "target": found[i]} if source else {"text": found[i]}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


@torch.no_grad()
def generate(module: Any, prompts: Sequence[np.ndarray], eos: Sequence[int], options: WriteOptions) -> list[list[int]]:
    """Return what transformers' generate writes after each prompt, without the end token."""
    place = device()
    module = module.to(place)
    turned = pad([ids[::-1] for ids in prompts], -1).flip(1)  # padded on the left
    written = module.generate(
        input_ids=turned.clamp_min(0).to(place),
        attention_mask=(turned >= 0).long().to(place),
        max_new_tokens=options.tokens,
        do_sample=options.temperature > 0,
        temperature=options.temperature or None,
        top_k=options.top_k if options.temperature > 0 else None,
        top_p=1.0 if options.temperature > 0 else None,
        eos_token_id=list(eos),
        pad_token_id=eos[0],
    )
    rows = written[:, turned.shape[1] :].tolist()
    ends = [next((place for place, token in enumerate(row) if token in eos), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]
