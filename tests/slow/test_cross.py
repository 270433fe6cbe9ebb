"""Bundles for other machines, built here: a Raspberry Pi's run under qemu with TVM's own aarch64 runtime.

`make test-cross` sets up what they need. Outputs are held against those of onnxruntime's bundle of the same model.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe.artifacts import CompiledModel, OnnxModel
from edgepipe.errors import TargetError
from edgepipe.levels import level_named
from edgepipe.runtime import load, open_graphs, read_bundle
from edgepipe.sources import open_model
from edgepipe.stages.compile import Compile
from edgepipe.stages.export import Export
from edgepipe.target import load_target
from tests.decoders import context, random_ids
from tests.engines.tvm_bundles import NOTE, decoder
from tests.slow import cross_machine
from tests.students.test_graphs import ENCODERS
from tests.students.tiny import save_tiny_student

pytest.importorskip("tvm", reason="TVM isn't here: make test-cross")
pytest.importorskip("ziglang", reason="Zig isn't here: make test-cross")

from edgepipe.engines.linking import BIONIC, RUNTIME, link, undefined

pytestmark = pytest.mark.slow
emulated = pytest.mark.skipif(
    cross_machine.missing() is not None, reason=f"no emulated machine: {cross_machine.missing()}"
)

A76, A72 = "cortex-a76", "cortex-a72"  # of a Raspberry Pi 5, of a 4
CLOSE = 1e-3  # float32 in another order, of the largest output
SENTENCES = ["The river runs from the hills to the sea.", "Boats carry grain down it.", "rain"]
# What runs on the emulated machine: bundle, inputs, outputs.
DECODE = """
import sys, numpy as np
from edgepipe.runtime import open_graphs, read_bundle
opened, ids = open_graphs(read_bundle(sys.argv[1]), 1), np.load(sys.argv[2])
cache, count, found = opened.new_cache(1), ids.shape[1], []
for start, end in [(0, count // 2), *((i, i + 1) for i in range(count // 2, count))]:
    places = np.arange(end - start)[None]
    found.append(opened.run(cache, ids[:, start:end], np.array([start]), np.array([end - start]), places).copy())
np.save(sys.argv[3], np.concatenate(found, axis=1))
"""
EMBED = """
import json, sys, numpy as np
from edgepipe.runtime import load
np.save(sys.argv[3], load(sys.argv[1], threads=1).embed(json.load(open(sys.argv[2]))))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the tiny models of this file."""
    return tmp_path_factory.mktemp("decoders")


def built(model: OnnxModel, target: str, path: Path, **options: object) -> tuple[CompiledModel, list[str]]:
    """Compile a model for a target; return it with what the stage said."""
    path.mkdir()
    notes: list[str] = []
    ctx = dataclasses.replace(context(path, notes), target=load_target(target), recipe={"target": target})
    settings = {"cache_dtype": "float32", **options}
    return Compile(**settings)(model, ctx), notes  # type: ignore[arg-type]


def there(code: str, arguments: Sequence[Path], *, processor: str) -> subprocess.CompletedProcess[str]:
    """Run code on the emulated machine."""
    command, environment = cross_machine.command(code, [str(one) for one in arguments], processor=processor)
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def outputs(code: str, bundle: Path, inputs: Path, *, processor: str = A76) -> np.ndarray:
    """Return what code saves on the emulated machine."""
    saved = inputs.with_name("outputs.npy")
    done = there(code, [bundle, inputs, saved], processor=processor)
    assert done.returncode == 0, done.stderr
    found: np.ndarray = np.load(saved)
    return found


def decoded_here(bundle: Path, ids: np.ndarray) -> np.ndarray:
    """Return the logits of all places through the engine of a bundle that runs here."""
    opened = open_graphs(read_bundle(bundle), 1)
    count = ids.shape[1]
    found: np.ndarray = opened.run(
        opened.new_cache(1), ids, np.zeros(1, np.int64), np.array([count]), np.arange(count)[None]
    )
    return found


def off(got: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest error, in the largest expected value."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@emulated
@pytest.mark.parametrize(("target", "processor"), [("rpi5", A76), ("rpi4", A72)])
def test_a_decoder(folder: Path, tmp_path: Path, target: str, processor: str) -> None:
    """4 bits, read as a prompt and then token by token, give onnxruntime's logits."""
    model = decoder(folder, "llama tied", "4 bits")
    ours, notes = built(model, target, tmp_path / "ours")
    theirs, _ = built(model, "cpu", tmp_path / "theirs")
    assert notes[1].startswith("those are its functions as compiled for this machine: a library for armv8")
    said = ours.manifest["library"]
    assert (said["machine"], said["system"], said["processor"]) == ("aarch64", "linux-gnu", processor)
    assert said["linked_by"].startswith("ziglang ") and "asimd" in said["flags"]
    np.save(tmp_path / "ids.npy", random_ids(model))
    got = outputs(DECODE, ours.path, tmp_path / "ids.npy", processor=processor)
    assert off(got, decoded_here(theirs.path, np.load(tmp_path / "ids.npy"))) < CLOSE
    with pytest.raises(
        TargetError, match=r"library is for aarch64 \(armv8.*\), but this machine is .*: build a bundle"
    ):
        load(ours.path)


@emulated
@pytest.mark.parametrize("grid", ["2 bits", "4 bits", "4 bits minima", "8 bits", "8 bits zero points"])
def test_products_of_bytes(folder: Path, tmp_path: Path, grid: str) -> None:
    """At accuracy level 4 sdot multiplies: near to the exact logits, and not the same."""
    model = decoder(folder, "llama tied", grid)
    ours, _ = built(model, "rpi5", tmp_path / "ours", accuracy_level=4)
    theirs, _ = built(model, "cpu", tmp_path / "theirs")
    assert ours.manifest["library"]["arithmetic"] == "int8"
    np.save(tmp_path / "ids.npy", random_ids(model))
    got = outputs(DECODE, ours.path, tmp_path / "ids.npy")
    assert 1e-5 < off(got, decoded_here(theirs.path, np.load(tmp_path / "ids.npy"))) < 0.1


@emulated
def test_an_encoder(tmp_path: Path) -> None:
    """Embeddings of texts, tokenized there."""
    save_tiny_student(tmp_path / "student", ENCODERS["mean"])
    model = Export(context=64, check_tokens=0)(open_model(str(tmp_path / "student")), context(tmp_path))
    ours, _ = built(model, "rpi5", tmp_path / "ours")
    theirs, _ = built(model, "cpu", tmp_path / "theirs")
    (tmp_path / "texts.json").write_text(json.dumps(SENTENCES), encoding="utf-8")
    got = outputs(EMBED, ours.path, tmp_path / "texts.json")
    assert off(got, load(theirs.path).embed(SENTENCES)) < CLOSE  # type: ignore[union-attr]


@emulated
def test_a_processor_without_the_instructions(folder: Path, tmp_path: Path) -> None:
    """A Raspberry Pi 4 says what it lacks for a bundle of a 5's, before it opens the library."""
    ours, _ = built(decoder(folder, "llama tied", "4 bits"), "rpi5", tmp_path / "ours", check_tokens=0)
    (ours.path / "library.so").write_bytes(b"\0" * (ours.path / "library.so").stat().st_size)  # no library if opened
    done = there("import sys; from edgepipe.runtime import load; load(sys.argv[1])", [ours.path], processor=A72)
    assert "TargetError: the bundle's library is for armv8.2-a, but this processor has no asimddp, asim" in done.stderr


@emulated
def test_what_a_library_calls_is_in_the_wheels(folder: Path, tmp_path: Path) -> None:
    """Names without a version of glibc are TVM's, and TVM's aarch64 libraries have them."""
    from elftools.elf.elffile import ELFFile

    ours, _ = built(decoder(folder, "llama tied", "4 bits"), "rpi5", tmp_path / "ours", check_tokens=0)
    given = set()
    for path in cross_machine.wheels_libraries():
        with path.open("rb") as file:
            symbols = ELFFile(file).get_section_by_name(".dynsym").iter_symbols()
            given |= {symbol.name for symbol in symbols if symbol["st_shndx"] != "SHN_UNDEF"}
    assert given >= RUNTIME
    assert set(undefined(ours.path / "library.so")) <= given


@pytest.mark.parametrize(("target", "kind"), [("android-arm64", "EM_AARCH64"), ("riscv64", "EM_RISCV")])
def test_libraries_that_are_only_compiled(folder: Path, tmp_path: Path, target: str, kind: str) -> None:
    """They link, are for the processor, and name the system's libraries; nothing more is known of them."""
    from elftools.elf.elffile import ELFFile

    ours, notes = built(decoder(folder, "llama tied", "4 bits"), target, tmp_path / "ours")
    assert any(note.startswith("those are its functions as compiled for this machine") for note in notes)
    with (ours.path / "library.so").open("rb") as file:
        elf = ELFFile(file)
        assert elf["e_machine"] == kind
        named = {tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")}
    assert named == (set(BIONIC) if target == "android-arm64" else {"libc.so.6"})


def test_a_library_for_an_older_machine_runs_here(folder: Path, tmp_path: Path) -> None:
    """AVX2 alone: its own functions are checked on a machine that has more."""
    from edgepipe.engines.native import runs_here

    level = load_target("x86-64-v3").tvm.named
    if level is None or not runs_here(level):
        pytest.skip("this machine has no AVX2")
    _, notes = built(decoder(folder, "llama tied", "4 bits"), "x86-64-v3", tmp_path / "ours", exact_tolerance=1e-4)
    assert notes[0].startswith(NOTE[:5]) and len(notes) == 2


def test_a_library_for_a_newer_machine(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VNNI where this machine has AVX2 alone: what can't run here is checked in exact arithmetic, for this machine."""
    from edgepipe.engines import native

    older = level_named("x86-64-v3")
    if not native.runs_here(older):
        pytest.skip("this machine has no AVX2")
    monkeypatch.setattr(native, "processor_flags", lambda: frozenset(older.flags))
    model = decoder(folder, "llama tied", "4 bits")
    ours, notes = built(model, "x86-64-v4-vnni", tmp_path / "ours", accuracy_level=4)
    assert ours.manifest["library"]["arithmetic"] == "int8"
    assert notes[1].endswith("as compiled for this machine: a library for x86-64-v4-vnni can't run here")


def test_a_name_that_nobody_has(tmp_path: Path) -> None:
    """The linker leaves it open, as in any library; it is read from the library, and refused."""
    source, compiled = tmp_path / "a.c", str(tmp_path / "a.o")
    source.write_text("float nobody_has(float); float f(float x) { return nobody_has(x); }\n", encoding="utf-8")
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu", "-c", "-fPIC", "-o", compiled]
    subprocess.run([*zig, str(source)], check=True)
    for level in (level_named("armv8-a"), level_named("armv8-a", "linux-android")):
        with pytest.raises(TargetError, match=rf"library for {level.triple} calls nobody_has, which its"):
            link(str(tmp_path / "a.so"), [compiled], level)


def compressed(folder: Path, model: str, target: str, *options: str) -> tuple[Path, dict[str, Any]]:
    """Run `edgepipe compress` as a user would; return bundle and summary."""
    out = folder / target
    (folder / "unmeasured.toml").write_text('stages = ["quantize", "export", "compile"]\n', encoding="utf-8")
    command = [sys.executable, "-m", "edgepipe", "compress", model, "--target", target, "--out", str(out), *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, dict(json.loads(done.stdout.strip().splitlines()[-1]))


@emulated
def test_minilm(tmp_path: Path) -> None:
    """The real encoder at 8 bits: embeddings are onnxruntime's."""
    ours, summary = compressed(tmp_path, "minilm-l6-v2", "rpi5", "--bits", "8")
    assert summary["not_measured"] == "the target rpi5 can't be measured from here"
    theirs, _ = compressed(tmp_path, "minilm-l6-v2", "cpu", "--bits", "8", "--recipe", "unmeasured.toml")
    (tmp_path / "texts.json").write_text(json.dumps(SENTENCES), encoding="utf-8")
    got = outputs(EMBED, ours, tmp_path / "texts.json")
    assert off(got, load(theirs).embed(SENTENCES)) < CLOSE  # type: ignore[union-attr]


@emulated
def test_smollm2(tmp_path: Path) -> None:
    """The real decoder at 4 bits, with its float16 cache: the same next tokens, and nearly the same distribution."""
    ours, _ = compressed(tmp_path, "smollm2-135m", "rpi5", "--bits", "4", "--context", "256")
    theirs, _ = compressed(
        tmp_path, "smollm2-135m", "cpu", "--bits", "4", "--context", "256", "--recipe", "unmeasured.toml"
    )
    ids = np.array([load(theirs).tokenizer.encode("The river runs from the hills to the sea, and boats carry grain.")])
    np.save(tmp_path / "ids.npy", ids)
    got, expected = outputs(DECODE, ours, tmp_path / "ids.npy")[0], decoded_here(theirs, ids)[0]
    a, b = (x - x.max(axis=1, keepdims=True) for x in (expected.astype(np.float64), got.astype(np.float64)))
    a, b = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (a, b))
    assert (np.exp(a) * (a - b)).sum(axis=1).max() < 1e-4
    best, second = np.sort(a, axis=1)[:, -1], np.sort(a, axis=1)[:, -2]
    clear = best - second > 0.05
    assert clear.sum() > len(clear) // 2
    assert (a.argmax(axis=1) == b.argmax(axis=1))[clear].all()
