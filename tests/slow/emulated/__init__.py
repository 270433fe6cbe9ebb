"""A GPU in software, where there is none: TVM's own runtime loads a library and launches its kernels.

The kernels are the source that nvcc gets, compiled by g++ after kernels.h, in place of the driver's library libcuda.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from edgepipe.engines.nvcc import nvcc

_HERE = Path(__file__).parent
_KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\(\d+\) (\w+)\(([^)]*)\);')
# Both are there before anything looks for them by name, the packaged runtime too
_PRELOAD = """
import ctypes, sys
for name in ("libcuda.so.1", "libcudart.so.13"):
    ctypes.CDLL(sys.argv[-1] + "/" + name, ctypes.RTLD_GLOBAL)
"""


def make_gpu(code: str, folder: Path) -> None:
    """Write libcuda and libcudart with the kernels of a library into `folder`."""
    calls = []
    for name, parameters in _KERNEL.findall(code):
        types = [text.rsplit(" ", 1)[0].replace("__restrict__", "") for text in parameters.split(", ") if text]
        values = ", ".join(f"*({kind}*)p[{i}]" for i, kind in enumerate(types))
        calls.append(f'extern "C" void emulated_{name}(void** p) {{ {name}({values}); }}')
        calls.append(f'extern "C" int emulated_count_{name} = {len(types)};')
    code = code.replace("__shared__ alignas(64)", "static __attribute__((aligned(64)))")  # one block runs at a time
    kernels = folder / "kernels.cpp"
    kernels.write_text("\n".join(['#include "kernels.h"', code, *calls, ""]), encoding="utf-8")
    (folder / "versions").write_text("libcudart.so.13 { global: cuda*; };\n", encoding="utf-8")
    headers = [f"-I{_HERE}", f"-I{nvcc().parents[1] / 'include'}"]
    gxx = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", *headers]
    driver = ["-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1"), str(_HERE / "driver.cpp"), str(kernels)]
    runtime = [f"-Wl,--version-script={folder / 'versions'}", "-Wl,-soname,libcudart.so.13"]
    runtime += ["-o", str(folder / "libcudart.so.13"), str(_HERE / "runtime.cpp")]
    for files in (driver, runtime):
        subprocess.run([*gxx, *files], check=True)


def run(code: str, folder: Path, arguments: Sequence[Path]) -> None:
    """Run Python code on a machine with the GPU in `folder`; arguments are sys.argv[1:]."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _PRELOAD + code, *map(str, arguments), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
