"""The base install alone: no torch, the same tokens, bounded memory, loaded in a second."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edgepipe.runtime import load
from tests.slow.conftest import Made

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
QUESTION = "Name three rivers in Europe, and say where each of them ends."

_CHILD = """
import importlib.util, json, sys, time
assert importlib.util.find_spec("torch") is None, "torch is importable"
begun = time.perf_counter()
from edgepipe.runtime import load
model = load(sys.argv[1])
load_s = time.perf_counter() - begun
answer = model.generate([{"role": "user", "content": sys.argv[2]}], max_new_tokens=48)
sentence = "The water rose a little every day, and nobody on the hill said anything about it. "
count = (model.context - 64) // len(model.encode(sentence))
long = model.generate(sentence * count, max_new_tokens=400, ignore_eos=True)
lines = open("/proc/self/status").read().splitlines()
peak = next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
loaded = sorted({"torch", "onnx", "transformers"} & set(sys.modules))
print(json.dumps({"load_s": load_s, "ids": answer.token_ids, "filled": long.prompt_tokens + len(long.token_ids),
                  "peak": peak, "loaded": loaded}))
"""


def run_child(python: Path, bundle: Path) -> dict[str, Any]:
    """Run the child in the base install and return what it found."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-c", _CHILD, bundle, QUESTION], cwd=python.parent, env=env, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def found(base_python: Path, default_made: Made) -> list[dict[str, Any]]:
    """Run the child four times; the first one warms the page cache."""
    return [run_child(base_python, default_made.bundle) for _ in range(4)][1:]


def test_the_same_tokens(found: list[dict[str, Any]], default_made: Made) -> None:
    here = load(default_made.bundle).generate([{"role": "user", "content": QUESTION}], max_new_tokens=48)
    assert len(here.token_ids) > 10
    assert all(tuple(one["ids"]) == here.token_ids for one in found)
    assert all(one["loaded"] == [] for one in found)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_with_a_full_context(found: list[dict[str, Any]], default_made: Made) -> None:
    """With the 2,048 tokens of the context filled: at most 2.5 × the weights + 100 MB."""
    weights = (default_made.bundle / "weights.bin").stat().st_size
    assert all(one["filled"] == 2048 for one in found)
    assert all(one["peak"] <= 2.5 * weights + 100e6 for one in found), [one["peak"] / 1e6 for one in found]


def test_a_bundle_can_be_measured_there(base_python: Path, default_made: Made) -> None:
    """On the device itself, where nothing that compresses is installed."""
    command = [base_python.parent / "edgepipe", "measure", default_made.bundle, "--blocks", "1", "--tokens", "512"]
    done = subprocess.run(command, cwd=base_python.parent, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert figures["bundle"]["perplexity_tokens"] == 511
    assert "tokens/s" in done.stderr


def test_the_doctor_runs_there(base_python: Path) -> None:
    """Without the extra nothing can be built, which is a line with a command and no failure."""
    command = [base_python.parent / "edgepipe", "doctor"]
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, cwd=base_python.parent, env=env, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.strip().splitlines()[-1])
    (cpu,) = told["targets"]
    assert cpu["run"]["ok"] and cpu["measure"]["ok"] and not cpu["build"]["ok"]
    (problem,) = cpu["build"]["problems"]
    assert "torch is missing" in problem and 'pip install "' in problem
    assert {row["state"] for row in told["packages"] if row["extra"] == "base"} == {"works"}


def test_a_bundle_can_be_evaluated_there(base_python: Path, default_made: Made) -> None:
    """Perplexity needs no extra; BLEU names the one it needs."""
    words = [base_python.parent / "edgepipe", "eval", default_made.bundle, "--data", "prose-eval", "--metric"]
    done = subprocess.run(
        [*words, "perplexity", "--tokens", "512"], cwd=base_python.parent, capture_output=True, text=True
    )
    assert json.loads(done.stdout)["details"]["tokens"] == 511, done.stderr
    done = subprocess.run([*words, "bleu"], cwd=base_python.parent, capture_output=True, text=True)
    assert done.returncode == 1 and "pip install 'edgepipe[eval]'" in done.stderr


def test_it_loads_within_a_second(found: list[dict[str, Any]]) -> None:
    """Imports included; the quickest of three, since the machine may be busy with something else."""
    assert min(one["load_s"] for one in found) < 1, [one["load_s"] for one in found]
