"""Tiny students with a tokenizer, as directories that edgepipe opens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from edgepipe.students.config import StudentConfig
from edgepipe.students.files import make_student, save_student
from edgepipe.students.models import Encoder, EncoderDecoder
from tests.tiny_models import save_tiny_tokenizer

VOCABULARY = 384  # what the tiny tokenizer needs
IDS = {"decoder_start_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def with_vocabulary(config: StudentConfig, vocab: int = VOCABULARY) -> StudentConfig:
    """Return a student's config with another vocabulary."""
    decoder = None if config.decoder is None else {**config.decoder, "vocab_size": vocab}
    return dataclasses.replace(config, encoder={**config.encoder, "vocab_size": vocab}, decoder=decoder)


def tiny_student(config: StudentConfig, seed: int = 0) -> Encoder | EncoderDecoder:
    """Return a seeded student whose outputs differ and whose norms and biases are no neutral elements."""
    student = make_student(config, seed=seed)
    assert isinstance(student, Encoder | EncoderDecoder)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for value in student.parameters():
            value.add_(torch.randn(value.shape, generator=generator) * 0.15)
    return student.eval()


def save_tiny_student(path: Path, config: StudentConfig, **changes: Any) -> Path:
    """Write a student of the tiny tokenizer's vocabulary as a directory and return it; `changes` go into its config."""
    path.mkdir(parents=True)
    save_student(tiny_student(with_vocabulary(config)), path, {}, {**IDS, **changes})
    save_tiny_tokenizer(path, VOCABULARY)
    return path
