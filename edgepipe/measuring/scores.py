"""The arithmetic of quality metrics on arrays and texts: no model, no file.

A metric is a statistic of rows, one row per example; so one bootstrap serves them all, and two bundles that ran the
same examples are compared example by example. Sources: Efron and Tibshirani, An Introduction to the Bootstrap (1993),
the percentile interval; BLEU as in Post, A Call for Clarity in Reporting BLEU Scores (2018), by sacrebleu; ROUGE as in
Lin (2004), by rouge-score.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgepipe.errors import TargetError

RESAMPLES = 1000
LEVEL = 0.95
NORMALISATION = "NFKC, case folded, white space collapsed"
ROUGE = ("rouge1", "rouge2", "rougeL")

_TAILS = (2.5, 97.5)  # percentiles: the middle 95 %
_BLEU_ORDER = 4

Statistic = Callable[[np.ndarray], float]  # rows [examples, k] float64 → the metric


@dataclass(frozen=True, slots=True)
class Interval:
    """Hold where a statistic lies in 95 % of the resamples."""

    low: float
    high: float


def bootstrap(statistic: Statistic, rows: np.ndarray, *, seed: int) -> Interval | None:
    """Return the 95 % percentile interval over resampled rows [examples, k]; None when it can't be told.

    That is when there is one example only, or when most resamples have no finite statistic.
    """
    if len(rows) < 2:
        return None
    generator = np.random.default_rng(seed)
    found = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        found[number] = statistic(rows[generator.integers(0, len(rows), len(rows))])
    finite = found[np.isfinite(found)]
    if finite.size < RESAMPLES / 2:
        return None
    low, high = np.percentile(finite, _TAILS)
    return Interval(float(low), float(high))


def difference(statistic: Statistic, width: int) -> Statistic:
    """Return the statistic's difference, first less second, of rows [examples, 2 · width] that hold both."""
    return lambda rows: statistic(rows[:, :width]) - statistic(rows[:, width:])


def mean_of(column: int) -> Statistic:
    """Return the statistic that is the mean of one column."""
    return lambda rows: float(rows[:, column].mean())


def mean_per(column: int, weight: int) -> Statistic:
    """Return the statistic that is a column's sum over another's: a mean per token of rows that are windows."""
    return lambda rows: float(rows[:, column].sum() / rows[:, weight].sum())


def cosine_similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the cosine [n] float64 between rows of two arrays [n, dim]; 0 where a row is zero."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    products = (first * second).sum(axis=1)
    cosine: np.ndarray = np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)
    return cosine


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks [n] float64 of values [n], from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    shared: np.ndarray = (last - (counts - 1) / 2)[inverse]
    return shared


def spearman(rows: np.ndarray) -> float:
    """Return the rank correlation of the two columns of rows [n, 2], in [−1, 1]; nan where a column is constant."""
    first, second = (ranks(rows[:, column]) for column in (0, 1))
    first, second = first - first.mean(), second - second.mean()
    scale = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / scale) if scale > 0 else float("nan")


def normalise(text: str) -> str:
    """Return a text as exact match compares it: as NORMALISATION says, no white space at the ends."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def exact_rows(answers: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Return [examples, 1]: 1 where the answer equals one of its references after `normalise`, else 0."""
    hits = [
        normalise(answer) in {normalise(one) for one in wanted}
        for answer, wanted in zip(answers, references, strict=True)
    ]
    return np.array(hits, np.float64)[:, None]


def check_extra(metric: str) -> None:
    """Raise TargetError unless what `metric` is computed with is installed."""
    if metric == "bleu":
        _import_sacrebleu()
    elif metric == "rouge":
        _import_rouge()


def bleu_rows(answers: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Return [examples, 10]: length, closest reference's length, n-grams of orders 1 to 4 that match, and all."""
    scorer = _import_sacrebleu().BLEU(effective_order=True)  # which changes a sentence's score, not its counts
    rows = []
    for answer, wanted in zip(answers, references, strict=True):
        counted = scorer.sentence_score(answer, list(wanted))
        rows.append([counted.sys_len, counted.ref_len, *counted.counts, *counted.totals])
    return np.array(rows, np.float64)


def bleu(rows: np.ndarray) -> float:
    """Return corpus BLEU, 0 to 100, from rows as `bleu_rows` makes them; smoothed as sacrebleu does by default."""
    sys_len, ref_len, *counts = (int(total) for total in rows.sum(axis=0))
    scored = _import_sacrebleu().BLEU.compute_bleu(
        counts[:_BLEU_ORDER], counts[_BLEU_ORDER:], sys_len, ref_len, smooth_method="exp"
    )
    return float(scored.score)


def bleu_signature(answers: Sequence[str], references: Sequence[Sequence[str]]) -> str:
    """Return sacrebleu's own words for how a corpus is scored."""
    scorer = _import_sacrebleu().BLEU()
    most = max(len(wanted) for wanted in references)
    streams = [[wanted[i] if i < len(wanted) else None for wanted in references] for i in range(most)]
    scorer.corpus_score(list(answers), streams)
    return str(scorer.get_signature())


def rouge_rows(answers: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Return [examples, 3]: F1 of ROUGE-1, ROUGE-2 and ROUGE-L, each against the reference that fits best."""
    scorer = _import_rouge().RougeScorer(list(ROUGE), use_stemmer=False)
    scored = [scorer.score_multi(list(w), answer) for answer, w in zip(answers, references, strict=True)]
    return np.array([[one[name].fmeasure for name in ROUGE] for one in scored], np.float64)


def _import_sacrebleu() -> Any:
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise TargetError(_missing("BLEU", "sacrebleu")) from error
    return metrics


def _import_rouge() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise TargetError(_missing("ROUGE", "rouge-score")) from error
    return rouge_scorer


def _missing(metric: str, package: str) -> str:
    return f"{metric} is computed by {package}, which isn't installed: pip install 'edgepipe[eval]'"
