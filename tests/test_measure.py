"""`edgepipe measure`: a bundle on this machine, alone or beside another one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgepipe.cli import main
from edgepipe.errors import ConfigError
from edgepipe.measure import measure
from edgepipe.stages.measure import Measure
from tests.listener import Silent

QUICK = Measure(tokens=64, blocks=1, turns=1)


def test_a_bundle_alone_has_no_baseline(tiny_bundle: Path) -> None:
    heard = Silent()
    figures = measure(tiny_bundle, QUICK, listener=heard)
    assert figures["baseline"] is None
    assert figures["bundle"]["perplexity_tokens"] == 63
    assert figures["bundle"]["weight_bytes"] == (tiny_bundle / "weights.bin").stat().st_size
    assert len(figures["bundle"]["samples"]) == 1
    assert heard.ran == ["measure"]


def test_two_bundles_are_measured_in_turn(tiny_bundle: Path, exact_bundle: Path) -> None:
    quick = ["--tokens", "64", "--blocks", "1", "--turns", "2"]
    result = CliRunner().invoke(main, ["measure", str(tiny_bundle), "--against", str(exact_bundle), *quick])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.strip().splitlines()[-1])
    assert figures["baseline"]["perplexity"] == pytest.approx(figures["bundle"]["perplexity"], rel=0.05)
    assert "against bundle ratio" in " ".join(result.stderr.split())
    assert figures["machine"]["cores"] >= 1
    for ratio in figures["ratios"].values():
        assert 0.05 < ratio["low"] <= ratio["value"] <= ratio["high"] < 20
        assert (ratio["verdict"] == "tie") == (ratio["low"] <= 1 <= ratio["high"])


def test_what_was_printed_earlier_can_be_compared(tiny_bundle: Path, tmp_path: Path) -> None:
    """Printed, kept, given back: and the same bundle is known by its manifest."""
    earlier = tmp_path / "earlier.json"
    quick = ["measure", str(tiny_bundle), "--tokens", "64", "--blocks", "1", "--turns", "2"]
    first = CliRunner().invoke(main, quick)
    assert first.exit_code == 0, first.output
    earlier.write_text(first.stdout, encoding="utf-8")
    again = CliRunner().invoke(main, [*quick, "--since", str(earlier)])
    assert again.exit_code == 0, again.output
    since = json.loads(again.stdout.strip().splitlines()[-1])["since"]
    assert since["same_bundle"]
    assert since["earlier_taken_at"] == json.loads(first.stdout)["taken_at"]
    assert since["agrees"] == all(found["low"] <= 1 <= found["high"] for found in since["figures"].values())
    assert all(sentence in again.stderr for sentence in since["sentences"])


def test_what_is_no_measurement_is_refused_before_anything_runs(tiny_bundle: Path, tmp_path: Path) -> None:
    heard = Silent()
    (tmp_path / "earlier.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds no measurement"):
        measure(tiny_bundle, QUICK, listener=heard, since=tmp_path / "earlier.json")
    assert heard.ran == []


@pytest.mark.parametrize(
    "arguments", [("--blocks", "0"), ("--turns", "0"), ("--tokens", "1"), ("--text", "no-such-text")]
)
def test_options_out_of_range(tiny_bundle: Path, arguments: tuple[str, str]) -> None:
    result = CliRunner().invoke(main, ["measure", str(tiny_bundle), *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("edgepipe: ")
    assert arguments[0].removeprefix("--") in result.stderr or arguments[1] in result.stderr


def test_what_is_no_bundle_is_refused_before_anything_runs(tiny_bundle: Path, tmp_path: Path) -> None:
    heard = Silent()
    with pytest.raises(ConfigError, match="has no manifest"):
        measure(tiny_bundle, QUICK, listener=heard, against=tmp_path)
    assert heard.ran == []


def test_the_base_install_is_enough() -> None:
    """Nothing that makes bundles is imported on the way."""
    code = (
        "import sys, edgepipe.measure, edgepipe.stages.measure, edgepipe.measuring.run, edgepipe.report.terminal;"
        "print(sorted({'torch', 'transformers', 'onnx', 'onnx_ir', 'gguf'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
