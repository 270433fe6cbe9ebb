"""Options of layers with one scale a row: what is refused of them, and the grid of the tokens they read.

Such layers are ternary, or have 4 bits and dynamic activations. Nothing heavy is imported here: options are checked
before any work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgepipe.artifacts import StageRecord, TokenGrid
from edgepipe.errors import ConfigError
from edgepipe.numerics.sparsity import pattern_of
from edgepipe.numerics.ternary import MEASURES

if TYPE_CHECKING:
    from edgepipe.stages.quantize import Quantize

TERNARY = 1.58  # bits of a digit with three values: log2 3
TERNARY_PAIRS = (
    "ternary encoder-decoders came out consistently worse than 16-bit ones, whatever their width (arXiv:2411.05882, as "
    "published at ICAART 2025): compare this one's quality with its baseline's before it ships"
)
_FOUR = "--bits 4 with quantize.activations=dynamic"
_TRAINING: tuple[str, ...] = ("data", "columns", "held_out", "batch", "learning_rate", "warmup", "precision")
_TRAINING += ("logits", "hidden", "attention", "targets", "strength_steps", "scratch")


def by_token(options: Quantize) -> bool:
    """Say whether layers have one scale a row and read rounded tokens."""
    return options.bits == TERNARY or (options.bits == 4 and options.activations == "dynamic")


def token_grid(options: Quantize) -> TokenGrid:
    """Return the grid of these tokens."""
    if options.bits == TERNARY:
        return TokenGrid(bits=8, form="largest")
    return TokenGrid(bits=options.activation_bits, form="signed" if options.activation_symmetric else "zero points")


def check_tokens(options: Quantize) -> None:
    """Refuse options of rounded tokens that are out of range, or say nothing."""
    if options.activation_bits not in (4, 8):
        raise ConfigError(f"quantize.activation_bits: expected 4 or 8, got {options.activation_bits}")
    if options.ternary not in MEASURES:
        raise ConfigError(f"quantize.ternary: expected one of {', '.join(MEASURES)}, got {options.ternary!r}")
    ternary = options.bits == TERNARY
    if ternary and not (options.symmetric and options.method == "rtn"):
        raise ConfigError("quantize.bits=1.58 has one scale a matrix: leave zero points and other methods out")
    if ternary and options.activations != "none":
        raise ConfigError("quantize.bits=1.58 rounds activations by itself: leave quantize.activations out")
    if by_token(options) and options.agreement:
        raise ConfigError(
            "quantize.agreement gives single layers more bits, which those with one scale a row can't take: leave it "
            f"out at --bits 1.58, and at {_FOUR}"
        )
    four = options.bits == 4 and options.activations == "dynamic"
    for names, applies, where in (
        (("activation_bits", "activation_symmetric"), four, _FOUR),
        (("ternary", "normalize"), ternary, "--bits 1.58"),
    ):
        if not applies:
            _refuse_others(options, names, f"is for {where}: leave it out")


def check_median(options: Quantize, history: Sequence[StageRecord]) -> None:
    """Refuse the median of matrices that `prune` has put zeros into half of: it would be zero, and so the scale."""
    pattern = pattern_of(history)
    if options.bits == TERNARY and options.ternary == "median" and pattern is not None and pattern.share >= 0.5:
        raise ConfigError(
            f"quantize.ternary=median: half of the weights are zero or more ({pattern.name}), so their median is no "
            "scale: set quantize.ternary=mean"
        )


def check_training(options: Quantize) -> None:
    """Refuse options of training that are out of range, or say nothing."""
    for name in ("steps", "strength_steps", "logits", "hidden", "attention", "targets"):
        if getattr(options, name) < 0:
            raise ConfigError(f"quantize.{name}: expected at least 0, got {getattr(options, name)}")
    if not 0 < options.held_out < 1:
        raise ConfigError(f"quantize.held_out: expected a share between 0 and 1, got {options.held_out}")
    if not options.steps:
        if options.bits == TERNARY:
            raise ConfigError("quantize.bits=1.58: ternary layers are trained: give quantize.steps and quantize.data")
        _refuse_others(options, _TRAINING, "is for training on the grid: give quantize.steps, or leave it out")
    elif not by_token(options):
        raise ConfigError(f"quantize.steps trains ternary layers, or {_FOUR}: set that, or leave steps out")
    elif not options.data:
        raise ConfigError("quantize.steps: layers are trained with data: give a file as quantize.data")
    elif not (options.logits or options.hidden or options.attention or options.targets):
        raise ConfigError("quantize.steps: every loss has the weight 0, so nothing would be learnt: give one a weight")


def _refuse_others(options: Quantize, names: tuple[str, ...], why: str) -> None:
    """Raise ConfigError for options that have another value than usual."""
    usual = {field.name: field.default for field in dataclasses.fields(options)}
    for name in names:
        if getattr(options, name) != usual[name]:
            raise ConfigError(f"quantize.{name} {why}")
