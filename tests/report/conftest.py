"""Fixtures of the report: real runs of tiny models, measured for a moment."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Once
from tests.families import save_family
from tests.listener import Silent

QUICK = [("measure", "tokens", 64), ("measure", "blocks", 1), ("measure", "turns", 2)]
OLDER = (  # what a side's figures had before there were intervals, an index and limits
    *("bundle_bytes", "weight_bytes", "bits_per_weight", "cache_bytes", "load_ms", "ttft_ms", "token_ms"),
    *("token_ms_p95", "tokens_per_second", "prompt_tokens", "memory_peak_bytes", "perplexity", "perplexity_tokens"),
    "samples",
)


def measured_run(model: Path, runs: Path, *settings: tuple[str, str, object]) -> Path:
    """Compress and measure a tiny model, and return the run's directory."""
    from edgepipe.compress import compress
    from edgepipe.recipe import resolve

    recipe = resolve(target="cpu", settings=[*QUICK, *settings])
    return Path(compress(str(model), recipe, listener=Silent(), runs=runs)["bundle"]).parent


@pytest.fixture(scope="session")
def run(tiny_model_dir: Path, once: Once) -> Path:
    """Run a tiny decoder, measured beside its float32 baseline."""
    return once("decoder-run", lambda folder: measured_run(tiny_model_dir, folder / "runs", ("export", "context", 128)))


@pytest.fixture(scope="session")
def encoder_run(once: Once) -> Path:
    """Run a tiny BERT, whose figures are calls."""

    def make(folder: Path) -> Path:
        return measured_run(save_family(folder / "tiny-bert", "bert"), folder / "runs")

    return once("encoder-run", make)


@pytest.fixture
def change_run(run: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], None]], Path]:
    """Return a function that copies the run's bundle and record, lets the record be changed, and returns the copy."""

    def change(edit: Callable[[dict[str, Any]], None]) -> Path:
        copy = tmp_path / "changed-run"
        (copy / "bundle").mkdir(parents=True)
        for file in (run / "bundle").iterdir():
            (copy / "bundle" / file.name).write_bytes(file.read_bytes())
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
        edit(record)
        (copy / "run.json").write_text(json.dumps(record), encoding="utf-8")
        return copy

    return change


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Train a tiny student in two phases, the first without held-out data; return a stage's figures of it."""
    import torch

    from edgepipe.students.files import make_student
    from edgepipe.training.loop import LoopData, Place, train
    from tests.training.tiny import OPTIONS, PAIR, predict, reversals

    folder, student = tmp_path_factory.mktemp("taught"), make_student(PAIR, seed=0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    contrast = train(student, predict, LoopData(train=reversals(99, 2)), OPTIONS, Place(folder=folder / "c", key="c"))
    data = LoopData(train=reversals(200, 0), held_out=reversals(30, 1))
    last = train(student, predict, data, OPTIONS, Place(folder=folder / "s", key="s"))
    torch.set_num_threads(before)
    said = {"name": "pairs.jsonl", "form": "source-target", "sha256": "0" * 64, "train": 200, "held_out": 30}
    return {"training": {"contrast": contrast, "student": last}, "data": said}


@pytest.fixture
def trained_run(change_run: Callable[..., Path], taught: dict[str, Any]) -> Path:
    """Return the run as if its first stage had trained the model."""

    def edit(record: dict[str, Any]) -> None:
        record["history"][0]["figures"] = taught

    return change_run(edit)


def as_older(record: dict[str, Any]) -> None:
    """Leave what a version before wrote: no history, no budgets, and of the figures only the old ones."""
    for key in ("history", "budgets"):
        del record[key]
    figures = record["figures"]
    for side in ("bundle", "baseline"):
        figures[side] = {key: figures[side][key] for key in OLDER}
    for key in ("schema", "task", "taken_at", "method", "index", "ratios", "since"):
        del figures[key]
    del figures["machine"]["versions"]
