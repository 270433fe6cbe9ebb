"""Weights that are stored deflated: smaller where there are masks, the same answers, and damage is one sentence."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe.artifacts import CompiledModel, StageRecord, TorchModel
from edgepipe.errors import ConfigError, ContractError, TargetError
from edgepipe.pruning.families import anatomy_of
from edgepipe.pruning.masks import matrices_of
from edgepipe.report.build import build
from edgepipe.report.record import Material
from edgepipe.runtime import load
from edgepipe.sources import open_model
from edgepipe.stages.compile import Compile
from edgepipe.stages.export import Export
from edgepipe.stages.prune import Prune
from edgepipe.stages.quantize import Quantize
from edgepipe.verify import verify_bundle
from tests.decoders import context, opened
from tests.stages.test_prune import STUDENTS
from tests.students.tiny import save_tiny_student

MASK: dict[str, Any] = {"ratio": 0.0, "pattern": "2:4", "mask": "magnitude"}
TEXT = "The river carried the boards."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold this file's models and bundles."""
    return tmp_path_factory.mktemp("deflated")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Callable[..., CompiledModel]:
    """Return a function that gives a masked 4-bit model's bundle, made once."""
    made: dict[str, CompiledModel] = {}

    def give(kind: str, deflate: str = "auto") -> CompiledModel:
        name = f"{kind} {deflate}"
        if name not in made:
            work = folder / name.replace(" ", "-")
            work.mkdir()
            made[name] = _compiled(_masked(_model(kind, folder), folder), work, deflate)
        return made[name]

    return give


def _model(kind: str, folder: Path) -> TorchModel:
    if kind == "llama grouped":
        return opened(folder, kind)
    path = folder / kind
    return open_model(str(path if path.exists() else save_tiny_student(path, STUDENTS[kind])))


def _masked(model: TorchModel, folder: Path) -> TorchModel:
    stage = Prune(**MASK)
    record = StageRecord(stage="prune", options=dataclasses.asdict(stage), key="0" * 64)
    return dataclasses.replace(stage(model, context(folder)), history=(record,))


def _compiled(model: TorchModel, work: Path, deflate: str, notes: list[str] | None = None) -> CompiledModel:
    ctx = context(work, notes)
    recipe = {"target": "cpu", "stages": [], "options": {"quantize": {}}, "seed": 0}
    portable = Export(context=64, check_tokens=0)(Quantize(bits=4)(model, ctx), ctx)
    portable = dataclasses.replace(portable, history=model.history)
    return Compile(deflate=deflate, cache_dtype="float32")(portable, dataclasses.replace(ctx, recipe=recipe))


@pytest.mark.parametrize("kind", ["llama grouped", "encoder", "encoder-decoder"])
def test_a_masked_bundle_is_smaller_and_answers_the_same(kind: str, bundle: Callable[..., CompiledModel]) -> None:
    packed, plain = bundle(kind), bundle(kind, "never")
    weights = packed.manifest["weights"]
    assert not (packed.path / "weights.bin").exists()
    assert (packed.manifest["schema"], plain.manifest["schema"]) == (3, 2)
    assert weights["bytes"] == (packed.path / "weights.bin.z").stat().st_size < 0.9 * weights["unpacked"]["bytes"]
    assert weights["unpacked"]["bytes"] == (plain.path / "weights.bin").stat().st_size
    for one in (packed, plain):
        assert [check for check in verify_bundle(one.path)["checks"] if check["ok"] is not True] == []
    first, second = (load(one.path, threads=1) for one in (packed, plain))
    if kind == "encoder":
        assert np.array_equal(first.embed(TEXT), second.embed(TEXT))  # type: ignore[union-attr]
        return
    answers = [one.generate(TEXT, max_new_tokens=8).token_ids for one in (first, second)]  # type: ignore[union-attr]
    assert answers[0] == answers[1]
    if kind == "encoder-decoder":
        scores = [one.score(TEXT, [5, 9]) for one in (first, second)]  # type: ignore[union-attr]
        assert np.array_equal(scores[0], scores[1])


def test_masks_are_in_the_codes_that_ship(bundle: Callable[..., CompiledModel], folder: Path) -> None:
    """Unpacked, at least half of the layers' 4-bit codes are 8, which is zero."""
    import zlib

    made, model = bundle("llama grouped"), _model("llama grouped", folder)
    content = np.frombuffer(zlib.decompress((made.path / "weights.bin.z").read_bytes()), np.uint8)
    codes = np.stack([content & 15, content >> 4], 1)
    masked = sum(model.weights[name].size for name in matrices_of(model, anatomy_of(model)))
    assert (codes == 8).sum() >= masked / 2


def test_a_dense_bundle_is_plain_unless_it_is_asked_for(folder: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    for deflate, name in (("auto", "weights.bin"), ("always", "weights.bin.z")):
        (tmp_path / deflate).mkdir()
        made = _compiled(_model("encoder", folder), tmp_path / deflate, deflate, notes)
        assert made.manifest["weights"]["file"] == name
    assert sum("weights are stored deflated" in note for note in notes) == 1


def test_the_report_says_where_zeros_buy_speed_and_where_bytes(bundle: Callable[..., CompiledModel]) -> None:
    for deflate, here in (("auto", "MB, deflated"), ("never", "MB, as they are")):
        made = bundle("llama grouped", deflate)
        material = Material(label="a", path="a", manifest=made.manifest, manifest_sha256="0" * 64, manifest_bytes=1)
        said = " ".join(build([material]).bundles[0].verdict)
        assert (
            "Zeros (2:4) buy speed on no target: they take as long as other weights, and only bytes are saved" in said
        )
        assert here in said


def damaged(made: CompiledModel, path: Path, change: Callable[[bytes], bytes], **facts: Any) -> Path:
    """Copy a bundle, change its weights' bytes, and let the manifest say what they are now."""
    shutil.copytree(made.path, path)
    file = path / "weights.bin.z"
    file.write_bytes(change(file.read_bytes()))
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"]["weights.bin.z"]["bytes"] = manifest["weights"]["bytes"] = file.stat().st_size
    manifest["weights"]["unpacked"] |= facts
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("change", "facts", "kind", "sentence"),
    [
        (
            lambda b: b[: len(b) // 2],
            {},
            ContractError,
            r"weights.bin.z ends after \d+ of the \d+ bytes it should hold",
        ),
        (lambda b: b + b"more", {}, ContractError, "weights.bin.z holds more than the"),
        (lambda b: b[:-1] + bytes([b[-1] ^ 1]), {}, ContractError, r"weights.bin.z can't be unpacked \(.*check"),
        (lambda b: b"no stream" + b, {}, ContractError, "weights.bin.z can't be unpacked"),
        (lambda b: b, {"bytes": 5000}, ContractError, "weights.bin.z holds more than the 5000 bytes it should"),
        (lambda b: b, {"bytes": 1 << 40}, ConfigError, r"weights.unpacked.bytes must be from 1 to \d+, but is"),
        (lambda b: b, {"file": "../weights.bin"}, ConfigError, "plain path inside the bundle"),
        (lambda b: b, {"file": "other.bin"}, TargetError, "could not load the bundle"),
    ],
)
def test_damage_is_told_in_one_sentence(
    change: Callable[[bytes], bytes],
    facts: dict[str, Any],
    kind: Any,
    sentence: str,
    bundle: Callable[..., CompiledModel],
    tmp_path: Path,
) -> None:
    with pytest.raises(kind, match=sentence):
        load(damaged(bundle("llama grouped"), tmp_path / "bundle", change, **facts))


@pytest.mark.parametrize("unpacked", [None, {}, {"file": "weights.bin", "bytes": "many"}])
def test_an_older_manifest_that_speaks_of_unpacked_weights_is_checked_too(
    unpacked: Any, bundle: Callable[..., CompiledModel], tmp_path: Path
) -> None:
    path = damaged(bundle("llama grouped"), tmp_path / "bundle", lambda b: b)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    manifest["schema"], manifest["weights"]["unpacked"] = 2, unpacked
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"manifest.json: weights.unpacked"):
        load(path)


def test_a_choice_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"compile.deflate: expected one of auto, always, never, got 'zip'"):
        Compile(deflate="zip")
