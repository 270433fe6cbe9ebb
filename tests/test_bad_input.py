"""Whatever is wrong with a request: one clear sentence, the right exit code, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result

from edgepipe.cli import main
from tests.test_lock import hold

UNMEASURED = 'stages = ["quantize", "export", "compile"]\n'
GOOD = '{"schema": 1, "edgepipe": "0.1.0", "name": "an earlier bundle", "files": {}}\n'


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Return a function that runs edgepipe in an empty directory, with a recipe that doesn't measure."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(UNMEASURED, encoding="utf-8")
    return lambda *arguments, **more: CliRunner().invoke(main, [str(a) for a in arguments], **more)


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """Put what looks like an earlier bundle at `out`."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text(GOOD, encoding="utf-8")
    return out


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def assert_refused(result: Result, code: int, *words: str) -> None:
    """Hold that a command ended with one sentence that holds the words."""
    assert result.exit_code == code, result.output
    said = [line for line in result.stderr.splitlines() if line.startswith("edgepipe: ")]
    assert len(said) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == said[0]
    assert "Traceback" not in result.output
    for word in words:
        assert word in said[0], said[0]


def assert_untouched(out: Path) -> None:
    """Hold that the earlier bundle is as it was, and that nothing lies beside it."""
    assert [p.name for p in out.iterdir()] == ["manifest.json"]
    assert (out / "manifest.json").read_text(encoding="utf-8") == GOOD
    assert not [p.name for p in out.parent.iterdir() if p.name.startswith(".out")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("compress", "tests/no-such-model.gguf"), ("no-such-model.gguf",)),
        (("compress", "no-such-model"), ("no-such-model", "smollm2-135m")),
        (("compress", "smollm2-135n"), ("smollm2-135n", "smollm2-135m")),
        (("compress", "--target", "gpux"), ("gpux", "cpu")),
        (("compress", "--bits", "5"), ("4, 8, 16", "5")),
        (("compress", "--embedding-bits", "3"), ("4, 8, 16", "3")),
        (("compress", "--max-drop", "much"), ("--max-drop", "1%", "'much'")),
        (("compress", "--max-drop", "1%", "--bits", "4"), ("--bits", "--max-drop", "leave one of them out")),
        (("compress", "--goal", "fastest"), ("--goal is for a search", "--max-drop")),
        (("compress", "--engine", "tvm", "--tune", "0"), ("--tune: expected minutes above 0, got 0",)),
        (("compress", "--engine", "tvm", "--tune", "-2"), ("--tune: expected minutes above 0, got -2",)),
        (("compress", "--engine", "tvm", "--tune", "1", "--max-drop", "1%"), ("--tune", "--max-drop", "leave one out")),
        (("compress", "--set", "quantize.bitz=4"), ("bitz", "did you mean 'bits'")),
        (("compress", "--set", "quantise.bits=4"), ("quantise", "did you mean 'quantize'")),
        (("compress", "--set", "quantize.bits"), ("STAGE.OPTION=VALUE",)),
        (("compress", "--set", "quantize.bits=four"), ("quantize.bits", "must be a number")),
        (("compress", "--set", "measure.tokens=1"), ("measure.tokens", "at least 2")),
        (("compress", "--context", "7"), ("export.context", "at least 8")),
        (("compress", "--seed", "-1"), ("seed", "-1")),
        (("compress", "--recipe", "absent.toml"), ("absent.toml", "can't be read")),
        (("inspect", "no-such-model"), ("no-such-model",)),
        (("stages", "quantise"), ("quantise", "quantize")),
        (("run", "no-such-bundle", "Hello"), ("no-such-bundle", "does not exist")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_unknown_names_and_values(
    cli: Callable[..., Result], tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_refused(cli(*arguments), 2, *words)
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.toml"]


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ('stages = ["export", "quantize", "compile"]', ("Quantize takes TorchModel", "given OnnxModel")),
        ('stages = ["compile"]', ("Compile takes OnnxModel", "given TorchModel")),
        ('stages = ["quantize", "export"]', ("end in OnnxModel",)),
        ('stages = ["shrink", "export", "compile"]', ("no stage 'shrink'",)),
        ('stages = ["quantize", "quantize", "export", "compile"]', ("named twice",)),
        ("stages = []", ("list of stage names",)),
        ('stagez = ["quantize"]', ("stagez", "unknown key")),
        ("[quantize\nbits = 4", ("not valid TOML",)),
        ("[quantize]\nbits = true", ("quantize.bits", "must be a number")),
        ('[quantize]\noverrides = ["*=5"]', ("PATTERN=BITS", "*=5")),
    ],
)
def test_recipes(cli: Callable[..., Result], tmp_path: Path, recipe: str, words: tuple[str, ...]) -> None:
    (tmp_path / "recipe.toml").write_text(recipe, encoding="utf-8")
    assert_refused(cli("compress", "--recipe", "recipe.toml"), 2, *words)
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.toml"]


def test_a_recipe_that_is_not_text(cli: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_bytes(b"\xff\xfe\x00")
    assert_refused(cli("compress", "--recipe", "recipe.toml"), 2, "not UTF-8")


def test_an_unknown_flag_is_clicks_usage_error(cli: Callable[..., Result]) -> None:
    result = cli("compress", "--bitz", "4")
    assert result.exit_code == 2
    assert "No such option" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (("steps=1", "data=nowhere.txt", "activations=dynamic"), "nowhere.txt can't be read"),
        (("method=gptq", "calibration=nowhere.txt"), "nowhere.txt"),
    ],
)
def test_what_a_later_stage_reads_is_there_before_a_student_is_made(
    cli: Callable[..., Result], model: Path, tmp_path: Path, setting: tuple[str, ...], words: str
) -> None:
    """What quantize itself can't look at yet, since its model is still to be made, fails before any training."""
    settings = [f"--set=quantize.{one}" for one in setting]
    assert_refused(cli("compress", model, "--student", "decoder", *settings), 2, words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("size", [0, 7, 200, -1])
def test_truncated_safetensors(cli: Callable[..., Result], model: Path, earlier: Path, size: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    result = cli("compress", model, "--recipe", "recipe.toml", "--out", earlier)
    assert_refused(result, 2, "model.safetensors")
    assert_untouched(earlier)


def test_a_truncated_gguf(cli: Callable[..., Result], tmp_path: Path, earlier: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\x05\x00\x00\x00")
    assert_refused(cli("compress", "broken.gguf", "--recipe", "recipe.toml", "--out", earlier), 2, "broken.gguf")
    assert_untouched(earlier)


@pytest.mark.parametrize("place", [10, 0.3, 0.6, 0.95, -1])
def test_a_gguf_cut_anywhere(cli: Callable[..., Result], tmp_path: Path, earlier: Path, place: float) -> None:
    """In the header, the tensors' table, the middle of the data, and one byte short."""
    content = write_gguf(tmp_path / "whole.gguf")
    size = int(len(content) * place) if isinstance(place, float) else place
    (tmp_path / "cut.gguf").write_bytes(content[:size])
    result = cli("compress", "cut.gguf", "--recipe", "recipe.toml", "--out", earlier)
    assert_refused(result, 2, "cut.gguf", "truncated")
    assert_untouched(earlier)


@pytest.mark.parametrize(
    ("place", "words"), [(0, "GGUF"), (4, "version"), (8, "tensors"), (16, "metadata keys"), (24, "bytes wanted")]
)
def test_a_gguf_with_a_broken_header(
    cli: Callable[..., Result], tmp_path: Path, earlier: Path, place: int, words: str
) -> None:
    content = bytearray(write_gguf(tmp_path / "whole.gguf"))
    content[place : place + 8] = b"\xff" * 8
    (tmp_path / "bent.gguf").write_bytes(content)
    result = cli("compress", "bent.gguf", "--recipe", "recipe.toml", "--out", earlier)
    assert_refused(result, 2, "bent.gguf", words)
    assert_untouched(earlier)


def write_gguf(path: Path) -> bytes:
    """Write a GGUF file of one tensor and a tokenizer's first keys; return its bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(64)
    writer.add_token_list(["<s>", "a", "b"])
    writer.add_tensor("token_embd.weight", np.ones((3, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_damaged_weights(cli: Callable[..., Result], model: Path, earlier: Path) -> None:
    """A number that is none, in the middle of a matrix: found when it is quantized, and nothing is left of the run."""
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-4096:-4092] = b"\xff\xff\xff\x7f"
    file.write_bytes(content)
    result = cli("compress", model, "--recipe", "recipe.toml", "--out", earlier)
    assert_refused(result, 1, "stage quantize: ", "not finite")
    assert_untouched(earlier)
    (folder,) = Path("runs").iterdir()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b'{"version": "1.0"}', b"\xff\x00"])
def test_a_damaged_tokenizer(cli: Callable[..., Result], model: Path, earlier: Path, content: bytes) -> None:
    (model / "tokenizer.json").write_bytes(content)
    assert_refused(cli("compress", model, "--recipe", "recipe.toml", "--out", earlier), 2, "tokenizer")
    assert_untouched(earlier)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_size", 224, ("config.json promises",)),
        ("num_hidden_layers", 3, ("config.json promises model.layers.2",)),
        ("num_hidden_layers", 1, ("model.layers.1", "does not use")),
        ("vocab_size", 400, ("model.embed_tokens.weight",)),
        ("num_key_value_heads", 2, ("cannot share",)),
        ("model_type", "gpt_oss_2", ("gpt_oss_2",)),
        ("hidden_act", "relu", ("activation 'relu'",)),
    ],
)
def test_a_config_that_contradicts_the_weights(
    cli: Callable[..., Result], model: Path, earlier: Path, key: str, value: object, words: tuple[str, ...]
) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {key: value}), encoding="utf-8")
    result = cli("compress", model, "--recipe", "recipe.toml", "--out", earlier)
    assert_refused(result, 2, *words)
    assert_untouched(earlier)
    assert not Path("runs").exists()


def test_nothing_but_pickled_weights(cli: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert_refused(cli("compress", model, "--recipe", "recipe.toml"), 2, "pytorch_model.bin", "convert it")


def test_an_output_that_is_a_file(cli: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    assert_refused(cli("compress", model, "--recipe", "recipe.toml", "--out", "out"), 2, "is a file")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"


def test_an_output_that_is_somebody_elses_directory(cli: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine", encoding="utf-8")
    assert_refused(cli("compress", model, "--recipe", "recipe.toml", "--out", "out"), 2, "isn't a bundle")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("manifest", ['{"name": "my web app", "start_url": "/"}', "[]", "{", '"edgepipe"'])
def test_an_output_whose_manifest_is_another_programs(
    cli: Callable[..., Result], model: Path, tmp_path: Path, manifest: str
) -> None:
    """Web apps and extensions have a manifest.json too: replacing such a directory would lose somebody's work."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(manifest, encoding="utf-8")
    assert_refused(cli("compress", model, "--recipe", "recipe.toml", "--out", "out"), 2, "isn't a bundle")
    assert (tmp_path / "out" / "manifest.json").read_text(encoding="utf-8") == manifest


def test_an_output_that_is_a_bundle_and_more(cli: Callable[..., Result], model: Path, earlier: Path) -> None:
    """Files that somebody put beside a bundle are not thrown away with it."""
    (earlier / "notes.txt").write_text("mine", encoding="utf-8")
    assert_refused(cli("compress", model, "--recipe", "recipe.toml", "--out", earlier), 2, "it holds notes.txt")
    assert (earlier / "notes.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("out", [".", "..", "runs", "runs/model-cpu-4bit", "runs/model-cpu-4bit/01-quantize"])
def test_an_output_that_lies_over_the_stages(
    cli: Callable[..., Result], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    """Publishing replaces a directory as a whole; the run's own stages must not be in it."""
    recipe = tmp_path / "recipe.toml"
    model = shutil.copytree(tiny_model_dir, tmp_path / "models" / "model")
    (tmp_path / "parent" / "work").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "parent" / "work")
    if out == "..":  # a bundle by its manifest, or it would be refused for the directory in it
        monkeypatch.setattr("edgepipe.pipeline._strangers", lambda path: [])
    result = cli("compress", model, "--recipe", recipe, "--out", out)
    assert_refused(result, 2, f"--out {out} would lie over the finished stages")
    assert list(Path().iterdir()) == []


def test_an_output_that_cannot_be_written(cli: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    """A directory below a file: true for every user, root included."""
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    result = cli("compress", model, "--recipe", "recipe.toml", "--out", "file/out")
    assert_refused(result, 2, "file/out", "is a file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("lock", ["runs/model-cpu-4bit/.lock", ".out.lock"])
def test_two_runs_at_once(cli: Callable[..., Result], model: Path, earlier: Path, lock: str) -> None:
    """The second is refused with a sentence; the lock of one that was killed is no obstacle."""
    named = "runs/model-cpu-4bit" if lock.startswith("runs") else f"--out {earlier}"
    child = hold(Path(lock))
    try:
        result = cli("compress", model, "--recipe", "recipe.toml", "--out", earlier)
        assert_refused(result, 2, f"another run is at work in {named}: wait until it has ended")
        assert [p.name for p in earlier.iterdir()] == ["manifest.json"]
    finally:
        child.kill()
        child.communicate()
    assert Path(lock).exists()
    assert cli("compress", model, "--recipe", "recipe.toml", "--out", earlier).exit_code == 0
    assert not Path(lock).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX")
def test_a_full_disk(model: Path, earlier: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk: writing beyond it fails in the middle."""

    def limit() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    (tmp_path / "recipe.toml").write_text(UNMEASURED, encoding="utf-8")
    command = [sys.executable, "-m", "edgepipe", "compress", model, "--recipe", "recipe.toml", "--out", earlier]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("edgepipe: stage quantize failed: File too large")
    assert "Traceback" not in done.stderr
    assert_untouched(earlier)
    (folder,) = (tmp_path / "runs").iterdir()
    assert [p.name for p in folder.iterdir()] == []


@pytest.mark.parametrize("command", ["compress", "inspect", "run"])
def test_a_name_longer_than_any_file_may_have(cli: Callable[..., Result], command: str) -> None:
    """A prompt where the bundle belongs, for example."""
    assert_refused(cli(command, "Tell me about rivers. " * 20), 2, "File name too long")


def test_an_unknown_text_or_tensor_is_refused_before_any_work(
    cli: Callable[..., Result], model: Path, tmp_path: Path
) -> None:
    assert_refused(cli("compress", model, "--set", "measure.text=prose-evil"), 2, "did you mean 'prose-eval'")
    result = cli("compress", model, "--set", 'quantize.overrides=["*.mlp.*=8", "*.mpl.*=8"]')
    assert_refused(result, 2, "no tensor matches *.mpl.*")
    assert not (tmp_path / "runs").exists()


def test_a_prompt_longer_than_the_context(cli: Callable[..., Result], tiny_bundle: Path) -> None:
    assert_refused(cli("run", tiny_bundle, "river " * 500), 2, "context of 128", "shorten it")


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt(cli: Callable[..., Result], tiny_bundle: Path, prompt: str) -> None:
    assert_refused(cli("run", tiny_bundle, prompt), 2, "prompt is empty")
    assert_refused(cli("run", tiny_bundle, input=prompt), 2, "prompt is empty")


def test_stdin_that_is_not_utf8(cli: Callable[..., Result], tiny_bundle: Path) -> None:
    assert_refused(cli("run", tiny_bundle, input=b"caf\xe9 au lait"), 2, "not UTF-8", "byte 3")


@pytest.mark.parametrize("more", [(), ("--raw",)])
def test_a_prompt_that_is_not_utf8(cli: Callable[..., Result], tiny_bundle: Path, more: tuple[str, ...]) -> None:
    """The shell passes bytes on; Python hands them over as half characters."""
    prompt = b"caf\xe9 au lait".decode("utf-8", "surrogateescape")
    assert_refused(cli("run", tiny_bundle, prompt, *more), 2, "not UTF-8", "character 3")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--temperature", "-1"), "temperature"),
        (("--top-p", "0"), "top_p"),
        (("--max-new-tokens", "0"), "max_new_tokens"),
        (("--threads", "0"), "threads"),
    ],
)
def test_sampling_out_of_range(
    cli: Callable[..., Result], tiny_bundle: Path, arguments: tuple[str, ...], words: str
) -> None:
    assert_refused(cli("run", tiny_bundle, "Hello", *arguments), 2, words)


def test_a_damaged_bundle(cli: Callable[..., Result], tiny_bundle: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_bundle, tmp_path / "broken"))
    weights = broken / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert_refused(cli("run", broken, "Hello"), 1, "weights.bin should have")
    (broken / "manifest.json").write_text("{", encoding="utf-8")
    assert_refused(cli("run", broken, "Hello"), 2, "not valid JSON")
