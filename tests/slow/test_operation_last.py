"""Twelve digits, then an operation: an encoder-decoder learns far more where its encoder looks ahead.

The operation stands last, so a causal encoder has read the digits before it knows what is to be done with them and
leaves all of the work to the decoder. A decoder-only teacher learns the task first; two encoder-decoders are made of it
and trained for the same steps, one of them with a causal encoder.
Source: arXiv:2504.06225, as a toy: ten operations, width 64, two layers a stack, what is held out is answered whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgepipe.artifacts import ModelInfo, TorchModel
from edgepipe.numerics.losses import IGNORED
from edgepipe.sources import open_model
from edgepipe.students.files import make_student
from edgepipe.students.from_teacher import StudentPlan, plan_student, student_values
from edgepipe.students.models import Decoder, EncoderDecoder, Student
from edgepipe.students.result import as_model
from edgepipe.training.batches import Seq2Seq
from edgepipe.training.distil import DistilOptions, distillation, run_student
from edgepipe.training.loop import LoopData, LoopOptions, Place, train

START, EOS, DIGIT, OPERATION, VOCAB, DIGITS = 0, 1, 2, 12, 22, 12
OPERATIONS: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
    lambda d: d,
    lambda d: d[::-1],
    lambda d: (d + 1) % 10,
    lambda d: 9 - d,
    lambda d: np.roll(d, 1),
    lambda d: np.roll(d, -1),
    lambda d: np.roll(d, DIGITS // 2),
    lambda d: d.reshape(-1, 2)[:, ::-1].ravel(),
    lambda d: np.concatenate([d[::2], d[1::2]]),
    lambda d: (d + np.roll(d, 1)) % 10,
)
STACK: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
PLAN = StudentPlan(kind="encoder-decoder", encoder_layers=2, decoder_layers=2)
ARMS = {"bidirectional": PLAN, "causal": dataclasses.replace(PLAN, causal_encoder=True)}
TEACHER_STEPS, STEPS = 1500, 1600


def examples(count: int, seed: int) -> Seq2Seq:
    """Return seeded digits with an operation after them, and what the operation makes of them."""
    rng = np.random.default_rng(seed)
    sources, targets = [], []
    for _ in range(count):
        digits, operation = rng.integers(0, 10, DIGITS), int(rng.integers(len(OPERATIONS)))
        sources.append(np.append(digits + DIGIT, OPERATION + operation).astype(np.int32))
        targets.append(np.append(OPERATIONS[operation](digits) + DIGIT, EOS).astype(np.int32))
    return Seq2Seq(sources=sources, targets=targets, start=START, pad=EOS)


def taught(student: Decoder | EncoderDecoder, steps: int, folder: Path) -> float:
    """Train on the task; return the share of held-out rows of which every token is foreseen."""
    options = LoopOptions(steps=steps, batch=64, learning_rate=2e-3, warmup=20, precision="no")
    objective = distillation(DistilOptions(alpha=0))
    train(student, objective, LoopData(train=examples(20_000, 1)), options, Place(folder=folder, key="digits"))
    batch = examples(500, 2).collate(range(500))
    with torch.no_grad():
        right = run_student(student.eval(), batch).logits.argmax(-1) == batch["target"]
    return float((right | (batch["target"] == IGNORED)).all(1).float().mean())


def made(teacher: TorchModel, plan: StudentPlan) -> Student:
    """Return the student that a plan makes of the teacher."""
    student = make_student(plan_student(STACK, plan))
    values = student_values(teacher, plan, plan_student(STACK, plan))
    student.load_state_dict({name: torch.from_numpy(np.array(v)) for name, v in values.items()})
    return student


@pytest.fixture
def info(tiny_model_dir: Path) -> ModelInfo:
    """Say of the teacher what no test here looks at: names, licence, tokens."""
    return dataclasses.replace(open_model(str(tiny_model_dir)).info, config=dict(STACK), eos_token_ids=(EOS,))


@pytest.mark.slow
def test_an_encoder_that_looks_ahead_learns_more(info: ModelInfo, tmp_path: Path) -> None:
    """After the same steps the bidirectional student answers most rows, and far more than the causal one."""
    decoder = make_student(STACK)
    assert isinstance(decoder, Decoder)
    assert taught(decoder, TEACHER_STEPS, tmp_path / "teacher") > 0.9
    teacher = as_model(decoder, info, name="teacher", tokenizer={})
    found = {}
    for name, plan in ARMS.items():
        student = made(teacher, plan)
        assert isinstance(student, EncoderDecoder)
        found[name] = taught(student, STEPS, tmp_path / name)
    assert found["bidirectional"] > 0.5, found
    assert found["bidirectional"] > found["causal"] + 0.3, found
