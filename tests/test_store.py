"""The store: what is saved comes back the same, and nothing is ever half there."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from edgepipe import store
from edgepipe.artifacts import (
    ActivationPlan,
    CompiledModel,
    Licence,
    Measured,
    ModelInfo,
    OnnxModel,
    QuantizedTensor,
    StageRecord,
    TorchModel,
)
from edgepipe.errors import ContractError
from edgepipe.numerics.grids import dequantize, round_to_nearest
from edgepipe.store import Artifact
from edgepipe.weights import Value, Weight, WeightStore

HISTORY = (
    StageRecord(stage="quantize", options={"bits": 4, "overrides": []}, key="a" * 64, notes=("kept 3", "größer")),
    StageRecord(stage="export", options={}, key="b" * 64),
)
INFO = ModelInfo(
    name="tiny",
    task="text-generation",
    config={"model_type": "llama", "rope_scaling": None, "rms_norm_eps": 1e-05},
    tokenizer={"tokenizer.json": b'{"a": "\xc3\xa9"}', "tokenizer_config.json": b"\x00\xff binary"},
    chat_template="{{ messages[0]['content'] }} – 王",
    eos_token_ids=(1, 7),
    bos_token_id=None,
    licence=Licence(id="Apache-2.0", source="org/tiny", lineage=("org/base", "org/older")),
    fingerprint="c" * 64,
)
RNG = np.random.default_rng(0)


def unheard(_what: str, _done: int, _total: int) -> None:
    """Hear nothing."""


def matrix(rows: int = 5, columns: int = 70) -> np.ndarray:
    """Return a random matrix whose rows are no whole number of groups."""
    return RNG.normal(size=(rows, columns)).astype(np.float32)


def with_minima() -> QuantizedTensor:
    """Return a matrix on a grid with float minima, as Q4_1 has them."""
    value = round_to_nearest(matrix(), bits=4, group=32, symmetric=True)
    minima = RNG.normal(size=value.scale.shape).astype(np.float16)
    return dataclasses.replace(value, minima=minima, source_grid="Q4_1")


VALUES: dict[str, Value] = {
    "norm.float32": RNG.normal(size=7).astype(np.float32),
    "matrix.float16": matrix(3, 5).astype(np.float16),
    "matrix.bfloat16": matrix(3, 5).astype(ml_dtypes.bfloat16),
    "symmetric.q4": round_to_nearest(matrix(), bits=4, group=32, symmetric=True),
    "symmetric.q8": round_to_nearest(matrix(), bits=8, group=64, symmetric=True),
    "zero_points.q4": round_to_nearest(matrix(), bits=4, group=16, symmetric=False),
    "minima.q4": with_minima(),
    "transposed": np.asfortranarray(matrix(4, 3)),
}


def weight_of(name: str, value: Value) -> Weight:
    """Describe a value as stages do."""
    quantized = isinstance(value, QuantizedTensor)
    return Weight(
        name=name,
        shape=value.shape,
        dtype=f"q{value.bits}" if isinstance(value, QuantizedTensor) else value.dtype.name,
        nbytes=value.nbytes,
        grid=value.source_grid if isinstance(value, QuantizedTensor) else None,
        load=partial(lambda v: v, value) if quantized else value.copy,
    )


def make_store(origin: str | None = None) -> WeightStore:
    """Return a store of every kind of value, the embedding tied to the head."""
    weights = {name: weight_of(name, value) for name, value in VALUES.items()}
    return WeightStore(weights, {"lm_head.weight": "symmetric.q8"}, origin=origin)


def assert_same_value(got: Value, expected: Value) -> None:
    """Hold that two values are bit for bit the same."""
    if isinstance(expected, QuantizedTensor):
        assert isinstance(got, QuantizedTensor)
        facts = ("shape", "bits", "group", "source_grid")
        assert [getattr(got, f) for f in facts] == [getattr(expected, f) for f in facts]
        for part in ("codes", "scale", "zero_points", "minima"):
            before, after = getattr(expected, part), getattr(got, part)
            assert (before is None) == (after is None), part
            if before is not None:
                assert before.dtype == after.dtype
                np.testing.assert_array_equal(before, after)
    else:
        assert isinstance(got, np.ndarray)
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert got.tobytes() == expected.tobytes()


def assert_same_weights(got: WeightStore, expected: WeightStore) -> None:
    """Hold that two stores have the same names, records and values."""
    assert list(got) == list(expected)
    assert got.aliases == expected.aliases
    for name in expected:
        facts = ("name", "shape", "dtype", "nbytes", "grid")
        assert [getattr(got[name], f) for f in facts] == [getattr(expected[name], f) for f in facts]
        assert_same_value(got.load(name), expected.load(name))


def test_every_kind_of_weight_comes_back(tmp_path: Path) -> None:
    saved = store.save_weights(make_store(), tmp_path, unheard)
    assert_same_weights(saved, make_store())
    assert_same_weights(store.load_weights(tmp_path), make_store())
    assert saved.origin == str(tmp_path.resolve())


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    saved = store.save_weights(make_store(), tmp_path, unheard)
    assert "lm_head.weight" in saved and "lm_head.weight" not in list(saved)
    assert_same_value(saved.load("lm_head.weight"), VALUES["symmetric.q8"])
    padding = 64 * 3 * len(VALUES)  # every part begins at a multiple of 64
    stored = sum(v.nbytes for v in VALUES.values())
    assert stored <= (tmp_path / "weights.bin").stat().st_size < stored + padding


def test_weights_come_back_from_the_file_when_they_are_read(tmp_path: Path) -> None:
    """Opening a store copies nothing: a value is a view of the memory-mapped file."""
    store.save_weights(make_store(), tmp_path, unheard)
    value = store.load_weights(tmp_path).load("norm.float32")
    assert isinstance(value, np.ndarray) and not value.flags.writeable
    base: object = value
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


def test_weights_are_computed_one_at_a_time(tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    store.save_weights(make_store(), tmp_path, lambda what, done, total: heard.append((what, done, total)))
    assert heard == [(name, i, len(VALUES)) for i, name in enumerate(VALUES)]


def test_a_store_without_weights(tmp_path: Path) -> None:
    assert len(store.save_weights(WeightStore({}), tmp_path, unheard)) == 0
    assert list(store.load_weights(tmp_path)) == []


@pytest.mark.parametrize("change", [{"nbytes": 1}, {"shape": (1, 2)}])
def test_a_value_other_than_planned_is_a_broken_promise(tmp_path: Path, change: dict[str, object]) -> None:
    planned = dataclasses.replace(weight_of("a.b", np.zeros((2, 3), np.float32)), **change)  # type: ignore[arg-type]
    with pytest.raises(ContractError, match=r"a\.b: planned .* got \(2, 3\) in 24$"):
        store.save_weights(WeightStore({"a.b": planned}), tmp_path, unheard)


def round_trip(artifact: Artifact, folder: Path, source: TorchModel, compiled: CompiledModel | None = None) -> Artifact:
    """Save an artifact, and read it back."""
    folder.mkdir()
    store.save_artifact(artifact, folder, unheard)
    return store.load_artifact(folder, source, compiled)


SOURCE = TorchModel(info=INFO, weights=make_store("source"))


def test_a_torch_model_comes_back(tmp_path: Path) -> None:
    model = TorchModel(info=INFO, weights=make_store(), history=HISTORY)
    got = round_trip(model, tmp_path / "01", SOURCE)
    assert isinstance(got, TorchModel)
    assert (got.info, got.history) == (INFO, HISTORY)
    assert_same_weights(got.weights, model.weights)
    assert got.weights.origin == str(tmp_path / "01")


def test_a_plan_of_activations_comes_back(tmp_path: Path) -> None:
    """With the ids that static ranges are seen over, a batch each, and the scales of channels beside the rest."""
    batch = {"input_ids": np.arange(12).reshape(3, 4), "attention_mask": np.ones((3, 4), np.int64)}
    plans = (
        ActivationPlan(kind="dynamic"),
        ActivationPlan(
            kind="static",
            ranges="entropy",
            calibration="everyday",
            batches=(batch, {"input_ids": batch["input_ids"][:1]}),
        ),
    )
    value = round_to_nearest(matrix(), bits=8, group=0, symmetric=True)
    value = dataclasses.replace(value, column_scale=np.linspace(0.5, 2, 70).astype(np.float16))
    weight = Weight(name="w", shape=(5, 70), dtype="q8", nbytes=value.nbytes, load=lambda: value, grid="rtn")
    for number, plan in enumerate(plans):
        model = TorchModel(info=INFO, weights=WeightStore({"w": weight}), activations=plan)
        got = round_trip(model, tmp_path / f"{number}", SOURCE)
        assert isinstance(got, TorchModel) and got.activations is not None
        assert repr(dataclasses.replace(got.activations, batches=())) == repr(dataclasses.replace(plan, batches=()))
        assert len(got.activations.batches) == len(plan.batches)
        for one, other in zip(got.activations.batches, plan.batches, strict=True):
            assert one.keys() == other.keys()
            assert all(np.array_equal(one[key], other[key]) for key in one)
        found = got.weights.load("w")
        assert isinstance(found, QuantizedTensor) and found.column_scale is not None
        np.testing.assert_array_equal(found.column_scale, np.asarray(value.column_scale))
        np.testing.assert_array_equal(got.weights.float32("w"), dequantize(value))


def test_an_untouched_source_is_referred_to(tmp_path: Path) -> None:
    got = round_trip(dataclasses.replace(SOURCE, history=HISTORY), tmp_path / "01", SOURCE)
    assert isinstance(got, TorchModel)
    assert got.weights is SOURCE.weights
    assert not (tmp_path / "01" / "weights.bin").exists()


def test_an_onnx_model_comes_back_with_the_weights_of_the_stage_before(tmp_path: Path) -> None:
    before = round_trip(TorchModel(info=INFO, weights=make_store()), tmp_path / "01", SOURCE)
    assert isinstance(before, TorchModel)
    graphs = {"decoder": b"\x08\x0a graph", "encoder": b""}
    spec = {"layers": 2, "eos_token_ids": [1, 7], "bos_token_id": None}
    model = OnnxModel(info=INFO, graphs=graphs, weights=before.weights, spec=spec, history=HISTORY)
    got = round_trip(model, tmp_path / "02", SOURCE)
    assert isinstance(got, OnnxModel)
    assert (got.info, got.history, got.graphs, got.spec) == (INFO, HISTORY, graphs, spec)
    assert_same_weights(got.weights, make_store())
    assert not (tmp_path / "02" / "weights.bin").exists()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for stage in ("01", "02"):
        (tmp_path / stage).rename(moved / stage)
    again = store.load_artifact(moved / "02", SOURCE)  # the reference is relative: a run's folder may be moved
    assert isinstance(again, OnnxModel)
    assert_same_weights(again.weights, make_store())


def make_compiled(folder: Path) -> CompiledModel:
    """Return a bundle of two files as the compile stage leaves it in its own folder."""
    bundle = folder / "bundle"
    bundle.mkdir(parents=True)
    (bundle / "weights.bin").write_bytes(b"\x01\x02")
    manifest = {"name": "tiny", "files": {"weights.bin": {"bytes": 2}}}
    store.write_json(bundle / "manifest.json", manifest)
    return CompiledModel(info=INFO, path=bundle, manifest=manifest, history=HISTORY)


def test_a_compiled_model_moves_into_its_stage(tmp_path: Path) -> None:
    compiled = make_compiled(tmp_path / "work")
    got = round_trip(compiled, tmp_path / "03", SOURCE)
    assert isinstance(got, CompiledModel)
    assert (got.info, got.history, got.manifest) == (INFO, HISTORY, compiled.manifest)
    assert got.path == tmp_path / "03" / "bundle"
    assert (got.path / "weights.bin").read_bytes() == b"\x01\x02"
    assert not compiled.path.exists()


def test_measurements_come_back_with_their_bundle(tmp_path: Path) -> None:
    compiled = make_compiled(tmp_path / "work")
    figures = {"bundle": {"ttft_ms": 1.25}, "baseline": None}
    measured = Measured(model=compiled, figures=figures, history=HISTORY)
    got = round_trip(measured, tmp_path / "04", SOURCE, compiled)
    assert isinstance(got, Measured)
    assert (got.figures, got.history) == (figures, HISTORY)
    assert got.model is compiled
    with pytest.raises(ContractError, match="the bundle they belong to is gone"):
        store.load_artifact(tmp_path / "04", SOURCE)


def test_the_same_artifact_is_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for place in ("here", "there"):
        round_trip(TorchModel(info=INFO, weights=make_store(), history=HISTORY), tmp_path / place, SOURCE)
        files = sorted(p for p in (tmp_path / place).rglob("*") if p.is_file())
        contents.append({p.relative_to(tmp_path / place): p.read_bytes() for p in files})
    assert len(contents[0]) == 6  # artifact.json, info.json, two tokenizer files, weights.bin and weights.json
    assert contents[0] == contents[1]


def test_json_is_written_the_same_whatever_the_order(tmp_path: Path) -> None:
    store.write_json(tmp_path / "a.json", {"b": [1, 2.5, None], "a": "Björn", "c": {"y": 1, "x": True}})
    store.write_json(tmp_path / "b.json", {"c": {"x": True, "y": 1}, "a": "Björn", "b": [1, 2.5, None]})
    text = (tmp_path / "a.json").read_bytes()
    assert text == (tmp_path / "b.json").read_bytes()
    assert text.startswith('{\n  "a": "Björn",\n'.encode())
    assert text.endswith(b"}\n")
    assert store.read_json(tmp_path / "a.json") == {"a": "Björn", "b": [1, 2.5, None], "c": {"x": True, "y": 1}}


def test_json_that_cannot_be_written_leaves_the_earlier_file(tmp_path: Path) -> None:
    store.write_json(tmp_path / "a.json", {"good": 1})
    with pytest.raises(TypeError):
        store.write_json(tmp_path / "a.json", {"bad": object()})
    assert store.read_json(tmp_path / "a.json") == {"good": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_key_stands_for_contents_code_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = ["fingerprint", "quantize", {"bits": 4, "group": 32}]
    key = store.cache_key(*contents)
    assert key == store.cache_key("fingerprint", "quantize", {"group": 32, "bits": 4})
    others = [
        store.cache_key("other", "quantize", {"bits": 4, "group": 32}),
        store.cache_key("fingerprint", "export", {"bits": 4, "group": 32}),
        store.cache_key("fingerprint", "quantize", {"bits": 8, "group": 32}),
        store.cache_key("fingerprint", "quantize", {"bits": 4, "group": 32}, 0),
    ]
    monkeypatch.setattr(store, "versions", lambda: {"numpy": "0.1"})
    others.append(store.cache_key(*contents))
    monkeypatch.undo()
    monkeypatch.setattr(store, "code_fingerprint", lambda: "changed")
    others.append(store.cache_key(*contents))
    assert len({key, *others}) == 7


def test_the_code_fingerprint_covers_every_file(monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint = store.code_fingerprint.__wrapped__
    before = fingerprint()
    assert before == fingerprint()
    package = Path(store.__file__).parent
    read = Path.read_bytes
    for file in ("store.py", "stages/quantize.py", "engines/onnxruntime/__init__.py"):
        changed = package / file
        monkeypatch.setattr(Path, "read_bytes", lambda self, c=changed: read(self) + b"#" * (self == c))
        assert fingerprint() != before, file


def test_versions_name_what_decides_the_bytes() -> None:
    found = store.versions()
    assert {"numpy", "onnxruntime", "onnx", "torch", "tokenizers"} <= set(found)
    assert found["numpy"] == np.__version__
