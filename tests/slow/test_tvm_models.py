"""The engine tvm on every grid, family and kind of student in tiny, beside the portable graph."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from edgepipe.errors import ContractError
from edgepipe.sources import open_model
from edgepipe.stages.export import Export
from tests.decoders import CHANGES, all_on, context
from tests.engines.tvm_bundles import NOTE, built, decoder
from tests.students.test_graphs import ENCODERS
from tests.students.test_models import PAIRS
from tests.students.tiny import save_tiny_student

pytest.importorskip("tvm", reason="TVM isn't here: pip install 'edgepipe[tvm]'")

from edgepipe.engines import tvm as engine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the tiny models of this file."""
    return tmp_path_factory.mktemp("decoders")


@pytest.mark.parametrize("grid", [name for name in CHANGES if name != "float32"])
def test_grids(folder: Path, tmp_path: Path, grid: str) -> None:
    """Every grid is multiplied and gathered as it is stored, to float32 rounding."""
    notes: list[str] = []
    built(decoder(folder, "llama tied", grid), tmp_path / "a", notes, exact_tolerance=1e-4)
    assert re.fullmatch(NOTE, notes[0])


@pytest.mark.parametrize("kind", ["qwen2", "qwen3 windows", "smollm3", "granite", "gemma", "llama rope yarn"])
def test_families(folder: Path, tmp_path: Path, kind: str) -> None:
    """Biases, norms per head, windows, layers without positions, multipliers, GELU."""
    notes: list[str] = []
    built(decoder(folder, kind), tmp_path / "a", notes, exact_tolerance=1e-4)
    assert re.fullmatch(NOTE, notes[0])


@pytest.mark.parametrize(
    ("kind", "grid"), [("plain gelu", "float16"), ("causal encoder", "8 bits"), ("narrow decoder", "4 bits minima")]
)
def test_encoder_decoders(tmp_path: Path, kind: str, grid: str) -> None:
    """Students that differ in their blocks, on three grids."""
    save_tiny_student(tmp_path / "student", PAIRS[kind])
    model = Export(context=64, check_tokens=0)(all_on(open_model(str(tmp_path / "student")), grid), context(tmp_path))
    notes: list[str] = []
    built(model, tmp_path / "a", notes, exact_tolerance=1e-4)
    assert re.fullmatch(NOTE, notes[0])


@pytest.mark.parametrize("kind", ["last", "max", "latent", "causal", "classes"])
def test_encoders(tmp_path: Path, kind: str) -> None:
    """Each pooling, attention to latents, classes."""
    from edgepipe.runtime import Encoder, load

    save_tiny_student(tmp_path / "student", ENCODERS[kind])
    model = Export(context=64, check_tokens=0)(open_model(str(tmp_path / "student")), context(tmp_path))
    notes: list[str] = []
    compiled = built(model, tmp_path / "a", notes, exact_tolerance=1e-4)
    assert re.fullmatch(NOTE, notes[0])
    encoder = load(compiled.path)
    assert isinstance(encoder, Encoder)
    found = encoder.classify(["The river", "carried"]) if kind == "classes" else encoder.embed(["The river", "carried"])
    assert np.isfinite(found).all() and found.shape[0] == 2


def test_rotary_tables_are_made_when_the_library_is_loaded(folder: Path, tmp_path: Path) -> None:
    """A table of 256 positions is no part of the library, and the logits are right."""
    notes: list[str] = []
    compiled = built(decoder(folder, "llama", tokens=256), tmp_path / "a", notes, exact_tolerance=1e-5)
    assert re.fullmatch(NOTE, notes[0])
    functions = compiled.manifest["library"]["functions"]
    assert functions["decoder_step"]["prepared"] in functions
    shorter = built(decoder(folder, "llama", tokens=160), tmp_path / "b", check_tokens=0)
    first, second = ((one.path / "library.so").stat().st_size for one in (shorter, compiled))
    assert abs(second - first) < 4096, "96 positions more are 6 KiB of tables, in each of two functions"


def test_activations_of_8_bits(folder: Path, tmp_path: Path) -> None:
    """At accuracy level 4 they are rounded where the processor multiplies bytes, and the note says what it costs."""
    notes: list[str] = []
    compiled = built(decoder(folder, "llama", "4 bits"), tmp_path / "a", notes, accuracy_level=4)
    integers = engine.level_here().byte_products
    assert compiled.manifest["library"]["arithmetic"] == ("int8" if integers else "float32")
    assert re.fullmatch(NOTE + (r", \de-0\d as shipped" if integers else ""), notes[0])


def test_a_library_that_computes_something_else_fails(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgepipe.engines.tvm import packed

    plan = packed.packed_codes
    monkeypatch.setattr(packed, "packed_codes", lambda value, w: plan(value, w)[:, ::-1])
    with pytest.raises(ContractError, match=r"\(exact\) differs from the portable one by .*; allowed 1e-03$"):
        built(decoder(folder, "llama", "4 bits"), tmp_path / "a")
