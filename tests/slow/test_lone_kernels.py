"""Kernels of the tvm engine on machines that have no TVM runtime: a Hexagon under qemu, WebAssembly in Node.

They are compiled here and linked by Zig with a C program, which stands in for the runtime and calls them as it would,
by TVM's FFI. `make test-cross` sets up what this needs, but for Node.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgepipe.levels import HEXAGON, WASM, Level
from edgepipe.numerics.grids import dequantize, round_to_nearest
from edgepipe.weights import WeightStore
from tests.decoders import stored
from tests.slow import cross_machine

pytest.importorskip("tvm", reason="TVM isn't here: make test-cross")
pytest.importorskip("ziglang", reason="Zig isn't here: make test-cross")

import tvm
import tvm_ffi

from edgepipe.engines.tvm import packed, products
from edgepipe.engines.tvm.tiling import Tiling

pytestmark = pytest.mark.slow
OUT, IN, GROUP = 52, 80, 32  # fill neither tile nor group
_DTYPES = {"float32": "kDLFloat, 32", "float16": "kDLFloat, 16", "int8": "kDLInt, 8", "uint8": "kDLUInt, 8"}
QEMU, NODE = cross_machine.qemu("hexagon"), shutil.which("node")
_WASI = """
const { WASI } = require("wasi"), fs = require("fs"), [folder, ...args] = process.argv.slice(1);
const wasi = new WASI({ version: "preview1", args: ["run", ...args], preopens: { "/": folder } });
WebAssembly.instantiate(fs.readFileSync(folder + "/run"), wasi.getImportObject())
  .then(({ instance }) => process.exit(wasi.start(instance)));
"""
PROGRAM = """
#include <stdio.h>
#include <stdlib.h>
#include <tvm/ffi/c_api.h>
typedef int (*Body)(int, void*, void*);
static int serial(Body body, void* data, int tasks) {
  struct { void* sync; int32_t count; } all = {0, 1};
  return body(0, &all, data);
}
extern int (*__TVMBackendParallelLaunch)(Body, void*, int);
void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* what) { fputs(what, stderr); }
void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** what, int32_t parts) {
  for (int i = 0; i < parts; i++) fputs(what[i], stderr);
}
#define KERNEL(name) extern int __tvm_ffi_##name(void*, const TVMFFIAny*, int32_t, TVMFFIAny*)
KERNEL(first);
KERNEL(codes_product);
%(shapes)s
static DLTensor tensors[] = {%(tensors)s};
static long bytes[] = {%(bytes)s};
static int call(int (*kernel)(void*, const TVMFFIAny*, int32_t, TVMFFIAny*), const int* which, int count) {
  TVMFFIAny arguments[16] = {0}, result = {0};
  for (int i = 0; i < count; i++) {
    arguments[i].type_index = kTVMFFIDLTensorPtr;
    arguments[i].v_ptr = &tensors[which[i]];
  }
  return kernel(0, arguments, count, &result);
}
int main(int count, char** arguments) {
  __TVMBackendParallelLaunch = serial;
  int all = sizeof(bytes) / sizeof(bytes[0]);
  FILE* in = fopen(arguments[1], "rb");
  for (int i = 0; i < all; i++) {
    tensors[i].data = aligned_alloc(128, (bytes[i] + 127) / 128 * 128);
    if (fread(tensors[i].data, 1, bytes[i], in) != bytes[i]) return 3;
  }
  int first[] = {%(first)s}, second[] = {%(second)s};
  if (call(__tvm_ffi_first, first, %(firsts)d) || call(__tvm_ffi_codes_product, second, %(seconds)d)) return 4;
  FILE* out = fopen(arguments[2], "wb");
  return fwrite(tensors[all - 1].data, 1, bytes[all - 1], out) == bytes[all - 1] && !fclose(out) ? 0 : 5;
}
"""


def zig(level: Level, folder: Path, *options: str) -> None:
    """Compile and link a program for a level."""
    environment = {**os.environ, "ZIG_LOCAL_CACHE_DIR": str(folder)}
    words = [sys.executable, "-m", "ziglang", "cc", "-target", level.triple, "-static", "-O1", *options]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def program(arrays: list[np.ndarray], first: list[int], second: list[int]) -> str:
    """Write the C program that reads arrays, calls two kernels with some of them, and writes the last."""
    shapes = [f"static int64_t shape{i}[] = {{{', '.join(map(str, a.shape))}}};" for i, a in enumerate(arrays)]
    tensors = [
        f"{{0, {{kDLCPU, 0}}, {a.ndim}, {{{_DTYPES[a.dtype.name]}, 1}}, shape{i}, 0, 0}}" for i, a in enumerate(arrays)
    ]
    return PROGRAM % {
        "shapes": "\n".join(shapes),
        "tensors": ", ".join(tensors),
        "bytes": ", ".join(str(a.nbytes) for a in arrays),
        "first": ", ".join(map(str, first)),
        "second": ", ".join(map(str, second)),
        "firsts": len(first),
        "seconds": len(second),
    }


def runs(level: Level, folder: Path) -> list[str]:
    """Return the command that runs a program in a folder with the files it reads and writes; skip without the means."""
    if level is HEXAGON:
        if QEMU is None:
            pytest.skip("compiled alone, qemu-hexagon isn't here: make test-cross")
        return [str(QEMU), "-cpu", "v67", *(str(folder / name) for name in ("run", "in.bin", "out.bin"))]
    if NODE is None:
        pytest.skip("compiled alone, Node isn't here: install nodejs")
    return [NODE, "--no-warnings", "-e", _WASI, str(folder), "/in.bin", "/out.bin"]


@pytest.mark.parametrize(("bits", "rows"), [(8, 1), (8, 11), (4, 11), (2, 3)])
@pytest.mark.parametrize("level", [HEXAGON, WASM], ids=lambda level: level.name)
def test_products_of_codes_run_there(level: Level, bits: int, rows: int, tmp_path: Path) -> None:
    """A Hexagon's object holds HVX's products of bytes; what comes out is numpy's, but for its 8 bits of x."""
    rng = np.random.default_rng(bits + rows)
    value = round_to_nearest(rng.standard_normal((OUT, IN)).astype(np.float32), bits=bits, group=GROUP, symmetric=True)
    w, integers = packed.codes_of(value), level.byte_products
    prepare = products.rounded if integers else products.group_sums
    kernels = {
        "first": prepare(w.columns, w.group, rows),
        "codes_product": products.codes_product(w, rows, Tiling(rows=2 if rows == 1 else 4), integers=integers),
    }
    named = {name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()}
    module = tvm.compile(tvm.IRModule(named), target=tvm.target.Target(level.target())).mod
    module.write_to_file(str(tmp_path / "kernels.o"))
    if integers:
        module.write_to_file(str(tmp_path / "kernels.s"))
        assert f"{integers}(" in (tmp_path / "kernels.s").read_text(encoding="utf-8")

    command = runs(level, tmp_path)
    x = np.zeros((rows, w.columns), np.float32)
    x[:, :IN] = rng.standard_normal((rows, IN))
    groups = np.zeros((rows, w.groups), np.float32)
    made = [np.zeros(x.shape, np.int8), groups, groups] if integers else [groups]  # codes, steps and sums; or sums
    parts = [one.load() for one in packed.plan_codes(WeightStore({"w": stored("w", value)}), "w", w)]
    arrays = [x, *made, *parts, np.zeros((rows, OUT), np.float32)]
    (tmp_path / "in.bin").write_bytes(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays))
    second = list(range(1 if integers else 0, len(arrays)))
    (tmp_path / "main.c").write_text(program(arrays, list(range(1 + len(made))), second), encoding="utf-8")
    include = Path(tvm_ffi.__file__).parent / "include"
    zig(level, tmp_path, "-I", str(include), "-o", *(str(tmp_path / name) for name in ("run", "main.c", "kernels.o")))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    y = np.frombuffer((tmp_path / "out.bin").read_bytes(), np.float32).reshape(rows, OUT)
    expected = x[:, :IN] @ dequantize(value).T
    error = np.abs(y - expected).max() / np.abs(expected).max()
    assert 1e-5 < error < 2e-2 if integers else error < 1e-5
