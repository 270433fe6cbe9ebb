"""What a report says in words: the verdict, what limits, how sure the times are. The one place for each sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator

from edgepipe.artifacts import Json
from edgepipe.report.rows import between, figure, in_order, same_tokens, shape_of
from edgepipe.target import zeros_pay

_NO_WORSE = 1.01  # perplexity ratio up to which the verdict says that nothing was lost
_TIMES = {"token_ms": "time per output token", "ttft_ms": "TTFT"}  # others are calls, named by their shape
_LIMITED = {"token": "an output token", "prefill": "the prompt's first step"}
SPREAD = "* spread over more than 10 % of the median: other work on the machine, or a changing clock."


def verdict(figures: Json, other: str) -> list[str]:
    """Say in short sentences what was won and what was lost; `other` is what the baseline is called."""
    after, before = figures["bundle"], figures.get("baseline")
    if before is None:
        return [f"{after['bundle_bytes'] / 1e6:,.1f} MB{_rate(after)}. Nothing is compared here."]
    size = after["bundle_bytes"] / before["bundle_bytes"]
    sizes = f"{before['bundle_bytes'] / 1e6:,.1f} MB became {after['bundle_bytes'] / 1e6:,.1f} MB"
    smaller = f"{1 / size:.1f} times smaller" if size <= 1 else f"{size:.2f} times as large"
    return [f"{smaller}: {sizes}.", *_speeds(figures, before, after, other), _quality(before, after, other)]


def _rate(after: Json) -> str:
    rate = figure(after, "tokens_per_second")
    if rate is not None:
        return f", {rate:,.1f} tokens/s"
    calls = after.get("calls") or ()
    return f", {calls[-1]['ms']:,.1f} ms for a call of {shape_of(calls[-1])}" if calls else ""


def _speeds(figures: Json, before: Json, after: Json, other: str) -> Iterator[str]:
    judged = figures.get("ratios") or {}
    for what, key in (("Decoding", "token_ms"), ("The first token", "ttft_ms")):
        old, new = figure(before, key), figure(after, key)
        if key in judged:
            yield _faster(what, judged[key], other)
        elif old and new is not None:
            yield _faster(what, {"value": new / old}, other)
    others = {shape_of(one): one["ms"] for one in before.get("calls") or ()}
    for call in after.get("calls") or ():
        name = shape_of(call)
        if name in judged or name in others:
            yield _faster(f"A call of {name}", judged.get(name) or {"value": call["ms"] / others[name]}, other)


def _faster(what: str, ratio: Json, other: str) -> str:
    """Say a ratio of times, smaller is faster, with its interval where it has one."""
    value, judged = ratio["value"], "verdict" in ratio
    if judged and ratio["verdict"] == "tie":
        interval = between(1 / ratio["high"], 1 / ratio["low"], 2)
        return f"{what} is a tie with {other}: {1 / value:.2f} times as fast {interval}."
    if value <= 1:
        interval = f" {between(1 / ratio['high'], 1 / ratio['low'], 2)}" if judged else ""
        return f"{what} is {1 / value:.2f} times as fast{interval}."
    interval = f" {between(ratio['low'], ratio['high'], 2)}" if judged else ""
    return f"{what} takes {value:.2f} times as long{interval}."


def _quality(before: Json, after: Json, other: str) -> str:
    if after.get("perplexity") is None or before.get("perplexity") is None:
        return "Quality was not measured here: `edgepipe eval` scores it."
    if not same_tokens(before, after):
        return (
            f"Perplexities can't be compared: the text is {before['perplexity_tokens']} tokens of {other} and "
            f"{after['perplexity_tokens']} of this vocabulary."
        )
    quality = after["perplexity"] / before["perplexity"]
    if not math.isfinite(quality):
        return "Perplexity is no number: the model is broken."
    if quality <= _NO_WORSE:
        return f"Nothing measurable was lost: perplexity is {quality:.3f} times that of {other}."
    return f"Perplexity is {100 * (quality - 1):+.1f} %."


def zeros(manifest: Json) -> list[str]:
    """Say of a model with masks where they buy speed, where only bytes, and how many; nothing of one without."""
    asked = [record["options"] for record in manifest["history"] if record["stage"] == "prune"]
    pattern = asked[-1].get("pattern") or asked[-1].get("sparsity") if asked else None
    if not pattern:
        return []
    weights = manifest["weights"]
    unpacked, stored = weights.get("unpacked"), f"{weights['bytes'] / 1e6:,.1f}"
    here = f"{stored} of {unpacked['bytes'] / 1e6:,.1f} MB, deflated" if unpacked else f"{stored} MB, as they are"
    return [
        f"{zeros_pay(pattern if isinstance(pattern, str) else f'{pattern:.0%}')}. Here weights are stored in {here}."
    ]


def certainty(figures: Json) -> list[str]:
    """Say how sure the times of the bundle are, and mark those that spread too much on either side."""
    return [*intervals(figures), *spread_note(figures)]


def intervals(figures: Json) -> list[str]:
    """Say between which times the bundle's lie."""
    found = figures["bundle"].get("intervals") or {}
    said = [
        f"{time_title(key)} {found[key]['low']:,.1f} to {found[key]['high']:,.1f} ms"
        for key in in_order(figures["bundle"], found)
    ]
    return [f"95 % intervals: {', '.join(said)}."] if said else []


def spread_note(figures: Json) -> list[str]:
    """Explain the star where a row has one."""
    sides = [side for side in (figures.get("baseline"), figures["bundle"]) if side is not None]
    return [SPREAD] if any(side.get("flagged") for side in sides) else []


def time_title(key: str) -> str:
    """Return what a time is called in a sentence: by its own name, or by the shape of its call."""
    return _TIMES.get(key, f"a call of {key}")


def limit_title(key: str) -> str:
    """Return what has a limit, as a sentence speaks of it."""
    return _LIMITED.get(key, f"a call of {key}")


def limits_of(side: Json) -> dict[str, Json]:
    """Return the limits of one side by what they are of: "token", "prefill" or the shape of a call."""
    limits = side.get("limits") or {}
    calls = limits.get("calls") or {}
    return {name: limits[name] for name in _LIMITED if name in limits} | {
        key: calls[key] for key in in_order(side, calls)
    }


def limit_sentences(side: Json) -> list[str]:
    """Say of every figure that has a limit what must be read and multiplied, and what limits."""
    return [_limit(limit_title(name), side["limits"], limit) for name, limit in limits_of(side).items()]


def _limit(what: str, limits: Json, limit: Json) -> str:
    return (
        f"{what[0].upper()}{what[1:]} reads {limit['bytes'] / 1e6:,.1f} MB, {limit['read_ms']:.1f} ms at "
        f"{limits['read_bytes_per_second'] / 1e9:.0f} GB/s, and has {limit['multiply_adds'] / 1e6:,.0f} M "
        f"multiply-adds, {limit['compute_ms']:.1f} ms at {limits['multiply_adds_per_second'] / 1e9:.0f} G/s "
        f"({limits['precision']}): {limit['share']:.0%} of the time it took; {limit['limited_by']} limits it."
    )


def machine_sentences(figures: Json) -> list[str]:
    """Say on what, when and how fast a machine it was measured."""
    machine, index = figures["machine"], figures.get("index")
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    sentences = [
        f"{machine['cpu']}, {machine['cores']} cores seen, threads: {machine['threads'] or 'one per physical core'}, "
        f"{machine['system']}, Python {machine['python']}{f', {versions}' if versions else ''}."
    ]
    if "taken_at" in figures:
        sentences.append(f"Taken at {figures['taken_at']}.")
    if index:
        sentences.append(
            f"Machine-speed index {index['ms']:.2f} ms {between(index['low'], index['high'], 2)}: one fixed piece of "
            f"work, timed {index['samples']} times beside the samples; it spread by {index['spread']:.0%}."
        )
    return sentences
