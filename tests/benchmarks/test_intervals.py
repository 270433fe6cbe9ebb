import numpy as np
import pytest

from benchmarks.intervals import Ratio, ratio_over_rounds


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
