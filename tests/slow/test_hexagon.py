"""The integer kernels of the tvm engine on a Hexagon: compiled here, linked by Zig, run under qemu-hexagon.

There is no bundle for it: TVM's runtime for Hexagon is built with Qualcomm's SDK alone. A C program stands in for the
runtime and calls the kernels as it would, by TVM's FFI. `make test-cross` sets up what this needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgepipe.levels import HEXAGON
from edgepipe.numerics.grids import dequantize, round_to_nearest
from edgepipe.weights import WeightStore
from tests.decoders import stored
from tests.slow import cross_machine

pytest.importorskip("tvm", reason="TVM isn't here: make test-cross")
pytest.importorskip("ziglang", reason="Zig isn't here: make test-cross")

import tvm
import tvm_ffi

from edgepipe.engines.tvm import packed, products

pytestmark = pytest.mark.slow
QEMU = cross_machine.qemu("hexagon")
PROCESSOR = "v67"  # as qemu names it
OUT, IN, GROUP = 52, 80, 32  # fill neither tile nor group
_DTYPES = {"float32": "{kDLFloat, 32, 1}", "float16": "{kDLFloat, 16, 1}", "int8": "{kDLInt, 8, 1}"}
_DTYPES["uint8"] = "{kDLUInt, 8, 1}"
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
KERNEL(rounded);
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
  int rounding[] = {0, 1, 2, 3}, multiplying[] = {1, 2, 3, 4, 5, 6};
  if (call(__tvm_ffi_rounded, rounding, 4) || call(__tvm_ffi_codes_product, multiplying, 6)) return 4;
  FILE* out = fopen(arguments[2], "wb");
  return fwrite(tensors[6].data, 1, bytes[6], out) == bytes[6] && !fclose(out) ? 0 : 5;
}
"""


def zig(folder: Path, *options: str) -> None:
    """Compile and link for a Hexagon under Linux."""
    environment = {**os.environ, "ZIG_LOCAL_CACHE_DIR": str(folder)}
    words = [sys.executable, "-m", "ziglang", "cc", "-target", "hexagon-linux-musl", "-static", "-O1", *options]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def program(arrays: list[np.ndarray]) -> str:
    """Write the C program that reads these arrays, rounds the first, multiplies, and writes the last."""
    shapes = [f"static int64_t shape{i}[] = {{{', '.join(map(str, a.shape))}}};" for i, a in enumerate(arrays)]
    tensors = [f"{{0, {{kDLCPU, 0}}, {a.ndim}, {_DTYPES[a.dtype.name]}, shape{i}, 0, 0}}" for i, a in enumerate(arrays)]
    return PROGRAM % {
        "shapes": "\n".join(shapes),
        "tensors": ", ".join(tensors),
        "bytes": ", ".join(str(a.nbytes) for a in arrays),
    }


@pytest.mark.parametrize(("bits", "rows"), [(8, 1), (8, 11), (4, 11), (2, 3)])
def test_products_of_bytes_run_on_a_hexagon(bits: int, rows: int, tmp_path: Path) -> None:
    """The object holds HVX's products of bytes; emulated, it gives what float gives, but for 8 bits of x."""
    rng = np.random.default_rng(bits + rows)
    value = round_to_nearest(rng.standard_normal((OUT, IN)).astype(np.float32), bits=bits, group=GROUP, symmetric=True)
    w = packed.codes_of(value)
    kernels = {
        "rounded": products.rounded(w.columns, w.group, rows),
        "codes_product": products.codes_product(w, rows, 2 if rows == 1 else 4, integers=HEXAGON.byte_products),
    }
    named = {name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()}
    module = tvm.compile(tvm.IRModule(named), target=tvm.target.Target(HEXAGON.target())).mod
    module.write_to_file(str(tmp_path / "kernels.s"))
    assert "vrmpy(" in (tmp_path / "kernels.s").read_text(encoding="utf-8")
    module.write_to_file(str(tmp_path / "kernels.o"))
    if QEMU is None:
        pytest.skip("compiled alone, qemu-hexagon isn't here: make test-cross")

    x = np.zeros((rows, w.columns), np.float32)
    x[:, :IN] = rng.standard_normal((rows, IN))
    parts = [one.load() for one in packed.plan_codes(WeightStore({"w": stored("w", value)}), "w", w)]
    arrays = [x, np.zeros(x.shape, np.int8), *(np.zeros((rows, w.groups), np.float32) for _ in range(2)), *parts]
    arrays.append(np.zeros((rows, OUT), np.float32))
    (tmp_path / "in.bin").write_bytes(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays))
    (tmp_path / "main.c").write_text(program(arrays), encoding="utf-8")
    include = Path(tvm_ffi.__file__).parent / "include"
    zig(
        tmp_path, "-I", str(include), "-o", str(tmp_path / "run"), str(tmp_path / "main.c"), str(tmp_path / "kernels.o")
    )
    command = [str(QEMU), "-cpu", PROCESSOR, str(tmp_path / "run"), str(tmp_path / "in.bin"), str(tmp_path / "out.bin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    y = np.frombuffer((tmp_path / "out.bin").read_bytes(), np.float32).reshape(rows, OUT)
    expected = x[:, :IN] @ dequantize(value).T
    assert 1e-5 < np.abs(y - expected).max() / np.abs(expected).max() < 2e-2
