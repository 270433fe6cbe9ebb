"""The engine tvm: whole bundles of every kind of graph, what they ship, what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
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
from edgepipe.verify import verify_bundle
from tests.decoders import CHANGES, TARGET, all_on, context, difference, exported, opened, random_ids
from tests.students.test_graphs import ENCODERS
from tests.students.test_models import PAIRS
from tests.students.tiny import save_tiny_student

pytest.importorskip("tvm", reason="TVM isn't here: pip install 'edgepipe[tvm]'")

from edgepipe.engines import tvm as engine

BOTH = dataclasses.replace(TARGET, engines=("onnxruntime", "tvm"))
NOTE = r"agrees with the portable graphs: \de-\d\d exact"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the tiny models of this file."""
    return tmp_path_factory.mktemp("decoders")


def built(model: OnnxModel, path: Path, notes: list[str] | None = None, **options: object) -> CompiledModel:
    """Compile a model with TVM, checked against the portable graph."""
    path.mkdir()
    settings = {"engine": "tvm", "cache_dtype": "float32", **options}
    ctx = dataclasses.replace(context(path, notes), target=BOTH, recipe={"target": "test", "stages": ["compile"]})
    return Compile(**settings)(model, ctx)  # type: ignore[arg-type]


def test_a_decoder(folder: Path, tmp_path: Path) -> None:
    """A bundle with a library for all graphs, whose notes say how close it is; any pieces give the same logits."""
    from edgepipe.runtime import open_graphs, read_bundle

    model = exported(all_on(opened(folder, "llama grouped"), "4 bits"))
    notes: list[str] = []
    compiled = built(model, tmp_path / "a", notes)
    assert re.fullmatch(NOTE, notes[0]) and re.match(r"a library of [\d,]+ KiB for ", notes[1])
    manifest = json.loads((compiled.path / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["engine"] == "tvm"
    assert manifest["graphs"] == {"decoder": "library.so"}
    assert {"library.so", "weights.bin"} <= set(manifest["files"])
    decoder = open_graphs(read_bundle(compiled.path), 1)
    ids = random_ids(model)
    expected = prompt_logits(model, ids)
    for pieces in ([12], [5, 1, 1, 5]):
        cache, start, found = decoder.new_cache(1), 0, []
        for count in pieces:
            places = np.arange(count)[None]
            new = ids[:, start : start + count]
            found.append(decoder.run(cache, new, np.array([start]), np.array([count]), places).copy())
            start += count
        assert difference(np.concatenate(found, axis=1), expected) < 1e-5


def test_rotary_tables_are_made_when_the_library_is_loaded(folder: Path, tmp_path: Path) -> None:
    """A table of 256 positions is no part of the library, and the logits are right."""
    notes: list[str] = []
    model = exported(opened(folder, "llama"), tokens=256)
    compiled = built(model, tmp_path / "a", notes, exact_tolerance=1e-5)
    assert re.fullmatch(NOTE, notes[0])
    functions = compiled.manifest["library"]["functions"]
    assert functions["decoder_step"]["prepared"] in functions
    shorter = built(exported(opened(folder, "llama"), tokens=160), tmp_path / "b", check_tokens=0)
    first, second = ((one.path / "library.so").stat().st_size for one in (shorter, compiled))
    assert abs(second - first) < 4096, "96 positions more are 6 KiB of tables, in each of two functions"


def test_rows_of_a_batch(folder: Path, tmp_path: Path) -> None:
    """Ragged rows beside each other give what each gives alone, and a row may be rewound."""
    from edgepipe.runtime import open_graphs, read_bundle

    model = exported(opened(folder, "llama"))
    decoder = open_graphs(read_bundle(built(model, tmp_path / "a").path), 2)
    ids = random_ids(model, batch=2)
    expected = prompt_logits(model, ids)
    cache = decoder.new_cache(2)
    lengths = np.array([12, 7])
    got = decoder.run(cache, ids, np.zeros(2, np.int64), lengths, lengths[:, None] - 1)
    assert difference(got[:, 0], np.stack([expected[0, 11], expected[1, 6]])) < 1e-5
    got = decoder.run(cache, ids[:, 7:8], np.array([7, 7]), np.ones(2, np.int64), np.zeros((2, 1), np.int64))
    assert difference(got[:, 0], expected[:, 7]) < 1e-5


@pytest.mark.parametrize("grid", [name for name in CHANGES if name != "float32"])
def test_grids(folder: Path, tmp_path: Path, grid: str) -> None:
    """Every grid is multiplied and gathered as it is stored, to float32 rounding."""
    notes: list[str] = []
    built(exported(all_on(opened(folder, "llama tied"), grid)), tmp_path / "a", notes, exact_tolerance=1e-4)
    assert re.fullmatch(NOTE, notes[0])


@pytest.mark.parametrize("kind", ["qwen2", "qwen3 windows", "smollm3", "granite", "gemma", "llama rope yarn"])
def test_families(folder: Path, tmp_path: Path, kind: str) -> None:
    """Biases, norms per head, windows, layers without positions, multipliers, GELU."""
    notes: list[str] = []
    built(exported(opened(folder, kind)), tmp_path / "a", notes, exact_tolerance=1e-4)
    assert re.fullmatch(NOTE, notes[0])


@pytest.mark.parametrize(
    ("kind", "grid"),
    [
        ("shared", "4 bits"),
        ("plain gelu", "float16"),
        ("causal encoder", "8 bits"),
        ("narrow decoder", "4 bits minima"),
    ],
)
def test_an_encoder_decoder(tmp_path: Path, kind: str, grid: str) -> None:
    """Encoder, decoder over a cache and scorer; sources padded and whole."""
    save_tiny_student(tmp_path / "student", PAIRS[kind])
    model = Export(context=64, check_tokens=0)(all_on(open_model(str(tmp_path / "student")), grid), context(tmp_path))
    notes: list[str] = []
    compiled = built(model, tmp_path / "a", notes, exact_tolerance=1e-4)
    assert re.fullmatch(NOTE, notes[0])
    assert set(compiled.manifest["graphs"]) == {"encoder", "decoder", "scorer"}


@pytest.mark.parametrize("kind", ["mean", "last", "max", "latent", "causal", "classes"])
def test_an_encoder(tmp_path: Path, kind: str) -> None:
    """Each pooling, attention to latents, classes; the runtime embeds with it."""
    from edgepipe.runtime import Encoder, load

    save_tiny_student(tmp_path / "student", ENCODERS[kind])
    model = Export(context=64, check_tokens=0)(open_model(str(tmp_path / "student")), context(tmp_path))
    notes: list[str] = []
    compiled = built(model, tmp_path / "a", notes, exact_tolerance=1e-4)
    assert re.fullmatch(NOTE, notes[0])
    encoder = load(compiled.path)
    assert isinstance(encoder, Encoder)
    found = encoder.classify(["The river", "carried"]) if kind == "classes" else encoder.embed(["The river", "carried"])
    assert np.isfinite(found).all() and found.shape[0] == 2


def test_a_traced_encoder(family_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """BERT as the framework's exporter writes it, masks of its own and all."""
    model = Export(check_tokens=0)(open_model(str(family_dir("bert")), "feature-extraction"), context(tmp_path))
    notes: list[str] = []
    built(model, tmp_path / "a", notes, exact_tolerance=1e-5)
    assert re.fullmatch(NOTE, notes[0])


def test_activations_of_8_bits(folder: Path, tmp_path: Path) -> None:
    """At accuracy level 4 they are rounded where the processor multiplies bytes, and the note says what it costs."""
    notes: list[str] = []
    built(exported(all_on(opened(folder, "llama"), "4 bits")), tmp_path / "a", notes, accuracy_level=4)
    integers = engine.level_here().byte_products
    assert re.fullmatch(NOTE + (r", \de-0\d as shipped" if integers else ""), notes[0])


def test_no_float_copy_ships(folder: Path, tmp_path: Path) -> None:
    """Neither file holds a row of a decoded matrix, and 4 bits with float16 scales stay below 4.6 a weight."""
    torch_model = all_on(opened(folder, "llama tied"), "4 bits")
    model = exported(torch_model)
    compiled = built(model, tmp_path / "a")
    code, weights = ((compiled.path / name).read_bytes() for name in ("library.so", "weights.bin"))
    assert len(code) < 1 << 20
    matrices = [name for name, weight in model.weights.items() if len(weight.shape) == 2]
    for name in matrices:
        row = model.weights.float32(name)[1, 16:32]
        for dtype in (np.float32, np.float16):
            assert row.astype(dtype).tobytes() not in code + weights, name
    # Tiles and groups are filled up: 112 = 7 tiles of 16 rows, 3.5 groups of 32 columns become 4
    for name in matrices:
        rows, columns = model.weights[name].shape
        filled = -(-rows // 16) * 16 * -(-columns // 32) * 32
        parts = [
            t
            for t in engine.lower(model, engine.level_here(), accuracy_level=0).file.tensors
            if t.name.startswith(f"{name}:")
        ]
        assert 8 * sum(part.nbytes for part in parts) <= 4.6 * filled
    assert len(weights) < 1.1 * sum(model.weights[name].nbytes for name in model.weights) + 4096 * len(matrices)


def test_the_bundle_runs_without_the_compiler(folder: Path, tmp_path: Path) -> None:
    """Loading and answering import neither the compiler nor torch, wherever they are installed."""
    compiled = built(exported(opened(folder, "llama")), tmp_path / "a")
    code = (
        "import sys, edgepipe.runtime\n"
        f"model = edgepipe.runtime.load({str(compiled.path)!r}, threads=1)\n"
        "answer = model.generate('The river', max_new_tokens=4, ignore_eos=True)\n"
        "assert len(answer.token_ids) == 4\n"
        "print(sorted({'tvm', 'torch', 'onnx', 'onnxruntime', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    checks = verify_bundle(compiled.path)["checks"]
    assert next(check for check in checks if check["name"] == "graph")["ok"], checks


def test_instructions_are_checked_before_loading(folder: Path, tmp_path: Path) -> None:
    from edgepipe.runtime import load

    compiled = built(exported(opened(folder, "llama")), tmp_path / "a")
    file = compiled.path / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    manifest["library"]["flags"].append("avx4096")
    file.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(TargetError, match=r"this processor has no avx4096: build a bundle for it"):
        load(compiled.path)


def test_an_unknown_operator(folder: Path, tmp_path: Path) -> None:
    """One sentence names node and operator."""
    g = GraphBuilder("model")
    x = g.input("x", ir.DataType.FLOAT, ["batch", 4])
    g.output("y", g.op("Det", [g.op("Unsqueeze", [x, g.constant(np.array([0]))])]), ir.DataType.FLOAT, ["batch"])
    ends = {
        "inputs": {"x": {"dtype": "float32", "shape": ["batch", 4]}},
        "outputs": {"y": {"dtype": "float32", "shape": ["batch"]}},
    }
    model = dataclasses.replace(
        exported(opened(folder, "llama")), graphs={"model": g.finish()}, spec={"ends": {"model": ends}, "vocab_size": 1}
    )
    with pytest.raises(
        TargetError, match=r"can't build node .* of graph 'model': it has no operator Det; take --engine"
    ):
        built(model, tmp_path / "a")


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    model = exported(opened(folder, "llama"))
    with pytest.raises(ConfigError, match=r"compile.engine: expected one of onnxruntime, tvm, got 'llvm'"):
        Compile(engine="llvm")
    with pytest.raises(TargetError, match=r"the target test runs onnxruntime, and the recipe asks for tvm"):
        Compile(engine="tvm")(model, context(tmp_path))
    plan = ActivationPlan(kind="static", ranges="minmax", calibration="none")
    with pytest.raises(TargetError, match=r"rounds activations as they come: take quantize.activations=dynamic"):
        built(dataclasses.replace(model, activations=plan), tmp_path / "a")


def test_a_library_that_computes_something_else_fails(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgepipe.engines.tvm import packed

    plan = packed.packed_codes
    monkeypatch.setattr(packed, "packed_codes", lambda value, w: plan(value, w)[:, ::-1])
    model = exported(all_on(opened(folder, "llama"), "4 bits"))
    with pytest.raises(ContractError, match=r"\(exact\) differs from the portable one by .*; allowed 1e-03$"):
        built(model, tmp_path / "a")
