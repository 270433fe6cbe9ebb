"""Every exception edgepipe raises on purpose, and the exit code each one means.

    EdgepipeError
    ├── ConfigError         the request is wrong (unknown name, value out of range, wrong order)      exit 2
    ├── StageError          a stage failed; says which, and what was already done                     exit 1
    │   └── ContractError   our own promise broke: shape, dtype, numeric mismatch                     exit 1
    ├── TargetError         this target or machine cannot do it; names the extra or file to add       exit 1
    └── BudgetError         no bundle keeps what was asked for; none was shipped                      exit 3

A message is one sentence or two: what was expected, what came, what to do next.
"""

from __future__ import annotations


class EdgepipeError(Exception):
    """Base of everything edgepipe raises on purpose; its text is fit to be shown to a user."""

    exit_code = 1


class ConfigError(EdgepipeError):
    """Say that the request itself is wrong: nothing was started."""

    exit_code = 2


class StageError(EdgepipeError):
    """Say that a stage failed after the request had been accepted."""

    def __init__(self, message: str, *, stage: str | None = None, done: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.stage = stage
        self.done = done


class ContractError(StageError):
    """Say that edgepipe broke its own promise (a numeric check, a shape, a missing tensor)."""


class TargetError(EdgepipeError):
    """Say that this target or machine cannot do what was asked."""


class BudgetError(EdgepipeError):
    """Say that no bundle keeps to the budget, so that there is none."""

    exit_code = 3
