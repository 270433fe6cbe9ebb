"""Which examples a step gets: a pure function, every example as often, rows of like length together."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from edgepipe.training.batches import batch_at

LENGTHS = np.random.default_rng(0).integers(3, 200, 1000)


def test_a_step_is_a_function_of_seed_and_step() -> None:
    """The same again in any order; another step or seed is another batch."""
    first = [batch_at(LENGTHS, 16, 0, step).tolist() for step in range(50)]
    assert [batch_at(LENGTHS, 16, 0, step).tolist() for step in reversed(range(50))] == first[::-1]
    assert batch_at(LENGTHS, 16, 1, 0).tolist() != first[0] != first[1]


@pytest.mark.parametrize(("count", "size"), [(1000, 10), (4, 4), (3, 8), (100, 7)])
def test_every_example_comes_as_often(count: int, size: int) -> None:
    """Over whole rounds each example is seen equally often, even when a batch holds all of them several times."""
    lengths = LENGTHS[:count]
    steps = count  # of whole rounds: as many as a batch has examples
    counts = Counter(np.concatenate([batch_at(lengths, size, 0, step) for step in range(steps)]).tolist())
    assert set(counts.values()) == {steps * size // count}
    assert len(counts) == count


@pytest.mark.parametrize(("count", "size"), [(64, 32), (65, 32), (95, 32), (100, 32), (500, 32), (1000, 7), (8, 8)])
def test_no_batch_holds_an_example_twice(count: int, size: int) -> None:
    """Copies of like length would stand side by side, and contrast would push them apart."""
    for seed, lengths in ((0, LENGTHS[:count]), (1, np.full(count, 9))):
        for step in range(400):
            assert len(set(batch_at(lengths, size, seed, step).tolist())) == size, step


def test_rows_of_a_batch_are_of_like_length() -> None:
    """Padding is a small part of a batch, far less than in batches drawn at random."""
    padding = []
    for step in range(60):
        lengths = LENGTHS[batch_at(LENGTHS, 16, 0, step)]
        padding.append(1 - lengths.mean() / lengths.max())
    assert np.mean(padding) < 0.08
    assert 1 - LENGTHS.mean() / LENGTHS.max() > 0.4


def test_long_and_short_batches_are_mixed() -> None:
    """Batches don't come sorted: training would see long texts in waves."""
    means = [LENGTHS[batch_at(LENGTHS, 16, 0, step)].mean() for step in range(32)]
    assert sum(a < b for a, b in pairwise(means)) in range(8, 24)
