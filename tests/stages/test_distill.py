"""The stage distill: every kind of student, what it says of itself, what goes on after a stop, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe.artifacts import Context, Json, TorchModel
from edgepipe.errors import ConfigError
from edgepipe.sources import open_model
from edgepipe.stages.distill import Distill
from edgepipe.students.result import save
from tests.decoders import TARGET
from tests.tiny_models import save_tiny_model

QUICK: dict[str, Any] = {
    "steps": 3,
    "batch": 8,
    "warmup": 1,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "precision": "no",
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    """Return a tiny teacher of four layers."""
    return open_model(str(save_tiny_model(tmp_path_factory.mktemp("teacher") / "llama", "llama", num_hidden_layers=4)))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return a file of every form of data."""
    folder = tmp_path_factory.mktemp("data")
    forms: dict[str, Any] = {
        "answers": lambda i: {"source": f"name {i}, food {i % 5}", "target": f"{i} has {i % 5}"},
        "pairs": lambda i: {"first": f"name {i}", "second": f"the name is {i}"},
        "scored": lambda i: {"first": f"name {i}", "second": f"name {i + i % 3}", "score": 5 - i % 3},
        "labels": lambda i: {"text": f"name {i}", "label": "odd" if i % 2 else "even"},
        "texts": lambda i: {"text": f"{i} is the name of number {i}"},
    }
    for name, row in forms.items():
        lines = "".join(json.dumps(row(i)) + "\n" for i in range(40))
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in forms}


def context(folder: Path, notes: list[str] | None = None, figures: Json | None = None, seed: int = 0) -> Context:
    """Return what the stage reads besides its input."""
    folder.mkdir(parents=True, exist_ok=True)
    return Context(
        target=TARGET,
        work_dir=folder,
        keep_dir=folder / "kept",
        seed=seed,
        note=([] if notes is None else notes).append,
        figures=({} if figures is None else figures).update,
    )


@pytest.mark.parametrize(
    ("data", "options", "task", "phases"),
    [
        ("answers", {}, "text2text-generation", ["student"]),
        ("answers", {"student": "decoder"}, "text-generation", ["student"]),
        ("answers", {"adapt_steps": 2, "targets": "teacher"}, "text2text-generation", ["teacher", "student"]),
        ("answers", {"on_policy": 1.0, "reverse": 0.5}, "text2text-generation", ["student"]),
        ("answers", {"cross": "random", "cross_steps": 2, "alpha": 0.0}, "text2text-generation", ["student"]),
        ("answers", {"hidden": 56, "match_hidden": 1.0}, "text2text-generation", ["student"]),
        ("answers", {"scratch": True, "causal_encoder": True}, "text2text-generation", ["student"]),
        ("texts", {}, "text2text-generation", ["student"]),
        ("texts", {"student": "decoder"}, "text-generation", ["student"]),
        ("texts", {"student": "encoder", "mask_steps": 2}, "feature-extraction", ["contrast", "masked"]),
        ("pairs", {"student": "encoder", "contrast_steps": 2}, "feature-extraction", ["contrast", "student"]),
        ("scored", {"student": "encoder", "pooling": "latent"}, "feature-extraction", ["student"]),
        ("labels", {"student": "encoder", "pooling": "last", "dropout": 0.1}, "text-classification", ["student"]),
    ],
)
def test_students(
    data: str,
    options: dict[str, Any],
    task: str,
    phases: list[str],
    teacher: TorchModel,
    files: dict[str, str],
    tmp_path: Path,
) -> None:
    """Each is made and trained, says so, keeps the lineage, and opens again from a directory with the same weights."""
    notes: list[str] = []
    figures: Json = {}
    stage = Distill(**{**QUICK, "data": files[data], **options})
    stage.check(teacher)
    student = stage(teacher, context(tmp_path / "work", notes, figures))
    assert student.info.task == task
    assert sorted(figures["training"]) == sorted(phases)
    assert figures["data"]["train"] + figures["data"]["held_out"] == 40
    assert any("million parameters" in note for note in notes)
    assert student.info.licence.lineage[0] == teacher.info.licence.source
    save(student, tmp_path / "student")
    again = open_model(str(tmp_path / "student"))
    assert again.info.task == task
    assert again.info.licence.lineage == student.info.licence.lineage
    assert again.weights.aliases == student.weights.aliases
    for name in student.weights:
        assert np.array_equal(again.weights.float32(name), student.weights.float32(name)), name


def test_the_same_seed_gives_the_same_student(teacher: TorchModel, files: dict[str, str], tmp_path: Path) -> None:
    """Two runs end in the same bytes, another seed doesn't."""
    found = []
    for number, seed in enumerate((0, 0, 1)):
        stage = Distill(**QUICK, data=files["answers"])
        found.append(stage(teacher, context(tmp_path / str(number), seed=seed)).info.fingerprint)
    assert found[0] == found[1] != found[2]


def test_the_teacher_writes_when_there_are_no_data(teacher: TorchModel, tmp_path: Path) -> None:
    """Its texts are kept with their provenance, and said to be its own."""
    notes: list[str] = []
    stage = Distill(**QUICK, own_texts=12, max_target=16)
    stage(teacher, context(tmp_path, notes))
    assert any("the teacher wrote" in note for note in notes)
    assert list((tmp_path / "kept" / "texts").glob("*.jsonl"))


def test_scores_are_kept_for_other_runs(
    teacher: TorchModel, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run with another seed asks the teacher for nothing."""
    from edgepipe.training import scores

    asked: list[int] = []
    counts: list[int] = []
    judge = scores.judge
    monkeypatch.setattr(scores, "judge", lambda *given: (asked.append(1), judge(*given))[1])
    for seed in (0, 1):
        stage = Distill(**QUICK, data=files["answers"], scores=str(tmp_path / "scores"))
        stage(teacher, context(tmp_path / str(seed), seed=seed))
        counts.append(len(asked))
    assert 0 < counts[0] == counts[1]


@pytest.mark.parametrize("kind", ["encoder-decoder", "encoder"])
def test_dropout(kind: str, teacher: TorchModel, files: dict[str, str], tmp_path: Path) -> None:
    """A student that is taught with dropout ends elsewhere; it answers without any."""
    data = files["answers" if kind == "encoder-decoder" else "pairs"]
    found = []
    for rate in (0.0, 0.2):
        stage = Distill(**{**QUICK, "student": kind, "data": data, "dropout": rate})
        found.append(stage(teacher, context(tmp_path / str(rate))).info.fingerprint)
    assert found[0] != found[1]
    with pytest.raises(ConfigError, match=r"distill\.dropout: expected from 0 to below 1, got 1"):
        Distill(dropout=1)


@pytest.mark.parametrize(("made", "sentence"), [("file", "is a file"), ("folder", "holds other things than scores")])
def test_scores_never_take_the_place_of_anything(
    made: str, sentence: str, teacher: TorchModel, files: dict[str, str], tmp_path: Path
) -> None:
    """A file, or a directory of somebody's own shards, is refused before any work and stays as it is."""
    place = tmp_path / "scores"
    if made == "folder":
        (place / "shard-a").mkdir(parents=True)
    precious = place / "shard-a" / "precious.txt" if made == "folder" else place
    precious.write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=sentence):
        Distill(**QUICK, data=files["answers"], scores=str(place)).check(teacher)
    assert precious.read_text(encoding="utf-8") == "mine"


def test_a_student_goes_on(teacher: TorchModel, files: dict[str, str], tmp_path: Path) -> None:
    """`start` trains an earlier student further; one that reads other tokens, or is of another kind, is refused."""
    first = Distill(**QUICK, data=files["answers"])(teacher, context(tmp_path / "first"))
    save(first, tmp_path / "student")
    stage = Distill(**QUICK, data=files["answers"], start=str(tmp_path / "student"))
    stage.check(teacher)
    second = stage(teacher, context(tmp_path / "second"))
    assert set(second.weights) == set(first.weights)
    assert second.info.fingerprint != first.info.fingerprint
    with pytest.raises(ConfigError, match="another kind of student than decoder"):
        dataclasses.replace(stage, student="decoder")(teacher, context(tmp_path / "third"))
    path = tmp_path / "student" / "tokenizer.json"
    rules = json.loads(path.read_text(encoding="utf-8"))
    one, other = list(rules["model"]["vocab"])[-2:]
    rules["model"]["vocab"] |= {one: rules["model"]["vocab"][other], other: rules["model"]["vocab"][one]}
    path.write_text(json.dumps(rules), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"tokenizer\.json disagree about id \d+"):
        stage(teacher, context(tmp_path / "fourth"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"student": "both"}, "distill.student: expected one of encoder-decoder, encoder, decoder, got 'both'"),
        ({"held_out": 1.0}, "distill.held_out: expected a share between 0 and 1"),
        ({"steps": 3, "minutes": 1.0}, "distill.steps and distill.minutes: give one of them"),
        ({"student": "encoder", "targets": "teacher"}, "an encoder has no targets"),
        (
            {"student": "encoder", "start": "x"},
            "distill.start: an encoder student is taught further by giving it as MODEL",
        ),
        ({"cross_steps": -1}, "distill.cross_steps: expected at least 0"),
        ({"batch": 0}, "distill.batch: expected at least 1"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], sentence: str) -> None:
    """Each is refused in a sentence."""
    with pytest.raises(ConfigError, match=sentence):
        Distill(**options)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b'{"source": "a"}\n', "line 1"),
        (b'{"source": "a", "target": "b"}\n{"source": "a"}\n', "line 2"),
        (b'{"source": "\xff", "target": "b"}\n', "UTF-8"),
        (b'{"source": "a", "target": "b"}\n{"source": "%s", "target": "b"}\n' % (b"12 " * 100_000), "line 2: expected"),
        (b'{"text": "a"}\n{"text": "%s"}\n' % (b"12 " * 100_000), "line 2: expected at most"),
    ],
)
@pytest.mark.parametrize("student", ["encoder-decoder", "encoder"])
def test_wrong_data_is_refused_before_any_work(
    student: str, content: bytes, sentence: str, teacher: TorchModel, tmp_path: Path
) -> None:
    """The sentence names file and line."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=sentence) as caught:
        Distill(student=student, data=str(path)).check(teacher)
    assert str(path) in str(caught.value)


def test_scores_that_rank_nothing(teacher: TorchModel, tmp_path: Path) -> None:
    """Pairs that all have one score teach nothing."""
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"first": "a", "second": "b", "score": 1}\n' * 3, encoding="utf-8")
    with pytest.raises(ConfigError, match="every pair has the score 1, which ranks none"):
        Distill(student="encoder", data=str(path)).check(teacher)


def test_the_trainers_versions_are_among_what_is_read(files: dict[str, str]) -> None:
    """Another accelerate or peft may give other weights: the stage's key changes with them."""
    assert set(Distill(data=files["answers"]).reads()["versions"]) == {"accelerate", "peft"}


def test_a_model_that_is_no_teacher(teacher: TorchModel, files: dict[str, str]) -> None:
    """A classifier, or another family, makes no students."""
    other = dataclasses.replace(teacher, info=dataclasses.replace(teacher.info, task="text-classification"))
    with pytest.raises(ConfigError, match="a teacher is a text-generation model"):
        Distill(data=files["answers"]).check(other)
    with pytest.raises(ConfigError, match="holds labels, which an encoder learns from"):
        Distill(**QUICK, data=files["labels"])(teacher, context(Path(files["labels"]).parent / "work"))
