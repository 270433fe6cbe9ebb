"""Real models on the emulated NPU of a Snapdragon 8 Gen 3: nearly all of them lies there, and little changes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.npu import TEXT, cosines, step_logits
from edgepipe.measuring.scores import spearman
from edgepipe.runtime import Encoder, Model, load
from edgepipe.runtime.qnn import is_installed
from edgepipe.runtime.sampling import log_softmax
from tests.slow.conftest import Made

DATA = Path(os.environ.get("EDGEPIPE_DATA", Path(__file__).parents[3] / "shared" / "data")) / "stsb-dev.tsv"
PAIRS = 25

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_installed(), reason="the NPU's compiler isn't here: pip install 'edgepipe[qnn]'"),
]


@pytest.mark.skipif(not DATA.is_file(), reason="STS-B isn't here: set EDGEPIPE_DATA to the folder that has it")
def test_minilm_on_an_npu(make_bundle: Callable[..., Made]) -> None:
    """A context binary, 95 % of the nodes, a cosine of 0.99 over 50 sentences, and no point of Spearman."""
    stages = ("export", "compile")
    plain = make_bundle("minilm-l6-v2", measured=False, stages=stages)
    npu = make_bundle("minilm-l6-v2", "--target", "snapdragon-8gen3-htp", measured=False, stages=stages)
    rows = [line.split("\t") for line in DATA.read_text(encoding="utf-8").splitlines()]
    drawn = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:PAIRS]]
    texts = [row[column] for row in drawn for column in (5, 6)]
    scores = np.array([float(row[4]) for row in drawn])
    encoders = [load(made.bundle) for made in (plain, npu)]
    assert all(isinstance(encoder, Encoder) for encoder in encoders)
    assert encoders[1].manifest["npu"]["share"] >= 0.95
    assert npu.summary["bundle_bytes"] < 0.30 * plain.summary["bundle_bytes"]
    expected, found = (encoder.embed(texts) for encoder in encoders)  # type: ignore[union-attr]
    assert cosines(found, expected).min() > 0.99
    before, after = (spearman(np.stack([cosines(e[::2], e[1::2]), scores], 1)) for e in (expected, found))
    assert abs(after - before) < 0.01


def test_a_decoder_on_an_npu(make_bundle: Callable[..., Made]) -> None:
    """SmolLM2's step: a context binary, 99 % of the nodes, and next tokens as likely as in float32."""
    stages = ("export", "compile")
    plain = make_bundle("smollm2-135m", "--set", "export.context=64", measured=False, stages=stages)
    sizes = ("--set", "export.context=64", "--set", "compile.tokens=64")
    npu = make_bundle("smollm2-135m", "--target", "snapdragon-8gen3-htp", *sizes, measured=False, stages=stages)
    model = load(plain.bundle)
    assert isinstance(model, Model)
    ids = model.encode((Path(__file__).parents[2] / "calibration" / f"{TEXT}.txt").read_text(encoding="utf-8"))[:12]
    expected, found = (log_softmax(step_logits(made.bundle, ids)) for made in (plain, npu))
    assert np.sum(np.exp(expected) * (expected - found), 1).mean() < 0.05
    loaded = load(npu.bundle)
    assert isinstance(loaded, Model) and loaded.manifest["npu"]["share"] >= 0.99
    answer = loaded.generate("The capital of France is", max_new_tokens=3, ignore_eos=True)
    assert "Paris" in answer.text
