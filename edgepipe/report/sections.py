"""The report's sections as titles, tables of text and sentences: Markdown and the page show the same ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edgepipe.artifacts import Json
from edgepipe.report.compare import compared_cells
from edgepipe.report.engines import engine_rows, engine_sentences
from edgepipe.report.guards import agreement_rows, agreement_sentences, product_rows, product_sentences
from edgepipe.report.plans import budget_sentences, more_bits, tried
from edgepipe.report.record import BundleReport, Comparison, Search, Time, Training
from edgepipe.report.rows import MISSING, Row, between, cells, shown_title
from edgepipe.report.sentences import limit_title

_BUNDLE = "bundle"
_STOPPED = {"early": "patience"}  # what ended a training, by the option's name
_PRECISIONS = {"no": "float32", "bf16": "bfloat16"}  # as the loop calls them
_LONG = 100  # seconds from which a tenth says nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Hold a table of text: figures stand right, words left; the first column always left."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: frozenset[int] = frozenset()  # columns that hold words


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Hold one section of a report."""

    title: str
    key: str  # what a page may draw above it: "latency", "limits", "parts", "training", "search"; others are tables
    table: Table | None = None
    sentences: tuple[str, ...] = ()


def bundle_sections(one: BundleReport) -> Iterator[Section]:
    """Yield what is said of one bundle below its verdict; what wasn't measured has no section."""
    rows = _before_and_after(one.rows, one.baseline)
    text = one.measured and one.measured.text
    scored = any(row.key == "perplexity" for row in one.rows)
    over = (f"Perplexity is that of the text {text}, through the bundle.",) if text and scored else ()
    title = "Before and after" if one.baseline else "Figures"
    yield Section(title=title, key="rows", table=rows, sentences=(*one.certainty, *over))
    if one.ttft:
        yield Section(title="Time to first token", key="ttft", table=_times("prompt", "first step", one.ttft))
    if one.calls:
        yield Section(title="Calls", key="calls", table=_times("batch × tokens", "run", one.calls))
    if one.latency:
        after = f"The last bar of a histogram holds what took longer than {one.latency[0].end_ms:,.0f} ms."
        yield Section(title="Time per output token", key="latency", table=_latency(one), sentences=(after,))
    if one.limits:
        yield Section(title="What limits", key="limits", table=_limits(one), sentences=one.limit_sentences)
    if one.start:
        yield Section(title="Cold start", key="start", table=_before_and_after(one.start, one.baseline))
    yield Section(title="Where the bytes are", key="parts", table=_parts(one))
    if one.training is not None:
        yield Section(
            title="Training", key="training", table=_phases(one.training), sentences=tuple(_taught(one.training))
        )
    yield from _choices(one)
    yield Section(title="How it was made", key="stages", table=_stages(one), sentences=(_origin(one),))
    if one.measured is not None:
        yield Section(title="Measured on", key="machine", sentences=one.measured.sentences)


def _choices(one: BundleReport) -> Iterator[Section]:
    """Yield how its grids were found, and what the guards found."""
    if one.search is not None:
        yield from search_sections(one.search)
    if one.agreement is not None:
        rows = tuple(agreement_rows(one.agreement))
        table = Table(header=("in float", "KL", "tokens", ""), rows=rows, words=frozenset({3})) if rows else None
        sentences = tuple(agreement_sentences(one.agreement))
        yield Section(title="Token agreement", key="agreement", table=table, sentences=sentences)
    if one.products:
        yield _products(one.products)
    if one.engines is not None:
        yield _engines(one.engines)


def search_sections(search: Search) -> Iterator[Section]:
    """Yield how a budget was kept, and which matrices got more bits for it."""
    first = ("pruned",) if search.prunes else ()
    yield Section(
        title="Quality, bytes and time",
        key="search",
        table=Table(
            header=(
                *(*first, "matrices, MB", "bundle, MB", f"loss, {search.loss_unit}", search.metric, "drop", "at most"),
                *("ms an example", ""),
            ),
            rows=tuple(tried(search)),
            words=frozenset({7 + len(first)}),
        ),
        sentences=tuple(budget_sentences(search)),
    )
    rows, sentence = more_bits(search)
    table = Table(header=("matrices", "grid", "MB", "MB more", "loss", "else"), rows=tuple(rows), words=frozenset({1}))
    yield Section(title="Matrices that got more bits", key="plan", table=table if rows else None, sentences=(sentence,))


def _products(products: Sequence[Json]) -> Section:
    return Section(
        title="Never slower",
        key="products",
        table=Table(
            header=("matrices", "stored as", "rows", "ms", "float, ms", "ratio", ""),
            rows=tuple(product_rows(products)),
            words=frozenset({1, 6}),
        ),
        sentences=tuple(product_sentences(products)),
    )


def _engines(found: Json) -> Section:
    sides = list(found["sides"])
    rows = tuple(engine_rows(found))
    table = Table(header=("", *sides, found["compared"]), rows=rows) if sides else None
    return Section(title="Engine", key="engines", table=table, sentences=tuple(engine_sentences(found)))


def comparison_section(found: Comparison) -> Section:
    """Return the bundles side by side."""
    rows = tuple(
        (("  " if row.detail else "") + shown_title(row.title, row.unit, False), *compared_cells(row))
        for row in found.rows
    )
    return Section(
        title="Side by side",
        key="comparison",
        table=Table(header=("", *found.labels), rows=rows),
        sentences=found.notes,
    )


def _before_and_after(rows: Sequence[Row], baseline: str | None) -> Table:
    if baseline is None:
        return Table(header=("", _BUNDLE), rows=tuple((title, after) for title, _, after, _ in map(cells, rows)))
    return Table(header=("", baseline, _BUNDLE, "ratio"), rows=tuple(tuple(cells(row)) for row in rows))


def _times(of: str, run: str, times: Sequence[Time]) -> Table:
    by_length = sorted(times, key=lambda time: [other.of for other in times].index(time.of))  # sides beside each other
    return Table(
        header=(of, "side", "tokenize, ms", f"{run}, ms", "in all, ms", "95 % interval", "spread"),
        rows=tuple(
            (
                time.of,
                time.side,
                _number(time.tokenize_ms, 2),
                _number(time.run_ms, 1),
                _number(time.ms, 1),
                _interval(time.low, time.high),
                _spread(time.spread, time.flagged),
            )
            for time in by_length
        ),
        words=frozenset({1}),
    )


def _latency(one: BundleReport) -> Table:
    return Table(
        header=("side", "tokens", "p50, ms", "95 % interval", "p95, ms", "p99, ms", "spread"),
        rows=tuple(
            (
                found.side,
                f"{found.samples:,}",
                _number(found.p50_ms, 1),
                _interval(found.low, found.high),
                _number(found.p95_ms, 1),
                _number(found.p99_ms, 1),
                _spread(found.spread, found.flagged),
            )
            for found in one.latency
        ),
    )


def _limits(one: BundleReport) -> Table:
    by_figure = sorted(one.limits, key=lambda limit: [other.figure for other in one.limits].index(limit.figure))
    return Table(
        header=("", "side", "reading, ms", "arithmetic, ms", "measured, ms", "limit's share", "limited by"),
        rows=tuple(
            (
                limit_title(limit.figure),
                limit.side,
                _number(limit.read_ms, 1),
                _number(limit.compute_ms, 1),
                _number(limit.measured_ms, 1),
                f"{limit.share:.0%}",
                limit.limited_by,
            )
            for limit in by_figure
        ),
        words=frozenset({1, 6}),
    )


def _parts(one: BundleReport) -> Table:
    return Table(
        header=("part", "stored as", "parameters", "MB", "share", "bits/weight"),
        rows=tuple(
            (
                part["part"],
                part["storage"],
                f"{part['parameters']:,}",
                f"{part['bytes'] / 1e6:,.1f}",
                f"{part['share']:.1%}",
                f"{part['bits_per_weight']:.2f}",
            )
            for part in one.parts
        ),
        words=frozenset({1}),
    )


def _phases(training: Training) -> Table:
    return Table(
        header=("phase", "steps", "stopped by", "held-out loss", "best", "at step", "tokens", "seconds", "tokens/s"),
        rows=tuple(
            (
                phase.phase,
                f"{phase.steps:,}",
                _STOPPED.get(phase.stopped, phase.stopped),
                _number(phase.first_loss, 3),
                _number(phase.best_loss, 3),
                _number(phase.best_step, 0),
                f"{phase.tokens:,}",
                _number(phase.seconds, 0 if phase.seconds >= _LONG else 1),
                _number(phase.tokens_per_second, 0),
            )
            for phase in training.phases
        ),
        words=frozenset({2}),
    )


def _taught(training: Training) -> Iterator[str]:
    """Say with what it was trained, and how the losses are to be read."""
    if training.data is not None:
        found = training.data
        yield (
            f"Data: {found['name']} ({found['form']}), {found['train']:,} examples to train with, "
            f"{found['held_out']:,} held out."
        )
    computed = dict.fromkeys((phase.precision, phase.processes) for phase in training.phases)
    yield (
        "Computed in "
        + ", then ".join(
            f"{_PRECISIONS.get(precision, precision)} by {processes} process{'es' if processes > 1 else ''}"
            for precision, processes in computed
        )
        + "; tokens per second count held-out scoring as well."
    )
    if any(phase.held_out for phase in training.phases):
        yield (
            "The weights of the best held-out loss are the ones that were kept. A phase may be judged by another loss "
            "than it is trained with: compare losses along a curve, not between the two."
        )


def _stages(one: BundleReport) -> Table:
    return Table(
        header=("stage", "options", "notes"),
        rows=tuple((s["stage"], _options(s["options"]), "; ".join(s["notes"])) for s in one.stages),
        words=frozenset({1, 2}),
    )


def _options(options: dict[str, object]) -> str:
    return ", ".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in options.items())


def _origin(one: BundleReport) -> str:
    """Say where the model came from and with what the bundle was built."""
    lineage = f", made from {', '.join(one.source['lineage'])}" if one.source["lineage"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in one.versions.items())
    return (
        f"Target {one.target}, seed {one.recipe['seed']}. Source: {one.source['model']}, licence "
        f"{one.source['licence']}{lineage}. Built with {versions}."
    )


def _number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:,.{digits}f}"


def _interval(low: float | None, high: float | None) -> str:
    return MISSING if low is None or high is None else between(low, high, 1)


def _spread(spread: float | None, flagged: bool) -> str:
    return MISSING if spread is None else f"{spread:.0%}" + (" *" if flagged else "")
