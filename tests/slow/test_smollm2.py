"""The promises of the default run, each held on real files: size, quality, time, memory."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgepipe.runtime import load
from tests.slow.conftest import Made

pytestmark = pytest.mark.slow

PARAMETERS = 134_515_008
WIKITEXT = Path(os.environ.get("EDGEPIPE_DATA", Path(__file__).parents[3] / "shared" / "data")) / "wikitext2-valid.txt"


def file_bits_per_weight(bundle: Path) -> float:
    """Count the bits of everything that holds weights: weights.bin and the graph."""
    return 8 * sum((bundle / name).stat().st_size for name in ("weights.bin", "decoder.onnx")) / PARAMETERS


def test_the_command_takes_less_than_four_minutes_and_four_gigabytes(default_made: Made) -> None:
    assert default_made.watched.seconds < 240
    assert default_made.watched.peak_bytes < 4e9


def test_the_table_and_one_json_line_are_printed(default_made: Made) -> None:
    for words in ("TTFT at 128 tokens", "tokens/s", "peak memory", "perplexity", "bits per weight"):
        assert words in default_made.watched.stderr
    assert {"bundle", "bundle_bytes", "bits_per_weight", "ttft_ms", "perplexity"} <= set(default_made.summary)


def test_it_knows_the_capital_of_france(default_made: Made) -> None:
    command = [sys.executable, "-m", "edgepipe", "run", default_made.bundle, "What is the capital of France?"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Paris" in done.stdout


def test_the_default_is_within_one_percent_of_the_float_model(default_made: Made) -> None:
    after, before = default_made.summary["perplexity"], default_made.summary["baseline"]["perplexity"]
    assert 10 < before < 100
    assert after / before < 1.01


def test_the_default_stays_as_it_came(default_made: Made) -> None:
    assert file_bits_per_weight(default_made.bundle) <= 5.8
    assert default_made.summary["bits_per_weight"] == pytest.approx(file_bits_per_weight(default_made.bundle), abs=0.02)


def test_symmetric_four_bits_everywhere_is_four_and_a_half(symmetric_made: Made) -> None:
    assert file_bits_per_weight(symmetric_made.bundle) <= 4.55


@pytest.mark.parametrize("made", ["default_made", "symmetric_made"])
def test_no_float_copy_of_a_quantized_weight_is_shipped(made: str, request: pytest.FixtureRequest) -> None:
    """Every float tensor is a scale, a minimum or a norm: far smaller than the smallest matrix, and 16 bits wide."""
    bundle: Path = request.getfixturevalue(made).bundle
    graph = onnx.load(bundle / "decoder.onnx", load_external_data=False).graph
    assert graph.initializer
    for tensor in graph.initializer:
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if kind == np.uint8 or math.prod(tensor.dims) < 10_000:
            continue
        part = tensor.name.rpartition(":")[2].partition("@")[0]
        assert part in ("scale", "minima"), tensor.name
        assert kind == np.float16, tensor.name


@pytest.mark.skipif(not WIKITEXT.is_file(), reason="WikiText-2 isn't here: set EDGEPIPE_DATA to the folder that has it")
def test_perplexity_on_wikitext(default_made: Made, symmetric_made: Made) -> None:
    """On 8 × 512 tokens of WikiText-2 valid the default keeps the float model's 19.5, and 4 bits everywhere don't."""
    text = WIKITEXT.read_text(encoding="utf-8")
    found = []
    for made in (default_made, symmetric_made):
        model = load(made.bundle, callers=1)
        ids = model.encode(text[:60_000])[: 8 * 512]
        assert len(ids) == 8 * 512
        scores = [model.token_logprobs(ids[i : i + 512]) for i in range(0, len(ids), 512)]
        found.append(float(np.exp(-np.concatenate(scores).mean())))
    assert found[0] == pytest.approx(19.5, abs=0.2)
    assert 23 < found[1] < 27


@pytest.mark.skipif(not WIKITEXT.is_file(), reason="WikiText-2 isn't here: set EDGEPIPE_DATA to the folder that has it")
def test_eval_on_wikitext(default_made: Made) -> None:
    """`edgepipe eval` gives the figure above; and by divergence from the float32 baseline nothing was lost."""
    words = [sys.executable, "-m", "edgepipe", "eval", default_made.bundle, "--data", WIKITEXT, "--tokens", "4096"]
    done = subprocess.run([*words, "--metric", "perplexity"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert (found["count"], found["details"]["tokens"]) == (8, 8 * 511)
    assert found["value"] == pytest.approx(19.5, abs=0.2)
    (baseline,) = default_made.bundle.parent.glob("runs/*/baseline/*-compile/bundle")
    more = ["--metric", "kl-to-float", "--against", baseline]
    done = subprocess.run([*words, *more], capture_output=True, text=True, check=True)
    apart = json.loads(done.stdout)
    assert apart["details"]["perplexity"] == pytest.approx(found["value"], rel=1e-6)
    assert 0 < apart["value"] < 1e-4 and apart["details"]["top1_agreement"] > 0.99
