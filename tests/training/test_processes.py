"""A launcher starts `edgepipe compress` twice: one bundle comes out, of a student that both trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import TINY_TEXT, save_tiny_model

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPE = """
stages = ["distill", "quantize", "export", "compile"]
[distill]
student = "decoder"
data = "{data}"
decoder_layers = 1
steps = 6
batch = 4
learning_rate = 1e-3
precision = "no"
top_k = 8
"""


@pytest.mark.slow
def test_two_processes_make_one_student(tmp_path: Path) -> None:
    """The losses are those of one process, and both processes end well, when all is there already as well."""
    model = save_tiny_model(tmp_path / "tiny", "llama")
    data = tmp_path / "data.jsonl"
    words = TINY_TEXT.split()
    rows = [{"source": " ".join(words[i : i + 5]), "target": words[i + 5]} for i in range(0, 60, 2)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(data=data), encoding="utf-8")
    together = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    curves = []
    for name, launcher in (("one", ()), ("two", together), ("two", together)):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        command = [sys.executable, *launcher, "-m", "edgepipe", "compress", str(model), "--recipe", str(recipe)]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        assert len(lines) == 1
        (artifact,) = folder.glob("runs/*/*-distill/artifact.json")
        figures = json.loads(artifact.read_text(encoding="utf-8"))["history"][0]["figures"]
        curves.append([point["loss"] for point in figures["training"]["student"]["train"]])
        assert figures["training"]["student"]["processes"] == (2 if name == "two" else 1)
    assert len(curves[0]) == 6
    assert curves[1] == curves[2]
    assert all(abs(a - b) < 1e-3 for a, b in zip(curves[0], curves[1], strict=True))
