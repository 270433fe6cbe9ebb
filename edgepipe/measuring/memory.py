"""Read how much memory this process has needed at most."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process: VmHWM where /proc has it, else ru_maxrss."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
