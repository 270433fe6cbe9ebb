"""The metrics of `edgepipe eval`, and the options of an evaluation, checked before anything runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from edgepipe.errors import ConfigError
from edgepipe.measuring import quality, scores, tasks
from edgepipe.package_data import did_you_mean
from edgepipe.rows import Columns, parse_columns

_TEXT_OPTIONS = frozenset({"tokens", "window", "stride", "exit_threshold"})
TABLE_OPTIONS = frozenset({"limit", "columns", "header", "batch"})
_ANSWER_OPTIONS = TABLE_OPTIONS | {"prompt", "chat", "max_new_tokens", "stop", "exit_threshold"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """Describe one metric."""

    name: str
    better: str  # "higher" or "lower"
    over: str  # what one row is, and what is resampled
    options: frozenset[str]  # those it reads, beside threads and seed
    statistic: scores.Statistic  # of its rows
    columns: str = ""  # where the parts of an example stand, unless --columns says otherwise
    keys: str = ""  # the same in .jsonl


METRICS = (
    Metric(name="perplexity", better="lower", over="windows", options=_TEXT_OPTIONS, statistic=quality.perplexity),
    Metric(name="kl-to-float", better="lower", over="windows", options=_TEXT_OPTIONS, statistic=scores.mean_per(0, 4)),
    Metric(
        name="spearman",
        better="higher",
        over="pairs",
        options=TABLE_OPTIONS | {"exit_threshold"},
        statistic=scores.spearman,
        columns="score=4,first=5,second=6",  # as STS-B has them
        keys="score=score,first=sentence1,second=sentence2",
    ),
    Metric(
        name="accuracy",
        better="higher",
        over="examples",
        options=TABLE_OPTIONS | {"prompt", "labels", "chat", "exit_threshold"},
        statistic=scores.mean_of(0),
        columns="text=0,label=1",
        keys="text=text,label=label",
    ),
    *(
        Metric(
            name=name,
            better="higher",
            over="inputs",
            options=_ANSWER_OPTIONS,
            statistic=statistic,
            columns="input=0,reference=1",
            keys="input=input,reference=reference",
        )
        for name, statistic in (
            ("bleu", scores.bleu),
            ("rouge", scores.mean_of(scores.ROUGE.index("rougeL"))),
            ("exact", scores.mean_of(0)),
        )
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Say how a bundle is evaluated; every option is a flag of `edgepipe eval`."""

    metric: str
    tokens: int = 0  # of a text, scored at most, from its beginning; 0: all
    window: int = quality.WINDOW_TOKENS  # tokens of a window, or the context if that is less
    stride: int = 0  # tokens from window to window; 0: end to end
    limit: int = 0  # examples, drawn with the seed; 0: all
    columns: str = ""  # "part=column,…", a column being a number from 0 or a name; empty: the metric's own
    header: bool | None = None  # None: look at the first line
    prompt: str = tasks.TEXT  # what a text model is asked
    labels: str = ""  # "label=words,…" for a text model, "label=number,…" for a classifier
    chat: bool = False  # ask through the chat template
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()  # an answer ends before one of these
    batch: int = 8  # examples that run together
    exit_threshold: float | None = None  # of a model with exits: when what it reads leaves; None: 0.5, a decoder 1
    threads: int = 0  # of the engine; 0: its choice
    seed: int = 0  # of the bootstrap and of `limit`

    def __post_init__(self) -> None:
        """Refuse what is out of range, and options that the metric doesn't read."""
        metric = self.described
        for name, least in (("window", 2), ("max_new_tokens", 1), ("batch", 1), ("limit", 0), ("stride", 0)):
            _at_least(name, getattr(self, name), least)
        for name in ("tokens", "threads", "seed"):
            _at_least(name, getattr(self, name), 0)
        if self.tokens == 1:
            raise ConfigError("--tokens: expected at least 2, or 0 for the whole text, got 1")
        if self.stride > self.window:
            raise ConfigError(f"--stride: expected at most the window of {self.window} tokens, got {self.stride}")
        for field in dataclasses.fields(self):
            if field.name in metric.options | {"metric", "threads", "seed"}:
                continue
            if getattr(self, field.name) != field.default:
                readers = ", ".join(m.name for m in METRICS if field.name in m.options)
                raise ConfigError(
                    f"--{field.name.replace('_', '-')} means nothing for {metric.name}, but for {readers}"
                )
        if tasks.TEXT not in self.prompt:
            raise ConfigError(f"--prompt: expected {tasks.TEXT} where the example goes, got {self.prompt!r}")
        if not all(self.stop):
            raise ConfigError("--stop: expected texts of at least one character")
        if self.columns:
            self.places(".tsv")
        self.label_words()

    @property
    def described(self) -> Metric:
        """Return the metric's record."""
        found = [metric for metric in METRICS if metric.name == self.metric]
        if not found:
            names = [metric.name for metric in METRICS]
            raise ConfigError(
                f"unknown metric {self.metric!r}{did_you_mean(self.metric, names)}: known are {', '.join(names)}"
            )
        return found[0]

    def places(self, suffix: str) -> Columns:
        """Return where the parts of an example stand in a file with that suffix."""
        metric = self.described
        places = parse_columns("--columns", metric.keys if suffix == ".jsonl" else metric.columns)
        given = parse_columns("--columns", self.columns)
        for part in given:
            if part not in places:
                hint = did_you_mean(part, places)
                raise ConfigError(f"--columns: {metric.name} reads {', '.join(places)}, not {part!r}{hint}")
        return Columns(places={**places, **given}, header=self.header)

    def label_words(self) -> dict[str, str]:
        """Return what each label of the file stands for."""
        labels = parse_columns("--labels", self.labels)
        if len(set(labels.values())) < len(labels):
            raise ConfigError(f"--labels: expected different words for each label, got {self.labels!r}")
        return labels


def _at_least(name: str, value: int, least: int) -> None:
    """Raise ConfigError for a number below the least."""
    if value < least:
        raise ConfigError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
