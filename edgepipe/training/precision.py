"""Decide whether a model computes in bfloat16: weights and sums stay float32, products don't.

By the machine's facts, never by a clock: the same recipe gives the same bytes run after run. A GPU that has bfloat16
gains by it, and so does a CPU with AMX. A CPU with AVX512-BF16 alone gains where a teacher only reads (1.7 to 1.9 times
as fast, SmolLM2 over E2E on an AMD EPYC), not where gradients flow too: casting weights and activations costs as much.
"""
# ruff: noqa: TID253  asks torch about the machine: this file is imported only where a model is trained

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["bf16", "no"]


def choose_precision(asked: str, device: torch.device, *, trains: bool) -> Precision:
    """Return bf16 or no for a wish of bf16, no or auto; `trains` says whether gradients are computed."""
    if asked != "auto":
        return "bf16" if asked == "bf16" else "no"
    if device.type == "cuda":
        gains = torch.cuda.is_bf16_supported()
    else:
        gains = torch.cpu._is_amx_tile_supported() or (not trains and torch.cpu._is_avx512_bf16_supported())
    return "bf16" if gains else "no"
