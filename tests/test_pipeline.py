"""The runner: reuse, resume, sameness of bytes, and nothing half-written when a stage fails."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgepipe.artifacts import CompiledModel, Context, Measured, OnnxModel, TorchModel
from edgepipe.compress import compress
from edgepipe.errors import ConfigError, StageError
from edgepipe.pipeline import run
from edgepipe.recipe import Recipe, resolve
from edgepipe.report import outputs
from edgepipe.report.record import Report
from edgepipe.runtime import load
from edgepipe.sources import open_model
from edgepipe.stages.compile import Compile
from edgepipe.stages.export import Export
from tests.listener import Silent
from tests.tiny_models import save_tiny_model

STAGES = ["quantize", "export", "compile"]
QUICK: list[tuple[str, str, object]] = [("measure", "blocks", 1), ("measure", "turns", 2), ("measure", "tokens", 64)]


def make_recipe(
    folder: Path, *settings: tuple[str, str, object], stages: list[str] | None = None, seed: int = 0
) -> Recipe:
    """Resolve a recipe of the stages, by default without measuring."""
    file = folder / "recipe.toml"
    file.write_text(f"stages = {json.dumps(stages or STAGES)}\n", encoding="utf-8")
    return resolve(target="cpu", file=file, settings=[("export", "context", 64), *settings], seed=seed)


def make(model: Path, folder: Path, recipe: Recipe, *, fresh: bool = False) -> tuple[Silent, CompiledModel | Measured]:
    """Run a recipe in a folder; return what the listener heard, and the result."""
    heard = Silent()
    result = run(open_model(str(model)), recipe, out=folder / "out", runs=folder / "runs", fresh=fresh, listener=heard)
    return heard, result


def hashes(bundle: Path) -> dict[str, str]:
    """Return the sha256 of every file."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(bundle.iterdir())}


def test_a_second_run_reuses_every_stage(tiny_model_dir: Path, tmp_path: Path) -> None:
    first, _ = make(tiny_model_dir, tmp_path, make_recipe(tmp_path))
    before = hashes(tmp_path / "out")
    second, _ = make(tiny_model_dir, tmp_path, make_recipe(tmp_path))
    assert (first.ran, first.reused) == (STAGES, [])
    assert (second.ran, second.reused) == ([], STAGES)
    assert first.notes == second.notes
    assert hashes(tmp_path / "out") == before


def test_fresh_repeats_every_stage(tiny_model_dir: Path, tmp_path: Path) -> None:
    make(tiny_model_dir, tmp_path, make_recipe(tmp_path))
    heard, _ = make(tiny_model_dir, tmp_path, make_recipe(tmp_path), fresh=True)
    assert (heard.ran, heard.reused) == (STAGES, [])


@pytest.mark.parametrize(
    ("setting", "again"),
    [
        (("quantize", "group", 64), STAGES),
        (("export", "check_tokens", 4), ["export", "compile"]),
        (("compile", "check_tokens", 4), ["compile"]),
    ],
)
def test_stages_from_the_changed_option_on_run_again(
    tiny_model_dir: Path, tmp_path: Path, setting: tuple[str, str, object], again: list[str]
) -> None:
    make(tiny_model_dir, tmp_path, make_recipe(tmp_path))
    heard, _ = make(tiny_model_dir, tmp_path, make_recipe(tmp_path, setting))
    assert heard.ran == again
    assert heard.reused == [name for name in STAGES if name not in again]


def test_another_seed_misses_the_cache(tiny_model_dir: Path, tmp_path: Path) -> None:
    make(tiny_model_dir, tmp_path, make_recipe(tmp_path))
    heard, _ = make(tiny_model_dir, tmp_path, make_recipe(tmp_path, seed=1))
    assert heard.reused == []


def test_another_model_of_the_same_name_misses_the_cache(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The name is the directory's; what counts is the contents."""
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    make(model, tmp_path, make_recipe(tmp_path))
    before = hashes(tmp_path / "out")
    shutil.rmtree(model)
    save_tiny_model(model, "llama", num_key_value_heads=1)
    heard, _ = make(model, tmp_path, make_recipe(tmp_path))
    assert heard.reused == []
    assert hashes(tmp_path / "out")["weights.bin"] != before["weights.bin"]


def test_the_same_recipe_gives_the_same_bytes_anywhere(tiny_model_dir: Path, tmp_path: Path) -> None:
    found = []
    for place in ("here", "somewhere else"):
        folder = tmp_path / place
        folder.mkdir()
        model = Path(shutil.copytree(tiny_model_dir, folder / "tiny-llama"))
        make(model, folder, make_recipe(folder))
        found.append(hashes(folder / "out"))
    names = {"manifest.json", "decoder.onnx", "weights.bin", "tokenizer.json", "chat_template.jinja", "sbom.cdx.json"}
    assert set(found[0]) == names
    assert found[0] == found[1]


def test_a_failing_stage_leaves_nothing_and_the_next_run_goes_on(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tiny_model_dir, tmp_path, make_recipe(tmp_path))
    before = hashes(tmp_path / "out")
    other = make_recipe(tmp_path, ("quantize", "bits", 8))
    written = Compile.__call__

    def fail(self: Compile, model: OnnxModel, ctx: Context) -> CompiledModel:
        written(self, model, ctx)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Compile, "__call__", fail)
    with pytest.raises(StageError, match="stage compile failed: No space left on device") as caught:
        make(tiny_model_dir, tmp_path, other)
    assert (caught.value.stage, caught.value.done) == ("compile", ("quantize", "export"))
    assert hashes(tmp_path / "out") == before
    (folder,) = (tmp_path / "runs").glob("*-8bit")
    assert sorted(p.name for p in folder.iterdir()) == ["01-quantize", "02-export"]
    monkeypatch.undo()
    heard, _ = make(tiny_model_dir, tmp_path, other)
    assert (heard.reused, heard.ran) == (["quantize", "export"], ["compile"])
    assert hashes(tmp_path / "out")["weights.bin"] != before["weights.bin"]


def test_an_interrupt_leaves_the_finished_stages(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Export, model: TorchModel, ctx: Context) -> OnnxModel:
        raise KeyboardInterrupt

    monkeypatch.setattr(Export, "__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(tiny_model_dir, tmp_path, make_recipe(tmp_path))
    (folder,) = (tmp_path / "runs").iterdir()
    assert [p.name for p in folder.iterdir()] == ["01-quantize"]
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    heard, _ = make(tiny_model_dir, tmp_path, make_recipe(tmp_path))
    assert (heard.reused, heard.ran) == (["quantize"], ["export", "compile"])


def test_what_a_stopped_stage_kept_is_found_again_by_its_own_key_only(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = Export.__call__
    found: list[list[str]] = []

    def keep(self: Export, model: TorchModel, ctx: Context) -> OnnxModel:
        assert ctx.keep_dir is not None
        found.append(sorted(p.name for p in ctx.keep_dir.iterdir()) if ctx.keep_dir.is_dir() else [])
        ctx.keep_dir.mkdir(exist_ok=True)
        (ctx.keep_dir / f"step-{len(found)}").touch()
        if len(found) < 4:
            raise KeyboardInterrupt
        return exported(self, model, ctx)

    monkeypatch.setattr(Export, "__call__", keep)
    usual, other = make_recipe(tmp_path), make_recipe(tmp_path, ("export", "check_tokens", 4))
    for recipe in (usual, usual, other):
        with pytest.raises(KeyboardInterrupt):
            make(tiny_model_dir, tmp_path, recipe)
    assert found == [[], ["step-1"], []]
    make(tiny_model_dir, tmp_path, other)
    assert found[3] == ["step-3"]
    (folder,) = (tmp_path / "runs").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["01-quantize", "02-export", "03-compile"]


@pytest.mark.parametrize(
    ("stage", "file", "cut"),
    [
        ("01-quantize", "weights.bin", True),
        ("01-quantize", "weights.json", False),
        ("01-quantize", "info.json", True),
        ("02-export", "decoder.onnx", False),
        ("03-compile", "bundle/weights.bin", True),
        ("03-compile", "bundle/manifest.json", False),
        ("03-compile", "artifact.json", True),
        ("01-quantize", "weights.json", None),
        ("02-export", "artifact.json", None),
        ("02-export", "tokenizer", None),
        ("03-compile", "bundle/manifest.json", None),
        ("03-compile", "key.json", None),
    ],
)
def test_a_damaged_stage_is_made_again(
    tiny_model_dir: Path, tmp_path: Path, stage: str, file: str, cut: bool | None
) -> None:
    """What an earlier run left may have been cut, deleted or (None) overwritten since: it's made again."""
    make(tiny_model_dir, tmp_path, make_recipe(tmp_path))
    before = hashes(tmp_path / "out")
    (folder,) = (tmp_path / "runs").iterdir()
    damaged = folder / stage / file
    if cut is None and damaged.is_dir():
        shutil.rmtree(damaged)
    elif cut is None:
        damaged.write_bytes(b"\0" * damaged.stat().st_size)
    elif cut:
        damaged.write_bytes(damaged.read_bytes()[:-1])
    else:
        damaged.unlink()
    shutil.rmtree(tmp_path / "out")
    heard, _ = make(tiny_model_dir, tmp_path, make_recipe(tmp_path))
    assert stage.partition("-")[2] in heard.ran
    assert hashes(tmp_path / "out") == before


def test_a_damaged_bundle_is_put_right(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A byte that was flipped in the published copy is no reason to leave it so."""
    make(tiny_model_dir, tmp_path, make_recipe(tmp_path))
    before = hashes(tmp_path / "out")
    content = bytearray((tmp_path / "out" / "weights.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "out" / "weights.bin").write_bytes(content)
    make(tiny_model_dir, tmp_path, make_recipe(tmp_path))
    assert hashes(tmp_path / "out") == before


def test_a_stage_that_cannot_take_the_model_is_refused_before_any_work(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--context 4096 is more than the 256 positions"):
        make(tiny_model_dir, tmp_path, make_recipe(tmp_path, ("export", "context", 4096)))
    assert not (tmp_path / "runs").exists()


def test_the_baseline_is_the_same_model_uncompressed(tiny_model_dir: Path, tmp_path: Path) -> None:
    stages = [*STAGES, "measure"]
    heard, result = make(tiny_model_dir, tmp_path, make_recipe(tmp_path, *QUICK, stages=stages))
    assert heard.ran == ["baseline export", "baseline compile", *stages]
    assert isinstance(result, Measured)
    (folder,) = (tmp_path / "runs").iterdir()
    baseline = folder / "baseline" / "02-compile" / "bundle"
    manifest = json.loads((baseline / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["cache"]["dtype"] == "float32"
    assert 31.9 < manifest["weights"]["bits_per_weight"] < 33
    source = open_model(str(tiny_model_dir))
    assert load(baseline).logits([1, 2, 3]).shape == (3, source.info.config["vocab_size"])
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert record["figures"] == result.figures
    assert np.isfinite(record["figures"]["baseline"]["perplexity"])


class EngineError(Exception):
    """An error as onnxruntime's are: below Exception and nothing else."""


def test_an_error_of_an_engine_is_a_stage_error(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Export, model: TorchModel, ctx: Context) -> OnnxModel:
        raise EngineError("no kernel for this node\nwith more lines")

    monkeypatch.setattr(Export, "__call__", fail)
    with pytest.raises(StageError, match=r"^stage export failed: EngineError: no kernel for this node$") as caught:
        make(tiny_model_dir, tmp_path, make_recipe(tmp_path))
    assert isinstance(caught.value.__cause__, EngineError)


def test_a_disk_that_is_full_when_the_bundle_is_published(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tiny_model_dir, tmp_path, make_recipe(tmp_path))
    before = hashes(tmp_path / "out")

    def fail(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(StageError, match=r"can't be written to .*out: No space left on device; it is kept in"):
        make(tiny_model_dir, tmp_path, make_recipe(tmp_path, ("quantize", "bits", 8)))
    assert hashes(tmp_path / "out") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "recipe.toml", "runs"]


def test_a_disk_that_is_full_when_the_run_is_recorded(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Path.write_text

    def fail(self: Path, data: str, encoding: str | None = None) -> int:
        if "run.json" in self.name:
            written(self, data[:10], encoding=encoding)
            raise OSError(28, "No space left on device")
        return written(self, data, encoding=encoding)

    monkeypatch.setattr("edgepipe.pipeline.BASELINE_LIMIT_BYTES", 1000)  # one bundle to measure
    recipe = make_recipe(tmp_path, *QUICK, stages=[*STAGES, "measure"])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(StageError, match=r"not its run\.json: No space left on device"):
            make(tiny_model_dir, tmp_path, recipe)
    (folder,) = (tmp_path / "runs").iterdir()
    assert not [p.name for p in folder.iterdir() if "run.json" in p.name]
    heard, _ = make(tiny_model_dir, tmp_path, recipe)
    assert heard.ran == []
    assert (folder / "run.json").is_file()


def test_the_page_is_written_while_other_runs_are_kept_out(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run can't put its own figures under the page of the first; half a page is never left."""
    monkeypatch.setattr("edgepipe.pipeline.BASELINE_LIMIT_BYTES", 1000)  # one bundle to measure
    recipe = make_recipe(tmp_path, *QUICK, stages=[*STAGES, "measure"])
    refused: list[str] = []
    rendered = outputs.render_page

    def meanwhile(shown: Report) -> str:
        with pytest.raises(ConfigError, match="another run is at work") as caught:
            make(tiny_model_dir, tmp_path, recipe)
        refused.append(str(caught.value))
        return rendered(shown)

    monkeypatch.setattr(outputs, "render_page", meanwhile)
    summary = compress(str(tiny_model_dir), recipe, listener=Silent(), out=tmp_path / "out", runs=tmp_path / "runs")
    assert len(refused) == 1
    report = Path(summary["report"])
    written = report.read_text(encoding="utf-8")
    assert written.rstrip().endswith("</html>")

    def full(self: Path, data: str, encoding: str | None = None) -> int:
        if "report.html" in self.name:
            self.write_bytes(data[:10].encode())
            raise OSError(28, "No space left on device")
        return plain(self, data, encoding=encoding)

    plain = Path.write_text
    monkeypatch.setattr(outputs, "render_page", rendered)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StageError, match=r"but not its report: No space left on device"):
        compress(str(tiny_model_dir), recipe, listener=Silent(), out=tmp_path / "out", runs=tmp_path / "runs")
    assert report.read_text(encoding="utf-8") == written
    assert sorted(p.name for p in report.parent.iterdir() if "report" in p.name) == [
        "report.html",
        "report.json",
        "report.md",
    ]


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (4, r"another run is at work in .*runs/tiny-llama-cpu-4bit: wait until it has ended, then repeat the command"),
        (8, r"another run is at work in --out .*out: wait until it has ended, then repeat the command"),
    ],
)
def test_a_second_run_at_the_same_time_is_refused(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, words: str
) -> None:
    """On the run's directory, or with another recipe on the same output: the first one doesn't notice."""
    (tmp_path / "alone").mkdir()
    make(tiny_model_dir, tmp_path / "alone", make_recipe(tmp_path))
    second = make_recipe(tmp_path, ("quantize", "bits", bits))
    refused: list[str] = []
    written = Export.__call__

    def meanwhile(self: Export, model: TorchModel, ctx: Context) -> OnnxModel:
        with pytest.raises(ConfigError, match=f"^{words}$") as caught:
            make(tiny_model_dir, tmp_path, second)
        refused.append(str(caught.value))
        return written(self, model, ctx)

    monkeypatch.setattr(Export, "__call__", meanwhile)
    heard, _ = make(tiny_model_dir, tmp_path, make_recipe(tmp_path))
    assert (heard.ran, len(refused)) == (STAGES, 1)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone" / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "out", "recipe.toml", "runs"]
    assert sorted(p.name for p in (tmp_path / "runs" / "tiny-llama-cpu-4bit").iterdir()) == [
        *("01-quantize", "02-export", "03-compile")
    ]
    monkeypatch.undo()
    heard, _ = make(tiny_model_dir, tmp_path, second)
    assert heard.reused == (STAGES if bits == 4 else [])


def test_an_earlier_bundle_that_a_killed_run_moved_aside_comes_back(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two renames, and the next run fails: the earlier bundle is there again."""
    make(tiny_model_dir, tmp_path, make_recipe(tmp_path))
    before = hashes(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.old-7")
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.lock").touch()

    def fail(self: Export, model: TorchModel, ctx: Context) -> OnnxModel:
        raise EngineError("no")

    monkeypatch.setattr(Export, "__call__", fail)
    with pytest.raises(StageError):
        make(tiny_model_dir, tmp_path, make_recipe(tmp_path, ("quantize", "bits", 8)))
    assert hashes(tmp_path / "out") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "recipe.toml", "runs"]


def test_an_output_behind_a_link_is_replaced_where_it_lies(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    for bits in (4, 8):
        _, result = make(tiny_model_dir, tmp_path, make_recipe(tmp_path, ("quantize", "bits", bits)))
        assert isinstance(result, CompiledModel) and result.path == tmp_path / "out"
        assert (tmp_path / "out").is_symlink()
        assert hashes(tmp_path / "out") == hashes(tmp_path / "disk" / "real")
        (history,) = [r for r in result.manifest["history"] if r["stage"] == "quantize"]
        assert history["options"]["bits"] == bits
        assert json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8")) == result.manifest
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["real"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "out", "recipe.toml", "runs"]


def test_a_damaged_output_is_written_again(tiny_model_dir: Path, tmp_path: Path) -> None:
    make(tiny_model_dir, tmp_path, make_recipe(tmp_path))
    before = hashes(tmp_path / "out")
    weights = tmp_path / "out" / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1])
    make(tiny_model_dir, tmp_path, make_recipe(tmp_path))
    assert hashes(tmp_path / "out") == before


def test_no_baseline_for_a_model_too_large_for_one(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgepipe.pipeline.BASELINE_LIMIT_BYTES", 1000)
    heard, result = make(tiny_model_dir, tmp_path, make_recipe(tmp_path, *QUICK, stages=[*STAGES, "measure"]))
    assert heard.ran == [*STAGES, "measure"]
    assert isinstance(result, Measured) and result.figures["baseline"] is None
    assert "no float32 baseline: it would be larger than the limit for one" in heard.notes
