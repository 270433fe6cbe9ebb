"""The commands as people and programs use them: what goes to stderr, what to stdout, and the exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgepipe.cli import main
from edgepipe.runtime import load

QUICK = ("--context", "96", "--set", "measure.blocks=1", "--set", "measure.tokens=64")


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Return a function that runs edgepipe in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments, **more: CliRunner().invoke(main, [str(a) for a in arguments], **more)


def last_json(result: Result) -> Any:
    """Return the JSON document on the last line of stdout."""
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.strip().splitlines()[-1])


def test_compress_prints_a_table_and_one_json_line(cli: Callable[..., Result], tiny_model_dir: Path) -> None:
    result = cli("compress", tiny_model_dir, "--bits", "4", "--out", "out", *QUICK)
    summary = last_json(result)
    assert len(result.stdout.strip().splitlines()) == 1
    for words in (
        "recipe: {",
        "quantize",
        "TTFT at",
        "tokens/s",
        "peak memory",
        "perplexity (63 tokens)",
        "bundle: out",
    ):
        assert words in result.stderr
    assert summary["bundle"] == "out"
    assert summary["bundle_bytes"] == sum(f.stat().st_size for f in Path("out").iterdir())
    assert summary["weight_bytes"] == Path("out/weights.bin").stat().st_size
    assert summary["bits_per_weight"] == pytest.approx(8 * summary["weight_bytes"] / parameters("out"), abs=1e-3)
    assert summary["cache_bytes"] == load("out").cache_bytes
    for figures in (summary, summary["baseline"]):
        assert 0 < figures["ttft_ms"] < 60_000
        assert figures["tokens_per_second"] == pytest.approx(1e3 / figures["token_ms"])
        assert 30e6 < figures["memory_peak_bytes"] < 4e9
        assert 1 < figures["perplexity"] < 1e9
    assert summary["over_budget"] == []
    again = cli("compress", tiny_model_dir, "--bits", "4", "--out", "out", *QUICK)
    assert again.stderr.count("reused from an earlier run") == 6
    assert last_json(again) == summary


def parameters(bundle: str) -> int:
    """Return the number of parameters a bundle's manifest states."""
    manifest = json.loads((Path(bundle) / "manifest.json").read_text(encoding="utf-8"))
    return int(manifest["weights"]["parameters"])


def test_a_dry_run_prints_the_resolved_recipe_and_does_nothing(cli: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("seed = 3\n[quantize]\nbits = 8\ngroup = 64\n", encoding="utf-8")
    found = last_json(cli("compress", "any", "--recipe", "mine.toml", "--set", "quantize.group=128", "--dry-run"))
    recipe = found["recipe"]
    assert recipe["target"] == "cpu"
    assert recipe["seed"] == 3
    assert recipe["stages"] == ["quantize", "export", "compile", "measure"]
    assert (recipe["options"]["quantize"]["bits"], recipe["options"]["quantize"]["group"]) == (8, 128)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.toml"]


def test_flags_win_over_settings_and_files(cli: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[quantize]\nbits = 16\n", encoding="utf-8")
    flags = ("--set", "quantize.bits=8", "--bits", "4", "--embedding-bits", "4", "--context", "512", "--seed", "7")
    recipe = last_json(cli("compress", "--recipe", "mine.toml", *flags, "--dry-run"))["recipe"]
    assert recipe["options"]["quantize"] | {"bits": 4, "embedding_bits": 4} == recipe["options"]["quantize"]
    assert recipe["options"]["export"]["context"] == 512
    assert recipe["seed"] == 7


def test_over_budget_is_exit_code_three(cli: Callable[..., Result], tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "strict.toml").write_text(
        'description = "nothing fits"\nengines = ["onnxruntime"]\nmeasurable = "here"\n'
        "[budgets]\nshipped_ratio = 0.001\nttft_ms = 1e6\n",
        encoding="utf-8",
    )
    result = cli("compress", tiny_model_dir, "--target", "./strict.toml", "--out", "out", *QUICK)
    assert result.exit_code == 3
    assert "over budget: shipped ratio is" in result.stderr
    summary = json.loads(result.stdout.strip().splitlines()[-1])
    assert len(summary["over_budget"]) == 1
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_run_streams_what_generate_gives(cli: Callable[..., Result], tiny_bundle: Path) -> None:
    asked: list[dict[str, Any]] = [{"role": "user", "content": "The river"}]
    expected = load(tiny_bundle).generate(asked, max_new_tokens=9).text
    answer = cli("run", tiny_bundle, "The river", "--max-new-tokens", "9")
    assert answer.exit_code == 0
    assert answer.stdout == expected + "\n"
    assert cli("run", tiny_bundle, "--max-new-tokens", "9", input="The river").stdout == expected + "\n"


def test_run_raw_leaves_the_template_out(cli: Callable[..., Result], tiny_bundle: Path) -> None:
    expected = load(tiny_bundle).generate("The river", max_new_tokens=9, temperature=0.8, seed=5).text
    result = cli("run", tiny_bundle, "The river", "--raw", *("--max-new-tokens", 9, "--temperature", 0.8, "--seed", 5))
    assert result.stdout == expected + "\n"


def test_inspect_agrees_on_model_and_bundle(
    cli: Callable[..., Result], tiny_model_dir: Path, tiny_bundle: Path
) -> None:
    model, bundle = last_json(cli("inspect", tiny_model_dir)), last_json(cli("inspect", tiny_bundle))
    assert (model["kind"], bundle["kind"]) == ("model", "bundle")
    assert model["layers"] == bundle["layers"] == 2
    assert model["parameters"] == bundle["parameters"] == sum(p["parameters"] for p in bundle["parts"])
    assert model["bits_per_weight"] == 32
    assert bundle["weight_bytes"] == (tiny_bundle / "weights.bin").stat().st_size
    assert sum(p["bytes"] for p in bundle["parts"]) <= bundle["weight_bytes"] < model["weight_bytes"] / 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("targets",), "cpu"), (("models",), "smollm2-135m"), (("stages",), "quantize"), (("stages", "compile"), "cache")],
)
def test_lists_are_a_table_and_json(cli: Callable[..., Result], arguments: tuple[str, ...], words: str) -> None:
    result = cli(*arguments)
    found = last_json(result)
    assert isinstance(found, list)
    assert len(result.stdout.strip().splitlines()) == 1
    assert words in json.dumps(found)
    assert all(entry["name"] in result.stderr for entry in found)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_ctrl_c_is_130_and_the_same_command_goes_on(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Interrupted once the first stage is kept; the second run reuses what was finished."""
    command = [sys.executable, "-m", "edgepipe", "compress", str(tiny_model_dir), "--out", "out", *QUICK]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    child = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while not list(tmp_path.glob("runs/*/02-export/key.json")) and time.monotonic() < until:
            time.sleep(0.005)
        child.send_signal(signal.SIGINT)
        _, stderr = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130, stderr
    assert stderr.strip().splitlines()[-1].startswith("edgepipe: stopped; finished stages are kept")
    assert "Traceback" not in stderr
    assert not (tmp_path / "out").exists()
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stderr.count("reused from an earlier run") >= 4
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    """`edgepipe targets | true`: nobody reads what is written."""
    command = f"{sys.executable} -m edgepipe targets | true"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, shell=True, env=env, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
