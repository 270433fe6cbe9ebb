"""Nested FFNs: narrow widths are learnt in one training, and what is cut out computes what was trained."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgepipe.artifacts import TorchModel
from edgepipe.errors import ConfigError
from edgepipe.quantizers.modules import module_of
from edgepipe.sources import open_model
from edgepipe.stages.distill import Distill
from edgepipe.stages.export import Export
from edgepipe.stages.prune import Prune
from edgepipe.students.config import StudentConfig, nested_widths, student_weights
from edgepipe.students.files import make_student
from edgepipe.training.loop import LoopData, LoopOptions, Objective, Place, train
from edgepipe.training.nested import at_width, nested
from tests.decoders import context, difference, opened, random_ids
from tests.stages.test_prune import STACK, STUDENTS
from tests.students.tiny import save_tiny_student
from tests.tiny_models import save_tiny_model
from tests.training.tiny import PAIR, predict, reversals

WIDTHS = (8, 16, 32, 64)
NESTED: dict[str, Any] = {"ratio": 0.0, "importance": "nested"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold this file's models."""
    return tmp_path_factory.mktemp("nested")


@pytest.fixture(scope="module")
def pair(folder: Path) -> TorchModel:
    """Return an encoder-decoder student of 3 and 2 layers, FFN 80, that says it is nested."""
    stacks = [{**stack, "nested_widths": [20, 40, 80]} for stack in (STACK, {**STACK, "num_hidden_layers": 2})]
    config = StudentConfig(kind="encoder-decoder", encoder=stacks[0], decoder=stacks[1])
    return open_model(str(save_tiny_student(folder / "pair", config)))


def answer(model: TorchModel, width: int | None = None) -> np.ndarray:
    """Return the logits of seeded ids, at one width of the model's MLPs."""
    module, ids = module_of(model), torch.from_numpy(random_ids(model))
    with torch.no_grad(), at_width(module, width or 10**6):
        found = module(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=ids[:, :5]).logits
    return np.asarray(found)


@pytest.mark.parametrize("width", [20, 40])
def test_what_is_cut_out_computes_what_was_trained(width: int, pair: TorchModel, folder: Path) -> None:
    smaller = Prune(ffn=width, **NESTED)(pair, context(folder))
    assert smaller.weights["encoder.layers.0.mlp.up_proj.weight"].shape == (width, 48)
    assert nested_widths(pair.info.config) == (20, 40, 80)
    assert nested_widths(smaller.info.config) == ()
    assert difference(answer(smaller), answer(pair, width)) < 1e-6


def test_a_decoder_that_is_cut_is_no_longer_nested(folder: Path) -> None:
    """Its config is a plain Llama's; recovery would train it at widths that it doesn't have."""
    path = save_tiny_model(folder / "decoder", "llama", nested_widths=[25, 50, 100])
    model = open_model(str(path))
    assert nested_widths(model.info.config) == (25, 50, 100)
    smaller = Prune(ffn=50, **NESTED)(model, context(folder))
    assert nested_widths(smaller.info.config) == ()


@pytest.mark.parametrize("widths", [5, [50, 25], [0, 50], ["25", "50"]])
def test_a_config_whose_nested_widths_are_none(widths: object) -> None:
    with pytest.raises(ConfigError, match=r"nested_widths is .*; expected growing whole numbers"):
        nested_widths({"nested_widths": widths})


def test_layers_of_several_widths_are_cut_out_in_seconds_and_exported(pair: TorchModel, folder: Path) -> None:
    """Mix'n'Match: the file has what the config promises, and the graph computes what torch does."""
    widths = (20, 40, 40, 40, 80)
    notes: list[str] = []
    begun = time.perf_counter()
    smaller = Prune(ffn_widths=widths, **NESTED)(pair, context(folder, notes))
    held = {name: np.asarray(weight.load()).shape for name, weight in smaller.weights.items()}
    assert time.perf_counter() - begun < 10
    config = smaller.info.config
    assert (config["encoder"]["ffn_widths"], config["decoder"]["ffn_widths"]) == ([20, 40, 40], [40, 80])
    assert config["encoder"]["intermediate_size"] == 40
    assert any("the encoder kept 20, 40 of 80 FFN channels" in note for note in notes)
    fields = {k: v for k, v in config.items() if k in ("encoder", "decoder")}
    assert held == student_weights(StudentConfig(kind="encoder-decoder", **fields))
    Export(context=32)(smaller, context(folder, notes))
    assert any(note.startswith("agrees with torch") for note in notes)
    with pytest.raises(ConfigError, match="have widths of their own already"):
        Prune().check(smaller)


@pytest.mark.slow
def test_narrow_widths_are_learnt_and_slices_of_a_plain_student_are_not(folder: Path) -> None:
    """Both ways to nest, at equal steps, judged by what the narrowest width loses on held-out data."""
    ways: dict[str, Objective] = {
        "plain": predict,
        "drawn": nested(predict, WIDTHS, every=False, seed=0),
        "every": nested(predict, WIDTHS, every=True, seed=0),
    }
    batch = reversals(60, 1).collate(range(60))
    losses: dict[str, list[float]] = {}
    for way, objective in ways.items():
        student = make_student(PAIR, seed=0)
        options = LoopOptions(steps=80, batch=16, learning_rate=3e-3, precision="no")
        train(student, objective, LoopData(train=reversals(200, 0)), options, Place(folder=folder / way, key=way))
        student.eval()
        losses[way] = []
        for width in WIDTHS:
            with torch.no_grad(), at_width(student, width):
                losses[way].append(float(predict(student, batch, 0).loss))
    lost = {way: found[0] - found[-1] for way, found in losses.items()}
    assert lost["plain"] > 0.03, losses
    for way in ("drawn", "every"):
        assert all(mine < slice_ for mine, slice_ in zip(losses[way][:-1], losses["plain"][:-1], strict=True)), losses
        assert lost[way] < 0.3 * lost["plain"], losses


def test_a_step_draws_one_width_and_judging_takes_all() -> None:
    seen: list[int | None] = []
    student: Any = make_student(PAIR, seed=0)

    def objective(module: Any, batch: Any, step: int) -> Any:
        seen.append(module.encoder.layers[0].mlp.kept)
        return predict(module, batch, step)

    batch = reversals(4, 0).collate(range(4))
    drawn = nested(objective, WIDTHS, every=False, seed=3)
    for step in (0, 0, *range(40)):
        drawn(student, batch, step)
    assert seen[0] == seen[1] == seen[2], "the same in all runs of a step"
    assert set(seen) == {8, 16, 32, None}
    found = nested(objective, WIDTHS, every=True, seed=3)(student, batch, 0)
    assert seen[-4:] == [8, 16, 32, None]
    expected = np.average([x.item() for x in found.figures.values()], weights=WIDTHS)
    assert found.loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_student_is_made_nested_with_what_matters_first(folder: Path) -> None:
    """The teacher's most important channels are the narrowest width's; config and training know the widths."""
    teacher = opened(folder, "llama rope llama3")
    texts = folder / "texts.jsonl"
    lines = [f'{{"source": "a {i}", "target": "{i} a"}}\n' for i in range(24)]
    texts.write_text("".join(lines), encoding="utf-8")
    quick: dict[str, Any] = {"steps": 2, "batch": 4, "alpha": 0.0, "data": str(texts), "precision": "no"}
    notes: list[str] = []
    made = Distill(encoder_layers=1, decoder_layers=1, nested=(16, 48), **quick)(teacher, context(folder, notes))
    whole = teacher.info.config["intermediate_size"]
    assert nested_widths(made.info.config) == (16, 48, whole)
    down = made.weights.float32("encoder.layers.0.mlp.down_proj.weight")
    norms = np.square(down).sum(0) * np.square(made.weights.float32("encoder.layers.0.mlp.up_proj.weight")).sum(1)
    assert norms[:16].mean() > norms[-16:].mean()
    smaller = Prune(ffn_widths=(16, 48), **NESTED)(made, context(folder))
    assert smaller.weights.parameters < made.weights.parameters


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ffn_widths": (20, 40)}, "prune.ffn_widths: expected 5 numbers, one for each layer"),
        ({"ffn_widths": (20, 40, 40, 40, 81)}, "prune.ffn_widths: 81 of .*'s 80 can't be kept: the most is 80"),
        ({"ffn_widths": (20, 0, 40, 40, 40)}, "0 channels of a layer can't be kept: the least is 1"),
    ],
)
def test_widths_that_cannot_be(options: dict[str, Any], sentence: str, pair: TorchModel) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Prune(**NESTED, **options).check(pair)


def test_widths_of_a_plain_model_and_of_a_plan(folder: Path) -> None:
    teacher = opened(folder, "llama rope llama3")
    with pytest.raises(ConfigError, match=r"one width for all layers: the nearest possible is prune\.ffn=20"):
        Prune(ffn_widths=(16, 24), **NESTED).check(teacher)
    with pytest.raises(
        ConfigError, match=r"nested: expected growing widths from 1 to below the whole \d+, got \[48, 16\]"
    ):
        Distill(nested=(48, 16), untaught=True).check(teacher)
    with pytest.raises(ConfigError, match=r"prune\.ffn and prune\.ffn_widths: give one"):
        Prune(ffn=8, ffn_widths=(8, 8))
    assert STUDENTS["encoder"].encoder.get("nested_widths") is None
