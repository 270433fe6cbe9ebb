"""The commands as people and programs use them: what goes to stderr, what to stdout, and the exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner, Result

from edgepipe.cli import main
from edgepipe.runtime import Model, load
from edgepipe.talk import forget_the_beginning

QUICK = ("--context", "96", *(f"--set=measure.{setting}" for setting in ("blocks=1", "turns=2", "tokens=64")))


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
    assert "times smaller" in Path(summary["report"]).read_text(encoding="utf-8")
    again = cli("compress", tiny_model_dir, "--bits", "4", "--out", "out", *QUICK)
    assert again.stderr.count("reused from an earlier run") == 6
    assert last_json(again) == summary
    assert not summary["replaced"]
    Path("unmeasured.toml").write_text('stages = ["quantize", "export", "compile"]\n', encoding="utf-8")
    other = cli("compress", tiny_model_dir, "--bits", "8", "--out", "out", "--recipe", "unmeasured.toml", *QUICK[:2])
    assert last_json(other)["replaced"]
    assert "It replaced the earlier bundle there" in other.stderr


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


def test_a_failing_stage_says_what_is_kept(
    cli: Callable[..., Result], tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, and one sentence that names the stage and the finished ones."""
    (Path("recipe.toml")).write_text('stages = ["quantize", "export", "compile"]\n', encoding="utf-8")
    tight = ("--set", "compile.exact_tolerance=1e-12", "--set", "compile.cache_dtype=float32")
    result = cli("compress", tiny_model_dir, "--recipe", "recipe.toml", "--out", "out", *tight)
    assert result.exit_code == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("edgepipe: stage compile: the lowered graph (exact) differs from the portable one by ")
    assert last.endswith("allowed 1e-12 (finished and kept: quantize, export)")
    assert result.stdout == ""
    assert not Path("out").exists()


def test_without_measuring_there_is_no_table(cli: Callable[..., Result], tiny_model_dir: Path) -> None:
    Path("recipe.toml").write_text('stages = ["export", "compile"]\n', encoding="utf-8")
    result = cli("compress", tiny_model_dir, "--recipe", "recipe.toml")
    summary = last_json(result)
    assert summary["bundle"] == "runs/tiny-llama-cpu/bundle"
    assert "perplexity" not in summary and "perplexity" not in result.stderr
    assert 31.9 < summary["bits_per_weight"] < 33
    assert load(summary["bundle"]).context == 256  # the model's own: it takes fewer than 2048


def test_run_with_a_stop_and_a_seed(cli: Callable[..., Result], tiny_bundle: Path) -> None:
    """Options reach generate: the same seed answers the same, and a stop string is cut."""
    asked = ("run", tiny_bundle, "The river", "--raw", "--max-new-tokens", 30, "--temperature", 1.5, "--top-k", 50)
    first, second, other = (cli(*asked, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == second != other
    stop = first.strip()[5:7]
    cut = cli(*asked, "--seed", 1, "--stop", stop).stdout
    assert cut == first[: first.index(stop)] + "\n"


@pytest.mark.skipif(sys.platform == "win32", reason="terminals are POSIX")
def test_a_chat_ends_with_ctrl_d_and_answers_with_what_was_said(tiny_bundle: Path) -> None:
    """Without a prompt and with a terminal: two turns, the second one sees the first."""
    import pty

    model = load(tiny_bundle)
    messages: list[dict[str, Any]] = []
    answers = []
    for text in ("Hello", "And then?"):
        messages.append({"role": "user", "content": text})
        answers.append(model.generate(messages, max_new_tokens=6).text)
        messages.append({"role": "assistant", "content": answers[-1]})
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "edgepipe", "run", str(tiny_bundle), "--max-new-tokens", "6"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as child:
        os.close(theirs)
        os.write(ours, b"Hello\nAnd then?\n\x04")  # the terminal keeps what is typed ahead
        stdout, stderr = child.communicate(timeout=60)
        os.close(ours)
    assert child.returncode == 0, stderr
    assert stdout.decode("utf-8") == "".join(f"{answer}\n" for answer in answers)
    assert stderr.decode("utf-8").startswith("tiny-llama: write a message, or end with Ctrl-D.\nyou> ")


def test_ctrl_c_while_a_bundle_answers(
    cli: Callable[..., Result], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pieces(self: Model, *arguments: Any, **more: Any) -> Iterator[str]:
        yield "so far"
        raise KeyboardInterrupt

    monkeypatch.setattr(Model, "generate", pieces)
    result = cli("run", tiny_bundle, "Hello")
    assert result.exit_code == 130
    assert result.stdout == "so far"
    assert result.stderr == "edgepipe: stopped\n"


def test_inspect_prints_a_table(cli: Callable[..., Result], tiny_bundle: Path) -> None:
    result = cli("inspect", tiny_bundle)
    facts = last_json(result)
    assert f"{facts['parameters']:,}" in result.stderr
    assert "embedding and head  q8 rtn" in result.stderr
    for part in facts["parts"]:
        assert f"{part['bits_per_weight']:.2f}" in result.stderr


def test_run_streams_what_generate_gives(cli: Callable[..., Result], tiny_bundle: Path) -> None:
    asked: list[dict[str, Any]] = [{"role": "user", "content": "The river"}]
    expected = load(tiny_bundle).generate(asked, max_new_tokens=9).text
    answer = cli("run", tiny_bundle, "The river", "--max-new-tokens", "9")
    assert answer.exit_code == 0
    assert answer.stdout == expected + "\n"
    assert cli("run", tiny_bundle, "--max-new-tokens", "9", input="The river").stdout == expected + "\n"


def test_run_says_when_an_answer_was_cut(cli: Callable[..., Result], tiny_bundle: Path, tiny_text: str) -> None:
    """A limit that ended the answer is named on stderr; a stop text or an end token is an end."""
    model = load(tiny_bundle)
    short = "The river"
    long = model.decode(model.encode(tiny_text)[: model.context - 6])
    room = model.context - len(model.encode(long))
    stop = model.generate(short, max_new_tokens=30).text[4:7]
    for prompt, options, note in (
        (short, ("--max-new-tokens", 3), "(not finished: --max-new-tokens ended it after 3 tokens)\n"),
        (long, (), f"(not finished: the model's context was full after {room} tokens)\n"),
        (short, ("--stop", stop), ""),
    ):
        result = cli("run", tiny_bundle, prompt, "--raw", *options)
        assert (result.exit_code, result.stderr) == (0, note)


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
    child = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that starts the tests in the background lets them ignore Ctrl-C, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        until = time.monotonic() + 300  # a busy machine imports torch for a minute
        while not list(tmp_path.glob("runs/*/02-export/key.json")) and time.monotonic() < until:
            time.sleep(0.005)
        child.send_signal(signal.SIGINT)
        _, stderr = child.communicate(timeout=120)
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


class _Counting:
    """A model whose prompt has ten tokens a message."""

    context = 128
    manifest: ClassVar[dict[str, Any]] = {"tokenizer": {"chat_template": "chat.jinja"}}

    def apply_chat_template(self, messages: list[dict[str, str]]) -> str:
        return "x" * 10 * len(messages)

    def encode(self, text: str) -> list[int]:
        return list(range(len(text)))


def test_a_chat_forgets_its_beginning_when_the_context_is_full(capsys: pytest.CaptureFixture[str]) -> None:
    """Turns go in pairs, the newest message stays, and it is said once."""
    messages = [{"role": role, "content": str(i)} for i in range(5) for role in ("user", "assistant")][:-1]
    forget_the_beginning(_Counting(), messages)
    assert [m["content"] for m in messages] == ["2", "2", "3", "3", "4"]
    assert "oldest 2 of your messages" in capsys.readouterr().err
    forget_the_beginning(_Counting(), messages)
    assert capsys.readouterr().err == ""
