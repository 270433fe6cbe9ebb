"""What several processes of one training share: one of them makes it, all of them have it.

The launcher starts them (training/loop.py); alone, a process is the first of one. Folders are the first process's, so
what lies there (scores, texts) wants a disk that all of them see; checkpoints don't.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def shared(make: Callable[[], Any]) -> Any:
    """Return what the first process makes, in all of them; the others wait."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    made = [make() if state.is_main_process else None]
    return broadcast_object_list(made)[0] if state.num_processes > 1 else made[0]


def mine(count: int) -> range:
    """Return this process's share of `count` pieces of work."""
    from accelerate import PartialState

    state = PartialState()
    return range(state.process_index, count, state.num_processes)


def device() -> Any:
    """Return the device of this process: its GPU, or the CPU."""
    from accelerate import PartialState

    return PartialState().device


def wait_for_all() -> None:
    """Go on when every process is here."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()
