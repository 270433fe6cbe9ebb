"""End with the parent: a measuring process whose starter was killed would go on for minutes and disturb the next one.

The starter holds the one end of a pipe that is the child's stdin. It writes nothing; when it ends, however it ends, the
system closes its end, and the child reads that there will be no more. That works on every system.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def held_stdin() -> Iterator[int]:
    """Give the stdin of one child that is to end with this process; start it and wait for it inside the block."""
    reading, writing = os.pipe()  # children inherit neither, but for what is handed to them as stdin
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


def end_with_parent() -> None:
    """End this process when the one that holds the other end of its stdin does; without a pipe there, do nothing."""
    stdin = sys.__stdin__
    if stdin is not None and stat.S_ISFIFO(os.fstat(stdin.fileno()).st_mode):
        threading.Thread(target=_wait, args=(stdin.fileno(),), name="end-with-parent", daemon=True).start()


def _wait(descriptor: int) -> None:
    while os.read(descriptor, 1):
        pass
    os._exit(1)  # at once: nothing here is worth tidying up
