"""A child that dies as its names say: `python -m tests.machine.dying fine sigill hang …`."""

from __future__ import annotations

import os
import signal
import sys
import time

from edgepipe.machine.child import attempt_all
from edgepipe.machine.children import WORKS, WRONG


def attempt(name: str) -> tuple[str, str]:
    """Do what the name says."""
    sys.stdout.write("what a library writes to stdout\n")
    if name.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[name])
    elif name == "hang":
        time.sleep(60)
    elif name == "exit":
        sys.stderr.write("the last words\n")
        os._exit(3)
    elif name == "raise":
        raise ValueError("two\nlines")
    return (WRONG, "one off") if name == "wrong" else (WORKS, "")


if __name__ == "__main__":
    if "unable" in sys.argv:
        raise SystemExit("can't even start")
    attempt_all(sys.argv[1:], attempt)
