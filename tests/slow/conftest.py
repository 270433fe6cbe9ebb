"""Fixtures of the slow tests: SmolLM2 compressed as a user would, once for all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgepipe.sources import open_model
from tests.slow.watch import Watched, watch

SYMMETRIC = ("--set", "quantize.import=false", "--embedding-bits", "4")
ROOT = Path(__file__).parents[2]
UNMEASURED = ("quantize", "export", "compile")


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """Hold a bundle, the summary its command printed, and what the command took."""

    bundle: Path
    summary: dict[str, Any]
    watched: Watched


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """Return a function that runs `edgepipe compress` in a folder of its own."""

    def make(*arguments: str, measured: bool = True, stages: Sequence[str] = UNMEASURED) -> Made:
        folder = tmp_path_factory.mktemp("made")
        command = [sys.executable, "-m", "edgepipe", "compress", *arguments, "--out", "bundle"]
        if not measured:
            (folder / "recipe.toml").write_text(f"stages = {json.dumps(stages)}\n", encoding="utf-8")
            command += ["--recipe", "recipe.toml"]
        watched = watch(command, cwd=folder)
        assert watched.code == 0, watched.stderr
        summary = json.loads(watched.stdout.strip().splitlines()[-1])
        return Made(bundle=folder / "bundle", summary=summary, watched=watched)

    return make


@pytest.fixture(scope="session")
def base_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the package without extras in a fresh environment and return its Python."""
    folder = tmp_path_factory.mktemp("base")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*install, "--constraint", ROOT / "constraints.txt", str(ROOT)], cwd=folder, check=True)
    return python


@pytest.fixture(scope="session")
def default_made(make_bundle: Callable[..., Made]) -> Made:
    """Make the default bundle: SmolLM2-135M-Instruct for the cpu at 4 bits, measured. Its package is there before."""
    open_model("smollm2-135m")
    return make_bundle("smollm2-135m", "--target", "cpu", "--bits", "4")


@pytest.fixture(scope="session")
def symmetric_made(make_bundle: Callable[..., Made]) -> Made:
    """Make the bundle in which all weights are symmetric 4 bits in groups of 32."""
    return make_bundle("smollm2-135m", "--target", "cpu", "--bits", "4", *SYMMETRIC, measured=False)
