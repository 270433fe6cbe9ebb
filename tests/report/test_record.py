"""The JSON document: the published schema describes it, no more and no less, and its numbers are those measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edgepipe.report import record, rows
from edgepipe.report.gather import gather
from tests.report.conftest import as_older

SCHEMA = json.loads((resources.files("edgepipe.report") / "report.schema.json").read_text(encoding="utf-8"))
DESCRIBED = {
    "row": rows.Row,
    "ratio": rows.Ratio,
    "time": record.Time,
    "latency": record.Latency,
    "limit": record.Limit,
    "phase": record.Phase,
    "training": record.Training,
    "search": record.Search,
    "measurement": record.Measurement,
    "bundle": record.BundleReport,
    "compared_row": record.ComparedRow,
    "comparison": record.Comparison,
}


def errors(document: Any) -> list[str]:
    """Return what the schema has against a document, after a trip through JSON."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    return [f"{list(e.absolute_path)}: {e.message}" for e in validator.iter_errors(json.loads(json.dumps(document)))]


def test_real_runs_fit_the_schema(run: Path, encoder_run: Path, tiny_bundle: Path) -> None:
    for paths in ([run], [encoder_run], [tiny_bundle], [run, encoder_run, tiny_bundle]):
        assert errors(gather(paths).to_json()) == []


def test_older_figures_fit_the_schema(change_run: Callable[..., Path]) -> None:
    assert errors(gather([change_run(as_older)]).to_json()) == []


def test_a_run_leaves_the_document(run: Path) -> None:
    stored = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert errors(stored) == []
    again = json.loads(json.dumps(gather([run]).to_json()))
    path = {"path": ""}  # the run named its bundle, this call its directory
    assert [one | path for one in again.pop("bundles")] == [one | path for one in stored.pop("bundles")]
    assert again == stored


@pytest.mark.parametrize("name", DESCRIBED)
def test_the_schema_names_every_key(name: str) -> None:
    keys = {field.name for field in dataclasses.fields(DESCRIBED[name])}
    assert set(SCHEMA["$defs"][name]["properties"]) == set(SCHEMA["$defs"][name]["required"]) == keys


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.update(schema=2),
        lambda d: d["bundles"].clear(),
        lambda d: d["bundles"][0].pop("verdict"),
        lambda d: d["bundles"][0]["rows"][0].update(unit="MB"),
        lambda d: d["bundles"][0].update(surprise=1),
        lambda d: d["bundles"][0]["limits"][0].update(limited_by="magic"),
    ],
)
def test_the_schema_refuses_others(run: Path, spoil: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(json.dumps(gather([run]).to_json()))
    spoil(document)
    assert errors(document) != []


def test_rows_are_the_figures(run: Path) -> None:
    figures = json.loads((run / "run.json").read_text(encoding="utf-8"))["figures"]
    one = gather([run]).bundles[0]
    found = {row.key: row for row in one.rows}
    assert {"bundle_bytes", "ttft_ms", "token_ms", "token_ms_p99", "cold_start_ms", "perplexity"} <= set(found)
    for key, row in found.items():
        if key in figures["bundle"]:
            assert (row.baseline, row.bundle) == (figures["baseline"][key], figures["bundle"][key])
    assert found["bundle_bytes"].bundle == one.facts["bundle_bytes"]
    for key in ("token_ms", "ttft_ms"):
        ratio = found[key].ratio
        assert ratio is not None
        assert dataclasses.asdict(ratio) == figures["ratios"][key]
        flagged = key in figures["bundle"]["flagged"] + figures["baseline"]["flagged"]
        assert found[key].flagged == flagged
    assert one.measured is not None
    assert one.measured.index == figures["index"]
    limits = {(limit.side, limit.figure): limit for limit in one.limits}
    assert set(limits) == {(side, what) for side in ("float32", "bundle") for what in ("token", "prefill")}
    token = figures["bundle"]["limits"]["token"]
    assert limits["bundle", "token"].share == token["share"]
    assert limits["bundle", "token"].limit_ms == token["limit_ms"]


def test_an_encoder_s_calls_are_rows(encoder_run: Path) -> None:
    figures = json.loads((encoder_run / "run.json").read_text(encoding="utf-8"))["figures"]
    one = gather([encoder_run]).bundles[0]
    found = {row.key: row for row in one.rows}
    for call in figures["bundle"]["calls"]:
        row = found[f"call_{call['batch']}x{call['tokens']}_ms"]
        assert row.bundle == call["ms"]
        assert row.ratio is not None
        assert row.ratio.verdict in ("better", "worse", "tie")
    assert "perplexity" not in found
    assert one.verdict[-1] == "Quality was not measured here: `edgepipe eval` scores it."
    assert {time.side for time in one.calls} == {"float32", "bundle"}
