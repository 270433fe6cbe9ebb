"""Build the report's record from what a run, or a measurement, left behind."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from edgepipe.artifacts import Json
from edgepipe.measuring.intervals import FLAG_ABOVE
from edgepipe.report.budgets import over_budget
from edgepipe.report.compare import compare
from edgepipe.report.engines import engines_of
from edgepipe.report.guards import agreement_of
from edgepipe.report.plans import search_of
from edgepipe.report.record import BundleReport, Latency, Limit, Material, Measurement, Phase, Report, Time, Training
from edgepipe.report.rows import figure, measured_rows, shape_of, start_rows, static_figures
from edgepipe.report.sentences import certainty, limit_sentences, limits_of, machine_sentences, verdict, zeros

BINS = 40  # of a histogram
_TAIL = 99.0  # percentile at which a histogram ends: one stall would squeeze everything else into one bar
_BUNDLE = "bundle"
_PHASES = (
    "teacher",
    "masked",
    "contrast",
    "student",
)  # of training, as they follow each other; run.json sorts its keys


def build(materials: Sequence[Material]) -> Report:
    """Return the report of one bundle, or of several side by side."""
    bundles = tuple(_bundle_report(one) for one in materials)
    return Report(bundles=bundles, comparison=compare(materials) if len(bundles) > 1 else None)


def _bundle_report(material: Material) -> BundleReport:
    """Build the part of one bundle; what wasn't measured stays empty."""
    manifest, figures = material.manifest, material.figures
    weights, licence = manifest["weights"], manifest["licence"]
    recipe = material.recipe or manifest["recipe"]
    static = static_figures(manifest, material.manifest_bytes)
    target = str(recipe["target"])
    sides = _sides(material)
    return BundleReport(
        label=material.label,
        path=material.path,
        name=manifest["name"],
        task=manifest["task"],
        target=target,
        engine=manifest["engine"],
        manifest_sha256=material.manifest_sha256,
        facts={**static, "parameters": weights["parameters"], "context": manifest["model"].get("context")},
        baseline=material.beside if len(sides) > 1 else None,
        verdict=(*(_not_measured(static) if figures is None else verdict(figures, material.beside)), *zeros(manifest)),
        over_budget=tuple(over_budget(figures, material.budgets or {}, target) if figures is not None else ()),
        remarks=material.remarks,
        rows=tuple(measured_rows({"bundle": static} if figures is None else figures)),
        certainty=tuple(certainty(figures) if figures is not None else ()),
        start=tuple(start_rows(figures) if figures is not None else ()),
        ttft=tuple(chain.from_iterable(_ttft(name, side) for name, side in sides)),
        calls=tuple(chain.from_iterable(_calls(name, side) for name, side in sides)),
        latency=tuple(_latencies(sides)),
        limits=tuple(chain.from_iterable(_limits(name, side) for name, side in sides)),
        limit_sentences=tuple(limit_sentences(figures["bundle"]) if figures is not None else ()),
        parts=tuple(byte_parts(weights["parts"])),
        training=_training(material.history or ()),
        search=None if material.search is None else search_of(material.search),
        agreement=agreement_of(material.history or ()),
        products=tuple(material.products),
        engines=None if material.engines is None else engines_of(material.engines),
        stages=tuple(_stages(material.history or manifest["history"])),
        recipe={"target": target, "seed": recipe["seed"]},
        source={
            "model": manifest["source"]["model"],
            "licence": licence["id"],
            "lineage": list(licence.get("lineage") or ()),
        },
        versions={"edgepipe": manifest["edgepipe"], **manifest["versions"]},
        measured=None if figures is None else _measurement(figures),
    )


def byte_parts(parts: Sequence[Json]) -> list[Json]:
    """Return the weights by part and storage, the largest first, with their share of the bytes (1 is all)."""
    total = sum(part["bytes"] for part in parts)
    largest_first = sorted(parts, key=lambda part: -part["bytes"])
    return [{**part, "share": part["bytes"] / total} for part in largest_first]


def _sides(material: Material) -> list[tuple[str, Json]]:
    """Return what was measured by name, the baseline first."""
    if material.figures is None:
        return []
    before, after = material.figures.get("baseline"), material.figures["bundle"]
    return [*([(material.beside, before)] if before is not None else []), (_BUNDLE, after)]


def _not_measured(static: Json) -> list[str]:
    return [f"{static['bundle_bytes'] / 1e6:,.1f} MB, {static['bits_per_weight']:.2f} bits per weight. Not measured."]


def _ttft(name: str, side: Json) -> Iterator[Time]:
    for one in side.get("ttft") or ():
        yield _time(name, f"{one['prompt_tokens']} tokens", one["ttft_ms"], one["first_step_ms"], one)


def _calls(name: str, side: Json) -> Iterator[Time]:
    for one in side.get("calls") or ():
        yield _time(name, shape_of(one), one["ms"], one["run_ms"], one)


def _time(side: str, of: str, ms: float, run_ms: float, one: Json) -> Time:
    return Time(
        side=side,
        of=of,
        ms=ms,
        low=one["low"],
        high=one["high"],
        spread=one["spread"],
        flagged=one["spread"] > FLAG_ABOVE,
        tokenize_ms=one["tokenize_ms"],
        run_ms=run_ms,
    )


def token_times(side: Json) -> np.ndarray:
    """Return all raw times per output token of one side, ms; empty where none were taken."""
    turns = chain.from_iterable(block.get("token_ms") or () for block in side.get("samples") or ())
    return np.array(list(chain.from_iterable(turns)), np.float64)


def _latencies(sides: Sequence[tuple[str, Json]]) -> Iterator[Latency]:
    """Yield percentiles and a histogram of every side, all on one axis from 0."""
    times = [(name, side, taken) for name, side in sides if (taken := token_times(side)).size]
    end = max((float(np.percentile(taken, _TAIL)) for _, _, taken in times), default=0.0)
    for name, side, taken in times:
        counts, _ = np.histogram(np.minimum(taken, end), bins=BINS, range=(0, end))
        p50, p95, p99 = (float(value) for value in np.percentile(taken, (50, 95, 99)))
        interval = (side.get("intervals") or {}).get("token_ms") or {}
        yield Latency(
            side=name,
            samples=len(taken),
            p50_ms=p50,
            p95_ms=p95,
            p99_ms=p99,
            low=interval.get("low"),
            high=interval.get("high"),
            spread=figure(side.get("spread"), "token_ms"),
            flagged="token_ms" in side.get("flagged", ()),
            end_ms=end,
            counts=tuple(int(count) for count in counts),
        )


def _limits(name: str, side: Json) -> Iterator[Limit]:
    for what, limit in limits_of(side).items():
        keys = Limit.__dataclass_fields__.keys() - {"side", "figure"}
        yield Limit(side=name, figure=what, **{key: limit[key] for key in keys})


def _stages(history: Sequence[Json]) -> Iterator[Json]:
    for record in history:
        yield {"stage": record["stage"], "options": record["options"], "notes": list(record["notes"])}


def _training(history: Sequence[Json]) -> Training | None:
    """Return what the stages' figures say of training; a manifest's history has none."""
    figures = [found for record in history if "training" in (found := record.get("figures") or {})]
    if not figures:
        return None
    phases = (
        _phase(name, found["training"][name]) for found in figures for name in sorted(found["training"], key=_turn)
    )
    return Training(data=figures[-1].get("data"), phases=tuple(phases))


def _turn(phase: str) -> int:
    return _PHASES.index(phase) if phase in _PHASES else len(_PHASES)


def _phase(name: str, record: Json) -> Phase:
    """Return one training; what isn't finite has no place on a curve, nor in JSON."""
    train, held_out = (tuple(_numbers(row) for row in record[key]) for key in ("train", "held_out"))
    best = _numbers(record["best"])
    return Phase(
        phase=name,
        steps=record["steps"],
        tokens=record["tokens"],
        seconds=record["seconds"],
        tokens_per_second=record["tokens"] / record["seconds"] if record["seconds"] > 0 else 0.0,
        precision=record["precision"],
        processes=record["processes"],
        stopped=record["stopped"],
        first_loss=held_out[0]["loss"] if held_out else None,
        best_loss=best.get("loss"),
        best_step=best.get("step"),
        train=train,
        held_out=held_out,
    )


def _numbers(row: Json) -> Json:
    return {key: value if math.isfinite(value) else None for key, value in row.items()}


def _measurement(figures: Json) -> Measurement:
    return Measurement(
        taken_at=figures.get("taken_at"),
        text=figures.get("text"),
        machine=figures["machine"],
        method=figures.get("method"),
        index=figures.get("index"),
        sentences=tuple(machine_sentences(figures)),
    )
