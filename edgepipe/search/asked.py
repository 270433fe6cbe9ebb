"""What `--max-drop` and the flags beside it ask for, as they were typed, and what they mean for a model's task."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass

from edgepipe.errors import ConfigError
from edgepipe.measuring.metrics import Evaluation
from edgepipe.package_data import fill_record
from edgepipe.quantizers.row_options import TERNARY
from edgepipe.search.promise import Budget, check_metric, parse_budget
from edgepipe.stages.quantize import BITS

MIXED = "mixed"  # --bits: the search chooses
DEFAULT = "1%"  # the budget of `--bits mixed`
_METRICS = {  # what a drop is measured with, unless it is said, by the model's task
    "text-generation": "perplexity",
    "text2text-generation": "bleu",
    "text-classification": "accuracy",
    "feature-extraction": "spearman",
}
_OWN_TEXTS = {"perplexity": "everyday"}  # a shipped text that serves where no file is named
_OWN_WINDOW = 128  # tokens: it is short, and an interval wants some windows


GOALS = ("smallest", "fastest")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Hold the flags."""

    max_drop: str = DEFAULT
    data: str | None = None
    metric: str | None = None
    options: tuple[str, ...] = ()  # of --eval: NAME=VALUE, as `edgepipe eval` has them
    goal: str = "smallest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Say what is searched for."""

    budget: Budget
    data: str  # a file, or the name of a shipped text
    options: Evaluation
    goal: str = "smallest"

    def __post_init__(self) -> None:
        """Refuse what nothing could keep."""
        check_metric(self.options)
        if self.goal not in GOALS:
            raise ConfigError(f"--goal: expected {' or '.join(GOALS)}, got {self.goal!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Say what a bundle may take; one of both."""

    nbytes: int = 0  # of all its files
    ms: float = 0.0  # TTFT of a prompt or source of measure.prompt_tokens; of an encoder, its longest call of one text

    def __post_init__(self) -> None:
        """Refuse none, and both."""
        if bool(self.nbytes) == bool(self.ms):
            raise ConfigError("--budget-bytes and --budget-ms: give one of them")

    @property
    def most(self) -> float:
        """Return the number."""
        return self.nbytes or self.ms

    def say(self, value: float) -> str:
        """Write a number with its unit."""
        return f"{value:,.0f} bytes" if self.nbytes else f"{value:.2f} ms"


def room_of(nbytes: int | None, ms: float | None) -> Room | None:
    """Return what two flags ask for; None where they don't. Raises ConfigError."""
    for name, value in (("bytes", nbytes), ("ms", ms)):
        if value is not None and not 0 < value < math.inf:  # no number isn't above 0 either
            raise ConfigError(f"--budget-{name}: expected a number above 0, got {value:g}")
    return None if nbytes is None and ms is None else Room(nbytes=nbytes or 0, ms=ms or 0.0)


def asked_of(
    *,
    bits: str | None,
    embedding_bits: int | None,
    max_drop: str | None,
    data: str | None,
    metric: str | None,
    options: tuple[str, ...],
    goal: str | None,
) -> Asked | None:
    """Return what flags ask for; None where none asks for a search, ConfigError for those that exclude it."""
    if max_drop is None and bits != MIXED:
        for name, value in (("--metric", metric), ("--eval", options), ("--goal", goal)):
            if value:
                raise ConfigError(f"{name} is for a search: add --max-drop, or leave it out")
        return None
    for name, chosen in (("--bits", bits if bits != MIXED else None), ("--embedding-bits", embedding_bits)):
        if chosen is not None:
            raise ConfigError(f"{name} and --max-drop: the search chooses the bits, so leave one of them out")
    parse_budget(max_drop or DEFAULT)  # what is no budget is refused before any work
    return Asked(max_drop=max_drop or DEFAULT, data=data, metric=metric, options=options, goal=goal or GOALS[0])


def number_of(bits: str | None) -> int | float | None:
    """Return the number that --bits was given; ConfigError when it is none of those there are."""
    if bits is None:
        return None
    known = {str(one): one for one in (TERNARY, *BITS)}
    if (chosen := known.get(bits.strip())) is None:
        raise ConfigError(f"--bits: expected {', '.join(known)} or {MIXED}, got {bits!r}")
    return chosen


def wanted_of(asked: Asked, task: str) -> Wanted:
    """Return what is searched for in a model for `task`; ConfigError for what can't be."""
    metric = asked.metric or _METRICS.get(task)
    if metric is None:
        raise ConfigError(f"--max-drop: no metric of edgepipe is for {task}; those that are, are {_known()}")
    options: dict[str, object] = {"metric": metric}
    data = asked.data
    if data is None and metric in _OWN_TEXTS:
        data, options = _OWN_TEXTS[metric], {**options, "window": _OWN_WINDOW}
    if data is None:
        raise ConfigError(f"--max-drop: {metric} is measured on a file of yours: name one with --data")
    evaluation = fill_record(Evaluation, {**options, **dict(map(_option, asked.options))}, "--eval")
    return Wanted(budget=parse_budget(asked.max_drop), data=data, options=evaluation, goal=asked.goal)


def _option(text: str) -> tuple[str, object]:
    """Read NAME=VALUE; the value is read as TOML, and as plain text when it isn't TOML."""
    name, equals, value = text.partition("=")
    key = name.strip().lstrip("-").replace("-", "_")
    if not equals or not key or key == "metric":
        raise ConfigError(f"--eval: expected an option of `edgepipe eval` as in limit=500, got {text!r}")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value.strip()


def _known() -> str:
    return ", ".join(f"{metric} ({task})" for task, metric in _METRICS.items())
