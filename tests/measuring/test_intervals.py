import random
import statistics

import numpy as np
import pytest

from edgepipe.measuring.intervals import (
    Ratio,
    expanded_tails,
    median_over_blocks,
    ratio_over_blocks,
    ratio_over_rounds,
    spread,
)


def test_drift_common_to_both_cancels() -> None:
    """A machine that halves its speed between rounds changes no ratio."""
    speed = np.array([1.0, 0.5, 0.8, 0.6])
    found = ratio_over_rounds((30 * speed).tolist(), (20 * speed).tolist(), seed=0)
    assert (found.value, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))


def test_equal_engines_tie() -> None:
    """Noise around equal figures gives an interval that holds 1, and the same one for the same seed."""
    noise = np.random.default_rng(3).normal(1, 0.02, (2, 9))
    found = ratio_over_rounds(noise[0].tolist(), noise[1].tolist(), seed=5)
    assert found.low < 1 < found.high
    assert found == ratio_over_rounds(noise[0].tolist(), noise[1].tolist(), seed=5)


@pytest.mark.parametrize(
    ("low", "high", "bigger", "verdict"),
    [
        (0.9, 1.1, True, "tie"),
        (1.0, 1.1, True, "tie"),
        (1.01, 1.1, True, "better"),
        (1.01, 1.1, False, "worse"),
        (0.9, 0.99, True, "worse"),
        (0.9, 0.99, False, "better"),
    ],
)
def test_verdict(low: float, high: float, bigger: bool, verdict: str) -> None:
    """Only an interval wholly on one side of 1 is a win or a loss, and which one depends on the figure."""
    assert Ratio(value=(low + high) / 2, low=low, high=high).verdict(bigger_is_better=bigger) == verdict


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], [1.0, 2.0])])
def test_rounds_must_pair(ours: list[float], theirs: list[float]) -> None:
    """Figures without a partner are refused."""
    with pytest.raises(ValueError, match="one figure per round"):
        ratio_over_rounds(ours, theirs, seed=0)


def naive_interval(blocks: list[list[float]], draws: int) -> tuple[float, float]:
    """Draw blocks, then turns in each, one at a time with Python's own random numbers."""
    draw = random.Random(7)
    medians = []
    for _ in range(draws):
        drawn = [draw.choice(draw_from) for draw_from in (draw.choice(blocks) for _ in blocks) for _ in draw_from]
        medians.append(statistics.median(drawn))
    low, high = expanded_tails(len(blocks))
    return float(np.percentile(medians, low)), float(np.percentile(medians, high))


def test_the_interval_of_a_median_is_the_bootstraps() -> None:
    """Blocks first, then the turns of each: the naive way gives the same interval, up to the luck of the draw."""
    noise = np.random.default_rng(1)
    blocks = [(20 + noise.normal(0, 0.5) + noise.normal(0, 1, 15)).tolist() for _ in range(12)]
    found = median_over_blocks(blocks, seed=0)
    low, high = naive_interval(blocks, 2000)
    assert found.value == statistics.median(time for block in blocks for time in block)
    assert found.low == pytest.approx(low, abs=0.1)
    assert found.high == pytest.approx(high, abs=0.1)
    assert found == median_over_blocks(blocks, seed=0)


def test_few_blocks_make_wider_intervals() -> None:
    """As Student's t does: with many the plain percentiles, with two all that was drawn."""
    lows = [expanded_tails(count)[0] for count in (2, 3, 4, 6, 10, 30, 1000)]
    assert lows == sorted(lows)
    assert lows[0] < 1e-9 and lows[-1] == pytest.approx(2.5, abs=0.05)
    # six: t of five degrees 2.571, times the square root of 6/5, is 2.816 standard deviations: 0.243 %
    assert expanded_tails(6) == pytest.approx((0.243, 99.757), abs=0.002)
    assert expanded_tails(1) == (0.0, 100.0)
    for freedom in (11, 15, 40, 200):
        assert expanded_tails(freedom + 1)[0] < expanded_tails(freedom + 2)[0]


def test_what_differs_from_process_to_process_widens_the_interval() -> None:
    """Turns that agree within each process don't make a figure certain that the next process would change."""
    apart = [[10.0] * 20, [11.0] * 20, [12.0] * 20]
    found = median_over_blocks(apart, seed=0)
    assert (found.low, found.value, found.high) == (10.0, 11.0, 12.0)


def test_a_ratio_is_taken_turn_by_turn() -> None:
    """A machine that halves its speed in the middle changes no ratio; the interval is as narrow as the ratios."""
    drift = [[1.0, 1.0, 2.0], [2.0, 3.0, 1.0]]
    ours = [[11 * one for one in block] for block in drift]
    theirs = [[10 * one for one in block] for block in drift]
    found = ratio_over_blocks(ours, theirs, seed=0)
    assert (found.value, found.low, found.high) == pytest.approx((1.1, 1.1, 1.1))
    assert found.verdict(bigger_is_better=False) == "worse"


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of 60 measurements of 6 blocks with a true median of 5, about 95 % have it in their interval."""
    noise = np.random.default_rng(2)
    held = 0
    for _ in range(60):
        blocks = (5 + noise.normal(0, 0.1, (6, 1)) + noise.normal(0, 0.3, (6, 10))).tolist()
        found = median_over_blocks(blocks, seed=0)
        held += found.low <= 5 <= found.high
    assert held >= 54  # 90 %


@pytest.mark.parametrize("blocks", [[], [[]], [[1.0], [1.0, 2.0]]])
def test_blocks_must_have_as_many_turns(blocks: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="blocks of equally many turns"):
        median_over_blocks(blocks, seed=0)


def test_both_sides_must_have_as_many_turns() -> None:
    with pytest.raises(ValueError, match="as many blocks and turns"):
        ratio_over_blocks([[1.0, 2.0]], [[1.0]], seed=0)


def test_the_spread_is_that_of_the_middle_80_percent() -> None:
    """One stall in twenty turns isn't a spread; a second speed in every fifth is."""
    assert spread([[10.0] * 10, [10.0] * 9 + [99.0]]) == 0
    assert spread([[10.0] * 8 + [12.0] * 2, [10.0] * 8 + [12.0] * 2]) == pytest.approx(0.2)
