"""What this machine offers a compiled library: the instructions it is built for, and what links it.

A level names LLVM's target and the flags that /proc/cpuinfo must show, so that the runtime can refuse a library before
it dies of an illegal instruction. Sources: the x86-64 psABI for v2 to v4; Arm's feature registers as Linux names them.
Nothing here needs the compiler: it is asked before any work, and for the key of a stage.
"""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass

from edgepipe.errors import TargetError
from edgepipe.runtime.library import processor_flags

_V2 = ("cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3")
_V3 = (*_V2, "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Describe one level of instructions."""

    name: str
    machine: str  # as `uname -m` says
    triple: str
    mcpu: str
    mattr: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()  # of /proc/cpuinfo
    rows: int = 4  # of x that share a load of weights: as many as the registers hold
    byte_products: bool = False  # has vpdpbusd

    def target(self) -> dict[str, object]:
        """Return LLVM's description, as TVM takes it."""
        return {"kind": "llvm", "mtriple": self.triple, "mcpu": self.mcpu, "mattr": list(self.mattr)}


_LINUX_X86, _LINUX_ARM = "x86_64-linux-gnu", "aarch64-linux-gnu"
# The preferred one of a machine first. AVX-512 in whole registers: LLVM would halve them for older processors' clocks.
LEVELS = (
    Level(
        name="x86-64-v4-vnni",
        machine="x86_64",
        triple=_LINUX_X86,
        mcpu="x86-64-v4",
        mattr=("+avx512vnni", "-prefer-256-bit"),
        flags=(*_V4, "avx512_vnni"),
        rows=8,
        byte_products=True,
    ),
    Level(
        name="x86-64-v4",
        machine="x86_64",
        triple=_LINUX_X86,
        mcpu="x86-64-v4",
        mattr=("-prefer-256-bit",),
        flags=_V4,
        rows=8,
    ),
    Level(name="x86-64-v3", machine="x86_64", triple=_LINUX_X86, mcpu="x86-64-v3", flags=_V3),
    Level(
        name="armv8.2-a",
        machine="aarch64",
        triple=_LINUX_ARM,
        mcpu="cortex-a76",
        flags=("asimd", "asimdhp", "asimddp", "asimdrdm", "atomics", "crc32", "fphp", "lrcpc"),
    ),
    Level(name="armv8-a", machine="aarch64", triple=_LINUX_ARM, mcpu="cortex-a72", flags=("asimd",)),
)


def level_here() -> Level:
    """Return the best level of this machine; TargetError when there is none."""
    flags = processor_flags()
    for level in LEVELS:
        if level.machine == platform.machine() and flags.issuperset(level.flags):
            return level
    raise TargetError(
        f"the tvm engine builds for x86-64-v3 and newer and for 64-bit Arm under Linux, and this machine "
        f"({platform.system()} on {platform.machine()}) shows neither: take --engine onnxruntime"
    )


def linker() -> str:
    """Return the path of what links a library; TargetError when there is none."""
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise TargetError("the tvm engine links its library with g++ or clang++, and neither is here: install one")
    return found
