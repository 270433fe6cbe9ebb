"""Libraries for GPUs of NVIDIA: what is refused, what they hold, the same functions on this processor.

slow/test_gpu.py compiles kernels and looks at the machine code.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgepipe.compress import why_not_measured
from edgepipe.engines import native, nvcc
from edgepipe.errors import ConfigError, ContractError, TargetError
from edgepipe.graph.evaluate import prompt_logits
from edgepipe.levels import GPUS, Gpu, gpu_named, level_named
from edgepipe.recipe import resolve
from edgepipe.runtime import gpus
from edgepipe.stages.compile import Compile
from edgepipe.store import file_sha256
from edgepipe.target import TvmSettings, load_target
from tests.decoders import difference, random_ids
from tests.engines.tvm_bundles import decoder

ORIN, ANY = gpu_named("sm_87"), gpu_named("nvidia")


@pytest.mark.parametrize(
    ("gpu", "runs", "not_these"),
    [
        (ORIN, [87], [72, 80, 86, 89, 90, 110, 120]),  # a Jetson's code runs on that Jetson alone
        (ANY, [75, 80, 86, 89, 90, 100, 120, 110], [52, 70, 72, 87]),
    ],
)
def test_which_gpus_run_a_library(gpu: Gpu, runs: list[int], not_these: list[int]) -> None:
    """Machine code for the same generation, or text for the driver."""
    assert all(gpus.reads(gpu, capability) for capability in runs)
    assert not any(gpus.reads(gpu, capability) for capability in not_these)


def test_a_library_for_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence where there is none, and where it is another."""
    monkeypatch.setattr(gpus, "capability_here", lambda: None)
    with pytest.raises(TargetError, match=r"are for NVIDIA's sm_87, but this machine shows no GPU of NVIDIA: build a"):
        gpus.check_gpu(ORIN)
    monkeypatch.setattr(gpus, "capability_here", lambda: 90)
    with pytest.raises(TargetError, match=r"are for NVIDIA's sm_87, but this machine's GPU is sm_90: build a bundle"):
        gpus.check_gpu(ORIN)
    gpus.check_gpu(ANY)


def test_a_gpu_that_nobody_knows() -> None:
    with pytest.raises(ConfigError, match=r"unknown GPU 'sm_78' \(did you mean 'sm_87'\?\): known are nvidia, sm_87"):
        TvmSettings(gpu="sm_78")


def test_the_targets() -> None:
    """jetson-orin is another machine; cuda is this one, and measured where it has such a GPU."""
    orin, here = load_target("jetson-orin"), load_target("cuda")
    assert orin.measurable == "no" and here.measurable == "here" and orin.engines == here.engines == ("tvm",)
    level = orin.tvm.named
    assert level is not None and (level.machine, level.gpu) == ("aarch64", ORIN)
    assert level.target()["arch"] == "sm_87" and level.target()["host"]["mcpu"] == "cortex-a76"  # type: ignore[index]
    assert here.tvm.named is None and here.tvm.on(level_named("x86-64-v3")).gpu == ANY
    assert {min(gpu.compiled) for gpu in GPUS} >= {75}


def test_why_a_gpu_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "level_here", lambda: level_named("x86-64-v3"))
    monkeypatch.setattr(native, "lacking", lambda level: gpus.why_not(level.gpu))
    monkeypatch.setattr(gpus, "capability_here", lambda: None)
    assert why_not_measured(resolve(target="cuda")) == "this machine shows no GPU of NVIDIA"
    monkeypatch.setattr(gpus, "capability_here", lambda: 86)
    assert why_not_measured(resolve(target="cuda")) == ""
    assert why_not_measured(resolve(target="jetson-orin")) == "the target jetson-orin can't be measured from here"


def test_the_compiler_is_asked_for_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without nvcc, whether packaged or on the PATH, a sentence names the extra."""
    pytest.importorskip("tvm", reason="TVM isn't here: pip install 'edgepipe[tvm]'")
    find, which = importlib.util.find_spec, shutil.which
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nvidia" else find(name))
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "nvcc" else which(name))
    with pytest.raises(TargetError, match=r"nvcc compiles kernels .*, and it isn't here: pip install 'edgepipe\[cuda"):
        Compile().meets(load_target("cuda"))


def test_kernels_that_do_not_compile() -> None:
    """Nvcc's first error is the sentence."""
    try:
        nvcc.nvcc()
    except TargetError as error:
        pytest.skip(str(error))
    with pytest.raises(TargetError, match=r"nvcc could not compile the kernels: kernels\.cu\(1\): error: .*nobody"):
        nvcc.fatbin("__global__ void f(float *x) { x[0] = nobody; }", ORIN)


def test_arrays_go_to_a_device_and_come_back() -> None:
    """Through TVM's own memory; the processor's stands for a GPU's."""
    pytest.importorskip("tvm_ffi", reason="TVM isn't here: pip install 'edgepipe[tvm]'")
    from edgepipe.runtime.tvm import open_package

    ffi = open_package()
    memory = gpus.Memory(ffi, ffi.device("cpu", 0))
    rng = np.random.default_rng(3)
    for dtype in ("float32", "float16", "uint8", "int64", "uint16", "bool"):
        array = rng.integers(0, 2, (3, 5, 2)).astype(dtype)
        got = memory.take(memory.put(array[:, ::2]))
        assert got.dtype == array.dtype and np.array_equal(got, array[:, ::2])
    assert memory.take(memory.put(np.zeros((0, 4), np.float32))).shape == (0, 4)


def test_the_same_functions_on_this_processor(tmp_path: Path) -> None:
    """What becomes kernels of a GPU is the portable graph's arithmetic, before it is shared out among threads."""
    pytest.importorskip("tvm", reason="TVM isn't here: pip install 'edgepipe[tvm]'")
    from edgepipe.engines import tvm as engine
    from edgepipe.runtime.tvm import Decoder, open_library

    model = decoder(tmp_path, "llama grouped", "4 bits minima")
    level = dataclasses.replace(level_named("armv8.2-a"), gpu=ORIN)
    library = engine.lower(model, level, accuracy_level=4, exact=True)
    assert library.products.keys() == {"float32"}  # bytes are a processor's: sdot would have multiplied them
    engine.write(library, tmp_path, lambda done, total: None)
    here = engine.level_here()
    engine.build(library, tmp_path / "library.so", here)
    names = ("library.so", "weights.bin")
    files = {n: {"bytes": (tmp_path / n).stat().st_size, "sha256": file_sha256(tmp_path / n)} for n in names}
    packed = sum(model.weights.load(name).nbytes for name in model.weights)
    assert files["weights.bin"]["bytes"] < 1.05 * packed + 4096 * len(list(model.weights))
    facts = {"library": engine.describe(library, here), "model": model.spec, "cache": {"dtype": "float32"}}
    manifest = {"files": files, "weights": {"file": "weights.bin"}, "graphs": {"decoder": "library.so"}, **facts}
    opened, ids = Decoder(open_library(tmp_path, manifest, 1), manifest), random_ids(model)
    cache, pieces = opened.new_cache(1), []
    for start, end in ((0, 9), (9, 10), (10, 12)):
        places = np.arange(end - start)[None]
        pieces.append(opened.run(cache, ids[:, start:end], np.array([start]), np.array([end - start]), places).copy())
    assert difference(np.concatenate(pieces, axis=1), prompt_logits(model, ids)) < 1e-5


def test_machine_code_takes_the_place_of_a_source() -> None:
    """In the block that TVM itself packs: lengths fit, nothing else is changed; a block without it is refused."""
    tvm = pytest.importorskip("tvm", reason="TVM isn't here: pip install 'edgepipe[tvm]'")
    import tvm_ffi
    from tvm import te
    from tvm.s_tir import dlight

    from edgepipe.engines.tvm import kernels, source_kept

    target = tvm.target.Target(dataclasses.replace(native.level_here(), gpu=ORIN).target())
    x = te.placeholder((64,), name="x")
    function = te.create_prim_func([x, te.compute((64,), lambda i: x[i] + 1.0)]).with_attr("global_symbol", "add")
    with target, source_kept():
        scheduled = dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(tvm.IRModule({"add": function}))
        module = tvm.tirx.build(scheduled, target=target)
    (source,) = kernels.sources(module)
    block = np.from_dlpack(tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")(module)).tobytes()
    changed = kernels.compiled(block, source.encode(), b"machine code")
    assert changed.endswith(b"\x0c" + bytes(7) + b"machine code") and b"__global__" not in changed
    assert int.from_bytes(changed[:8], "little") == len(changed) - 8
    at = changed.index(b"\x06" + bytes(7) + b"fatbin")
    assert int.from_bytes(changed[at - 8 : at], "little") == len(changed) - at
    with pytest.raises(ContractError, match=r"doesn't hold the kernels' source where 0\.27 has it"):
        kernels.compiled(block[:-1], source.encode(), b"")
