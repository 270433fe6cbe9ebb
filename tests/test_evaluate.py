"""`edgepipe eval`: a table for people, one JSON document for programs, a sentence for whatever is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgepipe.cli import main
from edgepipe.evaluate import evaluate
from edgepipe.measuring.metrics import Evaluation
from edgepipe.report.terminal import evaluated_table
from tests.listener import Silent

PERPLEXITY = ["--data", "prose-eval", "--metric", "perplexity", "--tokens", "300"]


def test_a_table_and_one_document(tiny_bundle: Path, float_bundle: Path) -> None:
    result = CliRunner().invoke(main, ["eval", str(tiny_bundle), *PERPLEXITY, "--against", str(float_bundle)])
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.strip().splitlines()
    found = json.loads(line)
    assert found["metric"] == "perplexity" and found["details"]["tokens"] == 297
    shown = " ".join(result.stderr.split())
    assert f"perplexity, 3 windows {found['value']:,.5g}" in shown
    assert f"difference: {found['against']['difference']['verdict']}" in shown


def test_every_flag_is_an_option_and_has_its_default() -> None:
    """What the command says when nothing is said is what the library says."""
    flags = {p.name: p.default for p in main.commands["eval"].params if p.name not in ("bundle", "data", "against")}
    options = Evaluation(metric="perplexity")
    assert set(flags) == set(Evaluation.__slots__)
    unsaid = {"metric", "stop", "header", "chat", "exit_threshold"}  # what is not said is no value to click
    for name in set(flags) - unsaid:
        assert flags[name] == getattr(options, name), name


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--data", "prose-eval"], 2, "--metric"),
        (["--data", "prose-eval", "--metric", "perplexities"], 2, "did you mean 'perplexity'"),
        (["--data", "no-such-file", "--metric", "perplexity"], 2, "no-such-file can't be read (No such file"),
        (["--data", "prose-eval", "--metric", "kl-to-float"], 2, "name one with --against"),
        (["--data", "prose-eval", "--metric", "exact"], 2, "expected a file that ends in .tsv, .csv, .jsonl"),
        ([*PERPLEXITY, "--against", "no-such-bundle"], 2, "no-such-bundle does not exist"),
        ([*PERPLEXITY, "--limit", "3"], 2, "--limit means nothing for perplexity"),
        ([*PERPLEXITY, "--threads", "-1"], 2, "--threads: expected at least 0"),
    ],
)
def test_bad_input(tiny_bundle: Path, arguments: list[str], code: int, sentence: str) -> None:
    result = CliRunner().invoke(main, ["eval", str(tiny_bundle), *arguments])
    assert result.exit_code == code, result.output
    assert sentence in result.stderr and "Traceback" not in result.output
    assert not result.stdout


def test_malformed_data_names_file_and_line(tiny_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text("input,reference\na,b\nc\n")
    result = CliRunner().invoke(main, ["eval", str(tiny_bundle), "--data", str(file), "--metric", "exact"])
    assert result.exit_code == 2
    assert f"{file}, line 3: expected a column 1 (reference)" in result.stderr


def test_the_listener_hears_it(tiny_bundle: Path) -> None:
    heard = Silent()
    evaluate(tiny_bundle, "prose-eval", Evaluation(metric="perplexity", tokens=50), listener=heard)
    assert heard.ran == ["eval"]


def test_the_table_shows_small_figures_and_names() -> None:
    found = {
        "metric": "kl-to-float",
        "value": 1.4551e-06,
        "interval": None,
        "count": 8,
        "over": "windows",
        "against": {"bundle": {}},
        "details": {"tokens": 4088, "top1_agreement": 0.99853, "signature": "how", "answers": []},
    }
    lines = [" ".join(line.split()) for line in evaluated_table(found).splitlines()]
    assert "kl-to-float, 8 windows 1.4551e-06 –" in lines
    assert lines[-3:] == ["tokens 4,088", "top1 agreement 0.99853", "signature: how"]


def test_the_base_install_is_enough() -> None:
    """Nothing that makes bundles, and no extra, is imported on the way."""
    code = (
        "import sys, edgepipe.evaluate, edgepipe.measuring.evaluation, edgepipe.measuring.run;"
        "heavy = {'torch', 'transformers', 'onnx', 'onnx_ir', 'gguf', 'sacrebleu', 'rouge_score', 'scipy', 'nltk'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
