"""Optimum's exporter in its own environment, through the whole command; the bundle against torch."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgepipe.graph.optimum import PYTHON_VARIABLE
from edgepipe.runtime import load
from edgepipe.runtime.encoder import Encoder
from tests.encoders import save_encoder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON = ROOT / ".venv-optimum" / "bin" / "python"
MODELS: dict[str, dict[str, Any]] = {
    "bert": {},
    "lilt": {"hidden_size": 96, "channel_shrink_ratio": 4},  # takes boxes: without any, all are 0
}
TEXTS = ["The river carried the timber.", "A mill"]


@pytest.fixture(scope="module")
def environment() -> Path:
    """Return the Python that `make optimum` sets up."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    done = subprocess.run([make, "optimum"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"`make optimum` can't have its packages here: {done.stderr.strip().splitlines()[-1]}")
    return PYTHON


def command(model: Path, out: Path, *, task: str = "feature-extraction", exporter: str = "optimum") -> list[str]:
    """Return the command that compresses a model, by way of optimum, without measuring."""
    (out.parent / "recipe.toml").write_text('stages = ["quantize", "export", "compile"]\n', encoding="utf-8")
    words = [sys.executable, "-m", "edgepipe", "compress", str(model), "--task", task, "--bits", "8"]
    return [*words, "--recipe", "recipe.toml", "--set", f"export.exporter={exporter}", "--out", str(out)]


def variables(python: Path) -> dict[str, str]:
    """Return the environment of a command that is to find `python`."""
    return {**os.environ, PYTHON_VARIABLE: str(python), "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("kind", MODELS)
def test_a_bundle_by_way_of_optimum(kind: str, environment: Path, tmp_path: Path) -> None:
    """Eight bits, through the runtime: embeddings are torch's to the rounding of the weights, and those are packed."""
    import torch
    import transformers

    source = save_encoder(tmp_path / kind, kind, **MODELS[kind])
    bundle = tmp_path / "bundle"
    done = subprocess.run(
        command(source, bundle), cwd=tmp_path, env=variables(environment), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "optimum-onnx 0.1.0" in done.stderr and "agrees with torch to" in done.stderr
    encoder = load(bundle)
    assert isinstance(encoder, Encoder)
    got = encoder.embed(TEXTS)
    module = transformers.AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    for text, vector in zip(TEXTS, got, strict=True):
        with torch.inference_mode():
            hidden = module(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
        assert vector @ (hidden / np.linalg.norm(hidden)) > 0.999
    floats = sum(parameter.numel() * 4 for parameter in module.parameters())
    assert (bundle / "weights.bin").stat().st_size < 0.35 * floats
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    assert sum(onnx.numpy_helper.to_array(t).nbytes for t in graph.initializer if not t.external_data) < 4096


def test_what_only_optimum_can(environment: Path, tmp_path: Path) -> None:
    """Falcon's one head of keys for many of queries stops transformers' exporter, not optimum's."""
    import torch
    import transformers

    task = "token-classification"
    source = save_encoder(tmp_path / "falcon", "falcon", task, num_labels=5)
    bundle = tmp_path / "bundle"

    def compress(exporter: str) -> subprocess.CompletedProcess[str]:
        words = command(source, bundle, task=task, exporter=exporter)
        return subprocess.run(words, cwd=tmp_path, env=variables(environment), capture_output=True, text=True)

    done = compress("framework")
    said = " ".join(done.stderr.split())
    assert done.returncode == 1 and "can't trace the graph model" in said
    assert "--set export.exporter=optimum might (docs/optimum.md)" in said
    done = compress("optimum")
    assert done.returncode == 0, done.stderr
    encoder = load(bundle)
    assert isinstance(encoder, Encoder)
    ids = np.arange(40).reshape(2, 20) + 7
    mask = np.ones_like(ids)
    got = encoder.run({"input_ids": ids, "attention_mask": mask})["logits"]
    module = transformers.AutoModelForTokenClassification.from_pretrained(source, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = module(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()
    assert np.abs(got - expected).max() < 0.03 * np.abs(expected).max()  # what 8 bits cost; float32 agrees to 1e-6


def test_what_optimum_cannot_trace_for_every_length(environment: Path, tmp_path: Path) -> None:
    """A graph that is right only at the sizes traced is refused, not shipped."""
    source = save_encoder(tmp_path / "longformer", "longformer", attention_window=8)
    done = subprocess.run(
        command(source, tmp_path / "bundle"), cwd=tmp_path, env=variables(environment), capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "can't be computed at other sizes than those it was traced with" in " ".join(done.stderr.split())
    assert not (tmp_path / "bundle").exists()


def test_a_task_that_optimum_has_no_export_of(environment: Path, tmp_path: Path) -> None:
    source = save_encoder(tmp_path / "yoso", "yoso")
    done = subprocess.run(
        command(source, tmp_path / "bundle"), cwd=tmp_path, env=variables(environment), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "optimum has no export of yoso for feature-extraction; it has none" in " ".join(done.stderr.split())


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="children are found in /proc")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT], ids=["killed", "Ctrl-C"])
def test_the_child_goes_with_the_command(sent: signal.Signals, environment: Path, tmp_path: Path) -> None:
    source = save_encoder(tmp_path / "bert", "bert")
    with subprocess.Popen(
        command(source, tmp_path / "bundle"), cwd=tmp_path, env=variables(environment), stderr=subprocess.DEVNULL
    ) as run:
        child = wait_for(lambda: children(tmp_path), 120)
        assert child, "the child never started"
        os.kill(run.pid, sent)
        run.wait(timeout=60)
    assert wait_for(lambda: not children(tmp_path), 20)


def children(folder: Path) -> list[int]:
    """Return the ids of running children of the exporter started in `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            ours = b"optimum_child.py" in path.read_bytes() and (path.parent / "cwd").readlink() == folder
        except OSError:
            continue  # ended meanwhile
        if ours:
            found.append(int(path.parent.name))
    return found


def wait_for(true: Any, seconds: float) -> Any:
    """Return what a function gives as soon as it is true, or in the end."""
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.05)
    return found
