"""Gates of exits: which exit is right already, and a logistic regression that tells from what an exit sees.

    right_k = q_k − β·l_k/L ≥ max over later exits j of (q_j − β·l_j/L)     q: quality of a text's answer at an exit,
                                                                             l: layers behind it, of L

β is what all layers together may cost in quality: at 0 a text stays only where more layers answer better, and the
larger β, the earlier texts leave. Where no later answer is right either, the first one is right: staying wins nothing.
Source: ECO-M2F, arXiv:2404.15244, whose gate names the best exit at once, from early features; here each exit has a
gate of its own, so that a threshold is a number between all layers and none.
"""

from __future__ import annotations

import numpy as np

_ROUNDS, _ENOUGH = 50, 1e-8  # of Newton's method, which needs about ten; the largest change of a weight that ends it
_SMALL = 1e-6  # a feature that varies less is a constant


def right_exits(quality: np.ndarray, depths: np.ndarray, beta: float) -> np.ndarray:
    """Return whether leaving at an exit is right [n, exits] bool; quality [n, exits + 1], depths [exits + 1] layers."""
    worth = quality - beta * depths / depths[-1]
    later = np.maximum.accumulate(worth[:, ::-1], axis=1)[:, ::-1]
    right: np.ndarray = worth[:, :-1] >= later[:, 1:]
    return right


def fit_gate(features: np.ndarray, right: np.ndarray, ridge: float = 1.0) -> tuple[np.ndarray, float]:
    """Return weights [f] and bias of the log odds w·x + b that x [n, f] is right [n] bool.

    Logistic regression by Newton's method on standardized features, with half of ridge · ‖w‖² beside the summed loss;
    the bias has it too, so that texts that are all right give it a number.
    """
    x, y = features.astype(np.float64), right.astype(np.float64)
    mean, deviation = x.mean(0), x.std(0)
    varies = deviation > _SMALL
    scale = np.where(varies, 1 / np.where(varies, deviation, 1), 0)
    x = np.concatenate([(x - mean) * scale, np.ones((len(x), 1))], 1)
    w = np.zeros(x.shape[1])
    for _ in range(_ROUNDS):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -50, 50)))
        gradient = x.T @ (p - y) + ridge * w
        curvature = (x * (p * (1 - p))[:, None]).T @ x + ridge * np.eye(len(w))
        step = np.linalg.solve(curvature, gradient)
        w = w - step
        if np.abs(step).max() < _ENOUGH:
            break
    weights = w[:-1] * scale
    return weights, float(w[-1] - weights @ mean)
