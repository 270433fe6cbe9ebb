"""Faults at a step of `edgepipe compress`: tests/slow/test_kill.py takes every step, and the real command."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.faults import Ended, Runs
from tests.test_pipeline import STAGES, hashes


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    """Start the process that forks runs with faults."""
    with Runs() as forked:
        yield forked


def command(model: Path) -> tuple[str, ...]:
    """Return the words of a small compress."""
    return ("compress", str(model), "--recipe", "recipe.toml", "--context", "64", "--out", "out")


def start_folder(runs: Runs, model: Path, folder: Path) -> Path:
    """Make a folder in which an earlier run with another grid finished: every stage and the bundle get replaced."""
    folder.mkdir()
    (folder / "recipe.toml").write_text(f"stages = {json.dumps(STAGES)}\n", encoding="utf-8")
    assert runs(folder, *command(model), "--set", "quantize.group=64").code == 0
    return folder


def assert_one_sentence(ended: Ended) -> None:
    """Hold that a run failed, and that one sentence says so."""
    assert ended.code in (1, 2), ended.stderr
    assert [line[:10] for line in ended.stderr.splitlines() if line.startswith("edgepipe:")] == ["edgepipe: "]
    assert ended.stderr.splitlines()[-1].startswith("edgepipe: ")
    assert "Traceback" not in ended.stderr


def assert_tidy(folder: Path) -> None:
    """Hold that a folder has what a finished run leaves, and nothing else."""
    assert sorted(p.name for p in folder.iterdir()) == ["out", "recipe.toml", "runs"]
    (home,) = (folder / "runs").iterdir()
    assert sorted(p.name for p in home.iterdir()) == ["01-quantize", "02-export", "03-compile"]


def sealed(folder: Path, finished: Path) -> int:
    """Count the stages that a stopped run had finished: their seals are those of the undisturbed run."""
    seals = [p.relative_to(finished) for p in finished.glob("runs/*/*/key.json")]
    return sum((folder / s).is_file() and (folder / s).read_bytes() == (finished / s).read_bytes() for s in seals)


@pytest.mark.skipif(sys.platform == "win32", reason="forks are POSIX")
def test_killed_at_three_steps_the_same_command_goes_on_to_the_same_bytes(
    runs: Runs, tiny_model_dir: Path, tmp_path: Path
) -> None:
    start = start_folder(runs, tiny_model_dir, tmp_path / "start")
    done = Path(shutil.copytree(start, tmp_path / "done"))
    steps = runs(done, *command(tiny_model_dir)).steps
    assert steps is not None and steps > 100
    for step in np.random.default_rng(0).integers(1, steps, 3):
        folder = Path(shutil.copytree(start, tmp_path / f"step {step}"))
        assert runs(folder, *command(tiny_model_dir), fault="kill", step=int(step)).code == -9
        kept = sealed(folder, done)
        ended = runs(folder, *command(tiny_model_dir))
        assert ended.code == 0, ended.stderr
        assert ended.stderr.count("reused from an earlier run") == kept
        assert hashes(folder / "out") == hashes(done / "out")
        assert_tidy(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="forks are POSIX")
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_takes_no_more_from_a_step_on(runs: Runs, tiny_model_dir: Path, tmp_path: Path, fault: str) -> None:
    """One sentence, the earlier bundle as it was, and what was finished is kept."""
    start = start_folder(runs, tiny_model_dir, tmp_path / "start")
    before = hashes(start / "out")
    for step in (1, 2, 5, 20, 45) if fault == "full" else (1,):
        folder = Path(shutil.copytree(start, tmp_path / f"step {step}"))
        ended = runs(folder, *command(tiny_model_dir), fault=fault, step=step)
        assert_one_sentence(ended)
        assert {"full": "No space left on device", "read-only": "Read-only file system"}[fault] in ended.stderr
        assert hashes(folder / "out") == before
        assert_tidy(folder)
