"""Decide whether a model is trained in bfloat16: weights and sums stay float32, products don't.

A GPU can or it cannot. A CPU may have the instructions (AVX512-BF16, AMX) and gain nothing, because weights and
activations are cast around every product; so there one step of the training itself is timed both ways.
"""
# ruff: noqa: TID253  asks torch about the machine: this file is imported only where a model is trained

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch

Precision = Literal["auto", "bf16", "no"]
_GAIN = 1.1  # float32 is given up for no less
_TRIES = 3


def choose_precision(asked: str, device: torch.device, step: Callable[[bool], None]) -> Literal["bf16", "no"]:
    """Return bf16 or no for this machine; `step(True)` runs one step in bfloat16, to be timed."""
    if asked != "auto":
        return "bf16" if asked == "bf16" else "no"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    if device.type != "cpu" or not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "no"
    seconds = {True: float("inf"), False: float("inf")}
    for short in [False, True] * _TRIES:  # in turns: whatever else the machine does hits both
        begun = time.perf_counter()
        step(short)
        seconds[short] = min(seconds[short], time.perf_counter() - begun)
    return "bf16" if seconds[False] > _GAIN * seconds[True] else "no"
