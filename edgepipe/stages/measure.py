"""Measure: TTFT, time per output token, memory, bytes and perplexity, beside the uncompressed baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe.artifacts import CompiledModel, Context, Json, Measured
from edgepipe.calibration import describe_set
from edgepipe.errors import ConfigError

if TYPE_CHECKING:
    from edgepipe.measuring.run import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """Options of the stage `measure`."""

    text: str = "prose-eval"  # name of an evaluation set in calibration/
    tokens: int = 8192  # perplexity is scored on at most this many tokens, from the text's beginning; 0: all of it
    blocks: int = 2  # fresh processes per bundle; within one, bundle and baseline take turns
    turns: int = 4  # per process: one prompt of every length and the output tokens each
    prompt_tokens: int = 128  # of the prompt or source whose TTFT is the headline
    output_tokens: int = 80  # that follow it, in bursts of 5; the first of a burst isn't counted
    threads: int = 0  # 0 takes the target's

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.blocks < 1 or self.turns < 1 or self.threads < 0:
            raise ConfigError(
                "measure.blocks must be at least 1, measure.turns must be at least 1 and "
                f"measure.threads must not be negative, got {self.blocks}, {self.turns} and {self.threads}"
            )
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise ConfigError(
                "measure.prompt_tokens and measure.output_tokens must be at least 1, "
                f"got {self.prompt_tokens} and {self.output_tokens}"
            )
        if self.tokens == 1 or self.tokens < 0:
            raise ConfigError(f"measure.tokens: expected at least 2, or 0 for the whole text, got {self.tokens}")
        if describe_set(self.text).purpose != "evaluation":
            raise ConfigError(f"measure.text: {self.text} is for calibration, a score on it would flatter the bundle")

    def __call__(self, model: CompiledModel, ctx: Context) -> Measured:
        """Return the bundle with its figures; where no baseline was built they say so."""
        bundles = {"bundle": model.path}
        if ctx.baseline is not None:
            bundles = {"baseline": ctx.baseline.path, **bundles}
        else:
            ctx.note(f"no float32 baseline: {ctx.no_baseline or 'none was asked for'}")
        threads = ctx.target.onnxruntime.threads
        figures = self.figures(bundles, default_threads=threads, progress=ctx.progress, work_dir=ctx.work_dir)
        return Measured(model=model, figures=figures, history=model.history)

    def figures(
        self,
        bundles: Mapping[str, Path],
        *,
        default_threads: int,
        progress: Callable[[str, int, int], None],
        work_dir: Path | None = None,
    ) -> Json:
        """Measure the directory called "bundle", and the one called "baseline" beside it where there is one."""
        from edgepipe.calibration import open_text
        from edgepipe.measuring.run import measure_bundles

        text = open_text(self.text, purpose="evaluation")
        plan = self.plan(default_threads)
        return measure_bundles(bundles, text, plan, progress=progress, work_dir=work_dir) | {"text": self.text}

    def plan(self, default_threads: int) -> Plan:
        """Return how much is measured."""
        from edgepipe.measuring.run import Plan

        return Plan(
            threads=self.threads or default_threads,
            blocks=self.blocks,
            turns=self.turns,
            tokens=self.tokens,
            prompt=self.prompt_tokens,
            output=self.output_tokens,
        )
