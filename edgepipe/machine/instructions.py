"""Instruction-set paths: what the CPU reports, and a few machine instructions of each with the result they must have.

Nothing is compiled here: each path carries its assembly and the bytes the GNU assembler makes of it (a test assembles
the text again and compares). A child process puts the bytes on an executable page and calls them (`executing.py`), with
inputs for which every result is exact, so that it is compared bit by bit.

    void path(void *out, const void *a, const void *b)     x86-64 System V: rdi, rsi, rdx; arm64: x0, x1, x2

Only the standard library is used, since numpy itself may be what a broken path kills.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgepipe.machine import operands
from edgepipe.machine.operands import Case


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionPath:
    """Describe one instruction-set extension and how to try it."""

    name: str  # as people write it
    architecture: str  # platform.machine(): x86_64 or aarch64
    flag: str  # in /proc/cpuinfo: the kernel lists what both the CPU and the system allow
    sysctl: str = ""  # the same on macOS; empty: it has none
    assembly: str
    code: str  # the assembled bytes, hex
    case: Callable[[], Case]
    asks_for_tiles: bool = False  # Linux hands AMX's tiles to a process only on request


def paths_for(architecture: str) -> tuple[InstructionPath, ...]:
    """Return the paths known for an architecture as platform.machine() calls it; empty for others than two."""
    wanted = {"amd64": "x86_64", "arm64": "aarch64"}.get(architecture.lower(), architecture.lower())
    return tuple(path for path in (*X86_64, *AARCH64) if path.architecture == wanted)


# ---------------------------------------------------------------------------------------------------------------------
# x86-64, Intel syntax

_TILE_ASSEMBLY = """
    mov eax, 64
    ldtilecfg [rsi]
    tilezero tmm0
    tileloadd tmm1, [rsi+rax*1+64]
    tileloadd tmm2, [rdx+rax*1]
    {} tmm0, tmm1, tmm2
    tilestored [rdi+rax*1], tmm0
    tilerelease
    ret
"""

X86_64 = (
    InstructionPath(
        name="SSE4.2",
        architecture="x86_64",
        flag="sse4_2",
        sysctl="hw.optional.sse4_2",
        assembly="""
            movdqu xmm0, [rsi]
            movdqu xmm1, [rdx]
            pcmpgtq xmm0, xmm1
            movdqu [rdi], xmm0
            ret
        """,
        code="f30f6f06f30f6f0a660f3837c1f30f7f07c3",
        case=operands.greater,
    ),
    InstructionPath(
        name="AVX",
        architecture="x86_64",
        flag="avx",
        sysctl="hw.optional.avx1_0",
        assembly="""
            vmovups ymm0, [rsi]
            vaddps ymm0, ymm0, [rdx]
            vmovups [rdi], ymm0
            vzeroupper
            ret
        """,
        code="c5fc1006c5fc5802c5fc1107c5f877c3",
        case=lambda: operands.add_floats(8),
    ),
    InstructionPath(
        name="AVX2",
        architecture="x86_64",
        flag="avx2",
        sysctl="hw.optional.avx2_0",
        assembly="""
            vmovdqu ymm0, [rsi]
            vpmaddubsw ymm0, ymm0, [rdx]
            vmovdqu [rdi], ymm0
            vzeroupper
            ret
        """,
        code="c5fe6f06c4e27d0402c5fe7f07c5f877c3",
        case=lambda: operands.pairs_saturated(32),
    ),
    InstructionPath(
        name="FMA",
        architecture="x86_64",
        flag="fma",
        sysctl="hw.optional.fma",
        assembly="""
            vmovups ymm1, [rsi]
            vmovups ymm0, [rsi+32]
            vfmadd231ps ymm0, ymm1, [rdx]
            vmovups [rdi], ymm0
            vzeroupper
            ret
        """,
        code="c5fc100ec5fc104620c4e275b802c5fc1107c5f877c3",
        case=lambda: operands.fused(8),
    ),
    InstructionPath(
        name="F16C",
        architecture="x86_64",
        flag="f16c",
        sysctl="hw.optional.f16c",
        assembly="""
            vcvtph2ps ymm0, [rsi]
            vmovups [rdi], ymm0
            vmovups ymm1, [rdx]
            vcvtps2ph [rdi+32], ymm1, 0
            vzeroupper
            ret
        """,
        code="c4e27d1306c5fc1107c5fc100ac4e37d1d4f2000c5f877c3",
        case=operands.halves,
    ),
    InstructionPath(
        name="AVX-512F",
        architecture="x86_64",
        flag="avx512f",
        sysctl="hw.optional.avx512f",
        assembly="""
            vmovups zmm1, [rsi]
            vmovups zmm0, [rsi+64]
            vfmadd231ps zmm0, zmm1, [rdx]
            vmovups [rdi], zmm0
            vzeroupper
            ret
        """,
        code="62f17c48100e62f17c4810460162f27548b80262f17c481107c5f877c3",
        case=lambda: operands.fused(16),
    ),
    InstructionPath(
        name="AVX-512BW",
        architecture="x86_64",
        flag="avx512bw",
        sysctl="hw.optional.avx512bw",
        assembly="""
            vmovdqu8 zmm0, [rsi]
            vpmaddubsw zmm0, zmm0, [rdx]
            vmovdqu8 [rdi], zmm0
            vzeroupper
            ret
        """,
        code="62f17f486f0662f27d48040262f17f487f07c5f877c3",
        case=lambda: operands.pairs_saturated(64),
    ),
    InstructionPath(
        name="AVX-512DQ",
        architecture="x86_64",
        flag="avx512dq",
        sysctl="hw.optional.avx512dq",
        assembly="""
            vmovdqu64 zmm0, [rsi]
            vpmullq zmm0, zmm0, [rdx]
            vmovdqu64 [rdi], zmm0
            vzeroupper
            ret
        """,
        code="62f1fe486f0662f2fd48400262f1fe487f07c5f877c3",
        case=lambda: operands.products_64(8),
    ),
    InstructionPath(
        name="AVX-512VL",
        architecture="x86_64",
        flag="avx512vl",
        sysctl="hw.optional.avx512vl",
        assembly="""
            vpxor ymm0, ymm0, ymm0
            vmovdqu32 ymm1, [rsi]
            vpternlogd ymm0, ymm1, [rdx], 0x96
            vmovdqu32 [rdi], ymm0
            vzeroupper
            ret
        """,
        code="c5fdefc062f17e286f0e62f3752825029662f17e287f07c5f877c3",
        case=lambda: operands.exclusive_or(32),
    ),
    InstructionPath(
        name="AVX-512 VNNI",
        architecture="x86_64",
        flag="avx512_vnni",
        sysctl="hw.optional.avx512vnni",
        assembly="""
            vpxord zmm0, zmm0, zmm0
            vmovdqu32 zmm1, [rsi]
            vpdpbusd zmm0, zmm1, [rdx]
            vmovdqu32 [rdi], zmm0
            vzeroupper
            ret
        """,
        code="62f17d48efc062f17e486f0e62f27548500262f17e487f07c5f877c3",
        case=lambda: operands.dots(64, "B"),
    ),
    InstructionPath(
        name="AVX-VNNI",
        architecture="x86_64",
        flag="avx_vnni",
        assembly="""
            vpxor ymm0, ymm0, ymm0
            vmovdqu ymm1, [rsi]
            {vex} vpdpbusd ymm0, ymm1, [rdx]
            vmovdqu [rdi], ymm0
            vzeroupper
            ret
        """,
        code="c5fdefc0c5fe6f0ec4e2755002c5fe7f07c5f877c3",
        case=lambda: operands.dots(32, "B"),
    ),
    InstructionPath(
        name="AVX-512 BF16",
        architecture="x86_64",
        flag="avx512_bf16",
        assembly="""
            vpxord zmm0, zmm0, zmm0
            vmovdqu32 zmm1, [rsi]
            vdpbf16ps zmm0, zmm1, [rdx]
            vmovdqu32 [rdi], zmm0
            vzeroupper
            ret
        """,
        code="62f17d48efc062f17e486f0e62f27648520262f17e487f07c5f877c3",
        case=lambda: operands.pairs_bfloat16(32),
    ),
    InstructionPath(
        name="AMX int8",
        architecture="x86_64",
        flag="amx_int8",
        assembly=_TILE_ASSEMBLY.format("tdpbusd"),
        code="b840000000c4e2784906c4e27b49c0c4e27b4b4c0640c4e27b4b1402c4e2695ec1c4e27a4b0407c4e27849c0c3",
        case=operands.tile_bytes,
        asks_for_tiles=True,
    ),
    InstructionPath(
        name="AMX bf16",
        architecture="x86_64",
        flag="amx_bf16",
        assembly=_TILE_ASSEMBLY.format("tdpbf16ps"),
        code="b840000000c4e2784906c4e27b49c0c4e27b4b4c0640c4e27b4b1402c4e26a5cc1c4e27a4b0407c4e27849c0c3",
        case=operands.tile_bfloat16,
        asks_for_tiles=True,
    ),
)

# ---------------------------------------------------------------------------------------------------------------------
# arm64; an out of four floats fits the shortest vectors of SVE and SME, so nothing asks how long they are

AARCH64 = (
    InstructionPath(
        name="NEON",
        architecture="aarch64",
        flag="asimd",
        sysctl="hw.optional.AdvSIMD",
        assembly="""
            ldp q1, q0, [x1]
            ldr q2, [x2]
            fmla v0.4s, v1.4s, v2.4s
            str q0, [x0]
            ret
        """,
        code="210040ad4200c03d20cc224e0000803dc0035fd6",
        case=lambda: operands.fused(4),
    ),
    InstructionPath(
        name="NEON fp16",
        architecture="aarch64",
        flag="asimdhp",
        sysctl="hw.optional.arm.FEAT_FP16",
        assembly="""
            ldr q1, [x1]
            ldr q2, [x2]
            fmul v0.8h, v1.8h, v2.8h
            str q0, [x0]
            ret
        """,
        code="2100c03d4200c03d201c426e0000803dc0035fd6",
        case=operands.multiply_halves,
    ),
    InstructionPath(
        name="dot product",
        architecture="aarch64",
        flag="asimddp",
        sysctl="hw.optional.arm.FEAT_DotProd",
        assembly="""
            movi v0.4s, #0
            ldr q1, [x1]
            ldr q2, [x2]
            sdot v0.4s, v1.16b, v2.16b
            str q0, [x0]
            ret
        """,
        code="0004004f2100c03d4200c03d2094824e0000803dc0035fd6",
        case=lambda: operands.dots(16, "b"),
    ),
    InstructionPath(
        name="i8mm",
        architecture="aarch64",
        flag="i8mm",
        sysctl="hw.optional.arm.FEAT_I8MM",
        assembly="""
            movi v0.4s, #0
            ldr q1, [x1]
            ldr q2, [x2]
            smmla v0.4s, v1.16b, v2.16b
            str q0, [x0]
            ret
        """,
        code="0004004f2100c03d4200c03d20a4824e0000803dc0035fd6",
        case=operands.matrix_i8,
    ),
    InstructionPath(
        name="bf16",
        architecture="aarch64",
        flag="bf16",
        sysctl="hw.optional.arm.FEAT_BF16",
        assembly="""
            movi v0.4s, #0
            ldr q1, [x1]
            ldr q2, [x2]
            bfdot v0.4s, v1.8h, v2.8h
            str q0, [x0]
            ret
        """,
        code="0004004f2100c03d4200c03d20fc426e0000803dc0035fd6",
        case=lambda: operands.pairs_bfloat16(8),
    ),
    InstructionPath(
        name="SVE",
        architecture="aarch64",
        flag="sve",
        assembly="""
            mov x3, #4
            whilelo p0.s, xzr, x3
            ld1w {z1.s}, p0/z, [x1]
            add x4, x1, #16
            ld1w {z0.s}, p0/z, [x4]
            ld1w {z2.s}, p0/z, [x2]
            fmla z0.s, p0/m, z1.s, z2.s
            st1w {z0.s}, p0, [x0]
            ret
        """,
        code="830080d2e01fa32521a040a52440009180a040a542a040a52000a26500e040e5c0035fd6",
        case=lambda: operands.fused(4),
    ),
    InstructionPath(
        name="SME",
        architecture="aarch64",
        flag="sme",
        sysctl="hw.optional.arm.FEAT_SME",
        # entering and leaving streaming mode clears the vector registers, of which d8 to d15 are the caller's
        assembly="""
            stp d8, d9, [sp, #-64]!
            stp d10, d11, [sp, #16]
            stp d12, d13, [sp, #32]
            stp d14, d15, [sp, #48]
            smstart
            mov x3, #4
            whilelo p0.s, xzr, x3
            ld1w {z0.s}, p0/z, [x1]
            ld1w {z1.s}, p0/z, [x2]
            zero {za}
            fmopa za0.s, p0/m, p0/m, z0.s, z1.s
            mov w12, #0
            st1w {za0h.s[w12, #0]}, p0, [x0]
            add x0, x0, #16
            mov w12, #1
            st1w {za0h.s[w12, #0]}, p0, [x0]
            add x0, x0, #16
            mov w12, #2
            st1w {za0h.s[w12, #0]}, p0, [x0]
            add x0, x0, #16
            mov w12, #3
            st1w {za0h.s[w12, #0]}, p0, [x0]
            smstop
            ldp d10, d11, [sp, #16]
            ldp d12, d13, [sp, #32]
            ldp d14, d15, [sp, #48]
            ldp d8, d9, [sp], #64
            ret
        """,
        code=(
            "e827bc6dea2f016dec37026dee3f036d7f4703d5830080d2e01fa32520a040a541a040a5ff0008c0000081800c008052"
            "0000bfe0004000912c0080520000bfe0004000914c0080520000bfe0004000916c0080520000bfe07f4603d5ea2f416d"
            "ec37426dee3f436de827c46cc0035fd6"
        ),
        case=operands.outer,
    ),
)
