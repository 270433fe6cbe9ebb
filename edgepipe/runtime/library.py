"""Read what a manifest says of a compiled library, and whether this processor has the instructions it was built for.

A library with instructions that a processor lacks ends its process without a word, so this is asked before it is
loaded. Nothing here needs the engine.
"""

from __future__ import annotations

import ctypes
import math
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe.errors import ConfigError, TargetError
from edgepipe.runtime.gpus import GpuFacts

# dtype in the file → as numpy reads it; bfloat16, which numpy lacks, is read as its bits
STORED = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "uint16",
    "uint8": "uint8",
    "int8": "int8",
}
_ALIGNMENT = 64  # of a tensor in the weights file: kernels load whole vectors
_MOST_AXES = 8
_PLAIN_FLAG = re.compile(r"[a-z0-9_.]{1,32}")
_CPUINFO = Path("/proc/cpuinfo")
_AT_HWCAP = 16  # what getauxval is asked for
# Bits of AT_HWCAP under 64-bit Arm, from the lowest. Source: Linux, arch/arm64/include/uapi/asm/hwcap.h
_ARM_FLAGS = (
    *("fp", "asimd", "evtstrm", "aes", "pmull", "sha1", "sha2", "crc32", "atomics", "fphp", "asimdhp", "cpuid"),
    *("asimdrdm", "jscvt", "fcma", "lrcpc", "dcpop", "sha3", "sm3", "sm4", "asimddp", "sha512", "sve", "asimdfhm"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionFacts:
    """Say what one function of a library takes and gives, in order."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    caches: tuple[str, ...]
    prepared: str | None  # the function that computes constants when the library is loaded
    weights: tuple[str, ...]  # keys of tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFacts:
    """Say where one tensor of the weights file lies."""

    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return its bytes."""
        return math.prod(self.shape) * np.dtype(STORED[self.dtype]).itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class LibraryFacts:
    """Hold the checked `library` of a manifest."""

    file: str
    level: str
    machine: str
    system: str
    flags: frozenset[str]
    gpu: GpuFacts | None  # runs the kernels; None: the processor does
    functions: Mapping[str, FunctionFacts]
    tensors: Mapping[str, TensorFacts]


def read_library(manifest: Mapping[str, Any]) -> LibraryFacts:
    """Return what a manifest says of its library; ConfigError for what is missing, of another type or out of range."""
    found = _object(manifest, "library", "")
    tensors = {}
    if "unpacked" in manifest["weights"]:
        raise _wrong("weights", "stored as they are where there is a library")
    size = manifest["files"][manifest["weights"]["file"]]["bytes"]
    described = _object(found, "tensors", "library.")
    for name in described:
        tensors[name] = _tensor(_object(described, name, "library.tensors."), name, size)
    functions = {}
    described = _object(found, "functions", "library.")
    for name in described:
        functions[name] = _function(_object(described, name, "library.functions."), f"library.functions.{name}.")
    for name, function in functions.items():
        if missing := sorted(set(function.weights) - set(tensors)):
            raise _wrong(f"library.functions.{name}.weights", f"tensors that are listed, but has {missing[0]!r}")
        if function.prepared is None:
            continue
        before = functions.get(function.prepared)
        if before is None or before.inputs or before.caches or before.prepared is not None:
            raise _wrong(f"library.functions.{name}.prepared", "the name of a function that takes weights alone")
    flags = _texts(found, "flags", "library.")
    if not all(_PLAIN_FLAG.fullmatch(flag) for flag in flags):
        raise _wrong("library.flags", "names of processor features")
    file = _text(found, "file", "library.")
    if file not in manifest["files"]:
        raise _wrong("library.file", "one of files")
    return LibraryFacts(
        file=file,
        level=_text(found, "level", "library."),
        machine=_text(found, "machine", "library."),
        system=_text({"system": "linux-gnu", **found}, "system", "library."),  # earlier versions knew no other
        flags=frozenset(flags),
        gpu=_gpu(_object(found, "gpu", "library.")) if "gpu" in found else None,
        functions=functions,
        tensors=tensors,
    )


def _gpu(facts: Mapping[str, Any]) -> GpuFacts:
    compiled, readable = facts.get("compiled"), facts.get("readable")
    if not isinstance(compiled, list) or not compiled or not all(_whole(n) for n in compiled):
        raise _wrong("library.gpu.compiled", "numbers of architectures")
    if not isinstance(readable, int) or not _whole(readable):
        raise _wrong("library.gpu.readable", "the number of an architecture, or 0")
    return GpuFacts(compiled=tuple(compiled), readable=readable)


def check_processor(facts: LibraryFacts) -> None:
    """Raise TargetError unless this machine has every instruction that a library may use."""
    if platform.machine() != facts.machine:
        raise TargetError(
            f"the bundle's library is for {facts.machine} ({facts.level}), but this machine is {platform.machine()}: "
            "build a bundle for it"
        )
    if (system := system_here()) != facts.system:
        raise TargetError(
            f"the bundle's library is for {facts.system}, but this system is {system or platform.system()}: build a "
            "bundle for it"
        )
    if missing := sorted(facts.flags - processor_flags()):
        raise TargetError(
            f"the bundle's library is for {facts.level}, but this processor has no {', '.join(missing)}: "
            "build a bundle for it, on such a machine or with --engine onnxruntime"
        )


def system_here() -> str:
    """Return the system as the end of LLVM's triple names it; empty where nothing says which instructions there are."""
    if hasattr(sys, "getandroidapilevel"):
        return "linux-android"
    return "linux-gnu" if sys.platform == "linux" else ""


def processor_flags() -> frozenset[str]:
    """Return the features that Linux lists for the first processor; none where there is no such list."""
    if platform.machine() == "aarch64" and (granted := _granted()) is not None:
        return granted
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _granted() -> frozenset[str] | None:
    """Return the features that the kernel grants this process, None where it can't be asked.

    /proc/cpuinfo lists the same names on an Arm, and those of another machine where one is emulated.
    """
    try:
        ask = ctypes.CDLL(None).getauxval
    except (AttributeError, OSError):
        return None
    ask.argtypes, ask.restype = [ctypes.c_ulong], ctypes.c_ulong
    bits = ask(_AT_HWCAP)
    return frozenset(name for place, name in enumerate(_ARM_FLAGS) if bits >> place & 1)


def _function(facts: Mapping[str, Any], where: str) -> FunctionFacts:
    prepared = facts.get("prepared")
    if prepared is not None and not isinstance(prepared, str):
        raise _wrong(f"{where}prepared", "a text or null")
    names = {kind: _texts(facts, kind, where) for kind in ("inputs", "outputs", "caches", "weights")}
    return FunctionFacts(
        inputs=names["inputs"],
        outputs=names["outputs"],
        caches=names["caches"],
        prepared=prepared,
        weights=names["weights"],
    )


def _tensor(facts: Mapping[str, Any], name: str, size: int) -> TensorFacts:
    where = f"library.tensors.{name[:80]}"
    offset: Any = facts.get("offset")
    dtype, shape = facts.get("dtype"), facts.get("shape")
    if not isinstance(dtype, str) or dtype not in STORED:
        raise _wrong(f"{where}.dtype", f"one of {', '.join(STORED)}")
    if not _whole(offset) or offset % _ALIGNMENT:
        raise _wrong(f"{where}.offset", f"a multiple of {_ALIGNMENT}")
    if not isinstance(shape, list) or len(shape) > _MOST_AXES or not all(_whole(n) and n <= size for n in shape):
        raise _wrong(f"{where}.shape", "a list of numbers")
    found = TensorFacts(offset=offset, dtype=dtype, shape=tuple(shape))
    if found.offset + found.nbytes > size:
        raise _wrong(where, f"inside the {size} bytes of the weights")
    return found


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _object(holder: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    value = holder.get(name)
    if not isinstance(value, dict):
        raise _wrong(f"{where}{name[:80]}", "an object")
    return value


def _text(holder: Mapping[str, Any], name: str, where: str) -> str:
    value = holder.get(name)
    if not isinstance(value, str):
        raise _wrong(f"{where}{name}", "a text")
    return value


def _texts(holder: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    value = holder.get(name)
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise _wrong(f"{where}{name}", "a list of texts")
    return tuple(value)


def _wrong(where: str, expected: str) -> ConfigError:
    return ConfigError(f"manifest.json: {where} must be {expected}: the bundle is damaged, copy or build it again")
