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


def test_gates_do_better_than_leaving_at_random() -> None:
    """Texts are hard to a degree that shows, noisily; the same share of texts leaves at each exit in both ways."""
    rng = np.random.default_rng(3)

    def drawn(count: int) -> tuple[list[np.ndarray], np.ndarray]:
        hard = rng.random(count)
        quality = np.stack([hard < reach + rng.normal(size=count) * 0.1 for reach in (0.5, 0.7, 0.9)], 1)
        seen = [np.stack([hard + rng.normal(size=count) * 0.2, rng.normal(size=count)], 1) for _ in range(2)]
        return seen, quality.astype(float)

    features, quality = drawn(2000)
    right = right_exits(quality, DEPTHS, 0.1)
    gates = [fit_gate(seen, right[:, number]) for number, seen in enumerate(features)]
    features, quality = drawn(2000)
    odds = np.stack([seen @ w + b for seen, (w, b) in zip(features, gates, strict=True)], 1)
    layers, reached, by_chance = [], [], []
    for threshold in (0.5, 0.7, 0.8, 0.9):
        stays = np.concatenate([odds > np.log(threshold / (1 - threshold)), np.ones((2000, 1), bool)], 1)
        exit_ = stays.argmax(1)
        layers.append(DEPTHS[exit_].mean())
        reached.append(quality[np.arange(2000), exit_].mean())
        by_chance.append(np.mean([quality[np.arange(2000), rng.permutation(exit_)].mean() for _ in range(20)]))
    assert layers == sorted(layers)
    assert reached == sorted(reached)
    assert layers[0] < 3.5 < 4.5 < layers[-1]
    assert reached[0] > by_chance[0]
    assert all(mine > chance + 0.05 for mine, chance in zip(reached[1:], by_chance[1:], strict=True)), by_chance
