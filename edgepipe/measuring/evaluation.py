"""Evaluate a bundle: one metric over one file, always through the runtime that ships. The base install is enough.

What `edgepipe eval` prints, and what a stage or a search may ask for. BLEU and ROUGE need the extra `eval`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

import edgepipe
from edgepipe.artifacts import Json
from edgepipe.errors import ConfigError, StageError
from edgepipe.measuring import examples, quality, scores, tasks
from edgepipe.measuring.metrics import TABLE_OPTIONS, Evaluation
from edgepipe.rows import Data, open_data, read_text
from edgepipe.runtime.bundle import MANIFEST, read_bundle
from edgepipe.runtime.encoder import Encoder
from edgepipe.runtime.exits import check_threshold, has_exits
from edgepipe.runtime.text_generation import Model

Progress = Callable[[str, int, int], None]

_SHOWN_ANSWERS = 3


def evaluate_bundle(
    bundle: Path, data: str, options: Evaluation, *, progress: Progress, against: Path | None = None
) -> Json:
    """Return a metric of the bundle over a file (or a shipped text by its name), with interval and what it came from.

    With `against` the other bundle runs the same examples, and the difference gets an interval of its own; for
    kl-to-float it is the reference, and must be there. Raises ConfigError for a wrong request or malformed data,
    TargetError where a package is missing, StageError when a bundle gives no finite numbers.
    """
    from edgepipe.measuring.run import describe_machine

    started = time.perf_counter()
    metric = options.described
    if metric.name == "kl-to-float" and against is None:
        raise ConfigError("kl-to-float compares with a float bundle: name one with --against, the run's baseline say")
    check_threshold(options.exit_threshold, read_bundle(bundle).manifest)
    if against is not None:
        read_bundle(against)
    scores.check_extra(metric.name)
    opened = open_data(data)
    if metric.options >= TABLE_OPTIONS:
        scored = _score_examples(bundle, against, opened, options, progress)
    else:
        scored = _score_text(bundle, against, opened, options, progress)
    return {
        "metric": metric.name,
        "better": metric.better,
        **_summary(scored, against, options),
        "seconds": round(time.perf_counter() - started, 3),
        "settings": _settings(options, opened.suffix),
        "data": {"name": opened.name, "sha256": opened.sha256, "bytes": len(opened.content)},
        "bundle": _came_from(bundle),
        "versions": _versions(metric.name),
        "machine": describe_machine(options.threads),
    }


def score_bundle(bundle: Path, data: Data, options: Evaluation, *, progress: Progress) -> np.ndarray:
    """Return the rows [examples, k] of which a metric is the statistic; those of two bundles stand beside each other.

    Raises what `evaluate_bundle` raises. kl-to-float, which has no rows of one bundle, isn't for this.
    """
    metric = options.described
    scores.check_extra(metric.name)
    check_threshold(options.exit_threshold, read_bundle(bundle).manifest)
    score = _score_examples if metric.options >= TABLE_OPTIONS else _score_text
    return score(bundle, None, data, options, progress).rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """Hold the rows of the bundle, those of the bundle it is compared with, and what else there is to say."""

    rows: np.ndarray  # [examples, k]
    against: np.ndarray | None
    details: Json


def _score_text(bundle: Path, against: Path | None, data: Data, options: Evaluation, progress: Progress) -> _Scored:
    """Score a text window by window; both bundles run the same windows."""
    text = read_text(data)
    paths = [bundle] if against is None else [bundle, against]
    window = min(options.window, *(_context(path, options.metric) for path in paths))
    windows: list[quality.Window] = []

    def open_scorer(path: Path) -> quality.Scorer:
        """Load a bundle; the windows of a second one must be those of the first."""
        model = _open(path, options)
        if not isinstance(model, quality.Scorer):
            raise _refusal(path, options.metric, "predicts text")
        found = quality.cut_windows(model.encode(text)[: options.tokens or None], window, options.stride)
        if windows and found != windows:
            raise ConfigError(f"{bundle} and {path} have different tokenizers: their tokens can't be compared")
        windows[:] = found
        if not windows:
            raise ConfigError(f"{data.name}: expected a text of at least 2 tokens, but it has fewer: give a longer one")
        return model

    if options.metric == "kl-to-float":
        assert against is not None
        sizes = {_vocabulary(path) for path in paths}
        if len(sizes) > 1:
            raise ConfigError(f"{bundle} and {against} have vocabularies of different sizes: they can't be compared")
        model, reference = open_scorer(bundle), open_scorer(against)
        found = quality.compare_windows(model, reference, windows, lambda d, n: progress("kl-to-float", d, n))
        details = {**_divergence_details(found, window), **_depths(model)}
        return _Scored(rows=found.rows, against=None, details=details)
    rows = []
    left: list[Json] = []
    for number, path in enumerate(paths):
        scored = open_scorer(path)  # one model at a time in memory
        rows.append(quality.score_windows(scored, windows, _tick(progress, "perplexity", number, len(paths))))
        left.append(_depths(scored))
        del scored
    details = {"tokens": int(rows[0][:, 1].sum()), "window_tokens": window, **left[0]}
    return _Scored(rows=rows[0], against=rows[1] if against is not None else None, details=details)


def _divergence_details(found: quality.Divergence, window: int) -> Json:
    """Return what else a divergence says."""
    rows, per_token = found.rows, found.per_token
    tokens = rows[:, 4].sum()
    return {
        "tokens": int(tokens),
        "window_tokens": window,
        "top1_agreement": float(rows[:, 1].sum() / tokens),
        "kl_median": float(np.median(per_token)),
        "kl_p99": float(np.percentile(per_token, 99)),
        "kl_max": float(per_token.max()),
        "perplexity": quality.perplexity(rows[:, [2, 4]]),
        "perplexity_of_reference": quality.perplexity(rows[:, [3, 4]]),
    }


def _score_examples(bundle: Path, against: Path | None, data: Data, options: Evaluation, progress: Progress) -> _Scored:
    """Run the examples of a table; both bundles run the same ones."""
    columns = options.places(data.suffix)
    run: Callable[[Path, tasks.Tick], tuple[np.ndarray, Json]]
    if options.metric == "spearman":
        pairs = examples.sample(examples.read_pairs(data, columns), options.limit, options.seed)

        def run(path: Path, tick: tasks.Tick) -> tuple[np.ndarray, Json]:
            return _compare_pairs(path, pairs, options, tick)

    elif options.metric == "accuracy":
        labelled = examples.sample(examples.read_labelled(data, columns), options.limit, options.seed)

        def run(path: Path, tick: tasks.Tick) -> tuple[np.ndarray, Json]:
            return _label(path, labelled, options, tick)

    else:
        asked = examples.sample(examples.read_asked(data, columns), options.limit, options.seed)

        def run(path: Path, tick: tasks.Tick) -> tuple[np.ndarray, Json]:
            return _answer(path, asked, options, tick)

    paths = [bundle] if against is None else [bundle, against]
    found = [run(path, _tick(progress, options.metric, number, len(paths))) for number, path in enumerate(paths)]
    return _Scored(rows=found[0][0], against=found[1][0] if against is not None else None, details=found[0][1])


def _compare_pairs(
    path: Path, pairs: list[examples.Pair], options: Evaluation, tick: tasks.Tick
) -> tuple[np.ndarray, Json]:
    """Embed pairs of texts with one bundle."""
    model = _open(path, options)
    if not isinstance(model, tasks.Embedder):
        raise _refusal(path, options.metric, "embeds texts")
    return tasks.similarity_rows(model, pairs, options.batch, tick), _depths(model)


def _label(
    path: Path, labelled: list[examples.Labelled], options: Evaluation, tick: tasks.Tick
) -> tuple[np.ndarray, Json]:
    """Classify texts with one bundle, or let it choose among words."""
    model = _open(path, options)
    labels = options.label_words()
    common = max(Counter(one.label for one in labelled).values())
    details: Json = {"majority": common / len(labelled)}  # what always saying the commonest label would score
    if isinstance(model, tasks.Classifier):
        if options.chat or options.prompt != tasks.TEXT:
            raise ConfigError(f"--prompt and --chat mean nothing for {path}, which classifies: leave them out")
        return tasks.classified_rows(model, labelled, labels, options.batch, tick), {**details, **_depths(model)}
    if not isinstance(model, Model):
        raise _refusal(path, options.metric, "classifies or predicts text")
    if len(labels) < 2 or options.prompt == tasks.TEXT:
        raise ConfigError(
            f"accuracy of {path}, which predicts text, needs the words of every label and a prompt: give both, as in "
            "--labels 0=negative,1=positive --prompt 'Review: {text} Sentiment:'"
        )
    _check_chat(model, options)
    rows = tasks.chosen_rows(model, labelled, labels, options.prompt, options.chat, tick)
    return rows[:, :1], {**details, **_depths(model), "prompts_cut": int(rows[:, 1].sum())}


def _answer(path: Path, asked: list[examples.Asked], options: Evaluation, tick: tasks.Tick) -> tuple[np.ndarray, Json]:
    """Answer inputs with one bundle and score the answers."""
    model = _open(path, options)
    if not isinstance(model, tasks.Generator):
        raise _refusal(path, options.metric, "generates text")
    _check_chat(model, options)
    answers = tasks.answers(
        model,
        asked,
        prompt=options.prompt,
        chat=options.chat,
        max_new_tokens=options.max_new_tokens,
        stop=options.stop,
        batch=options.batch,
        tick=tick,
    )
    wanted = [one.references for one in asked]
    shown = [{"input": o.text, "answer": a, "references": o.references} for o, a in zip(asked, answers, strict=True)]
    details: Json = {"references": sum(map(len, wanted)), "answers": shown[:_SHOWN_ANSWERS], **_depths(model)}
    if options.metric == "bleu":
        return scores.bleu_rows(answers, wanted), {"signature": scores.bleu_signature(answers, wanted), **details}
    if options.metric == "exact":
        return scores.exact_rows(answers, wanted), {"normalisation": scores.NORMALISATION, **details}
    rows = scores.rouge_rows(answers, wanted)
    each = {name: _estimate(scores.mean_of(column), rows, options.seed) for column, name in enumerate(scores.ROUGE)}
    return rows, {**each, **details}


# ---------------------------------------------------------------------------------------------------------------------
# bundles


def _open(path: Path, options: Evaluation) -> object:
    from edgepipe.runtime import load

    # Another bundle that runs beside it may have none
    threshold = options.exit_threshold if has_exits(read_bundle(path).manifest) else None
    return load(path, threads=options.threads or None, callers=1, exit_threshold=threshold)


def _depths(model: object) -> Json:
    """Return how many layers texts, or a decoder's tokens, went through where they may leave; nothing of others."""
    what = "texts" if isinstance(model, Encoder) else "tokens"
    found: dict[int, int] = {}
    if isinstance(model, Encoder | Model):
        found = model.texts_by_depth if isinstance(model, Encoder) else model.tokens_by_depth
    if not found:
        return {}
    mean = sum(depth * count for depth, count in found.items()) / max(1, sum(found.values()))
    return {"mean_layers": mean, f"{what}_by_layers": {str(depth): count for depth, count in found.items()}}


def _refusal(path: Path, metric: str, what: str) -> ConfigError:
    task = read_bundle(path).manifest["task"]
    return ConfigError(f"{metric} needs a bundle that {what}, but {path} is for {task}: choose another metric")


def _check_chat(model: object, options: Evaluation) -> None:
    """Raise ConfigError when the chat template is asked for and there is none."""
    if options.chat and isinstance(model, Model) and model.manifest["tokenizer"]["chat_template"] is None:
        raise ConfigError(f"{model.name} has no chat template: leave --chat out")


def _context(path: Path, metric: str) -> int:
    """Return the context of a bundle that predicts text."""
    manifest = read_bundle(path).manifest
    if manifest["task"] != "text-generation":
        raise _refusal(path, metric, "predicts text")
    return int(manifest["model"]["context"])


def _vocabulary(path: Path) -> int:
    return int(read_bundle(path).manifest["model"]["vocab_size"])


def _came_from(path: Path) -> Json:
    """Return which bundle it was, by its manifest's hash, which covers the hash of every file."""
    manifest = read_bundle(path).manifest
    return {
        "path": str(path),
        "name": manifest["name"],
        "task": manifest["task"],
        "bits_per_weight": manifest["weights"].get("bits_per_weight"),
        "manifest_sha256": hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# what is said


def _summary(scored: _Scored, against: Path | None, options: Evaluation) -> Json:
    """Return value, interval, count and what the other bundle has."""
    metric = options.described
    found = _estimate(metric.statistic, scored.rows, options.seed)
    other: Json | None = None
    if against is not None:
        other = {"bundle": _came_from(against)}
    if other is not None and scored.against is not None:
        apart = scores.difference(metric.statistic, scored.rows.shape[1])
        both = np.hstack([scored.rows, scored.against])
        gap = _estimate(apart, both, options.seed)
        other |= _estimate(metric.statistic, scored.against, options.seed)
        other["difference"] = gap | {"verdict": _verdict(gap["interval"], metric.better)}
    for value in (found["value"], 0.0 if other is None else other.get("value", 0.0)):
        if not math.isfinite(value):
            why = "every pair has the same similarity" if metric.name == "spearman" else "the logits are no use"
            raise StageError(f"{metric.name} is {value}, since {why}: look at the data, or build the bundle again")
    return {
        **found,
        "count": len(scored.rows),
        "over": metric.over,
        "bootstrap": {"level": scores.LEVEL, "resamples": scores.RESAMPLES, "seed": options.seed},
        "details": scored.details,
        "against": other,
    }


def _estimate(statistic: scores.Statistic, rows: np.ndarray, seed: int) -> Json:
    """Return a statistic with its interval, None where there is none."""
    interval = scores.bootstrap(statistic, rows, seed=seed)
    return {"value": statistic(rows), "interval": None if interval is None else [interval.low, interval.high]}


def _verdict(interval: list[float] | None, better: str) -> str | None:
    """Say "tie" when the interval of a difference holds 0, else "better" or "worse"; None without an interval."""
    if interval is None:
        return None
    if interval[0] <= 0 <= interval[1]:
        return "tie"
    return "better" if (interval[0] > 0) == (better == "higher") else "worse"


def _settings(options: Evaluation, suffix: str) -> Json:
    """Return the options that the metric reads, with the columns that were read."""
    chosen: Json = {name: getattr(options, name) for name in sorted(options.described.options)}
    if chosen.get("exit_threshold", 0) is None:  # of a model without exits, or the usual one
        del chosen["exit_threshold"]
    if "columns" in chosen:
        chosen["columns"] = dict(options.places(suffix).places)
    return {**chosen, "threads": options.threads, "seed": options.seed}


def _versions(metric: str) -> Json:
    """Return the versions of what had a part in the figure."""
    names = ["numpy", "onnxruntime", "tokenizers", *{"bleu": ["sacrebleu"], "rouge": ["rouge-score"]}.get(metric, [])]
    found = {"edgepipe": edgepipe.__version__, "python": platform.python_version()}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _tick(progress: Progress, what: str, number: int, bundles: int) -> tasks.Tick:
    """Return a tick that counts the examples of several bundles as one work."""
    return lambda done, total: progress(what, number * total + done, bundles * total)
