"""Perplexity over windows and divergence from another bundle: against loops over whole logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgepipe.errors import ConfigError, StageError
from edgepipe.measuring.quality import compare_windows, cut_windows, perplexity, score_windows
from edgepipe.runtime import Model, load
from tests.reference import divergence_naively, windows_naively


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Model:
    """Load the 4-bit bundle once."""
    return load(tiny_bundle, threads=1)


@pytest.fixture(scope="module")
def reference(float_bundle: Path) -> Model:
    """Load the 16-bit bundle of the same model once."""
    return load(float_bundle, threads=1)


@pytest.mark.parametrize("count", [0, 1, 2, 9, 10, 11, 20, 21, 22, 57])
@pytest.mark.parametrize(("window", "stride"), [(10, 0), (10, 10), (10, 3), (10, 1), (2, 1), (3, 2)])
def test_windows_score_every_token_they_can_once(count: int, window: int, stride: int) -> None:
    """With an overlap every token but the first is scored; end to end, those that begin a window are not."""
    ids = list(range(count))
    found = cut_windows(ids, window, stride)
    assert [(list(w.ids), w.first) for w in found] == windows_naively(ids, window, stride)
    scored = [token for w in found for token in w.ids[w.first :]]
    step = stride or window
    assert scored == [i for i in range(1, count) if step < window or i % window]
    assert all(len(w.ids) <= window for w in found)


def test_a_window_scores_its_new_tokens_alone(model: Model, tiny_text: str) -> None:
    ids = model.encode(tiny_text)[:150]
    windows = cut_windows(ids, 100, 40)
    rows = score_windows(model, windows)
    assert rows[:, 1].tolist() == [99, 40, 10]
    logprobs = model.token_logprobs(ids[40:140])
    assert rows[1, 0] == pytest.approx(-logprobs[-40:].sum(), rel=1e-6)


def test_perplexity_weighs_tokens_not_windows() -> None:
    assert perplexity(np.array([[3.0, 1], [1.0, 3]])) == pytest.approx(np.exp(1.0))
    assert perplexity(np.array([[1e6, 1]])) == np.inf


def test_the_windows_are_counted_aloud(model: Model, tiny_text: str) -> None:
    heard: list[tuple[int, int]] = []
    score_windows(model, cut_windows(model.encode(tiny_text)[:90], 30), lambda done, total: heard.append((done, total)))
    assert heard == [(0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize("stride", [0, 30, 100])
def test_divergence_is_what_the_logits_say(model: Model, reference: Model, tiny_text: str, stride: int) -> None:
    """Against a loop over all logits at once: KL of every token, agreement, both likelihoods; over ragged chunks."""
    ids = model.encode(tiny_text * 2)[:290]
    windows = cut_windows(ids, 128, stride)
    found = compare_windows(model, reference, windows)
    kl, agreed, ours, theirs = divergence_naively(model.logits, reference.logits, windows)
    np.testing.assert_allclose(found.per_token, kl, rtol=1e-6, atol=1e-9)
    assert found.rows[:, 1].sum() == sum(agreed)
    assert found.rows[:, 4].sum() == len(kl) == sum(len(w.ids) - w.first for w in windows)
    np.testing.assert_allclose(found.rows[:, 2].sum(), ours, rtol=1e-9)
    np.testing.assert_allclose(found.rows[:, 3].sum(), theirs, rtol=1e-9)
    assert min(kl) > -1e-9 and found.per_token.mean() > 1e-3  # 4 bits of a random model are not nothing


def test_a_bundle_doesn_t_diverge_from_itself(model: Model, tiny_text: str) -> None:
    found = compare_windows(model, model, cut_windows(model.encode(tiny_text)[:140], 128))
    assert np.abs(found.per_token).max() == 0
    assert (found.rows[:, 1] == found.rows[:, 4]).all()


def test_divergence_is_not_symmetric(model: Model, reference: Model, tiny_text: str) -> None:
    """The float model's probabilities weigh the differences, not the bundle's."""
    windows = cut_windows(model.encode(tiny_text)[:100], 100)
    forth = compare_windows(model, reference, windows)
    back = compare_windows(reference, model, windows)
    assert np.abs(forth.per_token - back.per_token).max() > 0.01
    np.testing.assert_array_equal(forth.rows[:, [1, 2, 3]], back.rows[:, [1, 3, 2]])


class Told:
    """Give fixed logits: what an engine that went wrong would."""

    name = "told"

    def __init__(self, *rows: list[float]) -> None:
        self.rows = np.array(rows, np.float32)

    def logit_chunks(self, prompt: object) -> list[np.ndarray]:
        """Give all rows in one chunk."""
        return [self.rows]


def test_impossible_tokens_of_the_reference_cost_nothing_and_nan_is_refused() -> None:
    windows = cut_windows([0, 1], 2)
    ours, theirs = Told([0.0, 0.0, 0.0]), Told([0.0, 0.0, -np.inf])
    assert compare_windows(ours, theirs, windows).per_token == pytest.approx([np.log(1.5)])  # type: ignore[arg-type]
    for broken in (Told([np.nan, 0.0, 0.0]), Told([0.0, -np.inf, 0.0])):
        with pytest.raises(StageError, match="no finite numbers"), np.errstate(invalid="ignore"):
            compare_windows(broken, ours, windows)  # type: ignore[arg-type]


def test_logit_chunks_are_the_logits(model: Model, tiny_text: str) -> None:
    """The same rows in order, 64 at a time; what can't be scored is refused before the first."""
    ids = model.encode(tiny_text)[:128]
    for count in (1, 64, 65, 128):
        chunks = list(model.logit_chunks(ids[:count]))
        assert [len(chunk) for chunk in chunks] == [min(64, count - start) for start in range(0, count, 64)]
        np.testing.assert_array_equal(np.concatenate(chunks), model.logits(ids[:count]))
    for wrong in ([], [*ids, 1]):
        with pytest.raises(ConfigError):
            model.logit_chunks(wrong)
