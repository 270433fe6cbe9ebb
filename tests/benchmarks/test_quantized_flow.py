"""Tiny students go the whole way of benchmarks/quantized.py: built, scored, timed, stored row by row, shown."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quantized, stored
from benchmarks.quantized import page_section, take, take_row, time_stand_in
from benchmarks.stored import read_result, write_result
from edgepipe.artifacts import Context
from edgepipe.sources import open_model
from edgepipe.stages.distill import Distill
from edgepipe.students.result import save
from tests.decoders import TARGET
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.slow
STUDENTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "encoder": ("embedding/classifier-0/student", {"student": "encoder", "encoder_layers": 2}, "label"),
    "pair": ("e2e/adapted-KD-0/student", {"encoder_layers": 2, "decoder_layers": 1}, "target"),
}


def student(folder: Path, name: str, steps: int = 2) -> None:
    """Teach a tiny student some steps, and put it where its benchmark would have left it."""
    folder.mkdir(exist_ok=True)
    place, options, key = STUDENTS[name]
    data = folder / "train.jsonl"
    if key == "label":
        rows = [{"text": f"name {i}", "label": str(i % 2)} for i in range(40)]
    else:
        rows = [{"source": f"name {i}", "target": f"it is {i % 2}"} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    teacher = save_tiny_model(folder / "llama", "llama", max_position_embeddings=1024)
    stage = Distill(**{"data": str(data), "steps": steps, "batch": 8, "warmup": 1, "precision": "no", **options})
    work = folder / "work"
    work.mkdir()
    (folder / place).parent.mkdir(parents=True)
    save(stage(open_model(str(teacher)), Context(target=TARGET, work_dir=work, keep_dir=work / "kept")), folder / place)


@pytest.mark.parametrize("name", STUDENTS)
def test_rows_of_a_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Scored first and timed later; what is stored isn't built again, and another student's rows are."""
    pytest.importorskip("sacrebleu", reason="BLEU needs the extra eval")
    student(tmp_path, name)
    data = tmp_path / "data"
    data.mkdir()
    tables = {"sst2-dev.tsv": ("sentence\tlabel", "name {}\t{}"), "e2e-dev.csv": ("mr,ref", "name {},it is {}")}
    for file, (first, line) in tables.items():
        lines = [first, *(line.format(i, i % 2) for i in range(12))]
        (data / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    for module in (quantized, stored):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(quantized, "FOLDER", tmp_path / "runs")
    names = [f"{name} {form}" for form in ("float32", "static", "rtn 4")]
    take(data, tmp_path, names, partial(take_row, speed=False))
    rows = read_result("quantized")["rows"]
    assert [(row["form"], row["speed"]) for row in rows] == [("float32", None), ("static", None), ("rtn 4", None)]
    assert rows[1]["bundle_bytes"] < rows[0]["bundle_bytes"]
    take(data, tmp_path, names[:2], take_row)
    timed = read_result("quantized")["rows"]
    assert timed[0]["speed"]["tokens_per_second"]["bundle"] > 0
    assert timed[1]["speed"]["time_beside_float32"]["value"] > 0
    assert [{**row, "speed": None} for row in timed] == rows
    shown = page_section({"rows": timed})
    assert shown.count("\n| ") == 5 and "8-bit, activations static, min-max" in shown

    shutil.move(tmp_path / STUDENTS[name][0], tmp_path / "gone")
    student(tmp_path / "other", name, steps=3)
    take(data, tmp_path / "other", names, time_stand_in)
    stood_in = read_result("quantized")["rows"]
    assert stood_in[:2] == timed[:2]
    speed = stood_in[2]["speed"]
    assert {**stood_in[2], "speed": None} == rows[2] and speed["tokens_per_second"]["bundle"] > 0
    assert speed["stand_in"] == open_model(str(tmp_path / "other" / STUDENTS[name][0])).info.fingerprint
    assert speed["stand_in"] != rows[2]["student"]
    assert "* |" not in shown and "* |" in page_section({"rows": stood_in})
    wrong = [{**row, "layers": {**row["layers"], "bytes": 1}, "speed": None} for row in rows]
    write_result("quantized", {"rows": wrong})
    with pytest.raises(SystemExit, match="expected layers of"):
        take(data, tmp_path / "other", names[:1], time_stand_in)

    write_result("quantized", {"rows": timed})
    shutil.move(tmp_path / "gone", tmp_path / STUDENTS[name][0])
    monkeypatch.delattr(quantized, "build")
    take(data, tmp_path, names[:2], take_row)
    assert read_result("quantized")["rows"] == timed
