"""How the engine of a bundle was chosen, as the report shows it: both engines' figures, and what decided."""

from __future__ import annotations

from collections.abc import Iterator

from edgepipe.artifacts import Json
from edgepipe.report.rows import MISSING, between

_TITLES = {
    "whole_ms": "what decides, ms",
    "ttft_ms": "TTFT, ms",
    "token_ms": "time per output token, ms",
    "bundle_bytes": "bundle, MB",
}


def engines_of(record: Json) -> Json:
    """Return what the report keeps of a run's record: all but raw samples, which run.json has."""
    return {key: value for key, value in record.items() if key != "samples"}


def engine_rows(found: Json) -> Iterator[tuple[str, ...]]:
    """Yield a row for each figure: both engines' and their ratio with its interval."""
    sides = list(found["sides"].values())
    for name in sides[0] if sides else ():
        ratio = found["ratios"].get(name)
        size = 1e6 if name == "bundle_bytes" else 1.0
        yield (
            _TITLES.get(name, f"calls of {name}, ms"),
            *(f"{side[name] / size:,.2f}" for side in sides),
            MISSING if ratio is None else f"{ratio['value']:.2f} {between(ratio['low'], ratio['high'], 2)}",
        )


def engine_sentences(found: Json) -> Iterator[str]:
    """Say which engine ships and why."""
    yield f"{found['why']}."
    if found["sides"]:
        yield "Both took turns in processes of their own, on the machine that built the bundle."
        for engine, sentence in found["left_out"].items():
            yield f"{engine} is left out: {sentence}."
