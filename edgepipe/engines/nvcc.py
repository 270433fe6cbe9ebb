"""Compile kernels for GPUs of NVIDIA with nvcc: from the packages of the extra `cuda`, or the one on the PATH.

No GPU is needed. The packages go first: their version is pinned, so the bytes of a library are the same everywhere.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from edgepipe.artifacts import Json
from edgepipe.engines.native import linker
from edgepipe.errors import TargetError
from edgepipe.levels import Gpu, Level

_PACKAGES = "nvidia"  # the namespace of the packages: nvidia/cu13/bin/nvcc
_RELEASE = re.compile(r"release [\d.]+, V([\d.]+)")


def nvcc() -> Path:
    """Return the path of nvcc; TargetError where there is none."""
    spec = importlib.util.find_spec(_PACKAGES)
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        if found := sorted(Path(folder).glob("cu*/bin/nvcc")):
            return found[-1]
    on_path = shutil.which("nvcc")
    if on_path is None:
        raise TargetError("nvcc compiles kernels for NVIDIA's GPUs, and it isn't here: pip install 'edgepipe[cuda]'")
    return Path(on_path)


def compiled_by(level: Level) -> Json:
    """Return what the manifest and a stage's key say of the compiler of kernels; TargetError where it doesn't start."""
    if level.gpu is None:
        return {}
    said = _run([str(nvcc()), "--version"]).stdout
    version = _RELEASE.search(said)
    return {"compiled_by": f"nvcc {version[1] if version else 'of an unknown version'}"}


def check_nvcc() -> None:
    """Refuse, before any work, what can't be compiled here: nvcc has its sources read by g++ first."""
    nvcc()
    linker()


def fatbin(code: str, gpu: Gpu) -> bytes:
    """Compile CUDA's C++ into one file with machine code for every architecture of `gpu`; TargetError where nvcc fails.

    No fast mathematics: the figures are those that the check compares.
    """
    kinds = [f"arch=compute_{number},code=sm_{number}" for number in gpu.compiled]
    if gpu.readable:
        kinds.append(f"arch=compute_{gpu.readable},code=compute_{gpu.readable}")
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "kernels.cu"), Path(folder, "kernels.fatbin")
        source.write_text(code, encoding="utf-8")
        architectures = [part for kind in kinds for part in ("-gencode", kind)]
        files = ["-o", output.name, source.name]  # without their folder, which would get into the output
        _run([str(nvcc()), "--fatbin", "-O3", "-ccbin", linker(), *architectures, *files], folder)
        return output.read_bytes()


def _run(command: list[str], folder: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run nvcc; TargetError with its last words."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    except OSError as error:
        raise TargetError(f"nvcc can't be started: {error}") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
        worst = next((line for line in said if "error" in line or "fatal" in line), said[-1])
        raise TargetError(f"nvcc could not compile the kernels: {worst}")
    return done
