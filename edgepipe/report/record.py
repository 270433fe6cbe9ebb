"""The report as a record: build.py makes it once; Markdown, JSON and the page only lay it out.

`to_json` gives the document that report.schema.json describes. A section whose figures weren't taken is empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import edgepipe
from edgepipe.artifacts import Json
from edgepipe.report.rows import Row

SCHEMA = 1  # of the document; report.schema.json


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """Hold what one bundle's part of a report is made from."""

    label: str  # what it is called beside others
    path: str
    manifest: Json
    manifest_sha256: str
    manifest_bytes: int
    figures: Json | None = None  # of the stage `measure`
    beside: str = "float32"  # what the figures' baseline is called
    recipe: Json | None = None  # as a run resolved it; None: the manifest's
    history: Sequence[Json] | None = None  # what a run recorded; None: the manifest's
    budgets: Mapping[str, Any] | None = None  # of the target
    search: Json | None = None  # as a run recorded how its grids were found
    products: Sequence[Json] = ()  # as a run recorded which of them are faster than floats
    engines: Json | None = None  # as a run recorded how its engine was chosen
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Time:
    """Hold the TTFT of one prompt length, or the time of calls of one shape, on one side."""

    side: str
    of: str  # "128 tokens", or the shape of a call
    ms: float
    low: float | None
    high: float | None
    spread: float | None  # (90th − 10th percentile) ÷ median
    flagged: bool
    tokenize_ms: float | None
    run_ms: float | None  # the first step over the prompt, or the run of a call


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Hold how the time per output token of one side is spread."""

    side: str
    samples: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    low: float | None  # of the median
    high: float | None
    spread: float | None
    flagged: bool
    end_ms: float  # where the histogram ends; its last bin holds what took longer
    counts: tuple[int, ...]  # from 0 to end_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Hold one figure beside what it could be at best."""

    side: str
    figure: str  # "token", "prefill", or the shape of a call
    bytes: int
    read_ms: float
    multiply_adds: int
    compute_ms: float
    limit_ms: float
    measured_ms: float
    share: float
    limited_by: str  # "reading", "arithmetic" or "overhead"


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Hold one training of the model, of its teacher or of one head: how long it took and what it brought."""

    phase: str  # "teacher", "student" …
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    precision: str
    processes: int
    stopped: str  # "steps", or "early": no better held-out loss
    first_loss: float | None  # held out, before the first step; None without held-out data
    best_loss: float | None
    best_step: int | None
    train: tuple[Json, ...]  # points of a curve: step, loss, and the objective's own figures
    held_out: tuple[Json, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Hold what a model was taught with, phase after phase."""

    data: Json | None  # name, form, and how many examples were trained with and held out
    phases: tuple[Phase, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Hold how a budget was kept: the frontier of plans, the bundles that were tried, and the plan that was chosen."""

    metric: str
    better: str  # "higher" or "lower"
    max_drop: float  # a share of the float model's value when relative, else in units of the metric
    relative: bool
    goal: str  # what the cost of a plan is: "smallest" bytes, or "fastest" ms
    data: Json  # name, sha256, examples
    loss_unit: str
    float_value: float
    # the costliest first: prune_ratio, cost, bytes, loss, and of tried ones value, drop, limit, example_ms …
    points: tuple[Json, ...]
    chosen: int
    units: tuple[Json, ...]  # matrices that got one choice: name, tensors, choice, bytes, and their other choices

    @property
    def prunes(self) -> bool:
        """Say whether models that are pruned were weighed too."""
        return any(point["prune_ratio"] for point in self.points)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Say when, on what and how the figures were taken."""

    taken_at: str | None
    text: str | None  # of the perplexity
    machine: Json
    method: Json | None
    index: Json | None  # the machine-speed index
    sentences: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleReport:
    """Hold everything a report says of one bundle."""

    label: str
    path: str
    name: str
    task: str
    target: str
    engine: str
    manifest_sha256: str
    facts: Json  # parameters, weight_bytes, bits_per_weight, context
    baseline: str | None  # what it was measured beside
    verdict: tuple[str, ...]
    over_budget: tuple[str, ...]
    remarks: tuple[str, ...]
    rows: tuple[Row, ...]  # before and after
    certainty: tuple[str, ...]
    start: tuple[Row, ...]  # what a cold start is made of
    ttft: tuple[Time, ...]
    calls: tuple[Time, ...]
    latency: tuple[Latency, ...]
    limits: tuple[Limit, ...]
    limit_sentences: tuple[str, ...]
    parts: tuple[Json, ...]  # the largest first, with its share of the bytes
    training: Training | None  # None: no stage trained it
    search: Search | None  # None: its grids were given
    agreement: Json | None  # how its greedy answers agree with the float model's; None: nobody asked
    products: tuple[Json, ...]  # each kind of matrix timed beside floats; empty: nobody asked
    engines: Json | None  # how its engine was chosen, with the figures of both; None: it was given
    stages: tuple[Json, ...]  # stage, options, notes
    recipe: Json  # target and seed
    source: Json  # model, licence, lineage
    versions: Json  # of what built it
    measured: Measurement | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRow:
    """Hold one figure of every bundle, in the order of the bundles."""

    key: str
    title: str
    unit: str
    digits: int
    values: tuple[float | None, ...]
    lows: tuple[float | None, ...]
    highs: tuple[float | None, ...]
    flagged: tuple[bool, ...]
    detail: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Hold several bundles side by side."""

    labels: tuple[str, ...]
    rows: tuple[ComparedRow, ...]
    verdict: tuple[str, ...]  # judged ratios of those measured in turn; why others have none
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Hold a report of one bundle, or of several."""

    bundles: tuple[BundleReport, ...]
    comparison: Comparison | None = None

    @property
    def title(self) -> str:
        """Return what stands at the head."""
        if self.comparison is not None:
            return f"{len(self.bundles)} bundles side by side"
        return f"{self.bundles[0].name} for {self.bundles[0].target}"

    def to_json(self) -> Json:
        """Return the document that report.schema.json describes."""
        return {"schema": SCHEMA, "edgepipe": edgepipe.__version__, "title": self.title, **asdict(self)}
