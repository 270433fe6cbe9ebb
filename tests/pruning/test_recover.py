"""Recovery: every kind of model gets nearer to the one it was cut from, goes on after a stop, and keeps its zeros."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgepipe.artifacts import Context, Json, TorchModel
from edgepipe.errors import ConfigError
from edgepipe.quantizers.modules import module_of, run_batch
from edgepipe.quantizers.texts import Calibration, batches
from edgepipe.sources import open_model
from edgepipe.stages.prune import Prune
from edgepipe.training.zeros import keep_zeros
from edgepipe.weights import WeightStore, held_weight
from tests.decoders import TARGET, context, opened
from tests.encoders import save_encoder
from tests.pruning.zeroed import with_values
from tests.stages.test_prune import STUDENTS
from tests.students.tiny import save_tiny_student

QUICK: dict[str, Any] = {"recover_steps": 12, "batch": 8, "warmup": 1, "precision": "no", "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where this file's models and data lie."""
    return tmp_path_factory.mktemp("recovered")


@pytest.fixture(scope="module")
def data(folder: Path) -> Callable[[str], str]:
    """Return a function that gives a file of texts, or of sources and targets."""

    def give(form: str) -> str:
        path = folder / f"{form}.jsonl"
        rows: dict[str, Callable[[int], Json]] = {
            "texts": lambda i: {"text": f"The river carried {i} boards down to mill {i % 7}."},
            "answers": lambda i: {"source": f"name {i}, food {i % 5}", "target": f"{i} has {i % 5}"},
        }
        path.write_text("".join(json.dumps(rows[form](i)) + "\n" for i in range(40)), encoding="utf-8")
        return str(path)

    return give


def model_of(kind: str, folder: Path) -> tuple[TorchModel, str]:
    """Return a tiny model, and the form of data it learns from."""
    if kind in ("bert", "bert as classifier"):
        task = "feature-extraction" if kind == "bert" else "text-classification"
        path = folder / kind.replace(" ", "-")
        model = open_model(str(path if path.exists() else save_encoder(path, "bert", task)))
        if kind == "bert":
            return model, "texts"
        # random classes are all as likely, and nothing would be left to learn
        return with_values(model, {"classifier.weight": 30 * model.weights.float32("classifier.weight")}), "texts"
    if kind == "llama":
        return opened(folder, "llama grouped"), "texts"
    path = folder / kind
    student = open_model(str(path if path.exists() else save_tiny_student(path, STUDENTS[kind])))
    return student, "answers" if kind == "encoder-decoder" else "texts"


def kept_context(folder: Path, notes: list[str], figures: Json) -> Context:
    """Return a context whose folder outlasts a stop."""
    folder.mkdir(parents=True, exist_ok=True)
    return Context(target=TARGET, work_dir=folder, keep_dir=folder / "kept", note=notes.append, figures=figures.update)


@pytest.mark.parametrize("kind", ["bert", "bert as classifier", "llama", "encoder", "encoder-decoder"])
def test_the_held_out_loss_falls_and_the_shapes_stay(kind: str, folder: Path, data: Callable[[str], str]) -> None:
    model, form = model_of(kind, folder)
    notes: list[str] = []
    figures: Json = {}
    options = {**QUICK, "importance": "magnitude", "ratio": 0.5, "data": data(form)}
    ctx = kept_context(folder / f"{kind} run", notes, figures)
    bare = Prune(ratio=0.5, importance="magnitude")(model, context(folder))
    taught = Prune(**options)(model, ctx)
    assert {n: w.shape for n, w in taught.weights.items()} == {n: w.shape for n, w in bare.weights.items()}
    assert taught.weights.aliases == bare.weights.aliases
    (record,) = figures["training"].values()
    assert record["best"]["loss"] < record["held_out"][0]["loss"]
    assert any(np.abs(taught.weights.float32(n) - bare.weights.float32(n)).max() > 0 for n in bare.weights)
    if model.info.task != "feature-extraction" or kind == "encoder":
        return
    rows = batches(model, Calibration(samples=8, tokens=24))
    far = [distance(model, one, rows) for one in (bare, taught)]
    assert far[1] < far[0]


def distance(whole: TorchModel, other: TorchModel, rows: Any) -> float:
    """Return how far an encoder's last states are from another's on texts that nothing was taught with."""
    first, second = (
        [run_batch(module, batch).last_hidden_state for batch in rows] for module in map(module_of, (whole, other))
    )
    return float(sum((a - b).square().sum() for a, b in zip(first, second, strict=True)))


def test_a_narrower_encoder_learns_how_texts_relate(folder: Path, data: Callable[[str], str]) -> None:
    model, _ = model_of("bert", folder)
    figures: Json = {}
    ctx = kept_context(folder / "narrow run", [], figures)
    smaller = {"ratio": 0.25, "hidden": 48, "importance": "magnitude"}
    taught = Prune(**{**QUICK, **smaller, "data": data("texts")})(model, ctx)
    assert taught.weights["embeddings.word_embeddings.weight"].shape == (384, 48)
    assert "relation" in figures["training"]["recovered"]["train"][-1]


def test_it_goes_on_after_a_stop_and_ends_in_the_same_weights(
    folder: Path, data: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgepipe.pruning import recover

    model, _ = model_of("bert", folder)
    stage = Prune(**{**QUICK, "recover_steps": 6, "importance": "magnitude", "data": data("texts")})
    plain = recover.loop_options
    monkeypatch.setattr(
        recover, "loop_options", lambda *given: dataclasses.replace(plain(*given), save_every=2, save_seconds=0)
    )
    whole = stage(model, kept_context(folder / "whole run", [], {}))
    inner = recover._embedding_recovery

    def stopping(*given: Any) -> Any:
        objective = inner(*given)

        def stop(module: Any, batch: Any, step: int) -> Any:
            if step == 5:
                raise KeyboardInterrupt
            return objective(module, batch, step)

        return stop

    monkeypatch.setattr(recover, "_embedding_recovery", stopping)
    with pytest.raises(KeyboardInterrupt):
        stage(model, kept_context(folder / "stopped run", [], {}))
    monkeypatch.setattr(recover, "_embedding_recovery", inner)
    figures: Json = {}
    again = stage(model, kept_context(folder / "stopped run", [], figures))
    for name in whole.weights:
        assert np.array_equal(whole.weights.float32(name), again.weights.float32(name)), name


def test_zeros_stay_zero_while_a_module_is_trained() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    first: Any = module[0].weight
    with torch.no_grad():
        first[:, ::2] = 0
    keep_zeros(
        module, WeightStore({"0.weight": held_weight("0.weight", first.detach().clone().numpy())}), on_grids=False
    )
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
    before = first.detach().clone()
    for _ in range(5):
        module(torch.randn(4, 8)).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(first[:, ::2], torch.zeros(8, 4))
    assert not torch.equal(first, before)


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        ("bert", {}, "prune.data: .* writes no texts of its own: give a file of texts"),
        ("bert", {"data": "answers", "alpha": 0.5}, "prune.alpha means nothing to an encoder"),
        ("encoder-decoder", {}, "prune.data: .* give a file of sources and targets"),
        ("llama", {"data": "texts", "max_source": 4, "max_target": 4}, "expected at most"),
        ("llama", {"data": "missing.jsonl"}, "missing.jsonl"),
    ],
)
def test_what_cannot_be_taught_is_refused_before_any_work(
    kind: str, options: dict[str, Any], sentence: str, folder: Path, data: Callable[[str], str]
) -> None:
    given = {**options}
    if given.get("data") in ("texts", "answers"):
        given["data"] = data(given["data"])
    with pytest.raises(ConfigError, match=sentence):
        Prune(recover_steps=4, **given).check(model_of(kind, folder)[0])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"recover_steps": -1}, "prune.recover_steps: expected at least 0"),
        ({"data": "x.jsonl"}, "prune.data is for recovery: set prune.recover_steps"),
        ({"recover_steps": 4, "batch": 0}, "prune.batch: expected at least 1"),
        ({"recover_steps": 4, "held_out": 1.0}, "prune.held_out: expected a share"),
    ],
)
def test_options_of_recovery_out_of_range(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Prune(**options)


def test_a_task_without_recovery_is_refused(folder: Path) -> None:
    path = save_encoder(folder / "tagger", "bert", "token-classification", num_labels=5)
    model = open_model(str(path), "token-classification")
    with pytest.raises(ConfigError, match="can be pruned but not taught again"):
        Prune(recover_steps=4).check(model)
