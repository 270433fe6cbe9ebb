"""Execute an instruction-set path in this process, which is a child: `python -m edgepipe.machine.executing NAME…`.

stdin has a JSON object per name: the machine code, the operands and the expected result in hex, and whether the code
needs AMX's tiles. The code is written to a page that is then made executable: no page is ever both.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

from edgepipe.machine.child import attempt_all
from edgepipe.machine.children import REFUSED, WORKS, WRONG, Outcome, try_in_children
from edgepipe.machine.instructions import InstructionPath

_TIMEOUT_S = 20.0  # for a start of Python and some nanoseconds of work, on a busy machine
_SYSCALL_ARCH_PRCTL = 158  # x86-64 Linux
_REQUEST_PERMISSION = 0x1023  # ARCH_REQ_XCOMP_PERM
_TILE_DATA = 18  # XFEATURE_XTILEDATA


def execute(paths: Sequence[InstructionPath]) -> tuple[Outcome, ...]:
    """Execute each path in a child of its own and return how it went."""
    outcomes: list[Outcome] = []
    for path in paths:
        case = path.case()
        given = {
            "code": path.code,
            "a": case.a.hex(),
            "b": case.b.hex(),
            "expected": case.expected.hex(),
            "asks_for_tiles": path.asks_for_tiles,
        }
        text = json.dumps({path.name: given})
        outcomes += try_in_children("edgepipe.machine.executing", [path.name], timeout_s=_TIMEOUT_S, given=text)
    return tuple(outcomes)


def _attempt(given: dict[str, Any]) -> tuple[str, str]:
    if given["asks_for_tiles"] and (reason := _ask_for_tiles()):
        return REFUSED, reason
    expected = bytes.fromhex(given["expected"])
    try:
        came = _call(bytes.fromhex(given["code"]), bytes.fromhex(given["a"]), bytes.fromhex(given["b"]), len(expected))
    except OSError as error:
        return REFUSED, f"this system gives a process no executable memory ({error.strerror})"
    if came == expected:
        return WORKS, ""
    at = next(i for i, (left, right) in enumerate(zip(came, expected, strict=True)) if left != right) // 4 * 4
    return WRONG, f"expected {expected[at : at + 4].hex()} at byte {at}, got {came[at : at + 4].hex()}"


def _ask_for_tiles() -> str:
    """Ask Linux for AMX's tiles, without which their first use kills the process; return why not, or nothing."""
    if platform.system() != "Linux":
        return f"{platform.system()} was not asked for AMX's tiles: only Linux's way is known here"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_SYSCALL_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0:
        return ""
    return f"Linux gives this process no AMX tiles ({os.strerror(ctypes.get_errno())})"


def _call(code: bytes, a: bytes, b: bytes, out_bytes: int) -> bytes:
    """Call machine code as `void f(out, a, b)` and return what it left in out; OSError: no page may be executed."""
    libc = ctypes.CDLL(None, use_errno=True)
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    # on arm64 Linux this also makes the instruction cache see what was written
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_EXEC):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    out = ctypes.create_string_buffer(out_bytes)
    ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p)(address)(out, a, b)
    return out.raw


def main(names: list[str]) -> None:
    """Try each name with what stdin gives for it."""
    given = json.loads(sys.stdin.read())
    attempt_all(names, lambda name: _attempt(given[name]))


if __name__ == "__main__":
    main(sys.argv[1:])
