"""The stage distill: every kind of student, what it says of itself, what goes on after a stop, what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgepipe.artifacts import Context, Json, TorchModel
from edgepipe.errors import ConfigError
from edgepipe.sources import open_model
from edgepipe.stages.distill import Distill
from edgepipe.students.result import save
from tests.decoders import TARGET
from tests.tiny_models import save_tiny_model

QUICK: dict[str, Any] = {"steps": 3, "batch": 8, "warmup": 1, "precision": "no"}
LAYERS: dict[str, dict[str, Any]] = {
    "encoder-decoder": {"encoder_layers": 2, "decoder_layers": 1},
    "encoder": {"encoder_layers": 2},
    "decoder": {"decoder_layers": 1},
}


def quick(**options: Any) -> Distill:
    """Return a stage of a few steps; a new student has few layers."""
    layers = {} if options.get("start") else LAYERS[options.get("student", "encoder-decoder")]
    return Distill(**{**QUICK, **layers, **options})


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
    stage = quick(data=files[data], **options)
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
        stage = quick(data=files["answers"])
        found.append(stage(teacher, context(tmp_path / str(number), seed=seed)).info.fingerprint)
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("options", [{"max_target": 16}, {"student": "encoder", "max_source": 24, "mask_steps": 2}])
def test_the_teacher_writes_when_there_are_no_data(options: Json, teacher: TorchModel, tmp_path: Path) -> None:
    """Its texts are kept with their provenance, and said to be its own."""
    notes: list[str] = []
    stage = quick(own_texts=12, **options)
    stage.check(teacher)
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
        stage = quick(data=files["answers"], scores=str(tmp_path / "scores"))
        stage(teacher, context(tmp_path / str(seed), seed=seed))
        counts.append(len(asked))
    assert 0 < counts[0] == counts[1]


@pytest.mark.parametrize("kind", ["encoder-decoder", "encoder"])
def test_dropout(kind: str, teacher: TorchModel, files: dict[str, str], tmp_path: Path) -> None:
    """A student that is taught with dropout ends elsewhere; it answers without any."""
    data = files["answers" if kind == "encoder-decoder" else "pairs"]
    found = []
    for rate in (0.0, 0.2):
        stage = quick(student=kind, data=data, dropout=rate)
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
    first = quick(data=files["answers"])(teacher, context(tmp_path / "first"))
    save(first, tmp_path / "student")
    stage = quick(data=files["answers"], start=str(tmp_path / "student"))
    stage.check(teacher)
    second = stage(teacher, context(tmp_path / "second"))
    assert set(second.weights) == set(first.weights)
    assert second.info.fingerprint != first.info.fingerprint
    with pytest.raises(ConfigError, match="another kind of student than decoder"):
        dataclasses.replace(stage, student="decoder").check(teacher)
    path = tmp_path / "student" / "tokenizer.json"
    rules = json.loads(path.read_text(encoding="utf-8"))
    one, other = list(rules["model"]["vocab"])[-2:]
    rules["model"]["vocab"] |= {one: rules["model"]["vocab"][other], other: rules["model"]["vocab"][one]}
    path.write_text(json.dumps(rules), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"tokenizer\.json disagree about id \d+"):
        stage.check(teacher)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"student": "both"}, "distill.student: expected one of encoder-decoder, encoder, decoder, got 'both'"),
        ({"held_out": 1.0}, "distill.held_out: expected a share between 0 and 1"),
        ({"steps": 3, "minutes": 1.0}, "distill.steps and distill.minutes: give one of them"),
        (
            {"student": "encoder", "data": "x", "targets": "teacher"},
            "distill.targets means something to .*or decoder alone",
        ),
        ({"student": "encoder", "data": "x", "adapt_steps": 3}, "distill.adapt_steps means something to"),
        ({"student": "encoder", "data": "x", "match_hidden": 1.0}, "distill.match_hidden means something to"),
        ({"student": "encoder", "data": "x", "alpha": 0.5}, "distill.alpha means something to"),
        ({"student": "encoder", "data": "x", "decoder_layers": 2}, "distill.decoder_layers means something to"),
        (
            {"pooling": "last"},
            "distill.pooling means something to a student of kind encoder alone, and .* encoder-decoder",
        ),
        ({"mask_steps": 3}, "distill.mask_steps means something to a student of kind encoder alone"),
        ({"student": "decoder", "contrast_steps": 3}, "distill.contrast_steps means something to"),
        (
            {"student": "decoder", "cross_steps": 3},
            "distill.cross_steps means something to a student of kind encoder-dec",
        ),
        ({"student": "decoder", "causal_encoder": True}, "distill.causal_encoder means something to"),
        ({"adapt_rate": -1.0}, "distill.adapt_rate: expected a number above 0"),
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
    ("name", "value", "sentence"),
    [
        ("alpha", 2.0, "expected a number from 0 to 1, got 2.0"),
        ("reverse", -1.0, "expected a number from 0 to 1, got -1.0"),
        ("on_policy", 1.5, "expected a number from 0 to 1, got 1.5"),
        ("temperature", 0.0, "expected a number above 0, got 0.0"),
        ("match_hidden", -1.0, "expected at least 0, got -1.0"),
        ("learning_rate", 5.0, "expected a number above 0 and up to 1, got 5.0"),
        ("precision", "fp8", "expected auto, bf16 or no, got 'fp8'"),
        ("rows", -3, "expected at least 0, got -3"),
        ("warmup", -1, "expected at least 0, got -1"),
        ("patience", -1, "expected at least 0, got -1"),
    ],
)
def test_what_training_would_refuse_is_refused_before_any_work(
    name: str, value: Any, sentence: str, teacher: TorchModel, files: dict[str, str]
) -> None:
    """By the name that the option has here."""
    with pytest.raises(ConfigError, match=f"^distill.{name}: {sentence}"):
        quick(data=files["answers"], **{name: value}).check(teacher)


def test_an_encoders_steps_are_refused_before_any_work(
    teacher: TorchModel, files: dict[str, str], tmp_path: Path
) -> None:
    """Labels can't be contrasted nor be one alone, a mask needs a token, and texts are read without a last course."""
    with pytest.raises(ConfigError, match=r"^distill\.contrast_steps: a classifier gives no embedding to contrast"):
        quick(student="encoder", data=files["labels"], contrast_steps=2).check(teacher)
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="expected texts with at least two different labels, but it has 1"):
        quick(student="encoder", data=str(path)).check(teacher)
    rules = json.loads(teacher.info.tokenizer["tokenizer.json"])
    rules["model"]["vocab"]["no underscore"] = rules["model"]["vocab"].pop("_")
    changed = {**teacher.info.tokenizer, "tokenizer.json": json.dumps(rules).encode()}
    other = dataclasses.replace(teacher, info=dataclasses.replace(teacher.info, tokenizer=changed))
    stage = Distill(student="encoder", data=files["texts"], mask_steps=2, untaught=True)
    stage.check(teacher)
    with pytest.raises(ConfigError, match=r"^distill\.mask_steps: the vocabulary has no mask token"):
        stage.check(other)
    with pytest.raises(ConfigError, match="line 1: expected at most 3 tokens"):
        dataclasses.replace(stage, max_source=3).check(teacher)


def test_a_teacher_without_what_a_student_needs(teacher: TorchModel, files: dict[str, str]) -> None:
    """No end token, or no tokenizer: one sentence each, for every kind."""
    endless = dataclasses.replace(teacher, info=dataclasses.replace(teacher.info, eos_token_ids=()))
    mute = dataclasses.replace(teacher, info=dataclasses.replace(teacher.info, tokenizer={}))
    for student in LAYERS:
        stage = quick(student=student, data=files["texts"])
        with pytest.raises(ConfigError, match="names no end token, which a student's texts end with"):
            stage.check(endless)
        with pytest.raises(ConfigError, match=r"has no tokenizer\.json, by which a student's texts become tokens"):
            stage.check(mute)


@pytest.fixture(scope="module")
def earlier(teacher: TorchModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a student as it is made."""
    folder = tmp_path_factory.mktemp("earlier")
    save(Distill(untaught=True, **LAYERS["encoder-decoder"])(teacher, context(folder / "work")), folder / "student")
    return folder / "student"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"encoder_layers": 3}, r"^distill\.encoder_layers: .* is a student already and keeps what it is made of"),
        ({"hidden": 56}, r"^distill\.hidden: .* is a student already"),
        ({"scratch": True}, r"^distill\.scratch: .* is a student already"),
        ({"match_hidden": 1.0}, r"^distill\.match_hidden: .* doesn't say which of the teacher's layers"),
    ],
)
def test_a_student_that_goes_on_stays_what_it_is(
    options: dict[str, Any], sentence: str, teacher: TorchModel, files: dict[str, str], earlier: Path
) -> None:
    """Options that would make another one of it are refused."""
    with pytest.raises(ConfigError, match=sentence):
        quick(data=files["answers"], start=str(earlier), **options).check(teacher)


def test_a_student_of_a_trimmed_vocabulary_is_judged_when_that_is_there(
    teacher: TorchModel, files: dict[str, str], earlier: Path, tmp_path: Path
) -> None:
    """A stage before may trim the teacher's vocabulary to the student's; with other tokens that can't be."""
    folder = tmp_path / "student"
    shutil.copytree(earlier, folder)
    path = folder / "tokenizer.json"
    rules = json.loads(path.read_text(encoding="utf-8"))
    last = max(rules["model"]["vocab"], key=rules["model"]["vocab"].get)
    number = rules["model"]["vocab"].pop(last)
    assert "".join(rules["model"]["merges"].pop()) == last
    path.write_text(json.dumps(rules), encoding="utf-8")
    stage = quick(data=files["answers"], start=str(folder))
    stage.check(teacher)
    rules["model"]["vocab"]["another"] = number
    path.write_text(json.dumps(rules), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"tokenizer\.json disagree about id {number}"):
        stage.check(teacher)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def _reshape(path: Path) -> None:
    values = load_file(path)
    values["embed_tokens.weight"] = values["embed_tokens.weight"][:7]
    save_file(values, path)


@pytest.mark.parametrize(
    ("name", "damage", "sentence"),
    [
        ("model.safetensors", _cut, "is truncated or not a safetensors file"),
        ("model.safetensors", _reshape, "config.json and model.safetensors disagree about embed_tokens.weight"),
        ("config.json", _cut, "cannot be read as JSON"),
        ("config.json", lambda path: path.write_text("{}"), "describes no student"),
        ("config.json", lambda path: path.write_text("[]"), "should hold a JSON object"),
        (
            "config.json",
            lambda path: path.write_text('{"model_type": "edgepipe_encoder_decoder", "encoder": {}, "decoder": {}}'),
            "describes no student",
        ),
    ],
)
def test_a_damaged_student_does_not_go_on(
    name: str,
    damage: Callable[[Path], Any],
    sentence: str,
    teacher: TorchModel,
    files: dict[str, str],
    earlier: Path,
    tmp_path: Path,
) -> None:
    """The sentence names the file."""
    shutil.copytree(earlier, tmp_path / "student")
    damage(tmp_path / "student" / name)
    with pytest.raises(ConfigError, match=sentence) as caught:
        quick(data=files["answers"], start=str(tmp_path / "student")).check(teacher)
    assert str(tmp_path / "student") in str(caught.value)
    assert name in str(caught.value)


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
        quick(data=files["labels"])(teacher, context(Path(files["labels"]).parent / "work"))
