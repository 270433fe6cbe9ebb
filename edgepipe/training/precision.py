"""Decide whether a model computes in bfloat16: weights and sums stay float32, products don't.

By the machine's facts, never by a clock: the same recipe gives the same bytes run after run. GPUs that have bfloat16
gain by it, and so do CPUs with AMX or AVX512-BF16: on an AMD EPYC with the latter a step of a student of 34 million
parameters takes 0.6 of its float32 time, one of a teacher's adapters 0.6, scoring by the teacher 0.5 to 0.6.
"""
# ruff: noqa: TID253  asks torch about the machine: this file is imported only where a model is trained

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["bf16", "no"]


def choose_precision(asked: str, device: torch.device) -> Precision:
    """Return bf16 or no for a wish of bf16, no or auto."""
    if asked != "auto":
        return "bf16" if asked == "bf16" else "no"
    if device.type == "cuda":
        gains = torch.cuda.is_bf16_supported()
    else:
        gains = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if gains else "no"
