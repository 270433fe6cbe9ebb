"""A model of 1.2 billion parameters is compressed within 1.5 × its fp16 bytes of memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.slow.big_model import PARAMETERS, write_big_model
from tests.slow.watch import watch

pytestmark = pytest.mark.slow


def test_memory_stays_below_one_and_a_half_fp16_copies(tmp_path: Path) -> None:
    """Counted over the process tree, shared pages once per process; measuring included."""
    write_big_model(tmp_path / "model")
    command = [sys.executable, "-m", "edgepipe", "compress", "model", "--bits", "4", "--out", "bundle"]
    command += ["--set", "measure.tokens=512", "--set", "measure.blocks=1"]
    watched = watch(command, cwd=tmp_path)
    assert watched.code == 0, watched.stderr
    summary = json.loads(watched.stdout.strip().splitlines()[-1])
    assert summary["bits_per_weight"] < 5.6  # layers 4.5; embedding and head 8.5, a fifth of the parameters
    assert watched.peak_bytes <= 1.5 * 2 * PARAMETERS, f"{watched.peak_bytes / 1e9:.2f} GB"
