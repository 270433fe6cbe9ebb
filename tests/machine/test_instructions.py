"""Instruction-set paths: the bytes are the assembler's, they compute what they should, and crashes are findings."""

from __future__ import annotations

import dataclasses
import platform
import re
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from edgepipe.machine import executing
from edgepipe.machine.children import DIES, REFUSED, WORKS, WRONG
from edgepipe.machine.executing import execute
from edgepipe.machine.facts import reported_flags
from edgepipe.machine.instructions import AARCH64, X86_64, InstructionPath, paths_for
from edgepipe.machine.operands import Case

PATHS = (*X86_64, *AARCH64)
HERE = paths_for(platform.machine())
_HEADS = {"x86_64": ".intel_syntax noprefix\n", "aarch64": ".arch armv8.6-a+sve+sme\n"}

on_linux = pytest.mark.skipif(not HERE or reported_flags() is None, reason="no path is known for this machine")


def tool(name: str, architecture: str) -> str:
    """Return the GNU tool for an architecture: this machine's own, or a cross tool."""
    own = platform.machine() == architecture and platform.system() == "Linux"
    command = shutil.which(name if own else f"{architecture}-linux-gnu-{name}")
    if command is None:
        pytest.skip(
            f"no GNU {name} for {architecture} here (Debian: binutils-{architecture.replace('_', '-')}-linux-gnu)"
        )
    return command


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_the_bytes_are_those_of_the_assembly(path: InstructionPath, tmp_path: Path) -> None:
    source, objects, binary = (tmp_path / f"path.{end}" for end in ("s", "o", "bin"))
    source.write_text(f"{_HEADS[path.architecture]}.text\n{path.assembly}\n", encoding="ascii")
    assembled = subprocess.run(
        [tool("as", path.architecture), "-o", objects, source], capture_output=True, text=True, check=False
    )
    if "no such instruction" in assembled.stderr or "unknown arch" in assembled.stderr:
        pytest.skip(f"this GNU as is too old for {path.name}")
    assert assembled.returncode == 0, assembled.stderr
    copy = [tool("objcopy", path.architecture), "-O", "binary", "-j", ".text", objects, binary]
    subprocess.run(copy, check=True)
    assert binary.read_bytes().hex() == path.code


@on_linux
@pytest.mark.parametrize("path", HERE, ids=lambda path: path.name)
def test_what_this_cpu_reports_works(path: InstructionPath) -> None:
    if path.flag not in (reported_flags() or ()):
        pytest.skip(f"this CPU reports no {path.name}")
    (outcome,) = execute([path])
    assert outcome.state in ((WORKS, REFUSED) if path.asks_for_tiles else (WORKS,)), outcome


@on_linux
@pytest.mark.parametrize(
    ("x86_64", "aarch64", "state", "detail"),
    [
        ("0f0b", "00000000", DIES, "dies with SIGILL"),  # ud2; udf
        ("31c08900c3", "000080d2000000b9c0035fd6", DIES, "dies with SIGSEGV"),  # write to address 0
        ("ebfe", "00000014", DIES, "took longer than 2 s"),  # jump to itself
        ("c3", "c0035fd6", WRONG, "expected 01000000 at byte 0, got 00000000"),  # return at once
    ],
    ids=["illegal", "address", "endless", "nothing"],
)
def test_a_crash_or_a_wrong_result_is_a_finding(
    x86_64: str, aarch64: str, state: str, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real machine code that dies, hangs or computes nothing, and a path behind it that works."""
    monkeypatch.setattr(executing, "_TIMEOUT_S", 2.0 if "longer" in detail else 30.0)
    code = {"x86_64": x86_64, "aarch64": aarch64}[HERE[0].architecture]
    broken = dataclasses.replace(HERE[0], name="broken", code=code, case=lambda: Case(a=b"", b=b"", expected=one()))
    found = execute([broken, HERE[0]])
    assert (found[0].state, found[0].detail) == (state, detail)
    assert "longer" in detail or found[1].state == WORKS


def one() -> bytes:
    """Return a result that no code above leaves."""
    return struct.pack("<i", 1)


@on_linux
def test_what_the_cpu_lacks_dies_in_the_child_alone() -> None:
    """Executed although it isn't reported: no path of the table works by accident."""
    lacking = [p for p in HERE if p.flag not in (reported_flags() or ())]
    if not lacking:
        pytest.skip("this CPU has every path in the table")
    assert {outcome.state for outcome in execute(lacking)} <= {DIES, REFUSED}


def test_architectures_have_two_spellings() -> None:
    assert paths_for("AMD64") == paths_for("x86_64") == X86_64
    assert paths_for("arm64") == paths_for("aarch64") == AARCH64
    assert paths_for("riscv64") == ()
    for paths in (X86_64, AARCH64):
        assert len({p.name for p in paths}) == len({p.flag for p in paths}) == len(paths)
        assert all(re.fullmatch("([0-9a-f]{2})+", p.code) for p in paths)


# ---------------------------------------------------------------------------------------------------------------------
# results that this machine may be unable to compute, beside numpy


def case_of(name: str) -> Case:
    """Return the operands of a path."""
    (path,) = [path for path in PATHS if path.name == name]
    return path.case()


def test_tiles_of_bytes_multiply() -> None:
    """TDPBUSD: C[m, n] += Σ over k and j of A[m, 4k + j] · B[k, 4n + j], A unsigned, behind the configuration."""
    case = case_of("AMX int8")
    a = np.frombuffer(case.a[64:], np.uint8).reshape(16, 16, 4).astype(np.int64)
    b = np.frombuffer(case.b, np.int8).reshape(16, 16, 4).astype(np.int64)
    assert (np.frombuffer(case.expected, np.int32).reshape(16, 16) == np.einsum("mkj,knj->mn", a, b)).all()
    assert (case.a[0], case.a[16:22], case.a[48:51]) == (1, b"\x40\0" * 3, b"\x10" * 3)
    assert len(case.a) == 64 + 1024


def test_tiles_of_bfloat16_multiply() -> None:
    case = case_of("AMX bf16")
    a, b = (
        (np.frombuffer(half, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(16, 16, 2)
        for half in (case.a[64:], case.b)
    )
    assert (np.frombuffer(case.expected, np.float32).reshape(16, 16) == np.einsum("mkj,knj->mn", a, b)).all()


def test_matrices_of_eight_columns_multiply() -> None:
    case = case_of("i8mm")
    a, b = (np.frombuffer(half, np.int8).reshape(2, 8).astype(np.int32) for half in (case.a, case.b))
    assert (np.frombuffer(case.expected, np.int32).reshape(2, 2) == a @ b.T).all()


@pytest.mark.parametrize("name", ["FMA", "AVX-512F", "NEON", "SVE"])
def test_a_product_rounded_before_the_sum_would_be_noticed(name: str) -> None:
    """The results of fused multiply-add are what rounding in between loses."""
    case = case_of(name)
    x, c = np.split(np.frombuffer(case.a, np.float32), 2)
    y, expected = np.frombuffer(case.b, np.float32), np.frombuffer(case.expected, np.float32)
    assert (x * y + c == 0).all()
    assert (expected == (x.astype(np.float64) * y + c)).all()
    assert np.count_nonzero(expected) > len(expected) // 2


def test_saturation_is_part_of_what_is_tried() -> None:
    """Sums of two products beyond 16 bits stay at the ends of the range."""
    sums = np.frombuffer(case_of("AVX-512BW").expected, np.int16)
    assert {-32768, 32767} & set(sums.tolist())
