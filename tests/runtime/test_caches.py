"""The cache pool: longest common beginning first, one cache per caller at a time, nobody starves."""

from __future__ import annotations

import threading

import pytest

from edgepipe.errors import ConfigError
from edgepipe.runtime.caches import CachePool, common_prefix


def _use(pool: CachePool, ids: list[int], *, reuse: bool = True) -> tuple[object, int]:
    """Lend a slot, fill it as a caller does, and say which cache it was and how much was shared."""
    with pool.lend(ids, reuse=reuse) as (slot, shared):
        assert slot.ids == ids[:shared]
        slot.ids.extend(ids[shared:])
        return slot.cache, shared


def test_common_prefix() -> None:
    """Count equal tokens from the beginning."""
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2, 3], [1, 2]) == 2
    assert common_prefix([1, 2, 3], [1, 5, 3]) == 1


def test_one_caller_needs_one_cache() -> None:
    """Make no second cache while the first is idle, whatever the prompts."""
    made: list[object] = []

    def make() -> object:
        made.append(object())
        return made[-1]

    pool = CachePool(make, 4)
    assert [_use(pool, ids)[1] for ids in ([1, 2, 3], [9, 8], [9, 8, 7])] == [0, 0, 2]
    assert len(made) == 1 == pool.caches


def test_last_token_is_always_left_to_run() -> None:
    """Leave one token although the cache holds the whole prompt and more."""
    pool = CachePool(object, 1)
    _use(pool, [1, 2, 3, 4])
    assert _use(pool, [1, 2, 3])[1] == 2


def test_longest_common_beginning_is_chosen() -> None:
    """Choose among idle caches, and fall back to the one unused longest."""
    pool = CachePool(object, 3)
    with pool.lend([1, 2, 3, 4]) as (first, _), pool.lend([1, 2, 7]) as (second, _), pool.lend([5]) as (third, _):
        first.ids.extend([1, 2, 3, 4])
        second.ids.extend([1, 2, 7])
        third.ids.extend([5])
    assert _use(pool, [1, 2, 7, 9]) == (second.cache, 3)
    assert _use(pool, [1, 2, 3, 9]) == (first.cache, 3)
    assert _use(pool, [8]) == (third.cache, 0)
    assert _use(pool, [1, 2, 3, 9], reuse=False) == (second.cache, 0)


def test_further_callers_wait_for_their_turn() -> None:
    """Let at most `most` callers in, batches counted, and the waiting one when a place is free."""
    pool = CachePool(object, 2)
    entered = threading.Event()

    def third() -> None:
        with pool.lend([1]):
            entered.set()

    thread = threading.Thread(target=third)
    with pool.lend([1]):
        with pool.turn():
            thread.start()
            assert not entered.wait(0.1)
        assert entered.wait(5)
    thread.join()


def test_slot_comes_back_after_an_error() -> None:
    """Give the cache and the turn back when the caller fails."""
    pool = CachePool(object, 1)

    def fail() -> None:
        with pool.lend([1, 2]) as (slot, _):
            slot.ids.append(1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert pool.caches == 1
    assert _use(pool, [1, 2])[1] == 1


def test_a_thread_is_told_when_it_would_wait_for_itself() -> None:
    """All turns are this thread's own: nobody else could ever give one back."""
    pool = CachePool(list, most=2)
    with pool.turn(), pool.turn(), pytest.raises(ConfigError, match="this thread holds all 2 calls"), pool.turn():
        pass
    with pool.turn(), pool.turn():
        pass
