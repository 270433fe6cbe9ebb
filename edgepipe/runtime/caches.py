"""Lend key/value caches to callers, and remember which tokens each one holds.

The pool has at most `most` borrowers at a time; others wait. A new prompt gets the idle cache that shares the longest
beginning with it, so a chat that grows turn by turn runs only what is new. A cache is made when no idle one is there:
memory follows the callers that were there at once, not the conversations.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from edgepipe.errors import ConfigError


@dataclass(slots=True, kw_only=True)
class Slot:
    """Pair a cache with the tokens it holds; used by one caller at a time."""

    cache: Any  # opaque to all but the engine
    ids: list[int] = field(default_factory=list)  # tokens whose keys and values are in the cache, in order


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens both begin with."""
    length = min(len(first), len(second))
    return next((index for index in range(length) if first[index] != second[index]), length)


class CachePool:
    """Lend slots of one row each, and the right to run a batch; safe for use from several threads."""

    def __init__(self, make_cache: Callable[[], Any], most: int) -> None:
        self._make_cache = make_cache
        self._most = most
        self._borrowers: list[int] = []  # the thread of each
        self._idle: list[Slot] = []  # least recently used first
        self._changed = threading.Condition()  # over a re-entrant lock: a collected stream may give back at any moment

    @contextmanager
    def lend(self, prompt: Sequence[int], *, reuse: bool = True) -> Iterator[tuple[Slot, int]]:
        """Lend the slot that suits `prompt` best, waiting for a turn; give it and the number of prompt tokens it holds.

        The slot's ids are cut to those. At least the last token of the prompt is left to run: it gives the logits.
        """
        with self.turn():
            slot, shared = self._take(prompt, reuse=reuse)
            del slot.ids[shared:]
            try:
                yield slot, shared
            finally:
                with self._changed:
                    self._idle.append(slot)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until fewer than the most callers are at work, and be one of them meanwhile.

        Raises ConfigError when all of them are open streams of this very thread: it would wait for itself.
        """
        me = threading.get_ident()
        with self._changed:
            if len(self._borrowers) >= self._most and set(self._borrowers) == {me}:
                raise ConfigError(
                    f"this thread holds all {self._most} calls that may run at a time, as streams that haven't ended: "
                    "read one to its end, close it, or load the bundle with more callers"
                )
            self._changed.wait_for(lambda: len(self._borrowers) < self._most)
            self._borrowers.append(me)
        try:
            yield
        finally:
            with self._changed:
                self._borrowers.remove(me)
                self._changed.notify()

    @property
    def caches(self) -> int:
        """Return how many one-row caches are idle now."""
        return len(self._idle)

    def _take(self, prompt: Sequence[int], *, reuse: bool) -> tuple[Slot, int]:
        """Take the idle slot with the longest common beginning, else the one unused longest, else a new one."""
        with self._changed:
            if self._idle:
                if not reuse:
                    return self._idle.pop(0), 0
                shared = [min(common_prefix(slot.ids, prompt), len(prompt) - 1) for slot in self._idle]
                best = max(range(len(shared)), key=shared.__getitem__)  # the first among equals: unused longest
                return self._idle.pop(best), shared[best]
        return Slot(cache=self._make_cache()), 0
