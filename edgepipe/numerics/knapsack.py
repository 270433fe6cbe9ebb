"""Choose one of several choices for each of many parts: the frontier of cost against loss.

Costs and losses of the parts add up. For every price λ there is a best choice of each part, the one with the least
loss + λ · cost, whatever the others choose; going through all prices from low to high gives points that no other
combination beats in both (it may lie between two of them, never below the line that joins them). So each part walks
down the lower convex hull of its own choices, and the steps of all parts are taken in the order of what they lose for
what they save: the greedy solution of the multiple-choice knapsack, optimal at each of its points.
Source: Sinha & Zoltners, "The Multiple-Choice Knapsack Problem", Operations Research 27 (1979); Kellerer, Pferschy &
Pisinger, Knapsack Problems (2004), chapter 11.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Hold one combination of choices."""

    chosen: tuple[int, ...]  # the number of each part's choice
    cost: float
    loss: float


def frontier(costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]]) -> list[Point]:
    """Return the points of the frontier, from the least loss to the least cost.

    costs and losses: of each part, of each of its choices, at least one.
    """
    hulls = [hull(c, x) for c, x in zip(costs, losses, strict=True)]
    steps = []
    for part, choices in enumerate(hulls):
        for place, (before, after) in enumerate(itertools.pairwise(choices)):
            saved = costs[part][before] - costs[part][after]
            lost = losses[part][after] - losses[part][before]
            steps.append((lost / saved, part, place, after))
    chosen = [choices[0] for choices in hulls]
    points = [_point(chosen, costs, losses)]
    for _, part, _, after in sorted(steps):
        chosen[part] = after
        points.append(_point(chosen, costs, losses))
    return points


def hull(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Return the choices on the lower convex hull of one part, from the least loss (the cheapest of those) down.

    Each costs less and loses more than the one before, and the price of what is saved rises from step to step.
    """
    found: list[int] = []
    for choice in sorted(range(len(costs)), key=lambda i: (losses[i], costs[i])):
        if found and costs[choice] >= costs[found[-1]]:
            continue  # another loses no more and costs no more
        while len(found) > 1 and _price(found[-2], found[-1], costs, losses) >= _price(
            found[-1], choice, costs, losses
        ):
            found.pop()
        found.append(choice)
    return found


def _price(before: int, after: int, costs: Sequence[float], losses: Sequence[float]) -> float:
    """Return what is lost for each unit of cost that is saved."""
    return (losses[after] - losses[before]) / (costs[before] - costs[after])


def _point(chosen: Sequence[int], costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]]) -> Point:
    return Point(
        chosen=tuple(chosen),
        cost=sum(cost[i] for cost, i in zip(costs, chosen, strict=True)),
        loss=sum(loss[i] for loss, i in zip(losses, chosen, strict=True)),
    )
