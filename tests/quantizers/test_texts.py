"""Calibration batches: what each kind of model gets, where texts come from, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from edgepipe.artifacts import TorchModel
from edgepipe.calibration import open_text, passages
from edgepipe.errors import ConfigError
from edgepipe.quantizers.modules import feeds, module_of, run_batch
from edgepipe.quantizers.texts import DEFAULT_SET, Batch, Calibration, batches, check_calibration, fingerprint, texts_of
from edgepipe.sources import open_model
from edgepipe.students.config import StudentConfig
from tests.encoders import save_encoder
from tests.families import FAMILIES, save_family
from tests.students.test_graphs import ENCODERS
from tests.students.test_models import PAIRS
from tests.students.tiny import save_tiny_student
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def decoder(folder: Path) -> TorchModel:
    return open_model(str(save_tiny_model(folder / "decoder", "llama")))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TorchModel:
    return open_model(str(save_encoder(folder / "encoder", "bert")))


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.attention_mask, b.attention_mask)
        for a, b in zip(first, second, strict=True)
    )


def test_a_decoder_gets_full_rows(decoder: TorchModel) -> None:
    """No padding; rows read on are the set's texts in some order, each with an end behind it."""
    found = batches(decoder, Calibration(tokens=32, samples=500, rows=3))
    assert all(batch.attention_mask.all() and batch.input_ids.shape[1] == 32 for batch in found)
    assert {len(batch.input_ids) for batch in found[:-1]} == {3}
    stream = np.concatenate([batch.input_ids.reshape(-1) for batch in found]).tolist()
    tokenizer = tokenizers.Tokenizer.from_buffer(decoder.info.tokenizer["tokenizer.json"])
    end = decoder.info.eos_token_ids[0]
    whole = {tuple(tokenizer.encode(text).ids) for text in passages(open_text(DEFAULT_SET, purpose="calibration"))}
    texts: list[tuple[int, ...]] = []
    row: list[int] = []
    for token in stream:
        if token == end:
            texts.append(tuple(row))
            row = []
        else:
            row.append(token)
    assert set(texts) == whole or len(set(texts) ^ whole) <= 1  # the last rest is no whole row


def test_an_encoder_gets_a_text_a_row(encoder: TorchModel) -> None:
    found = batches(encoder, Calibration(tokens=24, samples=500, rows=5))
    assert sum(len(batch.input_ids) for batch in found) == len(passages(open_text(DEFAULT_SET, purpose="calibration")))
    assert max(batch.input_ids.shape[1] for batch in found) == 24
    for batch in found:
        assert batch.input_ids.shape == batch.attention_mask.shape
        lengths = batch.attention_mask.sum(1)
        assert (batch.attention_mask == (np.arange(batch.input_ids.shape[1]) < lengths[:, None])).all()
        assert lengths.max() == batch.input_ids.shape[1] and batch.tokens == lengths.sum()


def test_samples_and_seed(encoder: TorchModel, decoder: TorchModel) -> None:
    for model in (encoder, decoder):
        few = Calibration(samples=7, tokens=16, rows=4)
        assert [len(batch.input_ids) for batch in batches(model, few)] == [4, 3]
        assert same(batches(model, few, seed=1), batches(model, few, seed=1))
        assert not same(batches(model, few, seed=1), batches(model, few, seed=2))


def test_rows_are_no_longer_than_the_model(encoder: TorchModel) -> None:
    """The tiny encoder has 128 positions; a sentence encoder may say fewer."""
    assert max(batch.input_ids.shape[1] for batch in batches(encoder, Calibration(tokens=4096))) <= 128
    said = dataclasses.replace(encoder, info=dataclasses.replace(encoder.info, sentence={"max_tokens": 20}))
    assert max(batch.input_ids.shape[1] for batch in batches(said, Calibration(tokens=4096))) == 20


def test_a_decoder_writes_its_own(decoder: TorchModel) -> None:
    own = Calibration(source="self", samples=4, tokens=16, rows=2)
    first = batches(decoder, own, seed=3)
    assert [batch.input_ids.shape for batch in first] == [(2, 16), (2, 16)]
    assert same(first, batches(decoder, own, seed=3))
    assert not same(first, batches(decoder, own, seed=4))
    assert fingerprint(own) == {}


@pytest.mark.parametrize("name", ["encoder", "seq2seq"])
def test_what_cannot_write_is_told_so(folder: Path, encoder: TorchModel, name: str) -> None:
    model = encoder
    if name == "seq2seq":
        model = open_model(str(save_family(folder / "t5-self", "t5")))
    with pytest.raises(ConfigError, match=r'"self": expected a decoder, which can write texts, but .* is for'):
        check_calibration(model.info, Calibration(source="self"))


def test_a_model_without_a_tokenizer_is_told_so(encoder: TorchModel) -> None:
    info = dataclasses.replace(encoder.info, tokenizer={})
    with pytest.raises(ConfigError, match="expected a model of texts with a tokenizer"):
        batches(dataclasses.replace(encoder, info=info), Calibration())


@pytest.mark.parametrize("given", ["evryday", "nowhere.txt"])
def test_an_unknown_set_lists_the_known_ones(given: str) -> None:
    with pytest.raises(ConfigError, match=rf"{given} can't be read .*: give a file, or one of the texts everyday"):
        texts_of(Calibration(source=given))


def test_an_evaluation_set_is_refused_under_any_name(tmp_path: Path) -> None:
    """By name, by its bytes, and by a passage of it in another file, wherever its lines end."""
    with pytest.raises(ConfigError, match="prose-eval is the evaluation set prose-eval"):
        texts_of(Calibration(source="prose-eval"))
    copy = tmp_path / "copy.txt"
    copy.write_text(open_text("prose-eval"), encoding="utf-8")
    with pytest.raises(ConfigError, match="is the evaluation set prose-eval"):
        texts_of(Calibration(source=str(copy)))
    long = max(passages(open_text("prose-eval")), key=len)
    mixed = tmp_path / "mixed.txt"
    mixed.write_text("A text of our own.\n\nAnother one.\n" + long.replace(". ", ".\n") + " And on.", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds a passage of the evaluation set prose-eval"):
        texts_of(Calibration(source=str(mixed)))


def test_files_of_every_kind(tmp_path: Path) -> None:
    rows = [{"text": "The first text.", "label": "pos"}, {"text": "The second text.", "label": "neg"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "a.tsv").write_text("The first text.\t0.5\nThe second text.\t4.75\n", encoding="utf-8")
    (tmp_path / "lines.txt").write_text("The first text.\nThe second text.\n", encoding="utf-8")
    (tmp_path / "passages.txt").write_text("The first\ntext.\n\nThe second text.\n\nThe second text.", encoding="utf-8")
    for name in ("a.jsonl", "a.tsv", "lines.txt"):
        assert texts_of(Calibration(source=str(tmp_path / name))) == ["The first text.", "The second text."]
    assert texts_of(Calibration(source=str(tmp_path / "passages.txt"))) == ["The first\ntext.", "The second text."]
    assert fingerprint(Calibration(source=str(tmp_path / "a.tsv"))) != fingerprint(Calibration())


@pytest.mark.parametrize("options", [{"samples": 0}, {"tokens": 7}, {"rows": 0}])
def test_options_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected at least"):
        Calibration(**options)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_runs_its_batches(folder: Path, name: str) -> None:
    model = open_model(str(save_family(folder / name, name)))
    if "tokenizer.json" not in model.info.tokenizer:
        with pytest.raises(ConfigError, match="expected a model of texts with a tokenizer"):
            batches(model, Calibration())
        return
    module = module_of(model)
    found = batches(model, Calibration(samples=4, tokens=16, rows=4), module=module)
    for batch in found:
        output = run_batch(module, batch)
        assert output is not None
        assert (batch.decoder_input_ids is not None) == (model.info.task == "text2text-generation")


@pytest.mark.parametrize("name", [*ENCODERS, *PAIRS])
def test_every_student_runs_its_batches(folder: Path, name: str) -> None:
    config: StudentConfig = {**ENCODERS, **PAIRS}[name]
    model = open_model(str(save_tiny_student(folder / f"student-{name}".replace(" ", "-"), config)))
    module = module_of(model)
    for batch in batches(model, Calibration(samples=4, tokens=16, rows=4), module=module):
        assert run_batch(module, batch) is not None
        assert (batch.decoder_input_ids is not None) == (config.decoder is not None)


def test_answers_are_the_models_own(folder: Path) -> None:
    """Each step of an answer is the likeliest one after those before, and what follows an end doesn't count."""
    model = open_model(str(save_family(folder / "t5-answers", "t5")))
    module = module_of(model)
    (batch,) = batches(model, Calibration(samples=4, tokens=16, rows=4), module=module)
    ids, mask = batch.decoder_input_ids, batch.decoder_mask
    assert ids is not None and mask is not None and ids.shape == mask.shape
    assert (ids[:, 0] == model.info.config["decoder_start_token_id"]).all() and ids.shape[1] > 1
    likeliest = module(**feeds(batch)).logits.argmax(-1).numpy()
    np.testing.assert_array_equal(likeliest[:, :-1], ids[:, 1:])
    ends = set(model.info.eos_token_ids)
    for row, counts in zip(ids.tolist(), mask.tolist(), strict=True):
        first = next((i for i, token in enumerate(row) if i and token in ends), len(row))
        assert counts == [1] * first + [0] * (len(row) - first)
