"""The stored rows of all forms on four models: what the page shows of them, what made them, and what they promised."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import quantized
from benchmarks.quantized import (
    NAME,
    PAGE,
    bits_of,
    build,
    decodes,
    facts,
    in_both_engines,
    lacking,
    main,
    missing,
    page_section,
    seen,
    timed,
)
from benchmarks.quantized_models import FLOAT, FORMS, GROUP, MODELS, NOTES, ROWS, learns, row_name, settings_of
from benchmarks.stored import read_result, section
from edgepipe.artifacts import Json
from edgepipe.recipe import resolve
from edgepipe.runtime.bundle import read_manifest
from edgepipe.sources import open_model

STORED = read_result(NAME)["rows"]
BY_NAME = {row_name(model, form): (model, form) for model, form in ROWS}


def stored(model: str) -> dict[str, Json]:
    """Return a model's stored rows by form."""
    return {row["form"]: row for row in STORED if row["model"] == model}


def value(row: Json) -> float:
    """Return a row's score, more being better."""
    model = next(model for model in MODELS if model.name == row["model"])
    return -row["quality"]["value"] if model.lower else row["quality"]["value"]


def test_the_page_shows_the_stored_run() -> None:
    """No figure of the page's tables is typed by hand."""
    assert section(PAGE, NAME) == page_section(read_result(NAME)).strip()


def test_what_is_stored_is_what_the_command_runs() -> None:
    """Every row was made with the settings it has now, once, and a model's rows are of one student and one file."""
    assert len({(row["model"], row["form"]) for row in STORED}) == len(STORED)
    for row in STORED:
        model, form = BY_NAME[f"{row['model']} {row['form']}"]
        assert row["settings"] == settings_of(model, form), row["form"]
        low, high = row["quality"]["interval"]
        assert low < row["quality"]["value"] < high
        assert bool(row["student"]) == bool(model.made_by)
    for model in MODELS:
        assert len({(row["student"], row["data"]["sha256"]) for row in stored(model.name).values()}) <= 1


def test_every_row_is_a_recipe() -> None:
    """Options are known and fit together; SmolLM2 is rounded anew in all forms but the one that keeps what came."""
    assert len(BY_NAME) == len(ROWS)
    for model, form in ROWS:
        options = settings_of(model, form) | ({"data": "texts.txt"} if learns(form) else {})
        settings = [*model.settings, *(("quantize", key, held) for key, held in options.items())]
        assert resolve(target="cpu", settings=settings), row_name(model, form)
        anew = settings_of(model, form).get("import") is False
        assert anew == (model.name == "decoder" and form.name not in ("float32", "kept"))


def test_bits_are_counted_from_files() -> None:
    """Codes and scales of the layers: b + 16 / g, or with zero points b + (16 + b) / g, and a few bytes of padding."""
    for row in STORED:
        bits, method = row["settings"].get("bits"), row["settings"].get("method")
        if method:
            offset = bits if method == "hqq" or not row["settings"]["symmetric"] else 0
            least = bits + (16 + offset) / GROUP
            assert least <= bits_of(row) <= least + (0.01 if row["model"] != "decoder" else 0.1), row["form"]
        if row["settings"].get("activations"):  # a scale a row
            assert bits < bits_of(row) < bits + 0.2
        if row["form"] == "ternary":
            assert 2 < bits_of(row) <= 2.2


def test_the_bars_of_minilm() -> None:
    """Static 8 bits lose half a point at most, the best of 4 bits one at 4.6 bits a weight, trained W4A4 1.5.

    At 2 bits GPTQ is no worse than rounding.
    """
    rows = stored("minilm")
    whole = value(rows["float32"])
    if "static" in rows:
        assert value(rows["static"]) >= whole - 0.005
    if "w4a4 trained" in rows:
        assert value(rows["w4a4 trained"]) >= whole - 0.015
    four = [row for row in rows.values() if row["settings"].get("bits") == 4 and bits_of(row) <= 4.6]
    assert max(value(row) for row in four) >= whole - 0.01
    assert value(rows["gptq 2"]) >= value(rows["rtn 2"])


@pytest.mark.parametrize("model", [model.name for model in MODELS])
@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_or_awq_is_no_worse_than_rounding_or_a_note_says_why(model: str, bits: int) -> None:
    rows = stored(model)
    names = [f"{method} {bits}" for method in ("rtn", "gptq", "awq")]
    if all(name in rows for name in names):
        rounded, *others = (value(rows[name]) for name in names)
        assert max(others) >= rounded or NOTES.get((model, bits))


def test_what_smollm2_came_on_is_kept() -> None:
    """As it came: the float model's perplexity within 0.5 %."""
    rows = stored("decoder")
    if "kept" not in rows:
        pytest.skip("no row of SmolLM2 is stored yet")
    assert abs(value(rows["kept"]) / value(rows["float32"]) - 1) <= 0.005


@pytest.mark.parametrize("engine", ["onnxruntime", "tvm"])
@pytest.mark.parametrize("threads", ["1", "2"])
def test_what_smollm2_came_on_decodes_at_three_quarters_of_symmetric_4_bits(engine: str, threads: str) -> None:
    speed = stored("decoder").get("kept", {}).get("speed")
    if not speed:
        pytest.skip("no speed of SmolLM2 as it came is stored yet")
    assert speed["beside"]["form"] == "rtn 4, embedding 4"
    assert speed["beside"]["token_ms"][engine].keys() == {"1", "2"}
    assert speed["beside"]["token_ms"][engine][threads]["value"] <= 1 / 0.75


def test_speeds_are_those_of_their_samples() -> None:
    """A rate is the median of raw samples that are stored, of both sides alike."""
    for row in STORED:
        if not (speed := row["speed"]):
            continue
        assert ("float32" in speed["samples_ms"]) == (row["form"] != FLOAT.name)
        for side, samples in speed["samples_ms"].items():
            turns = [np.median(turn) for block in samples for turn in block]
            if row["model"] in ("minilm", "encoder"):
                assert speed["tokens_per_second"][side] == pytest.approx(1e3 * 8 * 128 / np.median(turns), rel=1e-3)
            else:
                assert speed["tokens_per_second"][side] == pytest.approx(1e3 / np.median(samples), rel=1e-3)


def test_what_is_missing_is_said_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither data nor students: every model of them is left out, and what is stored stays."""
    minilm, encoder, *_ = MODELS
    assert "stsb-dev.tsv is not in" in missing(minilm, tmp_path, tmp_path)
    (tmp_path / encoder.data).write_text("sentence\tlabel\n", encoding="utf-8")
    said = missing(encoder, tmp_path, tmp_path)
    assert "run `python benchmarks/embedding.py` first" in said
    before = (read_result(NAME), PAGE.read_bytes())
    main(["--data", str(tmp_path), "--students", str(tmp_path)])
    shown = capsys.readouterr()
    assert shown.err.count("its rows are left out") == len(MODELS) == len(shown.err.splitlines())
    assert json.loads(shown.out.splitlines()[-1]).keys() == {f"{row['model']} {row['form']}" for row in STORED}
    assert (read_result(NAME), PAGE.read_bytes()) == before
    assert not lacking(FLOAT)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "neural_compressor", None)
    said = lacking(next(form for form in FORMS if form.name == "hqq 4"))
    assert "neural-compressor-pt" in said and "edgepipe[quantize]" in said


@pytest.mark.slow
def test_one_row_from_source_to_speed(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny decoder goes through the same functions: two bundles, counted and timed in turn."""
    monkeypatch.setattr(quantized, "FOLDER", tmp_path)
    model = dataclasses.replace(next(model for model in MODELS if model.name == "decoder"), settings=())
    source, form = open_model(str(tiny_model_dir)), next(form for form in FORMS if form.name == "rtn 4")
    bundle, floats = build(model, form, source, tmp_path), build(model, FLOAT, source, tmp_path)
    assert 4.5 <= bits_of(facts(bundle)) < 6 < bits_of(facts(floats)) == 32
    speed = timed(bundle.path, floats.path)
    assert speed["tokens_per_second"].keys() == speed["samples_ms"].keys() == {"bundle", "float32"}
    assert speed["time_beside_float32"]["low"] <= speed["time_beside_float32"]["high"]
    beside = in_both_engines(model, (form, FLOAT), source, tmp_path)
    assert beside.keys() == {"onnxruntime", "tvm"}
    for engine, found in beside.items():
        assert all(found[threads]["low"] <= found[threads]["high"] for threads in ("1", "2"))
        assert read_manifest(build(model, form, source, tmp_path, engine).path)["engine"] == engine
    said = decodes(form, {form.name: {"speed": {"beside": {"form": "float32", "token_ms": beside}}}})
    assert said.startswith(f"Tokens a second, {form.label} ÷ float32, in turn: ")
    assert f"{1 / beside['onnxruntime']['2']['value']:.2f} (" in said and said.endswith("on 2 threads of tvm")


def test_what_is_learnt_from_is_not_scored_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2 learns from the second half of the text whose beginning is scored."""
    monkeypatch.setattr(quantized, "FOLDER", tmp_path / "runs")
    decoder = next(model for model in MODELS if model.name == "decoder")
    lines = [f"Line {i} of a text that is long enough to be a passage, or so it seems." for i in range(100)]
    (tmp_path / decoder.data).write_text("\n".join(lines), encoding="utf-8")
    held = seen(decoder, tmp_path, trains=True).read_text(encoding="utf-8")
    assert lines[50] in held and lines[99] in held and lines[49] not in held
