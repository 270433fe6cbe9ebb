"""The training loop: it learns, and kills, more processes and other divisions of a batch change nothing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from edgepipe.errors import ConfigError, StageError
from edgepipe.students.files import make_student
from edgepipe.training.loop import LoopData, LoopOptions, Place, Step, schedule, train
from edgepipe.training.precision import choose_precision
from tests.training.tiny import OPTIONS, PAIR, predict, reversals, run_taught, run_tiny

ROOT = Path(__file__).resolve().parent.parent.parent


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Say whether two states are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def start(folder: Path, out: Path, *launcher: str, what: tuple[str, ...] = ("0.1",)) -> subprocess.Popen[bytes]:
    """Start tiny trainings, one after another, as a process (or several, by a launcher)."""
    command = [*(launcher or (sys.executable,)), "-m", "tests.training.tiny", str(folder), str(out), *what]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes], out: Path, what: str = "0.1") -> tuple[dict[str, torch.Tensor], Any]:
    """Wait for the trainings; return weights and record of one."""
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors.decode()
    return result(out / what)


def result(out: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """Return the weights and the record of a training."""
    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    return torch.load(out / "weights.pt", weights_only=True), record


def test_it_learns(tmp_path: Path) -> None:
    """Reversing is learnt: loss falls, the record has both curves, the module is the best one."""
    seen: list[tuple[str, int, int]] = []
    student = make_student(PAIR)
    data = LoopData(train=reversals(200, 0), held_out=reversals(30, 1))
    options = dataclasses.replace(OPTIONS, steps=150, evaluate_every=50, save_every=0)
    place = Place(folder=tmp_path, key="k", progress=lambda *what: seen.append(what))
    record = train(student, predict, data, options, place)
    assert record["train"][0]["loss"] > 3 > 2.8 > record["best"]["loss"]
    assert [point["step"] for point in record["held_out"]] == [0, 50, 100, 150]
    assert record["best"]["loss"] == min(point["loss"] for point in record["held_out"])
    assert record["steps"] == 150
    assert record["stopped"] == "steps"
    assert record["tokens"] > 150 * 16 * 7
    assert seen[-1][1:] == (150, 150)
    assert "tokens/s" in seen[-1][0]
    assert not student.training
    json.dumps(record)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Hold a training that nobody killed."""

    folder: Path
    weights: dict[str, torch.Tensor]
    record: Any


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train in a process of its own, which those that are killed go on in as well."""
    folder = tmp_path_factory.mktemp("undisturbed")
    weights, record = finish(start(folder / "whole", folder / "out"), folder / "out")
    return Trained(folder=folder / "whole" / "0.1", weights=weights, record=record)


def test_no_more_is_done_when_all_is(undisturbed: Trained, tmp_path: Path) -> None:
    """A finished training answers from its folder, with the same weights and the same record."""
    folder = Path(shutil.copytree(undisturbed.folder, tmp_path / "done"))
    begun = time.process_time()
    again, same = run_tiny(folder)
    assert time.process_time() - begun < 5
    assert same == undisturbed.record
    assert same_weights(undisturbed.weights, again.state_dict())


def test_another_run_does_not_go_on_from_here(undisturbed: Trained, tmp_path: Path) -> None:
    """Other options or another model begin at the beginning, in the same folder."""
    folder = Path(shutil.copytree(undisturbed.folder, tmp_path / "done"))
    other, _ = run_tiny(folder, dataclasses.replace(OPTIONS, learning_rate=1e-3))
    fresh, _ = run_tiny(tmp_path / "fresh", dataclasses.replace(OPTIONS, learning_rate=1e-3))
    assert same_weights(other.state_dict(), fresh.state_dict())


@pytest.mark.parametrize("trial", [0, *(pytest.param(trial, marks=pytest.mark.slow) for trial in (1, 2))])
def test_killed_and_resumed(trial: int, undisturbed: Trained, tmp_path: Path) -> None:
    """`kill -9` at a random moment: the resumed run ends with the undisturbed one's weights and curves, to the bit."""
    folder, out = tmp_path / "killed", tmp_path / "out"
    process, begun = start(folder, out), time.monotonic()
    while not (folder / "0.1" / "last").exists() and time.monotonic() - begun < 120:
        time.sleep(0.005)
    time.sleep(random.Random(trial).uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL  # it was at work
    assert not out.exists()
    weights, record = finish(start(folder, out), out)
    assert same_weights(weights, undisturbed.weights)
    for curve in ("train", "held_out", "best", "steps", "tokens"):
        assert record[curve] == undisturbed.record[curve]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train twice in two processes (gloo), the second time by a teacher; return where the records lie."""
    folder = tmp_path_factory.mktemp("together")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    finish(start(folder / "two", folder / "out", *launcher, what=("0", "taught")), folder / "out", "taught")
    return folder / "out"


@pytest.mark.parametrize("what", ["0", "taught"])
def test_two_processes_are_one(what: str, together: Path, tmp_path: Path) -> None:
    """Two processes that divide each batch give the loss curve of one, with a teacher's samples too."""
    _, one = run_taught(tmp_path / "one") if what == "taught" else run_tiny(tmp_path / "one", dropout=0)
    _, two = result(together / what)
    assert two["processes"] == 2
    for curve in ("train", "held_out"):
        assert [p["step"] for p in one[curve]] == [p["step"] for p in two[curve]]
        for a, b in zip(one[curve], two[curve], strict=True):
            assert abs(a["loss"] - b["loss"]) < 1e-3


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_accumulation_is_one_batch(rows: int, tmp_path: Path) -> None:
    """Examples that run one after another count as if they ran at once, ragged pieces included."""
    options = dataclasses.replace(OPTIONS, steps=10)
    _, whole = run_tiny(tmp_path / "whole", options, dropout=0)
    _, parts = run_tiny(tmp_path / "parts", dataclasses.replace(options, rows=rows), dropout=0)
    for a, b in zip(whole["train"], parts["train"], strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-4
        assert abs(a["accuracy"] - b["accuracy"]) < 1e-2


def test_what_a_teacher_teaches_goes_on_to_the_bit(tmp_path: Path) -> None:
    """A step on samples and states, drawn before its runs, is a function of its number: a stop leaves no trace."""
    whole, record = run_taught(tmp_path / "whole", rows=6)
    with pytest.raises(KeyboardInterrupt):
        run_taught(tmp_path / "stopped", rows=6, stop_at=4)
    again, resumed = run_taught(tmp_path / "stopped", rows=6)
    assert same_weights(whole.state_dict(), again.state_dict())
    assert resumed["train"] == record["train"]


def test_bfloat16(tmp_path: Path) -> None:
    """Products in bfloat16 give nearly the same curve, and the weights stay float32."""
    options = dataclasses.replace(OPTIONS, steps=10)
    _, exact = run_tiny(tmp_path / "exact", options, dropout=0)
    student, short = run_tiny(tmp_path / "short", dataclasses.replace(options, precision="bf16"), dropout=0)
    assert short["precision"] == "bf16"
    assert all(p.dtype == torch.float32 for p in student.parameters())
    losses = [(a["loss"], b["loss"]) for a, b in zip(exact["train"], short["train"], strict=True)]
    assert 0 < max(abs(a - b) for a, b in losses) < 0.02


def test_precision_is_decided_by_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wish is granted as it is; else facts decide, so that a second run decides alike."""
    cpu = torch.device("cpu")
    for amx, short in itertools.product((True, False), repeat=2):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda short=short: short)
        assert choose_precision("no", cpu) == "no"
        assert choose_precision("bf16", cpu) == "bf16"
        assert choose_precision("auto", cpu) == ("bf16" if amx or short else "no")


def test_cross_attention_alone_at_first(tmp_path: Path) -> None:
    """In the first steps only what `alone` matches moves; afterwards everything does."""
    options = dataclasses.replace(OPTIONS, steps=6, alone=r"\.cross_attn", alone_steps=6, warmup=0)
    before = make_student(PAIR).state_dict()
    student, _ = run_tiny(tmp_path / "alone", dataclasses.replace(options, evaluate_every=6))
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".cross_attn." in name}
    student, _ = run_tiny(tmp_path / "then", dataclasses.replace(options, steps=8, evaluate_every=8))
    after = student.state_dict()
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert all(p.requires_grad for p in student.parameters())


def test_early_stop_and_best(tmp_path: Path) -> None:
    """Without progress on held-out data training stops, and the weights are those of the best evaluation."""
    options = dataclasses.replace(OPTIONS, steps=1000, learning_rate=0.5, evaluate_every=5, patience=2, clip=0)
    student, record = run_tiny(tmp_path, options)
    assert record["stopped"] == "early"
    assert record["steps"] < 1000
    assert record["steps"] == record["best"]["step"] + 10
    data = LoopData(train=reversals(200, 0), held_out=reversals(30, 1))
    again = train(student, predict, data, OPTIONS, Place(folder=tmp_path / "again", key=""))
    assert again["held_out"][0]["loss"] == pytest.approx(record["best"]["loss"], abs=1e-6)


def test_held_out_examples_that_weigh_nothing(tmp_path: Path) -> None:
    """A loss of nothing is no loss of 0: there is no best, the last weights are kept, and the record says so."""

    def nothing(module: Any, batch: Any, step: int) -> Step:
        return Step(predict(module, batch, step).loss * 0, 0, {})

    before, student = make_student(PAIR).state_dict(), make_student(PAIR)
    data = LoopData(train=reversals(200, 0), held_out=reversals(30, 1), judge=nothing)
    options = dataclasses.replace(OPTIONS, steps=6, evaluate_every=2, patience=1)
    record = train(student, predict, data, options, Place(folder=tmp_path, key="nothing"))
    assert (record["steps"], record["stopped"], record["unjudged"]) == (6, "steps", True)
    assert record["held_out"] == [] and record["best"] == {}
    assert not same_weights(before, student.state_dict())


def test_minutes_decide_the_steps_once(tmp_path: Path) -> None:
    """A time limit becomes a number of steps that is written down, and the schedule ends there."""
    options = dataclasses.replace(OPTIONS, steps=0, minutes=0.05, evaluate_every=0, save_every=0)
    begun = time.monotonic()
    _, record = run_tiny(tmp_path, options)
    assert 1 < time.monotonic() - begun < 12
    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert plan["steps"] == record["steps"] == record["train"][-1]["step"] > 8
    steps = record["steps"]  # few on a busy machine, so the last rate isn't always near 0
    last = OPTIONS.learning_rate * schedule(steps, OPTIONS.warmup, steps)
    assert record["train"][-1]["learning_rate"] == pytest.approx(last)


def test_schedule() -> None:
    """Linear up to the highest rate, then half a cosine."""
    rates = [schedule(step, 4, 104) for step in range(1, 105)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[54] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.001
    assert [schedule(step, 2, 0) for step in (1, 2, 3)] == [0.5, 1.0, 1.0]


def test_a_loss_that_is_no_number_stops(tmp_path: Path) -> None:
    """One sentence, and nothing is saved over the last checkpoint."""

    def broken(module: Any, batch: Any, step: int) -> Step:
        found = predict(module, batch, step)
        return found._replace(loss=found.loss * (float("nan") if step == 3 else 1))

    data = LoopData(train=reversals(20, 0))
    with pytest.raises(StageError, match="the loss of step 3 is nan: lower the learning rate"):
        train(make_student(PAIR), broken, data, OPTIONS, Place(folder=tmp_path, key=""))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "give steps or minutes, not neither"),
        ({"minutes": 1}, "give steps or minutes, not both"),
        ({"learning_rate": 0}, "learning_rate: expected a number above 0"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"precision": "fp16"}, "precision: expected auto, bf16 or no"),
        ({"alone": "x"}, "go together"),
    ],
)
def test_options_out_of_range(changes: dict[str, Any], sentence: str) -> None:
    """Each is one sentence."""
    with pytest.raises(ConfigError, match=sentence):
        dataclasses.replace(OPTIONS, **changes)


def test_a_name_that_nothing_has(tmp_path: Path) -> None:
    """A pattern that matches no parameter is refused before any work."""
    options = LoopOptions(steps=3, alone="nothing", alone_steps=2)
    with pytest.raises(ConfigError, match="no parameter's name matches 'nothing'"):
        run_tiny(tmp_path, options)
