"""Set a measurement beside an earlier one: do they agree within their stated intervals, the speed index considered?

Hours apart, a machine has another speed. A time divided by the index beside it changes less than the time itself, so
these quotients are compared. Two agree when their 95 % intervals overlap; nothing is assumed beyond what both state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgepipe.artifacts import Json
from edgepipe.errors import ConfigError
from edgepipe.measuring.calls import call_name

_TITLES = {"token_ms": "time per output token", "ttft_ms": "TTFT"}  # others are calls, named by their shape
_SAME_MACHINE = ("cpu", "cores", "threads", "system")
_SAME_METHOD = ("bursts", "counted_tokens", "prompt_tokens", "calls", "repeats")


def read_measurement(file: Path) -> Json:
    """Return the figures in a file: what `edgepipe measure` printed, or a run's run.json; ConfigError for others."""
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the earlier measurement {file} can't be read ({error}): give what `edgepipe measure` printed"
        ) from None
    found = _parsed(text) or _parsed((text.splitlines() or [""])[-1])
    figures = found.get("figures", found)
    try:
        for name in figures["bundle"]["per_index"]:
            low, value, high = (float(figures["bundle"]["per_index"][name][key]) for key in ("low", "value", "high"))
            if not 0 < low <= value <= high:
                raise ValueError(name)
        complete = all(key in figures["machine"] for key in _SAME_MACHINE) and "taken_at" in figures
        complete = (
            complete and len(figures["bundle"]["per_index"]) > 0 and any(k in figures["method"] for k in _SAME_METHOD)
        )
    except (LookupError, TypeError, ValueError, AttributeError):
        complete = False
    if not complete:
        raise ConfigError(f"{file} holds no measurement of this kind: give what `edgepipe measure` printed")
    return dict(figures)


def check_comparable(earlier: Json, machine: Mapping[str, Any]) -> None:
    """Raise ConfigError when the earlier measurement is another machine's: the index bridges hours, not machines."""
    for key in _SAME_MACHINE:
        if earlier["machine"][key] != machine[key]:
            raise ConfigError(
                f"the earlier measurement has {key} {earlier['machine'][key]!r}, but here it is {machine[key]!r}: "
                "only measurements of one machine, with as many threads, can be compared"
            )


def compare(now: Json, earlier: Json) -> Json:
    """Return whether two measurements agree, figure by figure, and sentences that say so."""
    for key in _SAME_METHOD:
        then, here = earlier["method"].get(key), now["method"].get(key)
        if here != then:
            raise ConfigError(
                f"the earlier measurement has {key} {then}, but here it is {here}: measure a bundle for the same task "
                "with the same context"
            )
    then, here = (one["bundle"].get("prompt_tokens") for one in (earlier, now))
    if here != then:
        raise ConfigError(f"the earlier measurement's headline is a prompt of {then} tokens, but here it is {here}")
    figures = {name: _compare_one(name, now, earlier) for name in now["bundle"]["per_index"]}
    same = now["bundle"]["manifest_sha256"] == earlier["bundle"].get("manifest_sha256")
    sentences = [_sentence(name, found) for name, found in figures.items()]
    if not same:
        sentences.insert(0, f"Another bundle was measured at {earlier['taken_at']}: a difference may be its own.")
    return {
        "earlier_taken_at": earlier["taken_at"],
        "same_bundle": same,
        "agrees": all(found["agrees"] for found in figures.values()),
        "figures": figures,
        "sentences": sentences,
    }


def _compare_one(name: str, now: Json, earlier: Json) -> Json:
    """Compare a figure, raw and per index; the ratio's interval is what both intervals allow."""
    a, b = now["bundle"]["per_index"][name], earlier["bundle"]["per_index"][name]
    low, high = a["low"] / b["high"], a["high"] / b["low"]
    earlier_ms, now_ms = _ms(earlier["bundle"], name), _ms(now["bundle"], name)
    return {
        "earlier_ms": earlier_ms,
        "now_ms": now_ms,
        "raw_ratio": now_ms / earlier_ms,
        "ratio": a["value"] / b["value"],
        "low": low,
        "high": high,
        "agrees": low <= 1 <= high,
    }


def _ms(side: Json, name: str) -> float:
    """Return a time of a bundle: its own figure, or that of the calls of a shape."""
    if name in side:
        return float(side[name])
    return next(float(row["ms"]) for row in side["calls"] if call_name(row["batch"], row["tokens"]) == name)


def _sentence(name: str, found: Json) -> str:
    verdict = "they agree" if found["agrees"] else "they do NOT agree"
    return (
        f"{_TITLES.get(name, f'a call of {name}')}: {found['earlier_ms']:.1f} ms then, {found['now_ms']:.1f} ms now "
        f"({found['raw_ratio']:.2f} "
        f"times); beside the speed index {found['ratio']:.2f} times [{found['low']:.2f}, {found['high']:.2f}]: "
        f"{verdict}"
    )


def _parsed(text: str) -> Json:
    """Return a JSON object, empty when the text is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
