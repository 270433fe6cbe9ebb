"""The frontier against all combinations, on cases small enough to try every one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgepipe.numerics.knapsack import Point, frontier, hull


def everything(costs: list[list[float]], losses: list[list[float]]) -> list[tuple[float, float]]:
    """Return cost and loss of every combination there is."""
    return [
        (sum(c[i] for c, i in zip(costs, chosen, strict=True)), sum(x[i] for x, i in zip(losses, chosen, strict=True)))
        for chosen in itertools.product(*(range(len(c)) for c in costs))
    ]


def case(seed: int) -> tuple[list[list[float]], list[list[float]]]:
    """Return a few parts with up to five choices each; ties and choices that are worse in both occur."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 6, random.integers(1, 6))
    costs = [random.integers(1, 9, size).astype(float).tolist() for size in sizes]
    losses = [random.integers(0, 9, size).astype(float).tolist() for size in sizes]
    return costs, losses


@pytest.mark.parametrize("seed", range(60))
def test_no_combination_beats_a_point_of_the_frontier(seed: int) -> None:
    """Every point is the best one for its cost and for its loss; the ends are the least loss and the least cost."""
    costs, losses = case(seed)
    points = frontier(costs, losses)
    pairs = everything(costs, losses)
    for point in points:
        assert point.loss == min(loss for cost, loss in pairs if cost <= point.cost)
        assert point.cost == min(cost for cost, loss in pairs if loss <= point.loss)
    least = min(loss for _, loss in pairs)
    assert (points[0].loss, points[0].cost) == (least, min(c for c, loss in pairs if loss == least))
    cheapest = min(cost for cost, _ in pairs)
    assert (points[-1].cost, points[-1].loss) == (cheapest, min(loss for c, loss in pairs if c == cheapest))


@pytest.mark.parametrize("seed", range(60))
def test_what_lies_between_two_points_lies_above_their_line(seed: int) -> None:
    """So at a budget between two points the greedy answer is off by less than the step from one to the next."""
    costs, losses = case(seed)
    points = frontier(costs, losses)
    for better, cheaper in itertools.pairwise(points):
        assert cheaper.cost < better.cost and cheaper.loss > better.loss
        price = (cheaper.loss - better.loss) / (better.cost - cheaper.cost)
        assert all(
            loss + price * cost >= better.loss + price * better.cost - 1e-9 for cost, loss in everything(costs, losses)
        )


def test_one_step_changes_one_part() -> None:
    points = frontier([[8.0, 4.0, 2.0], [8.0, 4.0]], [[0.0, 1.0, 5.0], [0.0, 10.0]])
    assert [point.chosen for point in points] == [(0, 0), (1, 0), (2, 0), (2, 1)]
    assert points[1] == Point(chosen=(1, 0), cost=12.0, loss=1.0)


def test_a_choice_above_the_hull_is_never_taken() -> None:
    """The middle one saves 1 for 9, the last one 6 for 10."""
    assert hull([8.0, 7.0, 2.0], [0.0, 9.0, 10.0]) == [0, 2]
    assert hull([8.0, 8.0, 9.0], [1.0, 0.0, 0.0]) == [1]
