"""Shared fixtures: tiny real models, made in a second, seeded."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import settings

from tests.families import FAMILIES, save_family
from tests.tiny_models import TINY_TEXT, save_tiny_model

# The same examples in every run, however slow the machine: a test that fails here fails everywhere.
settings.register_profile("edgepipe", derandomize=True, deadline=None, database=None)
settings.load_profile("edgepipe")


_MANY = 100  # modules that are new since the last look: a library was imported
_frozen = [0]  # how many modules there were at it


def pytest_runtest_setup() -> None:
    """Leave the objects of imported libraries out of garbage collection: accelerate asks for one a training.

    With torch and transformers there are a million of them, which takes half a second each time.
    """
    if len(sys.modules) > _frozen[0] + _MANY:
        gc.collect()
        gc.freeze()
        _frozen[0] = len(sys.modules)


Once = Callable[[str, Callable[[Path], Path]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Return a function that makes what is slow to make once, for all test processes: a name, make(folder) → path.

    Who takes it reads it only, or changes a copy.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made-once"

    def give(name: str, make: Callable[[Path], Path]) -> Path:
        folder, made = shared / name, shared / f"{name}.path"
        shared.mkdir(exist_ok=True)
        with FileLock(shared / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                made.write_text(str(make(folder)), encoding="utf-8")
        return Path(made.read_text(encoding="utf-8"))

    return give


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a Hugging Face directory: a 2-layer random Llama with a small byte-level tokenizer and a chat template."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def build_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that sends a model directory down the pipeline, without measuring, and returns the bundle."""
    from edgepipe.compress import compress
    from edgepipe.recipe import resolve
    from tests.listener import Silent

    def build(model: Path, *settings: tuple[str, str, object], task: str | None = None) -> Path:
        folder = tmp_path_factory.mktemp("built")
        recipe_file = folder / "recipe.toml"
        recipe_file.write_text('stages = ["quantize", "export", "compile"]\n', encoding="utf-8")
        recipe = resolve(target="cpu", file=recipe_file, settings=[("export", "context", 128), *settings])
        listener, runs = Silent(), folder / "runs"
        summary = compress(str(model), recipe, listener=listener, out=folder / "bundle", runs=runs, task=task)
        return Path(summary["bundle"])

    return build


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model_dir: Path, build_tiny: Callable[..., Path]) -> Path:
    """Make a 4-bit bundle of the tiny model with a context of 128 tokens."""
    return build_tiny(tiny_model_dir)


@pytest.fixture(scope="session")
def exact_bundle(tiny_model_dir: Path, build_tiny: Callable[..., Path]) -> Path:
    """Make a 4-bit bundle of the tiny model whose arithmetic is float32."""
    return build_tiny(tiny_model_dir, ("compile", "accuracy_level", 0))


@pytest.fixture(scope="session")
def float_bundle(tiny_model_dir: Path, build_tiny: Callable[..., Path]) -> Path:
    """Make a bundle of the tiny model with 16-bit weights: what others are compared with."""
    return build_tiny(tiny_model_dir, ("quantize", "bits", 16), ("quantize", "embedding_bits", 16))


@pytest.fixture(scope="session")
def family_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the directory of a tiny model of a family, made on first use."""
    made: dict[str, Path] = {}

    def give(name: str) -> Path:
        if name not in made:
            made[name] = save_family(tmp_path_factory.mktemp("family") / name.replace(" ", "-"), name)
        return made[name]

    return give


@pytest.fixture(scope="session")
def family_bundle(
    family_dir: Callable[[str], Path], build_tiny: Callable[..., Path], once: Once
) -> Callable[..., Path]:
    """Return a function that gives the bundle of a tiny model of a family, made on first use: a name, bits (8)."""

    def give(name: str, bits: int = 8) -> Path:
        def make(_: Path) -> Path:
            return build_tiny(family_dir(name), ("quantize", "bits", bits), task=FAMILIES[name].task)

        return once(f"{name}-{bits}bit".replace(" ", "-"), make)

    return give


@pytest.fixture(scope="session")
def tiny_text() -> str:
    """Return the text the tiny tokenizer was trained on."""
    return TINY_TEXT


@pytest.fixture
def manifest_of() -> Callable[[Path], dict[str, Any]]:
    """Return a function that reads a bundle's manifest."""
    return lambda bundle: dict(json.loads((bundle / "manifest.json").read_text(encoding="utf-8")))
