"""Fake quantization: layers that compute as the bundle will, while training still sees their float weights.

    rows      W → the 2-, 4- or 8-bit grid with one scale a row        numerics/grids.py, to the bit
    ternary   W → −scale, 0, scale                                     numerics/ternary.py, to the bit
    tokens    x → at most 2^bits levels, a scale for every token       numerics/tokens.py, to the bit

    fake(v) = v + λ · (q(v) − v)          its gradient is that of v alone (straight-through, nothing is masked)

λ is 1 where nothing else is said; below it, rounding is phased in. BitLinear (arXiv:2411.05882) also sends x through a
LayerNorm without weights: here over each token alone, since the authors' code takes all tokens of a text together,
which neither padding nor a decoder that sees a token at a time allows. Its bias is added after scaling, not before.
"""
# ruff: noqa: TID253  this is training's side of the grids: imported only where a model is trained

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgepipe.artifacts import TokenGrid
from edgepipe.graph.bitlinear import EPSILON as EPSILON_OF_NORM
from edgepipe.numerics.ternary import EPSILON, LARGEST
from edgepipe.numerics.tokens import TINY

_SMALLEST_FP16 = 2.0**-20  # as in numerics/grids.py


def straight_through(value: Tensor, rounded: Tensor, strength: float = 1.0) -> Tensor:
    """Return `rounded`, to the bit at strength 1, with the gradient of `value`."""
    with torch.no_grad():
        mixed = rounded if strength == 1 else value + strength * (rounded - value)
    return mixed.detach() + (value - value.detach())


@torch.no_grad()
def on_rows(weight: Tensor, bits: int) -> Tensor:
    """Return weight [out, in] on the symmetric grid with one float16 scale a row."""
    half = 1 << (bits - 1)
    weight = weight.float()
    extreme = _extreme(weight.amax(-1, keepdim=True), weight.amin(-1, keepdim=True))
    scale = extreme / -half
    magnitude = scale.abs().clamp(_SMALLEST_FP16, LARGEST)
    scale = torch.where(scale == 0, 1.0, torch.copysign(magnitude, scale)).half().float()
    return scale * torch.clamp(torch.round(weight / scale), -half, half - 1)


@torch.no_grad()
def on_ternary(weight: Tensor, measure: str) -> Tensor:
    """Return weight [out, in] on its ternary grid."""
    magnitudes = weight.float().abs()
    found = magnitudes.double().mean().float() if measure == "mean" else magnitudes.median()
    scale = found.clamp(EPSILON, LARGEST).half().float()
    return scale * torch.clamp(torch.round(weight.float() / scale), -1, 1)


@torch.no_grad()
def on_tokens(x: Tensor, grid: TokenGrid) -> Tensor:
    """Return x [..., n] with every row of the last axis on its own grid."""
    x = x.float()
    half, top = 1 << (grid.bits - 1), (1 << grid.bits) - 1
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if grid.form == "zero points":
        low, high = low.clamp_max(0), high.clamp_min(0)
        scale = _never_zero((high - low) / top)
        zero = torch.round(-low / scale)
        return scale * torch.maximum(torch.minimum(torch.round(x / scale), top - zero), -zero)
    extreme = _extreme(high, low)
    scale = _never_zero(extreme / -half if grid.form == "signed" else extreme.abs() / (half - 1))
    return scale * torch.clamp(torch.round(x / scale), -half, half - 1)


def _extreme(high: Tensor, low: Tensor) -> Tensor:
    return torch.where(high > -low, high, low)


def _never_zero(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < TINY, 1.0, scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class Faked:
    """Say how layers compute."""

    bits: int = 4  # of rows; not looked at where they are ternary
    ternary: str = ""  # the measure of the scale: median, mean; empty: rows of `bits`
    tokens: TokenGrid | None = None  # None: activations stay floats
    normalizes: bool = False  # whether x goes through the LayerNorm without weights


@dataclass(slots=True)
class Dial:
    """Hold the strength that all layers share; training turns it."""

    strength: float = 1.0


def fake_layers(module: Any, names: Iterable[str], faked: Faked) -> Dial:
    """Let the linear layers whose weights are called `names` compute as the bundle will; return their dial."""
    dial = Dial()
    for name in names:
        layer = module.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, nn.Linear), name
        layer.forward = partial(_forward, layer, faked, dial)  # type: ignore[method-assign]
    return dial


def _forward(layer: nn.Linear, faked: Faked, dial: Dial, x: Tensor) -> Tensor:
    """Compute what a layer gives for x [..., in]."""
    if faked.normalizes:
        x = functional.layer_norm(x.float(), x.shape[-1:], eps=EPSILON_OF_NORM)
    if faked.tokens is not None:
        x = straight_through(x.float(), on_tokens(x, faked.tokens), dial.strength)
    weight = layer.weight
    rounded = on_ternary(weight, faked.ternary) if faked.ternary else on_rows(weight, faked.bits)
    return functional.linear(x, straight_through(weight, rounded, dial.strength), layer.bias)
