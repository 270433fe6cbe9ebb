"""`edgepipe distill`: where a student is written, and what it never takes the place of."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgepipe.artifacts import Json
from edgepipe.distill import distill
from edgepipe.errors import ConfigError
from tests.listener import Silent

UNTAUGHT = [("distill", "student", "decoder"), ("distill", "untaught", True), ("distill", "decoder_layers", 1)]


def made(model: Path, out: Path, runs: Path) -> Json:
    """Make a student without teaching it."""
    return distill(str(model), UNTAUGHT, out=out, seed=0, fresh=False, listener=Silent(), runs=runs)


def test_an_earlier_student_is_replaced(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The second run puts its student where the first one's stood, as long as nothing else was put there."""
    out = tmp_path / "student"
    for _ in range(2):
        assert made(tiny_model_dir, out, tmp_path / "runs")["task"] == "text-generation"
    before = sorted(path.name for path in out.iterdir())
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"holds notes\.txt"):
        made(tiny_model_dir, out, tmp_path / "runs")
    assert sorted(path.name for path in out.iterdir()) == sorted([*before, "notes.txt"])


def test_nothing_else_is_replaced(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A model directory of somebody else looks like a student's and isn't; MODEL itself, and a file, stay too."""
    other = Path(shutil.copytree(tiny_model_dir, tmp_path / "other"))
    (other / "README.md").write_text("a card", encoding="utf-8")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for model, out, sentence in (
        (tiny_model_dir, other, "is a directory that isn't a student's: it holds README.md"),
        (other, other, "is MODEL itself"),
        (tiny_model_dir, tmp_path / "file", "is a file"),
        (tiny_model_dir, tmp_path / "file" / "below", "can't be made"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            made(model, out, tmp_path / "runs")
    assert sorted(path.name for path in other.iterdir()) == sorted(
        [*(p.name for p in tiny_model_dir.iterdir()), "README.md"]
    )
    assert not (tmp_path / "runs").exists()
