"""Target: what edgepipe knows about the machine a model is made for, loaded from targets/NAME.toml or from a path."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from edgepipe.errors import ConfigError
from edgepipe.levels import LINUX, Level, gpu_named, level_named
from edgepipe.package_data import did_you_mean, find_named, list_names, read_record

ENGINES = ("onnxruntime", "tvm", "qnn")
AUTO = "auto"  # in place of an engine: the faster one of those the target has
_MAX_THREADS = 1024  # beyond any machine: a larger number is a typing error, and each thread costs a stack


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxruntimeSettings:
    """Hold what the onnxruntime engine is told about this machine."""

    # Least exact arithmetic that MatMulNBits may use for activations: 0 = kernel's choice, 1 = float32, 2 = float16,
    # 3 = bfloat16, 4 = int8; on CPUs 0 to 3 are all float32. Source: MatMulNBits in onnxruntime's ContribOperators.md.
    accuracy_level: int = 0
    threads: int = 0  # threads inside one operator; 0 = one per physical core

    def __post_init__(self) -> None:
        """Refuse values that onnxruntime would ignore or choke on."""
        if not 0 <= self.accuracy_level <= 4:
            raise ConfigError(f"onnxruntime.accuracy_level must be 0 to 4, not {self.accuracy_level}")
        if not 0 <= self.threads <= _MAX_THREADS:
            raise ConfigError(f"onnxruntime.threads must be 0 (all cores) to {_MAX_THREADS}, not {self.threads}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TvmSettings:
    """Hold what a compiled library is built for."""

    level: str = ""  # instructions, a name in edgepipe/levels.py; empty: the best that this machine has
    system: Literal["linux-gnu", "linux-android"] = "linux-gnu"  # whose C library it calls
    gpu: str = ""  # what runs the kernels, a name in edgepipe/levels.py; empty: the processor

    def __post_init__(self) -> None:
        """Refuse levels and GPUs that nobody knows, and a system without a level."""
        if self.gpu:
            gpu_named(self.gpu)
        if self.level:
            level_named(self.level)
        elif self.system != LINUX:
            raise ConfigError(f"tvm.system={self.system} wants a tvm.level: this machine's is Linux")

    @property
    def named(self) -> Level | None:
        """Return the level that is named; None where this machine's is meant."""
        return self.on(level_named(self.level, self.system)) if self.level else None

    def on(self, level: Level) -> Level:
        """Return a level with the GPU that is named."""
        return replace(level, gpu=gpu_named(self.gpu) if self.gpu else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class QnnSettings:
    """Hold what a context binary is compiled for: a chip with a Hexagon NPU."""

    htp_arch: int  # version of its tensor processor, 75 for v75
    soc_model: int  # the number that Qualcomm's SDK gives the chip
    most_tokens: int = 512  # of a text: what was tried
    most_axes: int = 5  # of a tensor

    def __post_init__(self) -> None:
        """Refuse numbers that no chip has."""
        for name, least, most in (("htp_arch", 68, 255), ("soc_model", 1, 65535), ("most_tokens", 8, 1 << 20)):
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"qnn.{name} must be {least} to {most}, not {getattr(self, name)}")
        if not 1 <= self.most_axes <= 8:
            raise ConfigError(f"qnn.most_axes must be 1 to 8, not {self.most_axes}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Hold what a finished model may cost; None = no limit."""

    shipped_ratio: float | None = None  # bytes of the bundle / bytes of the uncompressed model's bundle, > 0
    perplexity_ratio: float | None = None  # perplexity / the uncompressed model's perplexity, > 0 (1 = nothing lost)
    ttft_ms: float | None = None  # time to the first token, milliseconds, > 0

    def __post_init__(self) -> None:
        """Refuse budgets that nothing could meet."""
        for name in ("shipped_ratio", "perplexity_ratio", "ttft_ms"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"budgets.{name} must be a finite number above 0, not {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Describe one machine: facts, engine settings and budgets."""

    name: str  # file name without .toml
    description: str  # one line for `edgepipe targets`
    engines: tuple[str, ...]  # engines that run there, the preferred one first; at least one of ENGINES
    measurable: Literal["here", "emulated", "no"]  # whether speed on it can be measured from this machine
    sparse: tuple[str, ...] = ()  # patterns of zeros ("2:4") that its kernels skip; none: a zero takes as long as any
    onnxruntime: OnnxruntimeSettings = field(default_factory=OnnxruntimeSettings)
    tvm: TvmSettings = field(default_factory=TvmSettings)
    qnn: QnnSettings | None = None  # of a chip with an NPU
    budgets: Budgets = field(default_factory=Budgets)

    def __post_init__(self) -> None:
        """Refuse a target that no engine serves."""
        if not self.engines:
            raise ConfigError(f"engines is empty: name at least one of {', '.join(ENGINES)}")
        for engine in self.engines:
            if engine not in ENGINES:
                hint = did_you_mean(engine, ENGINES)
                raise ConfigError(f"unknown engine {engine!r}{hint}: known are {', '.join(ENGINES)}")
        if len(set(self.engines)) < len(self.engines):
            raise ConfigError(f"engines names one engine twice: {', '.join(self.engines)}")


def list_targets() -> tuple[str, ...]:
    """Return the names of the targets that come with edgepipe, sorted."""
    return list_names("targets")


def zeros_pay(pattern: str) -> str:
    """Say where zeros in a pattern buy speed, and where only bytes, of the targets that come along."""
    skips = [name for name in list_targets() if pattern in load_target(name).sparse]
    others = ", ".join(name for name in list_targets() if name not in skips)
    if not skips:
        return f"Zeros ({pattern}) buy speed on no target: they take as long as other weights, and only bytes are saved"
    slow = f"; on {others} they take as long as other weights, and only bytes are saved" if others else ""
    return f"Zeros ({pattern}) buy speed on {', '.join(skips)}{slow}"


def load_target(name_or_path: str | Path) -> Target:
    """Load a target by name ("cpu") or from a TOML file ("./mine.toml": a path ends in .toml or has a separator).

    Raises ConfigError: unknown name (lists the known ones), unreadable file, unknown key, wrong type, out of range.
    """
    text = str(name_or_path)
    is_path = isinstance(name_or_path, Path) or text.endswith(".toml") or "/" in text or "\\" in text
    path = Path(text) if is_path else find_named("targets", text, "target")
    return read_record(path, Target, {"name": path.stem})
