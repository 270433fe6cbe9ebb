"""Engine auto: both bundles are built and take turns, the faster one ships, and what can't be built is said."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgepipe.artifacts import Json
from edgepipe.cli import main
from edgepipe.compiling import library
from edgepipe.compress import compress, left_beside, place_beside
from edgepipe.errors import StageError
from edgepipe.levels import LEVELS, Level
from edgepipe.measuring.run import take_blocks
from edgepipe.recipe import Recipe, resolve
from edgepipe.report.engines import engine_rows, engine_sentences, engines_of
from edgepipe.search import engines
from edgepipe.search.engines import judge
from edgepipe.target import Target
from tests.listener import Silent

UNMEASURED = 'stages = ["quantize", "export", "compile"]\n'


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Return a function that runs edgepipe in an empty directory, with a recipe that doesn't measure."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(UNMEASURED, encoding="utf-8")
    return lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments])


def auto(folder: Path, *settings: tuple[str, str, object]) -> Recipe:
    """Return a recipe that leaves the engine open."""
    file = folder / "recipe.toml"
    file.write_text(UNMEASURED, encoding="utf-8")
    return resolve(
        target="cpu", file=file, settings=[("compile", "engine", "auto"), ("export", "context", 128), *settings]
    )


def block(ttft_ms: list[float], token_ms: float) -> Json:
    """Return what a process of two turns took: bursts of 5 tokens, two a turn."""
    turns = len(ttft_ms)
    return {
        "prompt_tokens": [32, 128],
        "bursts": 2,
        "burst_tokens": 5,
        "ttft_ms": ttft_ms,
        "token_ms": [[token_ms, 2 * token_ms] * 4 for _ in range(turns)],
        "index_ms": [[1.0, 1.0] for _ in range(turns)],
    }


@pytest.mark.parametrize(
    ("ttft_ms", "token_ms", "chosen", "says"),
    [
        ([11.0, 9.0], 3.0, "tvm", "tvm ships, the faster one; a prompt of 128 tokens and 10 after it: 40.0 ms, with"),
        ([90.0, 95.0], 4.0, "onnxruntime", "onnxruntime ships, the faster one; "),
        ([10.5, 9.5], 4.0, "onnxruntime", "onnxruntime ships, since neither is clearly faster"),
    ],
)
def test_the_whole_of_prompt_and_tokens_decides(ttft_ms: list[float], token_ms: float, chosen: str, says: str) -> None:
    """A slow prompt outweighs quick tokens where it costs more; where the interval holds 1 the first one ships."""
    found = judge({"onnxruntime": [block([10.0, 10.0], 4.0)] * 2, "tvm": [block(ttft_ms, token_ms)] * 2})
    assert found["chosen"] == chosen
    assert found["why"].startswith(says)
    assert found["sides"]["onnxruntime"] == {"whole_ms": 50.0, "ttft_ms": 10.0, "token_ms": 6.0}
    assert found["compared"] == "tvm ÷ onnxruntime"


def test_every_shape_of_calls_counts_the_same() -> None:
    """Half the time of a short call makes up for twice the time of a long one."""

    def calls(short: float, long: float) -> Json:
        shapes = {"1x32": short, "8x128": long}
        return {
            "calls": {name: {"tokenize_ms": [[0.0]], "run_ms": [[ms]]} for name, ms in shapes.items()},
            "index_ms": {name: [[1.0]] for name in shapes},
        }

    found = judge({"onnxruntime": [calls(2.0, 200.0)], "tvm": [calls(1.0, 400.0)]})
    assert found["ratios"]["whole_ms"]["value"] == pytest.approx(1)
    assert found["sides"]["tvm"]["8x128"] == 400.0


def test_both_are_built_and_measured(
    tiny_model_dir: Path,
    tmp_path: Path,
    manifest_of: Callable[[Path], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What ships is the engine that was chosen, built once, and the other lies beside it."""
    pytest.importorskip("tvm", reason="TVM isn't here: pip install 'edgepipe[tvm]'")
    monkeypatch.setattr(engines, "Measure", partial(engines.Measure, blocks=1, turns=2, output_tokens=10))
    recipe, runs, listener = auto(tmp_path), tmp_path / "runs", Silent()
    out = tmp_path / "out"
    summary = compress(str(tiny_model_dir), recipe, listener=listener, out=out, runs=runs, keep_both=True)
    made = summary["engines"]
    assert listener.ran == ["quantize", "export", "compile", "compile", "engines"]
    (other,) = {"onnxruntime", "tvm"} - {made["chosen"]}
    assert made["kept"] == str(tmp_path / f"out-{other}")
    manifests = manifest_of(out), manifest_of(tmp_path / f"out-{other}")
    assert [one["engine"] for one in manifests] == [made["chosen"], other]
    assert manifests[0]["recipe"]["options"]["compile"]["engine"] == made["chosen"]
    assert set(made["sides"]) == {"onnxruntime", "tvm"} and made["left_out"] == {}
    assert all(side["whole_ms"] > side["ttft_ms"] > 0 for side in made["sides"].values())
    assert "apache-tvm-ffi" in made["machine"]["versions"] and "samples" not in made
    rows = list(engine_rows(engines_of(made)))
    assert [row[0] for row in rows] == ["what decides, ms", "TTFT, ms", "time per output token, ms", "bundle, MB"]
    assert next(engine_sentences(made)) == f"{made['why']}."


def test_without_tvm_the_other_engine_ships(
    tiny_model_dir: Path, cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tvm", None)  # as where it isn't installed
    result = cli("compress", tiny_model_dir, "--recipe", "recipe.toml", "--engine", "auto", "--out", "out")
    assert result.exit_code == 0, result.output
    said = "engine: onnxruntime ships, not measured against another: tvm is left out: the tvm engine needs packages"
    assert said in result.stderr
    engines = json.loads(result.stdout.splitlines()[-1])["engines"]
    assert engines["left_out"]["tvm"].endswith("pip install 'edgepipe[tvm]'")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["engine"] == "onnxruntime"


def test_an_engine_without_an_option_is_left_out(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only one engine does is no reason to build none."""

    def here(cache_dtype: str, target: Target, *, checked: bool) -> Level:
        return LEVELS[0]

    monkeypatch.setattr(library, "check_tvm", here)  # as where it is installed
    recipe = auto(tmp_path, ("compile", "deflate", "always"))
    made = compress(str(tiny_model_dir), recipe, listener=Silent(), out=tmp_path / "out", runs=tmp_path / "runs")
    assert made["engines"]["chosen"] == "onnxruntime"
    assert made["engines"]["left_out"]["tvm"].startswith("compile.deflate=always: a compiled library reads")


def test_an_engine_that_dies_is_named(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that a signal ends while both are measured ends the run, and the sentence says whose it was."""
    dying = {"bundle": ("-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")}
    monkeypatch.setattr(engines, "take_blocks", partial(take_blocks, programs=dying))
    with pytest.raises(StageError, match=r"measuring the bundle of tvm ended with exit code -11: no message"):
        engines._race({"onnxruntime": tiny_bundle, "tvm": tiny_bundle}, auto(tmp_path), Silent())


def test_bundles_of_earlier_runs_are_named(tmp_path: Path) -> None:
    """What lies beside the bundle and wasn't written now may be of any recipe."""
    place, recipe = tmp_path / "out", auto(tmp_path)
    assert left_beside(place, recipe, None) == []
    (tmp_path / "out-tvm").mkdir()
    (tmp_path / "out-tvm" / "manifest.json").write_text("{}", encoding="utf-8")
    assert left_beside(place, recipe, None) == [str(tmp_path / "out-tvm")]
    assert left_beside(place, recipe, str(tmp_path / "out-tvm")) == []


def test_where_the_other_bundle_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert place_beside(Path("out"), "tvm") == Path("out-tvm")
    assert place_beside(Path(), "tvm") == tmp_path.with_name(f"{tmp_path.name}-tvm")


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--engine", "tvm"], 1, "the tvm engine needs packages that aren't here: pip install 'edgepipe[tvm]'"),
        (["--keep-both"], 2, "--keep-both keeps the bundles of two engines: it goes with --engine auto"),
        (["--engine", "auto", "--never-slower"], 2, "--never-slower times onnxruntime's kernels"),
        (["--engine", "tvm", "--max-drop", "1%", "--goal", "fastest"], 2, "--goal fastest times onnxruntime's kernels"),
        (["--engine", "auto", "--max-drop", "1%"], 2, "--max-drop measures one engine's bundle: name an engine"),
        (["--engine", "auto", "--budget-bytes", "9000"], 2, "a budget of bytes or time measures one engine's bundle"),
        (["--engine", "llvm"], 2, "compile.engine: expected onnxruntime, tvm, qnn or auto, got 'llvm'"),
    ],
)
def test_what_is_refused(
    tiny_model_dir: Path,
    cli: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    code: int,
    sentence: str,
) -> None:
    """One sentence, the right exit code, and nothing is written."""
    monkeypatch.setitem(sys.modules, "tvm", None)
    result = cli("compress", tiny_model_dir, "--recipe", "recipe.toml", "--out", "out", *options)
    assert result.exit_code == code, result.output
    assert result.stderr.splitlines()[-1].startswith(f"edgepipe: {sentence}")
    assert not (tmp_path / "out").exists()
