"""Try things in child processes: what kills a child is a finding about the thing it tried, and the others go on.

A child is `python -P -m MODULE NAME…`. It writes two JSON lines per name, `{"begin": NAME}` before it tries and
`{"name": NAME, "state": …, "detail": …}` after. When it dies in between, that name gets the finding, and a new child
goes on with the names behind it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

WORKS = "works"
WRONG = "wrong result"
DIES = "dies"
REFUSED = "refused"  # by the system, which is no fault of what was tried
_MOST_CHARACTERS = 300  # of a sentence that a child wrote


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Say how one thing went: WORKS, WRONG, DIES or REFUSED, and what there is to say about it."""

    name: str
    state: str
    detail: str = ""


def try_in_children(module: str, names: Sequence[str], *, timeout_s: float, given: str = "") -> tuple[Outcome, ...]:
    """Return one outcome per name, in order; `given` is what each child reads from stdin.

    A child may take `timeout_s` seconds in all; one that takes longer is killed, and that counts as dying.
    """
    outcomes: list[Outcome] = []
    while len(outcomes) < len(names):
        waiting = names[len(outcomes) :]
        found, begun, death = _run(module, waiting, timeout_s, given)
        outcomes += found[: len(waiting)]
        if len(found) < len(waiting):
            # nothing begun: the child can't even start, and neither would the next
            victims = waiting[len(found) : len(found) + 1] if begun > len(found) else waiting[len(found) :]
            outcomes += [Outcome(name=name, state=DIES, detail=death) for name in victims]
    return tuple(outcomes)


def _run(module: str, names: Sequence[str], timeout_s: float, given: str) -> tuple[list[Outcome], int, str]:
    """Run one child; return what it finished, how many it began, and how it ended."""
    # -P: a json.py in the directory the user happens to work in must not be taken for Python's
    command = [sys.executable, "-P", "-m", module, *names]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace") as child:
        try:
            out, err = child.communicate(given, timeout=timeout_s)
            death = _death(child.returncode, err)
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
            death = f"took longer than {timeout_s:g} s"
    found, begun = [], 0
    for line in out.splitlines():
        try:
            said = json.loads(line)
        except ValueError:  # a library that writes to stdout, or a line cut by the child's death
            continue
        if isinstance(said, dict) and "begin" in said:
            begun += 1
        elif isinstance(said, dict) and "state" in said:
            found.append(Outcome(name=said["name"], state=said["state"], detail=said["detail"]))
    return found, begun, death


def _death(code: int, stderr: str) -> str:
    """Say how a child ended: the signal's name, or the exit code with the last line it wrote."""
    if code < 0:
        try:
            return f"dies with {signal.Signals(-code).name}"
        except ValueError:
            return f"dies with signal {-code}"
    last = (stderr.strip().splitlines() or ["no message"])[-1]
    return f"ends with exit code {code}: {last}"[:_MOST_CHARACTERS]
