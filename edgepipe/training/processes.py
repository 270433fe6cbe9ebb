"""Several processes of one training: what they share, and how those beside the first one follow it.

A launcher starts the same command several times (training/loop.py). The first process does everything that `edgepipe`
does, alone; when its stage `distill` begins it calls the others, who make the same teacher and student and take their
part of every batch. Folders are the first process's, so what lies there (scores, texts) wants a disk that all of them
see; checkpoints don't. Without a launcher a process is the first of one, and nothing here does anything.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from edgepipe.artifacts import Context, TorchModel
from edgepipe.target import Target

_TRAIN, _DONE = "train", "done"
_PATIENCE = timedelta(days=7)  # the others wait for as long as the first one's other stages take


def _state() -> Any:
    """Return accelerate's record of the processes, made with our patience if it is the first time."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # without this it would take processes on a machine without a GPU for strangers
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=_PATIENCE)


def shared(make: Callable[[], Any]) -> Any:
    """Return what the first process makes, in all of them; the others wait."""
    from accelerate.utils import broadcast_object_list

    state = _state()
    made = [make() if state.is_main_process else None]
    return broadcast_object_list(made)[0] if state.num_processes > 1 else made[0]


def mine(count: int) -> range:
    """Return this process's share of `count` pieces of work."""
    state = _state()
    return range(state.process_index, count, state.num_processes)


def device() -> Any:
    """Return the device of this process: its GPU, or the CPU."""
    return _state().device


def wait_for_all() -> None:
    """Go on when every process is here."""
    _state().wait_for_everyone()


def _launched() -> tuple[int, int]:
    """Return this process's number and how many there are, as launchers say it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def several() -> bool:
    """Say whether a launcher started more than one process."""
    return _launched()[1] > 1


def follows() -> bool:
    """Say whether this process is there to help the first one."""
    number, count = _launched()
    return number > 0 and count > 1


def is_alone() -> bool:
    """Say whether this process is the only one of its training."""
    return _launched()[1] == 1


def call_the_others() -> None:
    """Tell the processes that follow that a training begins; they come to it by themselves (`follow`)."""
    number, count = _launched()
    if number == 0 and count > 1:
        shared(lambda: _TRAIN)


def dismiss_the_others() -> None:
    """Tell them that there will be no more."""
    number, count = _launched()
    if number == 0 and count > 1:
        shared(lambda: _DONE)


def follow(model: TorchModel, stages: Sequence[tuple[str, Any]], target: Target, seed: int) -> None:
    """Help the first process train, as often as it calls: run its stages up to `distill`, and forget the result."""
    while shared(lambda: None) == _TRAIN:
        with tempfile.TemporaryDirectory() as folder:
            artifact = model
            for name, stage in stages:
                work_dir = Path(folder) / name
                work_dir.mkdir()
                artifact = stage(artifact, Context(target=target, work_dir=work_dir, seed=seed))
                if name == "distill":
                    break
