"""Real file systems that are too small or become read-only: a sentence, nothing lost, and the same bytes afterwards."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_pipeline import STAGES, hashes
from tests.test_pipeline_faults import command

ROOT = Path(__file__).resolve().parents[2]
OWN = ["unshare", "--map-root-user", "--mount"]  # a namespace in which anybody may mount, and nobody else sees it


def may_mount() -> bool:
    """Say whether this machine lets us mount a file system of our own."""
    if shutil.which("unshare") is None:
        return False
    done = subprocess.run([*OWN, "mount", "-t", "tmpfs", "disk", "/mnt"], capture_output=True)
    return done.returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not may_mount(), reason="this machine lets nobody mount a file system (unshare --mount)"),
]


def on_a_disk(folder: Path, size: str, steps: str) -> None:
    """Run shell lines in a file system of `size` that is mounted at `folder`; `edgepipe` stands for the command."""
    python = f"{shlex.quote(sys.executable)} -m edgepipe"
    lines = f"set -e\nmount -t tmpfs -o size={size} disk {shlex.quote(str(folder))}\n{steps}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    lines = lines.replace("edgepipe ", f"{python} ")
    done = subprocess.run([*OWN, "sh", "-c", lines], cwd=folder.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Make a folder for a disk, a recipe, and beside them the bundle of a run on a large enough disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "recipe.toml").write_text(f"stages = {STAGES}\n".replace("'", '"'), encoding="utf-8")
    return tmp_path


def undisturbed(place: Path, model: Path) -> dict[str, str]:
    """Return the hashes of the bundle that a run makes which nothing goes wrong in."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "edgepipe", *command(model)], cwd=place, env=env, check=True)
    return hashes(place / "out")


def assert_a_sentence(stderr: str, words: str) -> None:
    """Hold that the last line says what is wrong, and that nothing else does."""
    *before, last = stderr.splitlines()
    assert last.startswith("edgepipe: ") and words in last, stderr
    assert not any(line.startswith(("edgepipe: ", "Traceback")) for line in before), stderr


@pytest.mark.parametrize("size", ["16k", "200k", "400k", "700k"])
def test_a_disk_that_is_too_small(tiny_model_dir: Path, place: Path, size: str) -> None:
    """It fails in the first stage, in a later one, or when the bundle is published; with more space it goes on."""
    compress = shlex.join(["edgepipe", *command(tiny_model_dir)])
    steps = f"""
cp recipe.toml disk && cd disk
{compress} 2> ../first && exit 1
ls -A > ../left
mount -o remount,size=64m disk .
{compress} 2> ../second
cp -r out ../found
ls -A > ../end
"""
    expected = undisturbed(place, tiny_model_dir)
    on_a_disk(place / "disk", size, steps)
    assert_a_sentence((place / "first").read_text(encoding="utf-8"), "No space left on device")
    left = (place / "left").read_text(encoding="utf-8").split()
    assert left in (["recipe.toml"], ["recipe.toml", "runs"])
    assert hashes(place / "found") == expected
    assert (place / "end").read_text(encoding="utf-8").split() == ["out", "recipe.toml", "runs"]


def test_a_disk_that_became_read_only(tiny_model_dir: Path, place: Path) -> None:
    """Refused before any work; the bundle of the earlier run is as it was."""
    words = ["edgepipe", *command(tiny_model_dir)]
    steps = f"""
cp recipe.toml disk && cd disk
{shlex.join(words)}
mount -o remount,ro disk .
{shlex.join([*words, "--bits", "8"])} 2> ../first && exit 1
cp -r out ../found
"""
    expected = undisturbed(place, tiny_model_dir)
    on_a_disk(place / "disk", "64m", steps)
    assert_a_sentence((place / "first").read_text(encoding="utf-8"), "can't be written to: name another place")
    assert hashes(place / "found") == expected
