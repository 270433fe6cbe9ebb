"""Killed at any moment, or out of space at any step: nothing is lost, and the same command ends with the same bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.faults import Runs
from tests.test_pipeline import STAGES, hashes
from tests.test_pipeline_faults import assert_one_sentence, assert_tidy, command, sealed, start_folder

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="kill -9 and forks are POSIX")]

KILLS = 30
MEASURED_KILLS = 6
MEASURED = "[measure]\nblocks = 1\ntokens = 64\n"


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    """Start the process that forks runs with faults."""
    with Runs() as forked:
        yield forked


def begin(folder: Path, model: Path, recipe: str) -> subprocess.Popen[str]:
    """Start the command in a folder, with a place of its own for temporary files."""
    (folder / "temporary").mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(recipe, encoding="utf-8")
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": root, "TMPDIR": str(folder / "temporary"), "PYTHONDONTWRITEBYTECODE": "1"}
    line = [sys.executable, "-m", "edgepipe", *command(model)]
    return subprocess.Popen(line, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(folder: Path, model: Path, recipe: str) -> str:
    """Run the command to its end; return what it said."""
    child = begin(folder, model, recipe)
    _, stderr = child.communicate()
    assert child.returncode == 0, stderr
    return stderr


def kept(folder: Path) -> int:
    """Count the sealed stages, those of the baseline included; the folder was empty, so all are of this command."""
    return sum(1 for path in (folder / "runs").rglob("key.json") if not path.parent.name.startswith("."))


@pytest.mark.parametrize(
    ("recipe", "kills"),
    [(f"stages = {STAGES}\n", KILLS), (MEASURED, MEASURED_KILLS)],
    ids=["unmeasured", "measured"],
)
def test_kill_9_at_a_random_moment(tiny_model_dir: Path, tmp_path: Path, recipe: str, kills: int) -> None:
    """From the start of Python to the end, at seeded moments between 0 and what an undisturbed run takes."""
    started = time.perf_counter()
    finish(tmp_path / "undisturbed", tiny_model_dir, recipe)
    seconds = time.perf_counter() - started
    expected = hashes(tmp_path / "undisturbed" / "out")
    left = inventory(tmp_path / "undisturbed")
    random = np.random.default_rng(0)
    killed = 0
    for number in range(3 * kills):  # one that ended before its kill doesn't count: the first run may have been slow
        folder = tmp_path / str(number)
        child = begin(folder, tiny_model_dir, recipe)
        moment = random.uniform(0, seconds)
        time.sleep(moment)
        child.kill()
        child.communicate()
        if child.returncode == -9:
            killed += 1
        else:
            seconds = moment
        finished = kept(folder)
        heard = finish(folder, tiny_model_dir, recipe)
        assert heard.count("reused from an earlier run") == finished
        assert hashes(folder / "out") == expected
        assert inventory(folder) == left
        shutil.rmtree(folder)
        if killed == kills:
            break
    assert killed == kills


def inventory(folder: Path) -> list[str]:
    """Return the names of everything in a folder."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def test_kill_9_at_every_step(runs: Runs, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Before each change to the files of a run that replaces finished stages and a bundle."""
    start = start_folder(runs, tiny_model_dir, tmp_path / "start")
    done = Path(shutil.copytree(start, tmp_path / "done"))
    steps = runs(done, *command(tiny_model_dir)).steps
    assert steps is not None
    before, after = hashes(start / "out"), hashes(done / "out")
    reused = []
    for step in range(1, steps + 1):
        folder = Path(shutil.copytree(start, tmp_path / "folder"))
        assert runs(folder, *command(tiny_model_dir), fault="kill", step=step).code == -9, step
        aside = [p for p in folder.iterdir() if p.name.startswith(".out.old-")]
        (bundle,) = [folder / "out"] if (folder / "out").exists() else aside
        assert hashes(bundle) in (before, after), step
        finished = sealed(folder, done)
        ended = runs(folder, *command(tiny_model_dir))
        assert ended.code == 0, (step, ended.stderr)
        assert ended.stderr.count("reused from an earlier run") == finished, step
        reused.append(finished)
        assert hashes(folder / "out") == after, step
        assert_tidy(folder)
        shutil.rmtree(folder)
    assert sorted(set(reused)) == [0, 1, 2, 3]


def test_a_full_disk_at_every_step(runs: Runs, tiny_model_dir: Path, tmp_path: Path) -> None:
    """One sentence, the earlier bundle as it was; with space again, the same command goes on."""
    start = start_folder(runs, tiny_model_dir, tmp_path / "start")
    done = Path(shutil.copytree(start, tmp_path / "done"))
    assert runs(done, *command(tiny_model_dir)).code == 0
    before, after = hashes(start / "out"), hashes(done / "out")
    for step in range(1, 200):
        folder = Path(shutil.copytree(start, tmp_path / "folder"))
        ended = runs(folder, *command(tiny_model_dir), fault="full", step=step)
        if ended.code == 0:
            break
        assert_one_sentence(ended)
        assert hashes(folder / "out") == before, step
        assert_tidy(folder)
        finished = sealed(folder, done)
        ended = runs(folder, *command(tiny_model_dir))
        assert ended.stderr.count("reused from an earlier run") == finished, step
        assert hashes(folder / "out") == after, step
        shutil.rmtree(folder)
    assert step > 40
