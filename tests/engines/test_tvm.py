"""The engine tvm: a bundle of every kind of graph, what it ships, what is refused; slow/test_tvm_models.py has more."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgepipe.artifacts import ActivationPlan, CompiledModel, OnnxModel
from edgepipe.errors import ConfigError, ContractError, TargetError
from edgepipe.graph.dialect import GraphBuilder
from edgepipe.graph.evaluate import prompt_logits
from edgepipe.sources import open_model
from edgepipe.stages.compile import Compile
from edgepipe.stages.export import Export
from edgepipe.store import file_sha256
from edgepipe.verify import verify_bundle
from tests.decoders import all_on, context, difference, random_ids
from tests.engines.tvm_bundles import BOTH, NOTE, built, decoder
from tests.students.test_graphs import ENCODERS
from tests.students.test_models import PAIRS
from tests.students.tiny import save_tiny_student

pytest.importorskip("tvm", reason="TVM isn't here: pip install 'edgepipe[tvm]'")

from edgepipe.engines import native
from edgepipe.engines import tvm as engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the tiny models of this file."""
    return tmp_path_factory.mktemp("decoders")


@pytest.fixture(scope="module")
def model(folder: Path) -> OnnxModel:
    """Export a decoder with grouped heads and tied ends, all of it on 4 bits."""
    return decoder(folder, "llama tied", "4 bits")


@pytest.fixture(scope="module")
def notes() -> list[str]:
    """Hold what the stage said of the bundle."""
    return []


@pytest.fixture(scope="module")
def bundle(model: OnnxModel, notes: list[str], tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    """Compile it once for the tests of this file that only read it."""
    return built(model, tmp_path_factory.mktemp("bundle") / "a", notes)


def test_a_decoder(model: OnnxModel, bundle: CompiledModel, notes: list[str]) -> None:
    """A bundle with a library for all graphs, whose notes say how close it is; any pieces give the same logits."""
    from edgepipe.runtime import open_graphs, read_bundle

    assert re.fullmatch(NOTE, notes[0]) and re.match(r"a library of [\d,]+ KiB for ", notes[1])
    manifest = json.loads((bundle.path / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["engine"] == "tvm"
    assert manifest["library"]["arithmetic"] == "float32"
    assert manifest["library"]["system"] == "linux-gnu" and "linked_by" not in manifest["library"]
    assert manifest["graphs"] == {"decoder": "library.so"}
    assert {"library.so", "weights.bin"} <= set(manifest["files"])
    opened = open_graphs(read_bundle(bundle.path), 1)
    ids = random_ids(model)
    expected = prompt_logits(model, ids)
    for pieces in ([12], [5, 1, 1, 5]):
        cache, start, found = opened.new_cache(1), 0, []
        for count in pieces:
            places = np.arange(count)[None]
            new = ids[:, start : start + count]
            found.append(opened.run(cache, new, np.array([start]), np.array([count]), places).copy())
            start += count
        assert difference(np.concatenate(found, axis=1), expected) < 1e-5


def test_rows_of_a_batch(model: OnnxModel, bundle: CompiledModel) -> None:
    """Ragged rows beside each other give what each gives alone, and a row may be rewound."""
    from edgepipe.runtime import open_graphs, read_bundle

    opened = open_graphs(read_bundle(bundle.path), 2)
    ids = random_ids(model, batch=2)
    expected = prompt_logits(model, ids)
    cache = opened.new_cache(2)
    lengths = np.array([12, 7])
    got = opened.run(cache, ids, np.zeros(2, np.int64), lengths, lengths[:, None] - 1)
    assert difference(got[:, 0], np.stack([expected[0, 11], expected[1, 6]])) < 1e-5
    got = opened.run(cache, ids[:, 7:8], np.array([7, 7]), np.ones(2, np.int64), np.zeros((2, 1), np.int64))
    assert difference(got[:, 0], expected[:, 7]) < 1e-5


def test_no_float_copy_ships(model: OnnxModel, bundle: CompiledModel) -> None:
    """Neither file holds a row of a decoded matrix, and 4 bits with float16 scales stay below 4.6 a weight."""
    code, weights = ((bundle.path / name).read_bytes() for name in ("library.so", "weights.bin"))
    assert len(code) < 1 << 20
    matrices = [name for name, weight in model.weights.items() if len(weight.shape) == 2]
    for name in matrices:
        row = model.weights.float32(name)[1, 16:32]
        for dtype in (np.float32, np.float16):
            assert row.astype(dtype).tobytes() not in code + weights, name
    # Tiles and groups are filled up: 112 = 7 tiles of 16 rows, 3.5 groups of 32 columns become 4
    tensors = engine.lower(model, engine.level_here(), accuracy_level=0).file.tensors
    for name in matrices:
        rows, columns = model.weights[name].shape
        filled = -(-rows // 16) * 16 * -(-columns // 32) * 32
        parts = [t for t in tensors if t.name.startswith(f"{name}:")]
        assert 8 * sum(part.nbytes for part in parts) <= 4.6 * filled
    assert len(weights) < 1.1 * sum(model.weights[name].nbytes for name in model.weights) + 4096 * len(matrices)


def test_the_bundle_runs_without_the_compiler(bundle: CompiledModel) -> None:
    """Loading and answering import neither the compiler nor torch, wherever they are installed.

    The caller's thread stays on the cores it had.
    """
    code = (
        "import os, sys, edgepipe.runtime\n"
        "cores = {max(os.sched_getaffinity(0))}\n"
        "os.sched_setaffinity(0, cores)\n"
        f"model = edgepipe.runtime.load({str(bundle.path)!r}, threads=1)\n"
        "answer = model.generate('The river', max_new_tokens=4, ignore_eos=True)\n"
        "assert len(answer.token_ids) == 4\n"
        "assert os.sched_getaffinity(0) == cores\n"
        "print(sorted({'tvm', 'torch', 'onnx', 'onnxruntime', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    checks = verify_bundle(bundle.path)["checks"]
    assert next(check for check in checks if check["name"] == "graph")["ok"], checks


def test_a_bundle_takes_the_threads_asked_for(bundle: CompiledModel) -> None:
    """A pool belongs to a calling thread, not to a bundle: two bundles in one process each get their own number."""
    code = (
        "import os, edgepipe.runtime, tvm_ffi\n"
        f"load = lambda threads: edgepipe.runtime.load({str(bundle.path)!r}, threads=threads)\n"
        "def used(model):\n"
        "    model.generate('The river', max_new_tokens=2, ignore_eos=True)\n"
        "    return tvm_ffi.get_global_func('runtime.NumThreads')()\n"
        "one, two, whole = load(1), load(2), load(None)\n"
        "most = len(os.sched_getaffinity(0))\n"
        "assert [used(m) for m in (one, two, whole, one)] == [1, min(2, most), most, 1]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_instructions_are_checked_before_loading(bundle: CompiledModel, tmp_path: Path) -> None:
    from edgepipe.runtime import load

    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    (copy / "library.so").write_bytes(b"\0" * (copy / "library.so").stat().st_size)  # would be no library if loaded
    file = copy / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    manifest["library"]["flags"].append("avx4096")
    file.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(TargetError, match=r"this processor has no avx4096: build a bundle for it"):
        load(copy)


def test_a_damaged_library_is_not_opened(bundle: CompiledModel, tmp_path: Path) -> None:
    """Its hash is compared first: what is damaged in it would run."""
    from edgepipe.runtime import load

    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    content = bytearray((copy / "library.so").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "library.so").write_bytes(content)
    with pytest.raises(ContractError, match=r"library\.so should have sha256 .*: the bundle was changed or damaged"):
        load(copy)


def test_a_slice_beyond_its_table(model: OnnxModel, tmp_path: Path) -> None:
    """More places than a table has read its last row, and nothing beyond it; fewer are exact."""
    from edgepipe.runtime.tvm import open_library

    g = GraphBuilder("model")
    x = g.input("x", ir.DataType.FLOAT, ["tokens"])
    table = g.constant(np.arange(4, dtype=np.float32))
    y = g.op("Add", [x, g.op("Slice", [table, g.constant(np.array([0])), g.op("Shape", [x])])])
    g.output("y", y, ir.DataType.FLOAT, ["tokens"])
    kind = {"dtype": "float32", "shape": ["tokens"]}
    spec = {**model.spec, "ends": {"model": {"inputs": {"x": kind}, "outputs": {"y": kind}}}}
    small = dataclasses.replace(model, graphs={"model": g.finish()}, spec=spec)
    library = engine.lower(small, engine.level_here(), accuracy_level=0)
    engine.build(library, tmp_path / "library.so")
    (tmp_path / "weights.bin").touch()
    files = {name: {"bytes": 0, "sha256": file_sha256(tmp_path / name)} for name in ("library.so", "weights.bin")}
    manifest = {"files": files, "weights": {"file": "weights.bin"}, "library": engine.describe(library), "model": {}}
    function = open_library(tmp_path, {**manifest, "graphs": {}}, 1).function("model")
    for count in (3, 6):
        found = function.run({"x": np.zeros(count, np.float32)})["y"]
        assert found.tolist() == [0.0, 1.0, 2.0, 3.0, 3.0, 3.0][:count]


def test_an_encoder_decoder(tmp_path: Path) -> None:
    """Encoder, decoder over a cache and scorer; sources padded and whole."""
    save_tiny_student(tmp_path / "student", PAIRS["shared"])
    student = all_on(open_model(str(tmp_path / "student")), "4 bits")
    model = Export(context=64, check_tokens=0)(student, context(tmp_path))
    notes: list[str] = []
    compiled = built(model, tmp_path / "a", notes, exact_tolerance=1e-4)
    assert re.fullmatch(NOTE, notes[0])
    assert set(compiled.manifest["graphs"]) == {"encoder", "decoder", "scorer"}


def test_an_encoder(tmp_path: Path) -> None:
    """The runtime embeds with it."""
    from edgepipe.runtime import Encoder, load

    save_tiny_student(tmp_path / "student", ENCODERS["mean"])
    model = Export(context=64, check_tokens=0)(open_model(str(tmp_path / "student")), context(tmp_path))
    notes: list[str] = []
    compiled = built(model, tmp_path / "a", notes, exact_tolerance=1e-4)
    assert re.fullmatch(NOTE, notes[0])
    encoder = load(compiled.path)
    assert isinstance(encoder, Encoder)
    found = encoder.embed(["The river", "carried"])
    assert np.isfinite(found).all() and found.shape[0] == 2
    vocabulary = encoder.manifest["model"]["vocab_size"]
    for ids, sentence in (
        (np.full((1, 3), vocabulary), rf"input_ids should be from 0 to {vocabulary - 1}, but go from {vocabulary} to"),
        (np.full((1, 3), -1), r"but go from -1 to -1"),
        (np.zeros((1, 65), np.int64), r"input_ids should have 64 tokens at most, but have 65"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            encoder.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})


def test_a_traced_encoder(family_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """BERT as the framework's exporter writes it, masks of its own and all."""
    model = Export(check_tokens=0)(open_model(str(family_dir("bert")), "feature-extraction"), context(tmp_path))
    notes: list[str] = []
    built(model, tmp_path / "a", notes, exact_tolerance=1e-5)
    assert re.fullmatch(NOTE, notes[0])


def test_an_unknown_operator(model: OnnxModel, tmp_path: Path) -> None:
    """One sentence names node and operator."""
    g = GraphBuilder("model")
    x = g.input("x", ir.DataType.FLOAT, ["batch", 4])
    g.output("y", g.op("Det", [g.op("Unsqueeze", [x, g.constant(np.array([0]))])]), ir.DataType.FLOAT, ["batch"])
    ends = {
        "inputs": {"x": {"dtype": "float32", "shape": ["batch", 4]}},
        "outputs": {"y": {"dtype": "float32", "shape": ["batch"]}},
    }
    strange = dataclasses.replace(model, graphs={"model": g.finish()}, spec={"ends": {"model": ends}, "vocab_size": 1})
    with pytest.raises(
        TargetError, match=r"can't build node .* of graph 'model': it has no operator Det; take --engine"
    ):
        built(strange, tmp_path / "a")


def test_what_is_refused(model: OnnxModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"compile.engine: expected onnxruntime, tvm, qnn or auto, got 'llvm'"):
        Compile(engine="llvm")
    with pytest.raises(TargetError, match=r"the target test runs onnxruntime, and the recipe asks for tvm"):
        Compile(engine="tvm")(model, context(tmp_path))
    plan = ActivationPlan(kind="static", ranges="minmax", calibration="none")
    with pytest.raises(TargetError, match=r"rounds activations as they come: take quantize.activations=dynamic"):
        built(dataclasses.replace(model, activations=plan), tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        ({"cache_dtype": "int8"}, TargetError, "the tvm engine keeps caches of float16 or float32"),
        (
            {"deflate": "always"},
            ConfigError,
            "compile.deflate=always: a compiled library reads its weights as they lie",
        ),
    ],
)
def test_options_of_the_other_engine_are_refused(options: dict[str, str], kind: type, sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        Compile(engine="tvm", **options).meets(BOTH)
    Compile(engine="tvm").meets(BOTH)


def test_what_a_machine_lacks_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """What links a library, and instructions there is a level for; another level is another key."""
    stage, first = Compile(engine="tvm"), dataclasses.replace(BOTH, engines=("tvm", "onnxruntime"))
    assert stage.meets(BOTH) == Compile().meets(first) == {"level": dataclasses.asdict(engine.level_here())}
    assert Compile().meets(BOTH) == {}
    with monkeypatch.context() as patched:
        patched.setattr(native, "processor_flags", frozenset)
        with pytest.raises(TargetError, match=r"the tvm engine builds for x86-64-v3 and newer"):
            stage.meets(BOTH)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(TargetError, match=r"links its library with g\+\+ or clang\+\+, and neither is here"):
        stage.meets(BOTH)
