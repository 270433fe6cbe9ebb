"""A worker whose every run of the decoder takes longer by a share of its own time, for trials of the method.

    python benchmarks/slowed_worker.py SHARE KIND BUNDLE TEXT THREADS

It is edgepipe.measuring.worker in all else: after a run it keeps the processor busy for SHARE of what the run took.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from edgepipe.measuring import worker
from edgepipe.runtime.onnxruntime import Decoder


def slow_down(share: float) -> None:
    """Let every run of a decoder in this process take longer by `share`."""
    run = Decoder.run

    def slowed(self: Decoder, *arguments: Any) -> Any:
        begun = time.perf_counter()
        logits = run(self, *arguments)
        end = time.perf_counter() + share * (time.perf_counter() - begun)
        while time.perf_counter() < end:
            pass
        return logits

    Decoder.run = slowed  # type: ignore[method-assign]


if __name__ == "__main__":
    slow_down(float(sys.argv[1]))
    worker.main(sys.argv[2:])
