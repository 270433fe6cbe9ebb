"""A tiny task that a tiny encoder-decoder learns in seconds: write the source backwards."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from edgepipe.numerics.losses import IGNORED, cross_entropy, masked_mean
from edgepipe.store import write_json
from edgepipe.students.config import StudentConfig, with_layers
from edgepipe.students.files import make_student
from edgepipe.training.batches import Batch, Seq2Seq
from edgepipe.training.distil import DistilOptions, LayerMap, Projected, distillation, drawing, likelihood
from edgepipe.training.loop import LoopData, LoopOptions, Place, Step, train
from edgepipe.training.teacher import Teacher
from tests.tiny_models import random_model, tiny_config

VOCAB, START, EOS = 24, 0, 1
STACK: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
PAIR = StudentConfig(kind="encoder-decoder", encoder=STACK, decoder=with_layers(STACK, [0]))


def reversals(count: int, seed: int) -> Seq2Seq:
    """Return seeded sources of 3 to 9 tokens and the same tokens backwards."""
    rng = np.random.default_rng(seed)
    sources = [rng.integers(2, VOCAB, rng.integers(3, 10)).astype(np.int32) for _ in range(count)]
    targets = [np.append(source[::-1], EOS).astype(np.int32) for source in sources]
    return Seq2Seq(sources=sources, targets=targets, start=START, pad=EOS)


def teacher(vocab: int = VOCAB, **changes: Any) -> Teacher:
    """Return a random teacher that is sure of itself."""
    config = tiny_config("llama", vocab_size=vocab, eos_token_id=EOS, **changes)
    module = random_model(config, seed=5)
    module.lm_head.weight.data.mul_(3)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return Teacher(module, "fingerprint", "random")


def predict(module: nn.Module, batch: Batch, _step: int) -> Step:
    """Score the target given the source."""
    logits = module(batch["source"], batch["source_mask"], batch["decoder_input"]).logits
    mask = batch["target"] != IGNORED
    right = (logits.argmax(-1) == batch["target"]).float()
    loss = masked_mean(cross_entropy(logits, batch["target"]), mask)
    return Step(loss, mask.sum(), {"accuracy": masked_mean(right, mask)})


OPTIONS = LoopOptions(steps=60, batch=16, learning_rate=3e-3, evaluate_every=10, save_every=5, precision="no")


def run_tiny(folder: Path, options: LoopOptions = OPTIONS, dropout: float = 0.1, seed: int = 0) -> tuple[Any, Any]:
    """Train in a folder, or go on there; return the student and the record."""
    student = make_student(PAIR, seed=seed)
    student.dropout.rate = dropout
    data = LoopData(train=reversals(200, 0), held_out=reversals(30, 1))
    return student, train(student, predict, data, options, Place(folder=folder, key=f"tiny {seed}"))


def run_taught(folder: Path, rows: int = 0, stop_at: int = 0) -> tuple[Any, Any]:
    """Train by a teacher, on samples in half of the steps, and on its states; stop in a step as Ctrl-C does."""
    student: Any = Projected(make_student(PAIR), 112)  # type: ignore[arg-type]
    how = DistilOptions(alpha=0.5, on_policy=0.5, match_hidden=0.5)
    taught = distillation(how, teacher(), layers=LayerMap(encoder=(0, 1), decoder=(1,)))

    def objective(module: nn.Module, batch: Batch, step: int) -> Step:
        if stop_at and step == stop_at:
            raise KeyboardInterrupt
        return taught(module, batch, step)

    data = LoopData(train=reversals(200, 0), held_out=reversals(30, 1), judge=likelihood, prepare=drawing(how))
    options = dataclasses.replace(OPTIONS, steps=6, learning_rate=1e-3, rows=rows, save_every=2)
    return student, train(student, objective, data, options, Place(folder=folder, key="taught"))


def main() -> None:
    """Train as a process of its own (killed, or one of several): folder, where records go, dropouts or `taught`."""
    import torch

    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    for what in sys.argv[3:]:
        student, record = (
            run_taught(folder / what) if what == "taught" else run_tiny(folder / what, dropout=float(what))
        )
        if record["processes"] == 1 or torch.distributed.get_rank() == 0:
            (out / what).mkdir(parents=True)
            torch.save(student.state_dict(), out / what / "weights.pt")
            write_json(out / what / "record.json", record)


if __name__ == "__main__":
    main()
