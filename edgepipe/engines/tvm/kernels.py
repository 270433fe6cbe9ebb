"""Give a library with kernels for a GPU its machine code: TVM packs their source, and would compile it on the device.

What a library imports lies in one block of bytes, `__tvm_ffi__library_bin`. In there a text is its length in 8 bytes
and itself, and CUDA's part is  "cuda" · bytes that follow · format · facts of every kernel · code.  The format becomes
"fatbin" and the code nvcc's file, which TVM's runtime hands to the driver.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tvm_ffi

from edgepipe.engines.nvcc import fatbin
from edgepipe.errors import ContractError
from edgepipe.levels import Gpu

_KIND, _SOURCE, _COMPILED = "cuda", b"cuda", b"fatbin"
_LENGTH = struct.Struct("<Q")
_ASSEMBLY = """    .section .rodata
    .balign 64
    .globl {name}
    .type {name}, %object
{name}:
    .incbin "{file}"
    .size {name}, . - {name}
    .section .note.GNU-stack, "", %progbits
"""


def pack(module: Any, is_system_lib: bool, prefix: str, folder: str, *, gpu: Gpu) -> str:
    """Write what a library imports as a file for the linker, kernels compiled for `gpu`; TVM calls it on export."""
    packed = tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")(module)
    block = np.from_dlpack(packed).tobytes()
    for source in sources(module):
        block = compiled(block, source.encode(), fatbin(source, gpu))
    binary, assembly = Path(folder, "imports.bin"), Path(folder, "imports.s")
    binary.write_bytes(block)
    name = tvm_ffi.get_global_func("runtime.ModuleImportsBlobName")()
    assembly.write_text(_ASSEMBLY.format(name=name, file=binary), encoding="utf-8")
    return str(assembly)


def sources(module: Any) -> Iterator[str]:
    """Yield the source of all kernels for a GPU that a module imports."""
    for imported in module.imports:
        if imported.kind == _KIND:
            yield imported.inspect_source()
        yield from sources(imported)


def compiled(block: bytes, source: bytes, code: bytes) -> bytes:
    """Return a library's block of imports with machine code in place of a source."""
    begin = block.find(_text(_SOURCE))
    while begin >= 0:
        first = begin + len(_text(_SOURCE)) + _LENGTH.size
        end = first + _LENGTH.unpack_from(block, first - _LENGTH.size)[0]
        part = block[first:end]
        if part.startswith(_text(_SOURCE)) and part.endswith(_text(source)):
            part = _text(_COMPILED) + part[len(_text(_SOURCE)) : -len(_text(source))] + _text(code)
            block = block[: first - _LENGTH.size] + _text(part) + block[end:]
            return _text(block[_LENGTH.size :])
        begin = block.find(_text(_SOURCE), begin + 1)
    raise ContractError("TVM's library doesn't hold the kernels' source where 0.27 has it: install apache-tvm 0.27")


def _text(value: bytes) -> bytes:
    return _LENGTH.pack(len(value)) + value
