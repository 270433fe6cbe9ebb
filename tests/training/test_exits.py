"""Exits are learnt together, gates over texts that nobody trained on, and other gates need no other training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgepipe.sources import open_model
from edgepipe.stages.distill import Distill
from edgepipe.students.config import StudentConfig
from edgepipe.students.files import make_student
from edgepipe.training.encoder_data import Labels, Texts, classified
from edgepipe.training.exits import at_depth, at_exits, fit_gates
from tests.training.test_encoder_course import changed, made, table, weights
from tests.training.tiny import STACK, VOCAB

WORDS = ("good", "bad", "fine", "poor")
EXITS = StudentConfig(
    kind="encoder", encoder={**STACK, "num_hidden_layers": 3}, exits=(1, 2), labels=("no", "yes"), pooling="last"
)


def examples(count: int, seed: int) -> Labels:
    """Return random texts of 3 to 9 tokens, and whether the first token is an even one."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(2, VOCAB, rng.integers(3, 10)).astype(np.int32) for _ in range(count)]
    return Labels(texts=Texts(ids=ids, pad=1), labels=np.array([int(text[0]) % 2 for text in ids], np.int64))


def test_a_loss_is_that_of_all_exits_each_by_its_layers() -> None:
    student: Any = make_student(EXITS, seed=0)
    batch = examples(8, 0).collate(range(8))
    whole = at_exits(classified, EXITS.depths)(student, batch, 1)
    each = []
    for depth in EXITS.depths:
        with at_depth(student, depth):
            each.append(classified(student, batch, 1).loss.item())
    assert len({round(loss, 6) for loss in each}) == 3
    assert whole.loss.item() == pytest.approx(np.average(each, weights=[1, 2, 3]), rel=1e-5)
    answers, _ = student.at_depths(batch["ids"], batch["mask"])
    by_answers = [torch.nn.functional.cross_entropy(one, batch["label"]).item() for one in answers]
    assert by_answers == pytest.approx(each, rel=1e-5), "one pass and three say the same"


def test_the_stage_fits_gates_and_fits_others_without_training(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"The {a} is {b} {i}.", "label": "yes" if a == "good" else "no"}
        for i in range(8)
        for a in WORDS
        for b in WORDS[:2]
    ]
    data = table(tmp_path / "labels.jsonl", rows)
    teacher = open_model(str(tiny_model_dir))
    notes: list[str] = []
    how: dict[str, Any] = {"encoder_layers": 2, "exits": (1,), "data": data, "max_source": 64}
    student = made(teacher, tmp_path / "a", notes, steps=4, **how)
    assert student.info.config["exits"] == [1]
    assert any("the exit after 1 layers is right for" in note for note in notes)
    own = weights(student)
    assert own["gates.0.weight"].shape == (student.info.config["encoder"]["hidden_size"] + 1,)
    assert own["gates.0.weight"].any()
    again = made(student, tmp_path / "b", data=data, untaught=True, gate_beta=4.0, max_source=64)
    assert changed(student, again) == {"gates.0.weight", "gates.0.bias"}
    same = made(student, tmp_path / "c", data=data, untaught=True, max_source=64)
    assert changed(student, same) == set(), "the same β, over the same texts"
    assert Distill(student="encoder", exits=(1,)).exits == (1,)


def test_every_exit_of_a_beta_that_outweighs_everything_is_right() -> None:
    student: Any = make_student(EXITS, seed=0)
    found = fit_gates(student, examples(60, 0), 10.0, 16)
    assert [one["right"] for one in found["exits"]] == [1.0, 1.0]
    _, features = student.at_depths(*(examples(9, 1).collate(range(9))[name] for name in ("ids", "mask")))
    assert all((gate(seen) > 0).all() for gate, seen in zip(student.gates, features, strict=True))


def test_exits_of_a_student_are_kept_in_its_config() -> None:
    plain = dataclasses.replace(EXITS, exits=())
    assert "exits" not in plain.to_json()
    assert EXITS.to_json()["exits"] == [1, 2]


def test_an_embedding_is_as_good_as_it_is_near_that_of_all_layers() -> None:
    """Text by text in the reference, in batches of like length in the fit: each text keeps its own quality."""
    student: Any = make_student(dataclasses.replace(EXITS, labels=(), pooling="mean"), seed=0)
    texts = examples(40, 3).texts
    beta = 0.5
    found = fit_gates(student, texts, beta, 16)
    right, quality = np.zeros(2), np.zeros(2)
    for number in range(40):
        batch = texts.collate([number])
        with torch.no_grad():
            *early, last = (one.numpy()[0] for one in student.at_depths(batch["ids"], batch["mask"])[0])
        cosines = [float(one @ last / np.linalg.norm(one) / np.linalg.norm(last)) for one in early]
        worth = [q - beta * depth / 3 for q, depth in zip((*cosines, 1.0), EXITS.depths, strict=True)]
        right += [worth[0] >= max(worth[1:]), worth[1] >= worth[2]]
        quality += cosines
    assert [one["right"] for one in found["exits"]] == pytest.approx(right / 40)
    assert [one["quality"] for one in found["exits"]] == pytest.approx(quality / 40, abs=1e-5)
    assert found["quality"] == pytest.approx(1.0)
    assert right.min() > 0 and right.max() < 40, "the test wants texts of both kinds"
