"""Figures before and after, a row each: the one place that says which figures are shown, in which order, named how.

Terminal, Markdown, page and JSON show these rows. A figure that wasn't taken has no row: other tasks have other ones,
and what older versions measured lacks some.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgepipe.artifacts import Json
from edgepipe.measuring.calls import call_name

MISSING = "–"
_SHOWN = {"bytes": ("MB", 1e-6), "ms": ("ms", 1.0), "": ("", 1.0)}  # unit of a figure → unit and factor it is shown in


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Hold bundle ÷ baseline; interval and verdict only where both were measured in turn and judged."""

    value: float
    low: float | None = None
    high: float | None = None
    verdict: str | None = None  # "better", "worse" or "tie"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Hold one figure, before and after."""

    key: str  # as the figures name it, where they do
    title: str
    unit: str  # "bytes", "ms" or "": of the values, not of what is shown
    digits: int  # after the point, when shown
    baseline: float | None
    bundle: float | None
    ratio: Ratio | None
    flagged: bool = False  # its spread was too wide
    detail: bool = False  # belongs to the row above


@dataclass(frozen=True, slots=True, kw_only=True)
class _Figure:
    """Say how a figure of the record is called and shown."""

    key: str
    title: str
    unit: str
    digits: int
    detail: bool = False


_SIZES = (
    _Figure(key="bundle_bytes", title="bundle", unit="bytes", digits=1),
    _Figure(key="bits_per_weight", title="bits per weight", unit="", digits=2),
)
_TIMES = (
    _Figure(key="token_ms", title="time per output token", unit="ms", digits=1),
    _Figure(key="token_ms_p95", title="95th percentile", unit="ms", digits=1, detail=True),
    _Figure(key="token_ms_p99", title="99th percentile", unit="ms", digits=1, detail=True),
    _Figure(key="tokens_per_second", title="tokens/s", unit="", digits=1),
)
_LOAD_AND_MEMORY = (
    _Figure(key="load_ms", title="load", unit="ms", digits=0),
    _Figure(key="memory_peak_bytes", title="peak memory", unit="bytes", digits=0),
    _Figure(key="memory_after_load_bytes", title="after loading", unit="bytes", digits=0, detail=True),
    _Figure(key="memory_without_model_bytes", title="without the model", unit="bytes", digits=0, detail=True),
    _Figure(key="cache_bytes", title="KV cache when full", unit="bytes", digits=1),
)
_START = (
    _Figure(key="import_ms", title="importing packages", unit="ms", digits=0),
    _Figure(key="load_ms", title="loading the bundle", unit="ms", digits=0),
    _Figure(key="first_token_ms", title="first token of the process", unit="ms", digits=0),
    _Figure(key="first_call_ms", title="first call of the process", unit="ms", digits=0),
    _Figure(key="cold_start_ms", title="cold start", unit="ms", digits=0),
)


def measured_rows(figures: Json) -> list[Row]:
    """Return what was measured, a row a figure."""
    before, after, ratios = figures.get("baseline"), figures["bundle"], figures.get("ratios") or {}
    return [
        *_rows(_SIZES, before, after, {}),
        *_ttft_rows(before, after, ratios),
        *_call_rows(before, after, ratios),
        *_rows([*_TIMES, _cold_start(after), *_LOAD_AND_MEMORY], before, after, ratios),
        *_perplexity_row(before, after),
    ]


def same_tokens(before: Json, after: Json) -> bool:
    """Say whether the text of the perplexity was cut into as many tokens on both sides; else a ratio means nothing."""
    return bool(before.get("perplexity_tokens") == after.get("perplexity_tokens"))


def _cold_start(after: Json) -> _Figure:
    first = "call" if "calls" in after else "token"
    return _Figure(key="cold_start_ms", title=f"cold start to first {first}", unit="ms", digits=0)


def start_rows(figures: Json) -> list[Row]:
    """Return what a cold start is made of; nothing where only loading was timed."""
    if figures["bundle"].get("cold_start_ms") is None:
        return []
    return list(_rows(_START, figures.get("baseline"), figures["bundle"], {}))


def static_figures(manifest: Mapping[str, Any], manifest_bytes: int) -> Json:
    """Return what a manifest and its own size say, under the names that figures have."""
    return {
        "bundle_bytes": manifest_bytes + sum(file["bytes"] for file in manifest["files"].values()),
        "weight_bytes": manifest["weights"]["bytes"],
        "bits_per_weight": manifest["weights"]["bits_per_weight"],
        "cache_bytes": (manifest["cache"] or {}).get("bytes"),
    }


def figure(side: Mapping[str, Any] | None, key: str) -> float | None:
    """Return a figure of one side; None where it wasn't taken, or is no number."""
    value = None if side is None else side.get(key)
    return float(value) if value is not None and math.isfinite(value) else None


def show(value: float | None, unit: str, digits: int) -> str:
    """Write a value in the unit it is shown in."""
    return MISSING if value is None else f"{value * _SHOWN[unit][1]:,.{digits}f}"


def shown_title(title: str, unit: str, flagged: bool) -> str:
    """Return a row's title with its unit, and a star where the figure spread too much."""
    return title + (f", {_SHOWN[unit][0]}" if unit else "") + (" *" if flagged else "")


def cells(row: Row) -> list[str]:
    """Return a row as it is shown: title, baseline, bundle, ratio; details stand two spaces in."""
    title = ("  " if row.detail else "") + shown_title(row.title, row.unit, row.flagged)
    return [title, show(row.baseline, row.unit, row.digits), show(row.bundle, row.unit, row.digits), _ratio(row.ratio)]


def in_order(side: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Return names of times in the order they are shown in; a stored record has sorted them."""
    shown = [shape_of(call) for call in side.get("calls") or ()]
    return sorted(keys, key=lambda key: shown.index(key) if key in shown else -1)


def between(low: float, high: float, digits: int) -> str:
    """Write an interval."""
    return f"[{low:,.{digits}f}, {high:,.{digits}f}]"


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return MISSING
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.3f}"
    tie = ", a tie" if ratio.verdict == "tie" else ""
    return f"{ratio.value:.3f} {between(ratio.low, ratio.high, 3)}{tie}"


def _perplexity_row(before: Json | None, after: Json) -> Iterator[Row]:
    alike = before is None or same_tokens(before, after)
    counts = [side.get("perplexity_tokens") for side in (before, after) if side is not None]
    tokens = counts[-1:] if alike else counts  # of a trimmed vocabulary there are more
    over = f" ({' and '.join(map(str, tokens))} tokens)" if tokens[-1] is not None else ""
    for row in _rows([_Figure(key="perplexity", title=f"perplexity{over}", unit="", digits=3)], before, after, {}):
        yield row if alike else dataclasses.replace(row, ratio=None)


def _rows(figures: Sequence[_Figure], before: Json | None, after: Json, ratios: Json) -> Iterator[Row]:
    flagged = {name for one in (before, after) if one is not None for name in one.get("flagged", ())}
    for one in figures:
        if after.get(one.key) is not None:
            old, new = figure(before, one.key), figure(after, one.key)
            yield _row(one, old, new, judged=ratios.get(one.key), flagged=one.key in flagged)


def _ttft_rows(before: Json | None, after: Json, ratios: Json) -> Iterator[Row]:
    """Yield a row for every prompt length; the headline's has an interval beside its ratio."""
    if "ttft_ms" not in after:
        return
    length = after["prompt_tokens"]
    others = {one["prompt_tokens"]: one["ttft_ms"] for one in (before or {}).get("ttft") or ()}
    for one in after.get("ttft") or [{"prompt_tokens": length}]:  # older versions measured one length
        tokens = one["prompt_tokens"]
        if tokens == length:
            found = _Figure(key="ttft_ms", title=f"TTFT at {length} tokens", unit="ms", digits=0)
            yield from _rows([found], before, after, ratios)
        else:
            found = _Figure(key=f"ttft_{tokens}_ms", title=f"TTFT at {tokens} tokens", unit="ms", digits=0)
            yield _row(found, others.get(tokens), one["ttft_ms"])


def _call_rows(before: Json | None, after: Json, ratios: Json) -> Iterator[Row]:
    """Yield a row for every shape of call of a model that embeds or classifies, and its inputs a second."""
    others = {shape_of(one): one for one in (before or {}).get("calls") or ()}
    flagged = {name for one in (before, after) if one is not None for name in one.get("flagged", ())}
    calls: list[Json] = list(after.get("calls") or ())
    for one in calls:
        name = shape_of(one)
        beside = others.get(name, {})
        found = _Figure(key=f"call_{name}_ms", title=call_title(one["batch"], one["tokens"]), unit="ms", digits=1)
        yield _row(found, beside.get("ms"), one["ms"], judged=ratios.get(name), flagged=name in flagged)
        if one is calls[-1]:
            found = _Figure(key="per_second", title="a second", unit="", digits=1, detail=True)
            yield _row(found, beside.get("per_second"), one["per_second"])


def shape_of(call: Json) -> str:
    """Return the name that figures give a call's shape: "8x128"."""
    return call_name(call["batch"], call["tokens"])


def call_title(batch: int, tokens: int | None) -> str:
    """Return how a call of a shape is called in a table."""
    return f"call, {batch} at a time" + (f" of {tokens} tokens" if tokens else "")


def _row(
    one: _Figure, old: float | None, new: float | None, *, judged: Json | None = None, flagged: bool = False
) -> Row:
    ratio = None
    if judged is not None:
        ratio = Ratio(value=judged["value"], low=judged["low"], high=judged["high"], verdict=judged["verdict"])
    elif old and new is not None:
        ratio = Ratio(value=new / old)
    return Row(
        key=one.key,
        title=one.title,
        unit=one.unit,
        digits=one.digits,
        baseline=old,
        bundle=new,
        ratio=ratio,
        flagged=flagged,
        detail=one.detail,
    )
