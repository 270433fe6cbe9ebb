"""A listener for runs inside tests: it keeps what it hears."""

from __future__ import annotations

from collections.abc import Sequence


class Silent:
    """Hear a run without printing; remember which stages ran and which were reused."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.reused: list[str] = []
        self.notes: list[str] = []

    def begin(self, stage: str, number: int, total: int) -> None:
        """Hear that a stage begins."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Hear how far it is."""

    def end(self, stage: str, seconds: float, *, reused: bool, notes: Sequence[str]) -> None:
        """Hear that a stage is done."""
        (self.reused if reused else self.ran).append(stage)
        self.notes.extend(notes)
