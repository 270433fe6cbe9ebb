"""Trim: the stage in front of the others, its bundle beside the untrimmed one, its key, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edgepipe.artifacts import TorchModel
from edgepipe.cli import main
from edgepipe.errors import ConfigError
from edgepipe.pipeline import run
from edgepipe.recipe import Recipe, resolve
from edgepipe.runtime import Encoder, load
from edgepipe.sources import open_model
from edgepipe.stages.trim import Trim
from edgepipe.verify import verify_bundle
from tests.decoders import context
from tests.listener import Silent
from tests.vocabularies import tokenizer_of

TEXT = "The river carried the timber down to the mill.\n\nAnna, Björn and 6.78\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Write a text."""
    file = tmp_path / "data.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Return a function that runs edgepipe in an empty directory, with a recipe that doesn't measure."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text('stages = ["quantize", "export", "compile"]\n', encoding="utf-8")
    return lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments])


def trimmed(model: TorchModel, data: Path, notes: list[str] | None = None, **options: Any) -> TorchModel:
    """Run the stage alone."""
    return Trim(data=str(data), **options)(model, context(data.parent, notes))


def test_a_trimmed_bundle_gives_the_logits_of_the_whole_one(
    cli: Callable[..., Result], tiny_model_dir: Path, data: Path, manifest_of: Callable[[Path], dict[str, Any]]
) -> None:
    common = ["--recipe", "recipe.toml", "--context", "64", "--set", "compile.accuracy_level=0"]
    assert cli("compress", tiny_model_dir, *common, "--out", "whole").exit_code == 0
    made = cli("compress", tiny_model_dir, *common, "--trim-vocab", data, "--out", "trimmed")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["weight_bytes"] < Path("whole/weights.bin").stat().st_size
    whole, small = load("whole"), load("trimmed")
    assert not isinstance(whole, Encoder) and not isinstance(small, Encoder)
    manifest = manifest_of(Path("trimmed"))
    assert manifest["recipe"]["stages"] == ["trim", "quantize", "export", "compile"]
    assert [record["stage"] for record in manifest["history"]] == ["trim", "quantize", "export"]
    verify_bundle(Path("trimmed"))
    old_ids = np.array(whole.encode("The river")), np.array(small.encode("The river"))
    assert len(old_ids[0]) == len(old_ids[1])
    names = json.loads(Path("trimmed/tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    before = json.loads(Path("whole/tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    kept = np.array([before[token] for token in sorted(names, key=names.__getitem__)])
    assert len(kept) == manifest["model"]["vocab_size"] < 384
    expected = whole.logits(TEXT)[:, kept]
    np.testing.assert_allclose(small.logits(TEXT), expected, rtol=1e-4, atol=1e-4 * float(np.abs(expected).max()))
    assert small.generate([{"role": "user", "content": "The mill"}], max_new_tokens=4).token_ids


def make(recipe: Recipe, model: Path, folder: Path) -> Silent:
    """Run a recipe in a folder and return what the listener heard."""
    heard = Silent()
    run(open_model(str(model)), recipe, out=folder / "out", runs=folder / "runs", fresh=False, listener=heard)
    return heard


def test_a_changed_file_misses_the_cache(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    recipe_file = tmp_path / "recipe.toml"
    recipe_file.write_text('stages = ["trim", "quantize", "export", "compile"]\n', encoding="utf-8")
    settings: list[tuple[str, str, object]] = [("trim", "data", str(data)), ("export", "context", 64)]
    recipe = resolve(target="cpu", file=recipe_file, settings=settings)
    stages = [name for name, _ in recipe.stages]
    assert make(recipe, tiny_model_dir, tmp_path).ran == stages
    assert make(recipe, tiny_model_dir, tmp_path).reused == stages
    data.write_text(TEXT + "recorded", encoding="utf-8")
    assert make(recipe, tiny_model_dir, tmp_path).ran == stages


def test_the_baseline_is_the_whole_model(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    from edgepipe.artifacts import Measured
    from edgepipe.report.rows import measured_rows
    from edgepipe.report.sentences import verdict

    quick: list[tuple[str, str, object]] = [("measure", "blocks", 1), ("measure", "turns", 1), ("measure", "tokens", 0)]
    settings = [("trim", "data", str(data)), ("export", "context", 64), *quick]
    recipe = resolve(target="cpu", settings=settings, before=["trim"])
    found = run(
        open_model(str(tiny_model_dir)), recipe, out=None, runs=tmp_path / "runs", fresh=False, listener=Silent()
    )
    assert isinstance(found, Measured)
    (folder,) = (tmp_path / "runs").iterdir()
    baseline = json.loads((folder / "baseline" / "02-compile" / "bundle" / "manifest.json").read_text(encoding="utf-8"))
    assert baseline["model"]["vocab_size"] == 384 > found.model.manifest["model"]["vocab_size"]
    before, after = (found.figures[side]["perplexity_tokens"] for side in ("baseline", "bundle"))
    assert before < after  # the shipped text is other text than that of the data
    (row,) = [row for row in measured_rows(found.figures) if row.key == "perplexity"]
    assert (row.title, row.ratio) == (f"perplexity ({before} and {after} tokens)", None)
    assert row.baseline is not None and row.bundle is not None
    assert (
        f"the text is {before} tokens of float32 and {after} of this vocabulary."
        in verdict(found.figures, "float32")[-1]
    )


def test_what_the_stage_says(tiny_model_dir: Path, data: Path) -> None:
    model = open_model(str(tiny_model_dir))
    notes: list[str] = []
    smaller = trimmed(model, data, notes)
    count = tokenizer_of(smaller).get_vocab_size()
    assert notes[0].startswith(f"kept {count} of 384 tokens, ")
    assert "whatever the data uses: 100.00 % of the data's " in notes[0]
    assert "tokens per word of the data: " in notes[1]
    figures = notes[1].replace(",", "").split()
    assert figures[figures.index("before") - 1] == figures[figures.index("after") - 1]
    assert tokenizer_of(smaller).encode(TEXT).tokens == tokenizer_of(model).encode(TEXT).tokens
    notes.clear()
    with pytest.raises(ConfigError, match=r"must stay"):
        trimmed(model, data, size=3)
    least = trimmed(model, data, notes, size=count - 3)
    assert tokenizer_of(least).get_vocab_size() <= count - 3
    assert "100.00 %" not in notes[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "data.txt is empty: give a file with trimming data"),
        (b"good\nbad \xff\n", "data.txt, line 2: expected UTF-8, but it is not: convert the file"),
        (None, "data.txt can't be read (No such file or directory)"),
    ],
)
def test_data_that_cannot_be_used(
    cli: Callable[..., Result], tiny_model_dir: Path, tmp_path: Path, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "data.txt").write_bytes(content)
    result = cli("compress", tiny_model_dir, "--recipe", "recipe.toml", "--trim-vocab", "data.txt")
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "runs").exists()


def test_a_model_without_text_is_refused_before_any_work(
    cli: Callable[..., Result], family_dir: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    result = cli("compress", family_dir("vit"), "--recipe", "recipe.toml", "--trim-vocab", data)
    assert result.exit_code == 2
    assert "vit reads no text, so it has no vocabulary to trim" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_options_out_of_range(tiny_model_dir: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^trim\.size: expected a number of tokens, 0 for all that are used, got -1$"
    ):
        Trim(data="x", size=-1)
    with pytest.raises(ConfigError, match=r"^trim\.data: expected a file whose texts say which tokens are kept"):
        Trim().check(open_model(str(tiny_model_dir)))


def test_a_recipe_may_have_the_stage_where_it_likes(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('stages = ["quantize", "trim", "export", "compile"]\n[trim]\ndata = "a.txt"\n', encoding="utf-8")
    recipe = resolve(target="cpu", file=file, before=["trim"], settings=[("trim", "data", "b.txt")])
    assert [name for name, _ in recipe.stages] == ["quantize", "trim", "export", "compile"]
    assert dict(recipe.stages)["trim"].data == "b.txt"


def test_an_encoder_that_is_trimmed_embeds_as_before(
    family_dir: Callable[[str], Path], build_tiny: Callable[..., Path], data: Path
) -> None:
    whole = load(build_tiny(family_dir("bert"), ("quantize", "bits", 16)))
    folder = data.parent / "small"
    folder.mkdir()
    (folder / "recipe.toml").write_text('stages = ["trim", "quantize", "export", "compile"]\n', encoding="utf-8")
    settings: list[tuple[str, str, object]] = [("trim", "data", str(data)), ("quantize", "bits", 16)]
    recipe = resolve(target="cpu", file=folder / "recipe.toml", settings=[*settings, ("export", "context", 128)])
    make(recipe, family_dir("bert"), folder)
    small = load(folder / "out")
    assert isinstance(whole, Encoder) and isinstance(small, Encoder)
    np.testing.assert_allclose(small.embed(TEXT), whole.embed(TEXT), atol=1e-6)
