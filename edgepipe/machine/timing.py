"""Whether figures taken now would be worth something: the clock, the counters, how busy the machine is, how steady.

The spread is (95th − 5th percentile) ÷ median of a fixed loop, timed again and again for half a second on one core. The
loop is Python's own, and about as long as a step of a small model.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING

from edgepipe.machine.facts import read_text

if TYPE_CHECKING:
    from edgepipe.artifacts import Json

STEADY = 0.10  # a spread above this share of the median is worth a warning
BUSY = 0.5  # a load above this share of the cores likewise: others take turns with what is measured
COARSEST_CLOCK_S = 1e-5  # a step of a small model takes some milliseconds
_SECONDS = 0.5
_LOOP_S = 0.004
_FEWEST = 20
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def describe_timing() -> Json:
    """Return clock, counters, load and spread; takes about half a second."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # before the loop adds to it
    stolen = _stolen_ticks()
    samples = _time_a_loop()
    return {
        "clock_resolution_s": time.get_clock_info("perf_counter").resolution,
        "clock_step_s": _smallest_step(),
        "peak_memory_readable": _peak_memory_readable(),
        "load": load,
        "governor": read_text(_GOVERNOR) or None,  # None: hidden, as in most virtual machines
        "stolen_share": _share_stolen(stolen, _stolen_ticks()),
        "loop_ms": round(1e3 * median(samples), 3),
        "spread_ratio": round(spread(samples), 4),
        "samples": len(samples),
    }


def spread(samples: list[float]) -> float:
    """Return (95th − 5th percentile) ÷ median."""
    cuts = quantiles(samples, n=20)
    return (cuts[-1] - cuts[0]) / median(samples)


def _time_a_loop() -> list[float]:
    """Return seconds of many runs of one loop that takes about _LOOP_S."""
    rounds = 1000
    while min(_loop(rounds) for _ in range(3)) < _LOOP_S:  # the least: a turn of somebody else's is not the loop
        rounds *= 2
    samples: list[float] = []
    started = time.perf_counter()
    while time.perf_counter() - started < _SECONDS or len(samples) < _FEWEST:
        samples.append(_loop(rounds))
    return samples


def _loop(rounds: int) -> float:
    begun = time.perf_counter()
    value = 1
    for _ in range(rounds):
        value = value * 1103515245 + 12345 & 0x7FFFFFFF
    return time.perf_counter() - begun


def _smallest_step() -> float:
    """Return the smallest time above zero between two readings of the clock."""
    smallest = 1.0
    for _ in range(1000):
        begun = time.perf_counter()
        while (now := time.perf_counter()) == begun:
            pass
        smallest = min(smallest, now - begun)
    return smallest


def _peak_memory_readable() -> bool:
    """Say whether the peak of a process can be read: VmHWM on Linux, getrusage on other Unix systems."""
    return "VmHWM:" in read_text(Path("/proc/self/status")) or sys.platform == "darwin"


def _stolen_ticks() -> tuple[int, int] | None:
    """Return (ticks that the host took from this virtual machine, all ticks) so far."""
    words = read_text(Path("/proc/stat")).partition("\n")[0].split()[1:]
    ticks = [int(word) for word in words if word.isdigit()]
    return (ticks[7], sum(ticks[:8])) if len(ticks) >= 8 else None


def _share_stolen(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    if before is None or after is None or after[1] == before[1]:
        return None
    return round((after[0] - before[0]) / (after[1] - before[1]), 4)
