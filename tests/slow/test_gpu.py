"""Libraries for GPUs of NVIDIA: compiled by nvcc, looked at with cuobjdump, and run where this machine has such a GPU.

`make test-gpu` sets up what they need. No GPU is needed for most: the functions are checked on this processor.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from edgepipe.artifacts import OnnxModel
from edgepipe.engines import nvcc
from edgepipe.errors import TargetError
from edgepipe.graph.evaluate import prompt_logits
from edgepipe.levels import Gpu
from edgepipe.runtime import load
from edgepipe.runtime.gpus import capability_here
from edgepipe.sources import open_model
from edgepipe.stages.export import Export
from tests.decoders import DECODERS, context, random_ids
from tests.engines.tvm_bundles import NOTE, decoder
from tests.slow import emulated
from tests.slow.test_cross import CLOSE, DECODE, EMBED, SENTENCES, built, compressed, off
from tests.students.test_graphs import ENCODERS
from tests.students.tiny import save_tiny_student

pytest.importorskip("tvm", reason="TVM isn't here: make test-gpu")
pytest.importorskip("ziglang", reason="Zig isn't here: make test-gpu")
from edgepipe.engines.tvm import kernels

try:
    CUOBJDUMP = nvcc.nvcc().with_name("cuobjdump")
except TargetError:
    pytest.skip("nvcc isn't here: make test-gpu", allow_module_level=True)

pytestmark = pytest.mark.slow
with_cuobjdump = pytest.mark.skipif(not CUOBJDUMP.exists(), reason="nvcc's folder has no cuobjdump: make test-gpu")
on_gpu = pytest.mark.skipif(capability_here() is None, reason="this machine shows no GPU of NVIDIA")
_FATBIN = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes that follow. Source: fatbinary_section.h
_MAGIC = 0xBA55ED50
LONG_ROWS = "llama of long rows"  # long enough for the kernels of one row


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the tiny models of this file."""
    return tmp_path_factory.mktemp("decoders")


def held(library: Path) -> tuple[set[str], set[str]]:
    """Return the architectures that a library has machine code and assembly text for, as cuobjdump reads them."""
    content = library.read_bytes()
    place = content.index(struct.pack("<I", _MAGIC))
    _, _, header, rest = _FATBIN.unpack_from(content, place)
    file = library.with_suffix(".fatbin")
    file.write_bytes(content[place : place + header + rest])
    found = []
    for kind in ("elf", "ptx"):
        done = subprocess.run([str(CUOBJDUMP), f"--list-{kind}", str(file)], capture_output=True, text=True)
        found.append(set(re.findall(r"\.(sm_\d+)\.", done.stdout)))
    file.unlink()
    return found[0], found[1]


def no_float_copy(model: OnnxModel, bundle: Path) -> None:
    """Neither file holds a row of a decoded matrix."""
    content = (bundle / "library.so").read_bytes() + (bundle / "weights.bin").read_bytes()
    for name in [name for name, weight in model.weights.items() if len(weight.shape) == 2]:
        row = model.weights.float32(name)[1, 16:32]
        assert row.tobytes() not in content and row.astype(np.float16).tobytes() not in content, name


@with_cuobjdump
@pytest.mark.parametrize(
    ("kind", "grid"),
    [
        ("llama tied", "4 bits"),
        ("llama grouped", "2 bits"),
        ("llama one key head", "8 bits zero points"),
        ("llama wide heads", "4 bits minima"),
    ],
)
def test_decoders_for_a_jetson(folder: Path, tmp_path: Path, kind: str, grid: str) -> None:
    """Machine code for sm_87 and nothing else; packed weights beside it; figures of the same functions here."""
    model = decoder(folder, kind, grid)
    ours, notes = built(model, "jetson-orin", tmp_path / "ours", exact_tolerance=1e-4)
    assert re.fullmatch(NOTE, notes[0]) and notes[1].endswith("a library for armv8.2-a with sm_87 can't run here")
    assert held(ours.path / "library.so") == ({"sm_87"}, set())
    assert b"__global__" not in (ours.path / "library.so").read_bytes()  # no source for the device to compile
    said = ours.manifest["library"]
    assert said["gpu"] == {"name": "sm_87", "compiled": [87], "readable": 0} and said["machine"] == "aarch64"
    assert said["compiled_by"].startswith("nvcc 13.") and said["linked_by"].startswith("ziglang ")
    no_float_copy(model, ours.path)
    with pytest.raises(TargetError, match=r"library is for aarch64 .*, but this|kernels are for NVIDIA's sm_87, but"):
        load(ours.path)


@with_cuobjdump
def test_an_encoder_for_this_machine(tmp_path: Path) -> None:
    """Machine code for three generations, text for what comes later; a machine without a GPU says so when it loads."""
    save_tiny_student(tmp_path / "student", ENCODERS["mean"])
    model = Export(context=64, check_tokens=0)(open_model(str(tmp_path / "student")), context(tmp_path))
    ours, notes = built(model, "cuda", tmp_path / "ours", exact_tolerance=1e-4)
    assert re.fullmatch(NOTE, notes[0])
    assert held(ours.path / "library.so") == ({"sm_75", "sm_80", "sm_90"}, {"sm_90"})
    if capability_here() is None:
        with pytest.raises(TargetError, match=r"NVIDIA's sm_75, sm_80, sm_90, but this machine shows no GPU of NVIDIA"):
            load(ours.path)


@with_cuobjdump
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("minilm-l6-v2", ["--recipe", "float32.toml"]),
        ("minilm-l6-v2", ["--bits", "8"]),
        ("smollm2-135m", ["--bits", "4", "--context", "256"]),
    ],
)
def test_real_models_for_a_jetson(tmp_path: Path, model: str, options: list[str]) -> None:
    """The same functions agree with the portable graphs, or the stage would have failed."""
    (tmp_path / "float32.toml").write_text('stages = ["export", "compile"]\n', encoding="utf-8")
    ours, summary = compressed(tmp_path, model, "jetson-orin", *options)
    assert "--recipe" in options or summary["not_measured"] == "the target jetson-orin can't be measured from here"
    assert held(ours / "library.so") == ({"sm_87"}, set())


def emulate(model: OnnxModel, folder: Path, code: str, arguments: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Build a model for `cuda` and run code over its bundle on a GPU in software; return what it saves."""
    sources: list[str] = []

    def kept(source: str, _gpu: Gpu) -> bytes:
        sources.append(source)
        return b"in emulated/"

    monkeypatch.setattr(kernels, "fatbin", kept)
    ours, _ = built(model, "cuda", folder / "ours", check_tokens=0)
    emulated.make_gpu(sources[0], folder)
    emulated.run(code, folder, [ours.path, arguments, folder / "out.npy"])
    found: np.ndarray = np.load(folder / "out.npy")
    return found


@pytest.mark.parametrize(
    ("kind", "grid"),
    [
        ("llama grouped", "4 bits minima"),
        ("llama tied", "float32"),
        ("mistral window", "8 bits zero points"),
        (LONG_ROWS, "4 bits"),
        (LONG_ROWS, "2 bits"),
        (LONG_ROWS, "8 bits zero points"),
        (LONG_ROWS, "float32"),
    ],
)
def test_a_decoder_on_a_gpu_in_software(
    folder: Path, tmp_path: Path, kind: str, grid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TVM's own runtime launches the kernels: threads, shared memory and shuffles give the portable graph's logits.

    Steps are recorded, and launched as one.
    """
    # Rows of 36 and 40 runs of 8 weights: of the second ones not all threads of a warp have one
    wide = {"hidden_size": 288, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 320}
    monkeypatch.setitem(DECODERS, LONG_ROWS, ("llama", wide))
    model = decoder(folder, kind, grid)
    np.save(tmp_path / "ids.npy", random_ids(model))
    code = f"{DECODE}\nassert cache[0].step.is_recorded\n"
    got = emulate(model, tmp_path, code, tmp_path / "ids.npy", monkeypatch)
    assert off(got, prompt_logits(model, random_ids(model))) < 1e-4


def test_an_encoder_on_a_gpu_in_software(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings of texts of several lengths, padded together, are onnxruntime's."""
    save_tiny_student(tmp_path / "student", ENCODERS["mean"])
    model = Export(context=64, check_tokens=0)(open_model(str(tmp_path / "student")), context(tmp_path))
    (tmp_path / "texts.json").write_text(json.dumps(SENTENCES), encoding="utf-8")
    got = emulate(model, tmp_path, EMBED, tmp_path / "texts.json", monkeypatch)
    theirs, _ = built(model, "cpu", tmp_path / "theirs")
    assert off(got, load(theirs.path).embed(SENTENCES)) < 1e-4  # type: ignore[union-attr]


@on_gpu
def test_an_encoder_on_the_gpu(tmp_path: Path) -> None:
    """The real one at 8 bits: embeddings are onnxruntime's, and a run measures it."""
    ours, summary = compressed(tmp_path, "minilm-l6-v2", "cuda", "--bits", "8")
    assert "not_measured" not in summary or not summary["not_measured"]
    theirs, _ = compressed(tmp_path, "minilm-l6-v2", "cpu", "--bits", "8", "--recipe", "unmeasured.toml")
    got, expected = (load(path).embed(SENTENCES) for path in (ours, theirs))  # type: ignore[union-attr]
    assert off(got, expected) < CLOSE


@on_gpu
@pytest.mark.parametrize("grid", ["float32", "2 bits", "4 bits minima", "8 bits zero points"])
def test_a_decoder_on_the_gpu(folder: Path, tmp_path: Path, grid: str) -> None:
    """The stage runs the library there, as a prompt and then token by token, and compares."""
    ours, notes = built(decoder(folder, "llama grouped", grid), "cuda", tmp_path / "ours", exact_tolerance=1e-4)
    assert re.fullmatch(NOTE, notes[0]) and not any("as compiled for this machine" in note for note in notes)
    assert ours.manifest["library"]["gpu"]["name"] == "nvidia"
