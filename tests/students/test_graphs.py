"""A student's graphs, as exported: torch's numbers for every kind of student."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from edgepipe.artifacts import TorchModel
from edgepipe.sources import open_model
from edgepipe.stages.export import Export
from edgepipe.students.files import save_student
from tests.decoders import context
from tests.students.test_models import PAIRS, PLAIN, pair
from tests.tiny_models import save_tiny_tokenizer


def saved(directory: Path, student: Any) -> Path:
    """Write a student with a tokenizer of its vocabulary as a directory and return it."""
    directory.mkdir()
    save_student(student, directory, {}, {"decoder_start_token_id": 0, "eos_token_id": 1})
    save_tiny_tokenizer(directory, 300)
    return directory

@pytest.mark.parametrize("kind", PAIRS)
def test_pairs(kind: str, tmp_path: Path) -> None:
    notes: list[str] = []
    model = open_model(str(saved(tmp_path / "s", pair(PAIRS[kind]))))
    Export(tolerance=1e-5, context=64)(model, context(tmp_path, notes))
    print(notes)


from edgepipe.artifacts import OnnxModel
from edgepipe.engines import onnxruntime as engine
from edgepipe.graph.evaluate import evaluate, logits_in_pieces
from edgepipe.runtime.onnxruntime import open_decoder
from edgepipe.stages.compile import _Asked, _portable, _run_in_steps
import numpy as np
from tests.decoders import all_on, CHANGES

@pytest.mark.parametrize("grid", ["float32", "4 bits"])
@pytest.mark.parametrize("kind", PAIRS)
def test_lowered(kind: str, grid, tmp_path: Path) -> None:
    model = open_model(str(saved(tmp_path / "s", pair(PAIRS[kind]))))
    model = all_on(model, grid)
    exported = Export(check_tokens=0, context=64)(model, context(tmp_path))
    graphs, file = engine.lower(exported, accuracy_level=0, cache_dtype="float32")
    engine.write(graphs, file, tmp_path, lambda *_: None)
    asked = _Asked.seeded(exported.spec, 12, 1)
    got = _run_in_steps(tmp_path, {n: f"{n}.onnx" for n in graphs}, exported, asked, "float32")
    exp = _portable(exported, asked)
    errs = [np.abs(g-e).max()/np.abs(e).max() for g,e in zip(got, exp, strict=True)]
    print(errs, file.nbytes, model.weights.nbytes)
    assert max(errs) < 1e-4
