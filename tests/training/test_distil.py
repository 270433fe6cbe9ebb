"""What a student learns of its teacher: places that fit, padding left out, samples, scores from disk, overfitting."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgepipe.errors import ConfigError
from edgepipe.numerics.losses import IGNORED
from edgepipe.students.config import StudentConfig, with_layers
from edgepipe.students.files import make_student
from edgepipe.training.batches import Seq2Seq
from edgepipe.training.distil import (
    DistilOptions,
    LayerMap,
    Projected,
    distillation,
    drawing,
    joined,
    likelihood,
    run_student,
    sample,
)
from edgepipe.training.loop import LoopData, LoopOptions, Objective, Place, train
from edgepipe.training.scores import ScoreOptions, keep_scores
from edgepipe.training.teacher import judge
from tests.training.tiny import EOS, PAIR, STACK, START, VOCAB, reversals, teacher

KINDS: dict[str, Any] = {"encoder-decoder": PAIR, "decoder": STACK}


def test_the_teacher_is_asked_at_the_students_places() -> None:
    """Logits of a padded batch are those of each row read alone: the j-th says what follows x, y_1 … y_(j−1)."""
    asked, examples = teacher(), reversals(5, 3)
    batch = examples.collate(range(5))
    found = judge(asked, batch, states=True)
    for row in range(5):
        x, y = examples.sources[row].tolist(), examples.targets[row].tolist()
        whole = asked.module(torch.tensor([x + y]), output_hidden_states=True)
        expected = whole.logits[0, len(x) - 1 : len(x) - 1 + len(y)]
        assert torch.allclose(found.logits[row, : len(y)], expected, atol=1e-4)
        for layer in (0, 1):  # the last one is normed by transformers
            stream = whole.hidden_states[layer][0]
            assert torch.allclose(found.source_states[layer][row, : len(x)], stream[: len(x)], atol=1e-4)
            assert torch.allclose(found.target_states[layer][row, : len(y)], stream[len(x) - 1 : -1], atol=1e-4)
        normed = asked.module.model.norm(found.target_states[2][row, : len(y)])
        assert torch.allclose(normed, whole.hidden_states[2][0, len(x) - 1 : -1], atol=1e-4)


def test_a_decoder_reads_source_and_target_as_one_row() -> None:
    """A ragged batch gives a decoder student the logits of each row alone."""
    student, examples = make_student(STACK).eval(), reversals(6, 4)
    batch = examples.collate(range(6))
    _, places = joined(batch)
    with torch.no_grad():
        logits = run_student(student, batch).logits  # type: ignore[arg-type]
        for row in range(6):
            x, y = examples.sources[row].tolist(), examples.targets[row].tolist()
            assert places[row, 0] == len(x) - 1
            alone = student(torch.tensor([x + y]))[0].logits[0, len(x) - 1 : -1]
            assert torch.allclose(logits[row, : len(y)], alone, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        DistilOptions(alpha=0),
        DistilOptions(alpha=0.5),
        DistilOptions(alpha=1, reverse=0.5, temperature=2),
        DistilOptions(alpha=0.9, on_policy=1),
        DistilOptions(alpha=0.5, match_hidden=0.3),
        DistilOptions(alpha=0.5, match_hidden=0.3, match_cosine=True),
    ],
)
def test_padding_changes_no_loss(kind: str, options: DistilOptions) -> None:
    """The loss of a batch is the mean over its tokens of the rows' own losses, whatever they are padded to."""
    objective = distillation(options, teacher(), layers=LayerMap(decoder=(1,)))
    student = Projected(make_student(KINDS[kind]).eval(), 112)  # type: ignore[arg-type]
    examples = reversals(4, 6)
    with torch.no_grad():
        whole = objective(student, examples.collate(range(4)), 3)
        rows = [objective(student, examples.collate([i]), 3) for i in range(4)]
    if options.on_policy:  # samples are as long as the longest target of their batch: compare what isn't sampled
        whole, rows = (
            whole._replace(loss=whole.figures["cross_entropy"]),
            [r._replace(loss=r.figures["cross_entropy"]) for r in rows],
        )
    mean = sum(float(r.loss) * int(r.weight) for r in rows) / sum(int(r.weight) for r in rows)
    assert float(whole.loss) == pytest.approx(mean, rel=1e-4)
    assert int(whole.weight) == sum(len(t) for t in examples.targets)


@pytest.mark.parametrize("rows", [5, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        DistilOptions(alpha=0.5, on_policy=1),
        DistilOptions(alpha=0, match_hidden=1),
        DistilOptions(alpha=0.9, on_policy=0.5, match_hidden=0.5, seed=1),
    ],
)
def test_a_divided_batch_is_one_batch(options: DistilOptions, kind: str, rows: int, tmp_path: Path) -> None:
    """Means over samples and over sources are the whole batch's, in losses and gradients, like those over targets."""
    records = []
    for number in (0, rows):
        student: Any = Projected(make_student(KINDS[kind]), 112)  # type: ignore[arg-type]
        layers = LayerMap(encoder=(0, 1) if kind == "encoder-decoder" else (), decoder=(1,))
        objective = distillation(options, teacher(), layers=layers)
        data = LoopData(train=reversals(40, 12), prepare=drawing(options))
        loop = LoopOptions(steps=4, batch=8, rows=number, learning_rate=1e-3, warmup=0, precision="no")
        place = Place(folder=tmp_path / str(number), key="divided")
        records.append(train(student, objective, data, loop, place)["train"])
    for whole, parts in zip(*records, strict=True):
        assert parts == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_samples(kind: str) -> None:
    """Samples end, depend on (seed, step, example) alone, and one token to choose from is the likeliest."""
    student: Any = make_student(KINDS[kind])
    with torch.no_grad():
        for value in student.parameters():
            value.mul_(4)
    examples, options = reversals(8, 7), DistilOptions(on_policy=1)
    batch = examples.collate(range(8))
    found = sample(student, batch, options, 1)
    assert found.shape == batch["target"].shape
    for row in found.tolist():
        end = row.index(EOS) if EOS in row else len(row) - 1
        assert all(token == IGNORED for token in row[end + 1 :])
        assert all(0 <= token < VOCAB for token in row[: end + 1])
    assert torch.equal(found, sample(student, batch, options, 1))
    assert not torch.equal(found, sample(student, batch, options, 2))
    turned = sample(student, examples.collate(range(7, -1, -1)), options, 1)
    assert torch.equal(turned.flip(0), found)
    greedy = sample(student, batch, dataclasses.replace(options, sample_top_k=1), 1)
    written = {**batch, "target": greedy}
    written["decoder_input"] = torch.cat([batch["decoder_input"][:, :1], greedy[:, :-1].clamp_min(0)], 1)
    with torch.no_grad():
        best = run_student(student.eval(), written).logits.argmax(-1)
    assert torch.equal(best[greedy != IGNORED], greedy[greedy != IGNORED])


def test_samples_follow_the_distribution() -> None:
    """Frequencies of the first token are the student's probabilities at the temperature, cut to the top k."""
    student: Any = make_student(PAIR).eval()
    with torch.no_grad():
        for value in student.parameters():
            value.mul_(5)
    one = reversals(1, 8)
    many = Seq2Seq(sources=list(one.sources) * 3000, targets=[np.array([2, EOS])] * 3000, start=START, pad=EOS)
    options = DistilOptions(on_policy=1, sample_top_k=5, sample_temperature=2.0)
    batch = many.collate(range(3000))
    first = sample(student, batch, options, 1)[:, 0]
    with torch.no_grad():
        logits = run_student(student, {k: v[:1] for k, v in batch.items()}).logits[0, 0] / 2.0
    top = logits.topk(5)
    expected = torch.zeros(VOCAB).scatter(0, top.indices, top.values.softmax(-1))
    assert (torch.bincount(first, minlength=VOCAB) / 3000 - expected).abs().max() < 0.03


def test_scores_of_a_smaller_teacher(tmp_path: Path) -> None:
    """A student with more tokens than its teacher learns the same from scores on disk as from asking."""
    asked, examples = teacher(vocab=VOCAB), reversals(8, 9)
    stack = {**STACK, "vocab_size": VOCAB + 8}
    student = make_student({**stack}).eval()
    scores = keep_scores(asked, examples, ScoreOptions(k=VOCAB, vocab=VOCAB, precision="no"), tmp_path, lambda *_: None)
    batch = examples.collate(range(8))
    with torch.no_grad():
        online = distillation(DistilOptions(alpha=1), asked)(student, batch, 1)
        stored = distillation(DistilOptions(alpha=1), scores=scores, vocab=VOCAB)(student, batch, 1)
    assert float(stored.loss) == pytest.approx(float(online.loss), rel=2e-3)


def test_scores_from_disk(tmp_path: Path) -> None:
    """Kept scores of all tokens give the loss of asking the teacher; a killed scoring goes on after its last shard."""
    asked, examples = teacher(), reversals(600, 9)
    options = ScoreOptions(k=VOCAB, vocab=VOCAB, temperature=2.0, precision="no")
    scores = keep_scores(asked, examples, options, tmp_path, lambda *_: None)
    assert len(scores.shards) == 2
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    for path in (tmp_path / "shard-00001").iterdir():
        path.unlink()
    (tmp_path / "shard-00001").rmdir()
    scores = keep_scores(asked, examples, options, tmp_path, lambda *_: None)
    changed = {path for path in kept if path.stat().st_mtime_ns != kept[path]}
    assert {path.parent.name for path in changed} == {"shard-00001"}
    student, distil = make_student(PAIR).eval(), DistilOptions(alpha=1, temperature=2.0, reverse=0.3)
    batch = examples.collate([3, 511, 512, 599])
    with torch.no_grad():
        online = distillation(distil, asked)(student, batch, 1)
        stored = distillation(distil, scores=scores)(student, batch, 1)
    assert float(stored.loss) == pytest.approx(float(online.loss), rel=2e-3)
    short = dataclasses.replace(options, precision="bf16")
    with torch.no_grad():
        nearly = distillation(distil, scores=keep_scores(asked, examples, short, tmp_path / "short", lambda *_: None))
        assert float(nearly(student, batch, 1).loss) == pytest.approx(float(online.loss), rel=2e-2)
    other = dataclasses.replace(asked, fingerprint="another")
    keep_scores(other, examples, dataclasses.replace(options, k=4), tmp_path, lambda *_: None)
    assert np.load(tmp_path / "shard-00000" / "ids.npy").shape[1] == 4


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (DistilOptions(alpha=0.5), "needs a teacher to ask"),
        (DistilOptions(alpha=0, match_hidden=1), "comparing states needs a teacher"),
    ],
)
def test_what_is_missing(options: DistilOptions, sentence: str) -> None:
    """An objective without what it needs is refused when it is made."""
    with pytest.raises(ConfigError, match=sentence):
        distillation(options)


@pytest.mark.parametrize("name", ["alpha", "reverse", "on_policy", "temperature", "sample_temperature", "match_hidden"])
def test_out_of_range(name: str) -> None:
    """Each is one sentence."""
    with pytest.raises(ConfigError, match=f"{name}: expected"):
        DistilOptions(**{name: -1})


def overfit(objective: Objective, module: nn.Module, epochs: int, folder: Path) -> list[float]:
    """Train on four copies of one pair, one batch an epoch; return the losses."""
    one = reversals(1, 10)
    copies = Seq2Seq(sources=list(one.sources) * 4, targets=list(one.targets) * 4, start=START, pad=EOS)
    options = LoopOptions(steps=epochs, batch=4, learning_rate=1e-2, precision="no")
    record = train(module, objective, LoopData(train=copies), options, Place(folder=folder, key="overfit"))
    return [point["loss"] for point in record["train"]]


ARMS: dict[str, tuple[Callable[[], Objective], int, float]] = {
    "cross-entropy": (lambda: distillation(DistilOptions(alpha=0)), 128, 0.01),
    "teacher": (lambda: distillation(DistilOptions(alpha=1), teacher()), 256, 0.1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arm", ARMS)
def test_overfitting(kind: str, arm: str, tmp_path: Path) -> None:
    """The released code's own check (arXiv:2501.16273) in fewer epochs: four copies of one pair, the teacher alone
    to 0.1 within 512, cross-entropy alone to 0.01 within 128.
    """
    make, epochs, limit = ARMS[arm]
    student: Any = make_student(KINDS[kind])
    losses = overfit(make(), student, epochs, tmp_path)
    assert losses[0] > 10 * limit
    assert losses[-1] <= limit


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_learnt_on_samples(kind: str, tmp_path: Path) -> None:
    """What the student writes differs from step to step, and it meets the teacher's scores of it better and better."""
    student: Any = make_student(KINDS[kind])
    losses = overfit(distillation(DistilOptions(alpha=1, on_policy=1), teacher()), student, 128, tmp_path)
    assert np.mean(losses[-16:]) < 0.6 * np.mean(losses[:4])


def test_hidden_states_are_learnt(tmp_path: Path) -> None:
    """States of a student come close to the teacher's through a projection."""
    objective = distillation(
        DistilOptions(alpha=0, match_hidden=1), teacher(), layers=LayerMap(encoder=(0, 1), decoder=(1,))
    )
    losses = overfit(objective, Projected(make_student(PAIR), 112), 128, tmp_path)  # type: ignore[arg-type]
    assert losses[-1] < 0.2 * losses[0]


def test_judging_is_the_same_for_all() -> None:
    """Students are compared by the cross-entropy of the data's targets, however they were trained."""
    student, batch = make_student(PAIR).eval(), reversals(4, 11).collate(range(4))
    with torch.no_grad():
        plain = distillation(DistilOptions(alpha=0))(student, batch, 0)
        judged = likelihood(student, batch, 0)
    assert torch.equal(plain.loss, judged.loss)
    assert 0 <= float(judged.figures["accuracy"]) <= 1


def test_unequal_depths_and_widths_are_fine() -> None:
    """A student with a narrower decoder distils all the same."""
    narrow = StudentConfig(
        kind="encoder-decoder",
        encoder=STACK,
        decoder={**with_layers(STACK, [1]), "hidden_size": 16},
    )
    student: Any = Projected(make_student(narrow), 112)  # type: ignore[arg-type]
    layers = LayerMap(encoder=(0, 1), decoder=(1,))
    found = distillation(DistilOptions(match_hidden=1), teacher(), layers=layers)(
        student, reversals(2, 0).collate([0, 1]), 1
    )
    found.loss.backward()
    assert all(p.grad is not None for p in student.parameters())
