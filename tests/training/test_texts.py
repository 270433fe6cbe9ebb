"""What the teacher writes: the same as one row at a time, kept with its origin, whole after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgepipe.artifacts import TorchModel
from edgepipe.errors import ConfigError
from edgepipe.graph.reference import torch_logits
from edgepipe.sources import open_model
from edgepipe.training import texts
from edgepipe.training.batches import Limits, Special, seq2seq
from edgepipe.training.data import TrainingData, read_data
from edgepipe.training.teacher import Teacher, open_teacher
from edgepipe.training.texts import WriteOptions, Writing, generate, write_targets, write_texts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    """Open a tiny teacher with its tokenizer."""
    from tests.tiny_models import save_tiny_model

    return open_model(str(save_tiny_model(tmp_path_factory.mktemp("teacher") / "tiny", "llama")))


@pytest.fixture(scope="module")
def teacher(model: TorchModel) -> Teacher:
    """Return it as a teacher."""
    return open_teacher(model)


def writing(model: TorchModel, teacher: Teacher, folder: Path) -> Writing:
    """Return where and how it writes."""
    return Writing(
        teacher=teacher,
        files=model.info.tokenizer,
        eos=sorted(model.info.eos_token_ids),
        folder=folder,
        progress=lambda *_: None,
    )


def sources(folder: Path, model: TorchModel, count: int = 7) -> tuple[TrainingData, list[np.ndarray]]:
    """Return some records, one source twice, and the sources' ids."""
    from edgepipe.training.batches import encode

    rows = [{"source": f"The river {'rose ' * (i % 4)}{i}", "target": "by hand"} for i in range(count - 1)]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]), encoding="utf-8")
    data = read_data(str(path))
    return data, encode(data, [r.first for r in data.records], model.info.tokenizer, 64, False, print)


def test_the_teacher_is_the_model(model: TorchModel, teacher: Teacher) -> None:
    """The whole module gives the logits of the streamed one, tied weights included."""
    ids = np.array([[5, 9, 200, 31]])
    with torch.no_grad():
        logits = teacher.module(torch.from_numpy(ids)).logits.numpy()
    assert np.allclose(logits, torch_logits(model, ids), atol=1e-4)
    assert not any(p.requires_grad for p in teacher.module.parameters())
    assert teacher.fingerprint == model.info.fingerprint


def test_padded_rows_are_answered_as_alone(model: TorchModel, teacher: Teacher, tmp_path: Path) -> None:
    """Greedy answers of a batch are those of each prompt alone."""
    _, prompts = sources(tmp_path, model)
    options = WriteOptions(tokens=6)
    eos = sorted(model.info.eos_token_ids)
    together = generate(teacher.module, prompts, eos, options)
    assert together == [generate(teacher.module, [ids], eos, options)[0] for ids in prompts]
    assert all(len(row) <= 6 and not set(row) & set(eos) for row in together)


def test_targets(model: TorchModel, teacher: Teacher, tmp_path: Path) -> None:
    """One target for each different source, in the data's order, with its provenance; written once."""
    data, ids = sources(tmp_path, model)
    found = write_targets(data, ids, writing(model, teacher, tmp_path / "w"), WriteOptions(tokens=8))
    assert found.form == "source-target"
    answered = {r.first for r in found.records}  # this teacher's first token may be an end
    assert [r.first for r in found.records] == [r.first for r in data.records[:-1] if r.first in answered]
    assert len(answered) >= 4
    about = json.loads((tmp_path / "w" / "targets.json").read_text(encoding="utf-8"))
    assert about["teacher"]["fingerprint"] == model.info.fingerprint
    assert about["data"]["sha256"] == data.sha256
    assert (about["asked"], about["written"]) == (6, len(answered))
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == ["targets.json", "targets.jsonl"]
    before = (tmp_path / "w" / "targets.jsonl").stat().st_mtime_ns
    again = write_targets(data, ids, writing(model, teacher, tmp_path / "w"), WriteOptions(tokens=8))
    assert again == found
    assert (tmp_path / "w" / "targets.jsonl").stat().st_mtime_ns == before
    write_targets(data, ids, writing(model, teacher, tmp_path / "w"), WriteOptions(tokens=3))
    assert json.loads((tmp_path / "w" / "targets.json").read_text(encoding="utf-8"))["options"]["tokens"] == 3


def test_a_text_s_second_half_is_the_teacher_s(model: TorchModel, teacher: Teacher, tmp_path: Path) -> None:
    """The teacher goes on from the first half of a text, and that half is all that a student reads."""
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(f"The river number {i} runs past the old mill" for i in range(6)), encoding="utf-8")
    data = read_data(str(path))
    special = Special(start=0, eos=model.info.eos_token_ids[0], pad=model.info.eos_token_ids[0])
    halves = seq2seq(data, model.info.tokenizer, Limits(source=64, target=64), special, lambda _note: None)
    found = write_targets(data, halves.sources, writing(model, teacher, tmp_path / "w"), WriteOptions(tokens=8))
    assert found.form == "source-target"
    for record in found.records:
        whole = next(r.first for r in data.records if r.first.startswith(record.first))
        assert 0 < len(record.first) < 0.7 * len(whole)


def test_own_texts_go_on_after_a_kill(
    model: TorchModel, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled texts depend on the seed, and a writing that was stopped ends in the same file."""
    monkeypatch.setattr(texts, "_PART", 4)
    options = WriteOptions(tokens=5, temperature=1.0, top_k=50, rows=4)
    start = min(model.info.eos_token_ids)
    whole = write_texts(12, start, writing(model, teacher, tmp_path / "a"), options)
    assert whole.form == "text"
    assert len({r.first for r in whole.records}) > 6
    asked: list[Any] = []

    def stop(module: Any, prompts: Any, eos: Any, how: Any) -> list[list[int]]:
        asked.append(prompts)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return generate(module, prompts, eos, how)

    monkeypatch.setattr(texts, "generate", stop)
    with pytest.raises(KeyboardInterrupt):
        write_texts(12, start, writing(model, teacher, tmp_path / "b"), options)
    resumed = write_texts(12, start, writing(model, teacher, tmp_path / "b"), options)
    assert len(asked) == 4
    assert [r.first for r in resumed.records] == [r.first for r in whole.records]
    other = write_texts(
        12, start, writing(model, teacher, tmp_path / "c"), WriteOptions(tokens=5, temperature=1.0, seed=1)
    )
    assert [r.first for r in other.records] != [r.first for r in whole.records]


def test_own_texts_are_sampled(model: TorchModel, teacher: Teacher, tmp_path: Path) -> None:
    """The likeliest text over and over teaches nothing."""
    with pytest.raises(ConfigError, match="temperature must be above 0"):
        write_texts(3, 0, writing(model, teacher, tmp_path), WriteOptions())


def test_a_teacher_of_another_family(tmp_path: Path) -> None:
    """Scaled embeddings and other norms come through the lazy store too."""
    from tests.tiny_models import save_tiny_model

    opened = open_model(str(save_tiny_model(tmp_path / "gemma", "gemma", head_dim=16)))
    ids = np.array([[5, 9, 20]])
    with torch.no_grad():
        logits = open_teacher(opened).module(torch.from_numpy(ids)).logits.numpy()
    assert np.allclose(logits, torch_logits(opened, ids), atol=1e-3)
