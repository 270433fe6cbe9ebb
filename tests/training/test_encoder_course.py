"""Encoders of a tiny teacher: made and not taught, taught by one file, then further by another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe.artifacts import TorchModel
from edgepipe.errors import ConfigError
from edgepipe.sources import open_model
from edgepipe.stages.distill import Distill
from edgepipe.students.result import save
from edgepipe.training import encoder_course
from edgepipe.training.encoder_course import phase_seed
from tests.decoders import context

SENTENCES = [f"The {a} {b} the {c}." for a in ("cat", "dog", "man") for b in ("sees", "eats") for c in ("fish", "bird")]


def table(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write a .jsonl file and return its name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def made(model: TorchModel, folder: Path, notes: list[str] | None = None, **options: Any) -> TorchModel:
    """Run the stage alone."""
    stage = Distill(**{"student": "encoder", "held_out": 0.2, "batch": 4, "precision": "no", **options})
    stage.check(model)
    return stage(model, context(folder, notes))


def weights(model: TorchModel) -> dict[str, np.ndarray]:
    """Return all weights."""
    return {name: np.array(model.weights.float32(name)) for name in model.weights}


def changed(before: TorchModel, after: TorchModel) -> set[str]:
    """Name the weights that differ, among those both have."""
    old, new = weights(before), weights(after)
    return {name for name in set(old) & set(new) if not np.array_equal(old[name], new[name])}


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """Write texts."""
    return table(tmp_path / "texts.jsonl", [{"text": text} for text in SENTENCES])


def test_untaught_is_the_teacher_without_its_mask(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Without data and steps every weight is the teacher's; the head it has no use for is gone."""
    teacher = open_model(str(tiny_model_dir))
    student = made(teacher, tmp_path, untaught=True, encoder_from=(0,))
    assert student.info.task == "feature-extraction"
    own = weights(student)
    np.testing.assert_array_equal(own["embed_tokens.weight"], teacher.weights.float32("model.embed_tokens.weight"))
    name = "layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(own[f"encoder.{name}"], teacher.weights.float32(f"model.{name}"))


@pytest.mark.parametrize("student", ["decoder", "encoder-decoder"])
def test_untaught_generators(student: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The other kinds need no data either, and nobody writes any."""
    teacher = open_model(str(tiny_model_dir))
    student_of = Distill(student=student, untaught=True, decoder_layers=1)
    found = student_of(teacher, context(tmp_path))
    assert found.info.task == {"decoder": "text-generation", "encoder-decoder": "text2text-generation"}[student]
    assert not list(tmp_path.rglob("*.jsonl"))


def test_masked_prediction_alone(tiny_model_dir: Path, tmp_path: Path, texts: str) -> None:
    """With `untaught`, the steps in front are all that happens; `contrast_steps` count for texts then, too."""
    teacher = open_model(str(tiny_model_dir))
    plain = made(teacher, tmp_path, untaught=True)
    masked = made(teacher, tmp_path / "a", data=texts, untaught=True, mask_steps=2)
    both = made(teacher, tmp_path / "b", data=texts, untaught=True, mask_steps=2, contrast_steps=2)
    assert changed(plain, masked) and changed(masked, both)
    again = made(teacher, tmp_path / "c", data=texts, steps=2, mask_steps=2)
    assert not changed(both, again)
    other = made(teacher, tmp_path / "d", data=texts, steps=2, mask_steps=2, contrast_dropout=0.1)
    assert changed(both, other)


def test_phases_have_numbers_of_their_own(
    tiny_model_dir: Path, tmp_path: Path, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first phase draws by the run's seed, and no phase by that of another run's."""
    assert [phase_seed(seed, 0) for seed in range(5)] == list(range(5))
    seeds = [phase_seed(seed, phase) for seed in range(50) for phase in range(3)]
    assert len(set(seeds)) == len(seeds)
    used: list[int] = []
    train = encoder_course.train
    monkeypatch.setattr(encoder_course, "train", lambda *given: (used.append(given[3].seed), train(*given))[1])
    made(open_model(str(tiny_model_dir)), tmp_path, data=texts, mask_steps=1, steps=1)
    assert used == [0, phase_seed(0, 1)]


def test_held_out_texts_without_a_masked_token_judge_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    """One token is never masked: there is no best student, so the last one is kept, and that is said."""
    notes: list[str] = []
    teacher = open_model(str(tiny_model_dir))
    file = table(tmp_path / "short.jsonl", [{"text": letter} for letter in "abcdefgh"] + [{"text": "the mill"}] * 30)
    plain = made(teacher, tmp_path, untaught=True)
    masked = made(teacher, tmp_path / "a", notes, data=file, untaught=True, mask_steps=3, held_out=0.02)
    assert changed(plain, masked)
    assert any("gave nothing to judge by: the last weights are kept" in note for note in notes)


def test_a_student_is_taught_further(tiny_model_dir: Path, tmp_path: Path, texts: str) -> None:
    """Texts, then pairs, then labels: each goes on from the weights of the one before, from its directory too."""
    notes: list[str] = []
    embeds = made(open_model(str(tiny_model_dir)), tmp_path / "a", data=texts, steps=2)
    save(embeds, tmp_path / "student")
    opened = open_model(str(tmp_path / "student"))
    assert not changed(embeds, made(opened, tmp_path / "b", notes, untaught=True))
    assert any("taught further" in note for note in notes)
    pairs = [
        {"first": first, "second": first if i % 2 else SENTENCES[i - 2], "score": i % 2}
        for i, first in enumerate(SENTENCES)
    ]
    file = table(tmp_path / "pairs.jsonl", pairs)
    ranked = made(opened, tmp_path / "c", data=file, steps=20, learning_rate=3e-3)
    assert changed(embeds, ranked) and ranked.info.task == "feature-extraction"
    labels = [{"text": text, "label": "x" if "cat" in text else "y"} for text in SENTENCES]
    file = table(tmp_path / "labels.jsonl", labels)
    classifier = made(ranked, tmp_path / "d", data=file, steps=2)
    assert classifier.info.task == "text-classification"
    assert weights(classifier)["classifier.weight"].shape[0] == 2
    same = made(classifier, tmp_path / "e", data=file, untaught=True)
    assert not changed(classifier, same)


def test_what_is_refused(tiny_model_dir: Path, tmp_path: Path, texts: str) -> None:
    """Options that a student can't follow any more, students of another kind, steps that nobody takes."""
    teacher = open_model(str(tiny_model_dir))
    student = made(teacher, tmp_path, untaught=True)
    with pytest.raises(ConfigError, match=r"distill\.encoder_layers: .* is a student already"):
        made(student, tmp_path, data=texts, steps=1, encoder_layers=1)
    with pytest.raises(ConfigError, match=r"a teacher is a text-generation model"):
        Distill(student="decoder", data=texts).check(student)
    pair = Distill(untaught=True, encoder_layers=1, decoder_layers=1)(teacher, context(tmp_path))
    with pytest.raises(ConfigError, match="an encoder can be taught further"):
        made(pair, tmp_path, data=texts, steps=1)
    with pytest.raises(ConfigError, match=r"distill\.untaught: give no steps"):
        Distill(untaught=True, steps=3)
    for rate in (0.0, 1.0):
        with pytest.raises(ConfigError, match=r"distill\.contrast_dropout: expected above 0 and below 1"):
            Distill(contrast_dropout=rate)
    student = made(teacher, tmp_path / "student", untaught=True)
    with pytest.raises(ConfigError, match="writes no texts of its own: give a file of texts, pairs or labels"):
        Distill(student="encoder", mask_steps=1, untaught=True).check(student)
