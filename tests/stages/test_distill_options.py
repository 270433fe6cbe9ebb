"""What each option of the stage distill does to the student: figures of the first step, weights, checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgepipe.artifacts import Json, TorchModel
from edgepipe.students.result import save
from tests.stages.test_distill import context, files, quick, teacher  # noqa: F401  fixtures are found by their names


def run(model: TorchModel, folder: Path, **options: Any) -> tuple[TorchModel, Json]:
    """Return a student, and what is said of its training."""
    figures: Json = {}
    stage = quick(learning_rate=3e-3, **options)
    stage.check(model)
    return stage(model, context(folder, figures=figures)), figures.get("training", {})


def changed(one: TorchModel, other: TorchModel) -> set[str]:
    """Name the weights that differ."""
    return {n for n in one.weights if not np.array_equal(one.weights.float32(n), other.weights.float32(n))}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that the usual student was made in."""
    return tmp_path_factory.mktemp("usual")


@pytest.fixture(scope="module")
def usual(
    teacher: TorchModel,  # noqa: F811
    files: dict[str, str],  # noqa: F811
    place: Path,
) -> tuple[TorchModel, Json]:
    """Return a student of the default options."""
    return run(teacher, place, data=files["answers"])


@pytest.mark.parametrize(
    ("options", "divergence", "cross_entropy"),
    [
        ({"reverse": 1.0}, "other", "same"),
        ({"temperature": 2.0}, "other", "same"),
        ({"top_k": 2}, "other", "same"),
        ({"on_policy": 1.0}, "other", "same"),
        ({"on_policy": 1.0, "sample_top_k": 1}, "other", "same"),
        ({"alpha": 0.0}, "none", "same"),
        ({"match_hidden": 1.0}, "other", "same"),
        ({"match_hidden": 1.0, "match_cosine": True}, "other", "same"),
        ({"targets": "teacher"}, "other", "other"),
        ({"adapt_steps": 3, "adapt_rate": 1e-2}, "other", "other"),
        ({"scratch": True}, "other", "other"),
    ],
)
def test_the_first_steps_losses(
    options: dict[str, Any],
    divergence: str,
    cross_entropy: str,
    usual: tuple[TorchModel, Json],
    teacher: TorchModel,  # noqa: F811
    files: dict[str, str],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Before its first step a student is the usual one: what it is taught with differs, and afterwards its weights."""
    student, said = run(teacher, tmp_path, data=files["answers"], **options)
    first, before = (record["student"]["train"][0] for record in (said, usual[1]))
    assert (first["cross_entropy"] == before["cross_entropy"]) == (cross_entropy == "same")
    if divergence == "none":
        assert "divergence" not in first
    else:
        assert abs(first["divergence"] - before["divergence"]) > 1e-3
    assert ("hidden" in first) == ("match_hidden" in options)
    assert ("teacher" in said) == ("adapt_steps" in options)
    held = [record["student"]["held_out"][0]["loss"] for record in (said, usual[1])]
    assert (held[0] == held[1]) == (not {"scratch", "adapt_steps"} & set(options))  # judged by the data's own targets
    assert changed(student, usual[0])


def test_rows_change_no_losses(
    teacher: TorchModel,  # noqa: F811
    files: dict[str, str],  # noqa: F811
    tmp_path: Path,
) -> None:
    """A batch that is divided gives the figures of the whole, those of samples and of sources too."""
    whole, parts = (
        run(teacher, tmp_path / str(rows), data=files["answers"], on_policy=1.0, match_hidden=1.0, rows=rows)[1]
        for rows in (0, 3)
    )
    for one, other in zip(whole["student"]["train"], parts["student"]["train"], strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_a_student_with_more_tokens_is_compared_at_the_teachers(
    teacher: TorchModel,  # noqa: F811
    files: dict[str, str],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Rows of embedding and head behind the teacher's vocabulary don't count in the divergence."""
    save(quick(steps=0, untaught=True)(teacher, context(tmp_path / "made")), tmp_path / "student")
    shutil.copytree(tmp_path / "student", tmp_path / "wider")
    config = json.loads((tmp_path / "wider" / "config.json").read_text(encoding="utf-8"))
    for part in (config, config["encoder"], config["decoder"]):
        part["vocab_size"] += 16
    (tmp_path / "wider" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    values = load_file(tmp_path / "wider" / "model.safetensors")
    for name in {"embed_tokens.weight", "lm_head.weight"} & set(values):
        values[name] = np.concatenate([values[name], values[name][:16] + 1])
    save_file(values, tmp_path / "wider" / "model.safetensors")
    first, wider = (
        run(teacher, tmp_path / f"from {name}", data=files["answers"], start=str(tmp_path / name))[1]["student"][
            "train"
        ][0]
        for name in ("student", "wider")
    )
    assert wider["divergence"] == pytest.approx(first["divergence"], rel=1e-5)
    assert wider["cross_entropy"] > first["cross_entropy"]


def test_cross_attention_is_trained_alone(
    usual: tuple[TorchModel, Json],
    teacher: TorchModel,  # noqa: F811
    files: dict[str, str],  # noqa: F811
    tmp_path: Path,
) -> None:
    """With `cross_steps` for all steps nothing else moves."""
    made = quick(steps=0, untaught=True)(teacher, context(tmp_path / "made"))
    alone, _ = run(teacher, tmp_path / "alone", data=files["answers"], cross_steps=3)
    moved = changed(made, alone)
    assert moved and all(".cross_att" in name for name in moved)
    assert not moved > changed(made, usual[0])


@pytest.mark.parametrize(
    ("data", "options", "then"),
    [
        ("answers", {}, {"alpha": 0.0}),
        ("answers", {}, {"data": "texts"}),
        ("texts", {"student": "encoder"}, {"contrast_dropout": 0.1}),
        ("pairs", {"student": "encoder"}, {"pooling": "max"}),
    ],
)
def test_checkpoints_of_other_options_are_no_ones_own(
    data: str,
    options: dict[str, Any],
    then: dict[str, Any],
    usual: tuple[TorchModel, Json],
    place: Path,
    teacher: TorchModel,  # noqa: F811
    files: dict[str, str],  # noqa: F811
    tmp_path: Path,
) -> None:
    """A run in a folder where another one ended is the run of a fresh folder."""
    other = {**options, **then, "data": files[then.get("data", data)]}
    if options:
        before, _ = run(teacher, tmp_path / "one", data=files[data], **options)
    else:
        before = usual[0]
        shutil.copytree(place, tmp_path / "one")
    after, _ = run(teacher, tmp_path / "one", **other)
    fresh, _ = run(teacher, tmp_path / "two", **other)
    assert changed(after, before)
    assert not changed(after, fresh)
