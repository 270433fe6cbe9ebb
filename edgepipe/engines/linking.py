"""Link a library for another machine, and hold what it calls against what is there.

Zig's linker brings the C library of every system it knows (as stubs: names and versions) in one package of pip, where
Debian's cross compilers are a package of the system each. What a library calls is read from its dynamic symbols:

    linux-gnu        names of glibc 2.28, which the linker found there, and of TVM's runtime
    linux-android    names of bionic and of TVM's runtime, from the lists below: Zig has no bionic
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from edgepipe.artifacts import Json
from edgepipe.engines.native import linker
from edgepipe.errors import TargetError
from edgepipe.levels import ANDROID, Level
from edgepipe.runtime.library import system_here

_GLIBC = "2.28"  # that of the wheels of TVM's runtime (manylinux_2_28)
# Of libtvm_ffi: all else comes through pointers that the runtime sets when it opens a library.
RUNTIME = frozenset({"TVMFFIErrorSetRaisedFromCStr", "TVMFFIErrorSetRaisedFromCStrParts"})
# There since Android 5. Sources: libc.map.txt and libm.map.txt of bionic.
BIONIC = {
    "libc.so": frozenset({"__cxa_finalize", "__cxa_atexit", "memcpy", "memmove", "memset"}),
    "libm.so": frozenset({"cosf", "erff", "exp2f", "expf", "fmodf", "logf", "powf", "rintf", "sinf", "tanhf"}),
}


def linked_here(level: Level) -> bool:
    """Say whether this machine's own linker does: the library is for such a machine under such a system."""
    return level.machine == platform.machine() and level.system == system_here()


def check_linker(level: Level) -> None:
    """Refuse what can't be linked here, before any work."""
    if linked_here(level):
        linker()
    elif any(importlib.util.find_spec(name) is None for name in ("ziglang", "elftools")):
        raise TargetError(
            f"a library for {level.triple} is linked by Zig, which isn't here: pip install 'edgepipe[cross]'"
        )


def linked_by(level: Level) -> Json:
    """Return what the manifest and a stage's key say of the linker; nothing of this machine's own."""
    return {} if linked_here(level) else {"linked_by": f"ziglang {metadata.version('ziglang')}"}


def link(output: str, objects: Sequence[str], level: Level) -> None:
    """Link objects into a library for another machine; TargetError for what its runtime hasn't."""
    with tempfile.TemporaryDirectory() as folder:
        _zig(
            [*_system(level, Path(folder)), "-shared", "-Wl,-s", "-Wl,--build-id=none", "-o", output, *objects], folder
        )
    if strangers := sorted(set(undefined(Path(output))) - _allowed(level)):
        raise TargetError(
            f"the library for {level.triple} calls {', '.join(strangers)}, which its runtime hasn't: take --engine "
            "onnxruntime"
        )


def undefined(library: Path) -> Iterator[str]:
    """Yield the names that a library wants from others and the linker found in none of them."""
    from elftools.elf.elffile import ELFFile

    with library.open("rb") as file:
        elf: Any = ELFFile(file)  # some of its versions have types, with None for a section that isn't there
        versions = elf.get_section_by_name(".gnu.version")
        for number, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
            wanted = symbol["st_shndx"] == "SHN_UNDEF" and symbol["st_info"]["bind"] != "STB_WEAK"
            found = versions is not None and isinstance(versions.get_symbol(number)["ndx"], int)
            if symbol.name and wanted and not found:
                yield symbol.name


def _allowed(level: Level) -> frozenset[str]:
    return RUNTIME.union(*BIONIC.values()) if level.system == ANDROID else RUNTIME


def _system(level: Level, folder: Path) -> list[str]:
    """Return the options for a system; for Android with empty libraries in place of bionic's, so that they are named.

    A library finds names only in those that it names: Android's loader looks into no others.
    """
    if level.system != ANDROID:
        return ["-target", f"{level.triple}.{_GLIBC}"]
    options = ["-target", f"{level.machine}-linux-musl", "-nostdlib"]
    empty = folder / "empty.c"
    empty.touch()
    stubs = [folder / name for name in BIONIC]
    for stub in stubs:
        _zig([*options, "-shared", f"-Wl,-soname,{stub.name}", "-o", str(stub), str(empty)], str(folder))
    return [*options, "-Wl,--no-as-needed", *map(str, stubs)]


def _zig(options: Sequence[str], folder: str) -> None:
    """Run Zig's C compiler; TargetError with its last words."""
    environment = {**os.environ, "ZIG_LOCAL_CACHE_DIR": folder}  # or it would lie where the user stands
    command = [sys.executable, "-m", "ziglang", "cc", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise TargetError(f"Zig could not link the library: {said}")
