"""The arithmetic of metrics: against naive twins, on ties, ragged lengths and degenerate rows."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from edgepipe.errors import TargetError
from edgepipe.measuring import scores
from tests.reference import bleu_naively, rouge_l_naively, spearman_naively

ANSWERS = ["the cat sat on the mat today", "a river runs", "boards and boards and boards", "no word fits"]
REFERENCES = [
    ("the cat sat on a mat", "today the cat sat on the mat again"),
    ("the river runs down to the mill",),
    ("boards and timber", "boards boards boards", "and"),
    ("something else entirely",),
]


@pytest.mark.parametrize("seed", range(5))
def test_spearman_is_the_naive_one(seed: int) -> None:
    """Few distinct values make many ties; the sign turns with one side."""
    random = np.random.default_rng(seed)
    rows = np.stack([random.integers(0, 6, 40), random.normal(size=40).round(1)], axis=1).astype(np.float64)
    expected = spearman_naively(rows[:, 0].tolist(), rows[:, 1].tolist())
    assert scores.spearman(rows) == pytest.approx(expected, abs=1e-12)
    assert scores.spearman(rows * [1, -3]) == pytest.approx(-expected, abs=1e-12)


def test_spearman_at_its_ends() -> None:
    values = np.array([3.0, 1.0, 2.0, 10.0])
    assert scores.spearman(np.stack([values, np.exp(values)], axis=1)) == pytest.approx(1)
    assert scores.spearman(np.stack([values, -values], axis=1)) == pytest.approx(-1)
    assert np.isnan(scores.spearman(np.stack([values, np.ones(4)], axis=1)))
    assert scores.ranks(np.array([5.0, 1.0, 5.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]


def test_cosine_of_float16_sized_and_zero_vectors() -> None:
    first = np.array([[1, 0], [3, 4], [0, 0], [1e-20, 1e-20]], np.float32)
    second = np.array([[0, 2], [3, 4], [1, 1], [1e-20, -1e-20]], np.float32)
    np.testing.assert_allclose(scores.cosine_similarity(first, second), [0, 1, 0, 0], atol=1e-7)


def test_bootstrap_of_a_mean_is_the_textbook_s() -> None:
    """For a mean the percentile interval is about ± 1.96 standard errors, and covers as often as it says."""
    random = np.random.default_rng(1)
    rows = random.normal(5, 2, (400, 1))
    found = scores.bootstrap(scores.mean_of(0), rows, seed=0)
    assert found is not None
    error = 1.96 * rows.std() / 20
    assert found.low == pytest.approx(rows.mean() - error, abs=0.05)
    assert found.high == pytest.approx(rows.mean() + error, abs=0.05)
    covered = 0
    for trial in range(100):
        interval = scores.bootstrap(scores.mean_of(0), random.normal(5, 2, (50, 1)), seed=trial)
        assert interval is not None
        covered += interval.low <= 5 <= interval.high
    assert 86 <= covered <= 100


def test_bootstrap_repeats_and_says_when_it_can_t_tell() -> None:
    rows = np.random.default_rng(2).normal(size=(30, 2))
    assert scores.bootstrap(scores.spearman, rows, seed=3) == scores.bootstrap(scores.spearman, rows, seed=3)
    assert scores.bootstrap(scores.spearman, rows, seed=3) != scores.bootstrap(scores.spearman, rows, seed=4)
    assert scores.bootstrap(scores.mean_of(0), rows[:1], seed=0) is None
    assert scores.bootstrap(scores.spearman, np.ones((5, 2)), seed=0) is None


def test_a_difference_is_paired() -> None:
    """What moves both bundles alike cancels: the interval of a constant difference is a point."""
    rows = np.random.default_rng(3).normal(0, 10, (50, 1))
    found = scores.bootstrap(scores.difference(scores.mean_of(0), 1), np.hstack([rows + 0.5, rows]), seed=0)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((0.5, 0.5))


def test_a_mean_per_token_weighs_windows_by_their_tokens() -> None:
    assert scores.mean_per(0, 1)(np.array([[2.0, 1], [2.0, 3]])) == 1


@pytest.mark.parametrize(
    ("answer", "references", "hit"),
    [
        ("Paris", ("paris",), 1),
        ("  The   river\n", ("a river", "the river"), 1),
        ("ﬁne", ("fine",), 1),  # a ligature
        ("Straße", ("STRASSE",), 1),
        ("Paris.", ("Paris",), 0),  # punctuation counts
        ("", ("x",), 0),
    ],
)
def test_exact_match_after_its_normalisation(answer: str, references: tuple[str, ...], hit: int) -> None:
    assert scores.exact_rows([answer], [references]).tolist() == [[hit]]


def test_bleu_is_the_naive_one_and_sacrebleu_s() -> None:
    metrics = pytest.importorskip("sacrebleu.metrics", reason="the extra eval isn't installed: make test brings it")
    rows = scores.bleu_rows(ANSWERS, REFERENCES)
    assert rows.shape == (4, 10)
    assert scores.bleu(rows) == pytest.approx(bleu_naively(ANSWERS, REFERENCES), abs=1e-9)
    streams = [[wanted[i] if i < len(wanted) else None for wanted in REFERENCES] for i in range(3)]
    assert scores.bleu(rows) == pytest.approx(metrics.BLEU().corpus_score(ANSWERS, streams).score, abs=1e-9)
    # no 4-gram matches: smoothed, not zero
    assert scores.bleu(rows[1:]) == pytest.approx(bleu_naively(ANSWERS[1:], REFERENCES[1:]), abs=1e-9) != 0
    assert scores.bleu(rows[3:]) == 0
    assert scores.bleu(scores.bleu_rows([""], [("a b c d",)])) == 0


def test_bleu_says_how_it_was_computed() -> None:
    pytest.importorskip("sacrebleu", reason="the extra eval isn't installed: make test brings it")
    signature = scores.bleu_signature(ANSWERS, REFERENCES)
    assert signature.startswith("nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert "nrefs:1|" in scores.bleu_signature(["a"], [("b",)])


def test_rouge_is_the_naive_one_against_the_best_reference() -> None:
    pytest.importorskip("rouge_score", reason="the extra eval isn't installed: make test brings it")
    rows = scores.rouge_rows(ANSWERS, REFERENCES)
    expected = [
        max(rouge_l_naively(answer, one) for one in wanted) for answer, wanted in zip(ANSWERS, REFERENCES, strict=True)
    ]
    np.testing.assert_allclose(rows[:, scores.ROUGE.index("rougeL")], expected, atol=1e-12)
    assert (rows[:, 0] >= rows[:, 2] - 1e-12).all() and (rows[:, 0] >= rows[:, 1]).all()


@pytest.mark.parametrize(("metric", "package"), [("bleu", "sacrebleu"), ("rouge", "rouge_score")])
def test_a_missing_package_names_the_extra(metric: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    missing: Any = None  # what Python takes for "can't be imported"
    monkeypatch.setitem(sys.modules, package, missing)
    with pytest.raises(TargetError, match=rf"{package.replace('_', '-')}.*pip install 'edgepipe\[eval\]'"):
        scores.check_extra(metric)
    scores.check_extra("exact")
