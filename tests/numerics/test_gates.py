"""Gates of exits: which exit is right, by hand and by a loop; and a regression that finds what decides."""

from __future__ import annotations

import numpy as np
import pytest

from edgepipe.numerics.gates import fit_gate, right_exits

DEPTHS = np.array([2, 4, 6])


def naive(quality: np.ndarray, depths: np.ndarray, beta: float) -> list[list[bool]]:
    """Compare each exit with every later one."""
    found = []
    for row in quality.tolist():
        worth = [q - beta * depth / depths[-1] for q, depth in zip(row, depths, strict=True)]
        found.append([all(worth[k] >= later for later in worth[k + 1 :]) for k in range(len(row) - 1)])
    return found


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.7, 2.0])
def test_right_is_what_no_later_exit_is_worth_more_than(beta: float) -> None:
    quality = np.random.default_rng(0).random((40, 3)).round(1)
    assert right_exits(quality, DEPTHS, beta).tolist() == naive(quality, DEPTHS, beta)


def test_right_by_hand() -> None:
    """Right at once; only in the end; never, so nothing is won by staying; right and then lost again."""
    quality = np.array([[1, 1, 1], [0, 0, 1], [0, 0, 0], [1, 0, 0]], float)
    assert right_exits(quality, DEPTHS, 0.1).tolist() == [[True, True], [False, False], [True, True], [True, True]]
    assert right_exits(quality, DEPTHS, 1.6)[1].tolist() == [True, False], "two thirds of β are more than it wins"


def test_a_gate_finds_what_decides() -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(400, 6)) * [1, 100, 0.01, 1, 1, 0] + [0, 5, 3, 0, 0, 7]
    right = (features[:, 2] - 3) / 0.01 + rng.normal(size=400) * 0.3 > 0.5
    weights, bias = fit_gate(features[:300], right[:300])
    told = features[300:] @ weights + bias > 0
    assert (told == right[300:]).mean() > 0.9
    assert weights[5] == 0, "a constant tells nothing"
    p = 1 / (1 + np.exp(-(features @ weights + bias)))
    assert p[:300].mean() == pytest.approx(right[:300].mean(), abs=0.02)


@pytest.mark.parametrize("all_right", [True, False])
def test_texts_that_are_all_alike_give_a_number(all_right: bool) -> None:
    features = np.random.default_rng(2).normal(size=(50, 4))
    weights, bias = fit_gate(features, np.full(50, all_right))
    assert np.isfinite([*weights, bias]).all()
    assert ((features @ weights + bias > 0) == all_right).all()
