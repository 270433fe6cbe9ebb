"""Levels of instructions that a compiled library can be built for, and GPUs beside the processor.

A level names LLVM's target and the flags that /proc/cpuinfo must show, so that the runtime can refuse a library before
it dies of an illegal instruction. Sources: the x86-64 psABI for v2 to v4; Arm's feature registers as Linux names them;
the RISC-V profile RVA20 for what every 64-bit distribution asks for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgepipe.errors import ConfigError
from edgepipe.package_data import did_you_mean

LINUX, ANDROID = "linux-gnu", "linux-android"  # systems, as the end of LLVM's triple names them
_V2 = ("cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3")
_V3 = (*_V2, "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
# What every GPU named here gives a block of threads. Source: NVIDIA, CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability".
_BLOCK = {"max_threads_per_block": 1024, "max_shared_memory_per_block": 48 * 1024, "thread_warp_size": 32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Name the GPUs of NVIDIA that a library's kernels are compiled for; 87 is compute capability 8.7, sm_87."""

    name: str
    compiled: tuple[int, ...]  # there is machine code for these
    readable: int = 0  # assembly text that a driver compiles for this and newer ones; 0: none


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Describe one level of instructions, under one system."""

    name: str
    machine: str  # as `uname -m` says, and as LLVM's triple begins
    mcpu: str
    mattr: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()  # of /proc/cpuinfo; none: every machine of the kind has it
    mabi: str = ""  # where LLVM's default isn't the system's
    rows: int = 4  # of x that share a load of weights: as many as the registers hold
    byte_products: str = ""  # what multiplies bytes: vpdpbusd, sdot or vrmpy; empty: they are multiplied as floats
    table: bool = False  # one instruction looks 16 floats up by 4 bits each: vpermps of AVX-512
    system: str = LINUX
    gpu: Gpu | None = None  # runs the kernels; the rest is for the processor beside it

    @property
    def title(self) -> str:
        """Return what sentences call it."""
        return self.name if self.gpu is None else f"{self.name} with {self.gpu.name}"

    @property
    def triple(self) -> str:
        """Return LLVM's name of processor and system."""
        return f"{self.machine}-{self.system}"

    def target(self) -> dict[str, object]:
        """Return the description of GPU and processor, as TVM takes it."""
        abi = {"mabi": self.mabi} if self.mabi else {}
        host: dict[str, object] = {
            "kind": "llvm",
            "mtriple": self.triple,
            "mcpu": self.mcpu,
            "mattr": list(self.mattr),
            **abi,
        }
        if self.gpu is None:
            return host
        return {"kind": "cuda", "arch": f"sm_{min(self.gpu.compiled)}", **_BLOCK, "host": host}


# The preferred one of a machine first. AVX-512 in whole registers: LLVM would halve them for older processors' clocks.
LEVELS = (
    Level(
        name="x86-64-v4-vnni",
        machine="x86_64",
        mcpu="x86-64-v4",
        mattr=("+avx512vnni", "-prefer-256-bit"),
        flags=(*_V4, "avx512_vnni"),
        rows=8,
        byte_products="vpdpbusd",
        table=True,
    ),
    Level(
        name="x86-64-v4",
        machine="x86_64",
        mcpu="x86-64-v4",
        mattr=("-prefer-256-bit",),
        flags=_V4,
        rows=8,
        table=True,
    ),
    Level(name="x86-64-v3", machine="x86_64", mcpu="x86-64-v3", flags=_V3),
    Level(
        name="armv8.2-a",
        machine="aarch64",
        mcpu="cortex-a76",
        flags=("asimd", "asimdhp", "asimddp", "asimdrdm", "atomics", "crc32", "fphp", "lrcpc"),
        byte_products="sdot",
    ),
    Level(
        name="armv8-a",
        machine="aarch64",
        mcpu="cortex-a72",
        mattr=("-aes", "-sha2"),  # LLVM gives a Cortex-A72 the cryptography that it may leave out, as a Pi 4's does
        flags=("asimd", "crc32"),
    ),
    Level(
        name="rv64gc",
        machine="riscv64",
        mcpu="generic-rv64",
        mattr=("+m", "+a", "+f", "+d", "+c"),
        mabi="lp64d",
    ),
)

# Kernels alone, and no target: no package has TVM's runtime for these. Sources: Qualcomm, Hexagon V67 HVX Programmer's
# Reference Manual (80-N2040-46), vectors of 128 bytes; WebAssembly's proposal of fixed-width SIMD.
HEXAGON = Level(
    name="hexagonv67",
    machine="hexagon",
    mcpu="hexagonv67",
    mattr=("+hvxv67", "+hvx-length128b"),
    byte_products="vrmpy",
    system="linux-musl",
)
WASM = Level(name="wasm32", machine="wasm32", mcpu="generic", mattr=("+simd128",), system="wasi")

# Machine code of an architecture runs on later ones of its generation on a desktop or server, and nowhere else on a
# Jetson. Source: NVIDIA, CUDA C++ Programming Guide, "Binary Compatibility". CUDA 13 compiles for 7.5 and newer.
GPUS = (
    Gpu(name="nvidia", compiled=(75, 80, 90), readable=90),  # Turing, Ampere and Ada, Hopper; Blackwell reads the text
    Gpu(name="sm_87", compiled=(87,)),
)


def gpu_named(name: str) -> Gpu:
    """Return the GPUs of a name; ConfigError lists those there are."""
    for gpu in GPUS:
        if gpu.name == name:
            return gpu
    known = [gpu.name for gpu in GPUS]
    raise ConfigError(f"unknown GPU {name!r}{did_you_mean(name, known)}: known are {', '.join(known)}")


def level_named(name: str, system: str = LINUX) -> Level:
    """Return the level of a name under a system; ConfigError lists those there are."""
    for level in LEVELS:
        if level.name == name:
            return replace(level, system=system)
    known = [level.name for level in LEVELS]
    raise ConfigError(f"unknown level {name!r}{did_you_mean(name, known)}: known are {', '.join(known)}")
