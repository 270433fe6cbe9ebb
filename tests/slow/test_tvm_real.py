"""The engine tvm on a real decoder: what ships at 4 bits, and that two engines read the same next tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgepipe.runtime import open_graphs, read_bundle

pytest.importorskip("tvm", reason="TVM isn't here: pip install 'edgepipe[tvm]'")
pytestmark = pytest.mark.slow

MODEL = "smollm2-135m"
MEGABYTE = 1 << 20
TEXT_TOKENS = 48
MOST_KL = 1e-4  # nats, both in float32 on the same codes; what is left is the float16 cache


def compressed(folder: Path, engine: str) -> Path:
    """Build a bundle of symmetric 4-bit codes, embedding included, with float32 arithmetic."""
    (folder / "recipe.toml").write_text('stages = ["quantize", "export", "compile"]\n', encoding="utf-8")
    out = folder / engine
    options = ["--bits", "4", "--embedding-bits", "4", "--set", "quantize.import=false", "--context", "256"]
    where = ["--target", "cpu", "--recipe", "recipe.toml", "--engine", engine, "--out", str(out)]
    command = [sys.executable, "-m", "edgepipe", "compress", MODEL, *where, *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def next_tokens(bundle: Path, ids: np.ndarray) -> np.ndarray:
    """Return the log-probabilities after each token, the first half read as a prompt and the rest one by one."""
    decoder = open_graphs(read_bundle(bundle), 1)
    cache, count = decoder.new_cache(1), ids.shape[1]
    found = []
    for start, end in [(0, count // 2), *((i, i + 1) for i in range(count // 2, count))]:
        places = np.arange(end - start)[None]
        new = decoder.run(cache, ids[:, start:end], np.array([start]), np.array([end - start]), places)
        found.append(new[0].astype(np.float64))
    logits = np.concatenate(found)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_four_bits_ship_as_four_bits_and_give_the_same_tokens(tmp_path: Path) -> None:
    """Library and weights: at most 4.6 bits per weight and 1 MB; next tokens are onnxruntime's."""
    from edgepipe.runtime.tokenizer import Tokenizer

    ours, theirs = (compressed(tmp_path, engine) for engine in ("tvm", "onnxruntime"))
    manifest = json.loads((ours / "manifest.json").read_text(encoding="utf-8"))
    shipped = sum((ours / name).stat().st_size for name in ("library.so", "weights.bin"))
    assert shipped <= 4.6 / 8 * manifest["weights"]["parameters"] + MEGABYTE
    text = "The river runs from the hills to the sea, and boats carry grain and timber down it in spring. " * 3
    ids = np.array([Tokenizer(ours / "tokenizer.json").encode(text)[:TEXT_TOKENS]])
    a, b = next_tokens(theirs, ids), next_tokens(ours, ids)
    kl = (np.exp(a) * (a - b)).sum(axis=1)
    assert kl.max() < MOST_KL
    best, second = np.sort(a, axis=1)[:, -1], np.sort(a, axis=1)[:, -2]
    clear = best - second > 0.05
    assert clear.sum() > TEXT_TOKENS // 2
    assert (a.argmax(axis=1) == b.argmax(axis=1))[clear].all()
