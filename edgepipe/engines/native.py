"""What this machine offers a compiled library: the instructions it has, and what links one for it.

Nothing here needs the compiler: it is asked before any work, and for the key of a stage.
"""

from __future__ import annotations

import platform
import shutil

from edgepipe.errors import TargetError
from edgepipe.levels import LEVELS, Level
from edgepipe.runtime.gpus import GpuFacts, why_not
from edgepipe.runtime.library import processor_flags, system_here


def level_here() -> Level:
    """Return the best level of this machine; TargetError when there is none."""
    found = next((level for level in LEVELS if runs_here(level)), None)
    if found is None:
        raise TargetError(
            f"the tvm engine builds for x86-64-v3 and newer and for 64-bit Arm under Linux, and this machine "
            f"({platform.system()} on {platform.machine()}) shows neither: take --engine onnxruntime"
        )
    return found


def runs_here(level: Level) -> bool:
    """Say whether this machine runs a library that was built for a level."""
    return not lacking(level)


def lacking(level: Level) -> str:
    """Say what this machine lacks for a library that was built for a level; empty where it runs it."""
    here = level.machine == platform.machine() and level.system == system_here()
    if not (here and processor_flags().issuperset(level.flags)):
        return f"this machine has not all instructions of {level.name}"
    if level.gpu is None:
        return ""
    return why_not(GpuFacts(compiled=level.gpu.compiled, readable=level.gpu.readable))


def linker() -> str:
    """Return the path of what links a library for this machine; TargetError when there is none."""
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise TargetError("the tvm engine links its library with g++ or clang++, and neither is here: install one")
    return found
