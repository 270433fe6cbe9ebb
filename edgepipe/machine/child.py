"""What a child process of the doctor says, and what it may leave behind: two lines per thing tried, no core file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from edgepipe.machine.children import WRONG

Attempt = Callable[[str], tuple[str, str]]  # a name → state and detail


def attempt_all(names: list[str], attempt: Attempt) -> None:
    """Try each name and write how it went; an exception is a wrong result, with its sentence."""
    _leave_no_core_file()
    for name in names:
        _say({"begin": name})
        try:
            state, detail = attempt(name)
        except Exception as error:
            state, detail = WRONG, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        _say({"name": name, "state": state, "detail": detail})


def _say(value: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _leave_no_core_file() -> None:
    try:
        import resource  # not on Windows
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
