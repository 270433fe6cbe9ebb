"""Trimming: kept rows are the old ones bit by bit, outputs the same numbers, ids in every place the new ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from edgepipe.artifacts import QuantizedTensor, TorchModel
from edgepipe.errors import ConfigError
from edgepipe.graph.framework import build_module, fill_module
from edgepipe.graph.reference import torch_logits
from edgepipe.sources import open_model
from edgepipe.students.trimming import check_trimmable, trim
from edgepipe.weights import WeightStore
from tests.decoders import CHANGES, all_on, opened, stored, watched
from tests.families import FAMILIES
from tests.tiny_models import CHAT_TEMPLATE
from tests.vocabularies import TOKENIZERS, model_of, tokenizer_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEXTS = ["The river carried the timber down.", "Anna, Björn and 6.78"]
# One of every way that families name and tie embedding, head, biases, and count positions from the padding token
NAMED = (
    "bert as filler",
    "roberta",
    "electra",
    "xlnet",
    "gpt2",
    "codegen",
    "gpt_neox",
    "opt",
    "t5",
    "bart",
    "prophetnet",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the tiny models of this file."""
    return tmp_path_factory.mktemp("decoders")


@pytest.fixture(scope="module")
def model(folder: Path) -> TorchModel:
    """Return a Llama with an untied head."""
    return opened(folder, "llama")


def ids_of(model: TorchModel, text: str) -> list[int]:
    """Return the ids of a text."""
    return list(tokenizer_of(model).encode(text).ids)


@pytest.mark.parametrize("kind", ["llama", "llama tied", "qwen2 tied", "granite"])
def test_logits_of_kept_tokens_are_the_same_numbers(folder: Path, kind: str) -> None:
    model = opened(folder, kind)
    smaller, kept = trim(model, TEXTS)
    assert smaller.weights.aliases == model.weights.aliases
    for text in TEXTS:
        old, new = ids_of(model, text), ids_of(smaller, text)
        assert kept.old_ids[new].tolist() == old
        expected = torch_logits(model, np.array([old]))[..., kept.old_ids]
        np.testing.assert_allclose(torch_logits(smaller, np.array([new])), expected, rtol=1e-5, atol=1e-5)


def outputs(model: TorchModel, text: str) -> np.ndarray:
    """Return what transformers computes from a text."""
    import torch

    module = build_module(model.info)
    fill_module(module, model.weights)
    ids = torch.tensor([ids_of(model, text)])
    feeds = {"input_ids": ids}
    if model.info.task == "text2text-generation":
        feeds["decoder_input_ids"] = ids[:, :5]
    with torch.inference_mode():
        values: np.ndarray = module(**feeds)[0].numpy()
    return values


def same_outputs(directory: Path, name: str) -> None:
    """Compare a family's outputs with those of its trimmed model."""
    model = open_model(str(directory), FAMILIES[name].task)
    smaller, kept = trim(model, TEXTS)
    assert len(kept.old_ids) == smaller.info.config["vocab_size"] < kept.rows_before == 384
    for text in TEXTS:
        expected = outputs(model, text)
        gives_logits = FAMILIES[name].task in ("text-generation", "text2text-generation", "fill-mask")
        expected = expected[..., kept.old_ids] if gives_logits else expected
        np.testing.assert_allclose(outputs(smaller, text), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMED)
def test_outputs_are_the_same_numbers(name: str, family_dir: Callable[[str], Path]) -> None:
    same_outputs(family_dir(name), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NAMED])
def test_outputs_of_every_family(name: str, family_dir: Callable[[str], Path]) -> None:
    directory = family_dir(name)
    if (directory / "preprocessor_config.json").exists():
        with pytest.raises(ConfigError, match=r"reads no text, so it has no vocabulary to trim$"):
            check_trimmable(open_model(str(directory), FAMILIES[name].task))
    else:
        same_outputs(directory, name)


@pytest.mark.parametrize("grid", CHANGES)
def test_rows_are_taken_from_a_grid_without_rounding(model: TorchModel, grid: str) -> None:
    on_grid = all_on(model, grid)
    smaller, kept = trim(on_grid, TEXTS)
    for name in (EMBEDDING, HEAD):
        weight, value, whole = smaller.weights[name], smaller.weights.load(name), on_grid.weights.load(name)
        assert (weight.shape, weight.nbytes) == (value.shape, value.nbytes)
        assert weight.shape == (len(kept.old_ids), 112)
        assert (weight.dtype, weight.grid) == (on_grid.weights[name].dtype, on_grid.weights[name].grid)
        np.testing.assert_array_equal(
            smaller.weights.float32(name), on_grid.weights.float32(name)[kept.old_ids], strict=True
        )
        if isinstance(whole, QuantizedTensor):
            assert isinstance(value, QuantizedTensor)
            np.testing.assert_array_equal(value.codes, whole.codes[kept.old_ids])
            assert value.source_grid == whole.source_grid
    others = [name for name in on_grid.weights if name not in (EMBEDDING, HEAD)]
    assert all(smaller.weights[name] is on_grid.weights[name] for name in others)


def test_nothing_is_read_before_it_is_asked_for(model: TorchModel) -> None:
    store, held = watched(model.weights)
    smaller, _ = trim(dataclasses.replace(model, weights=store), TEXTS)
    assert held.in_all == 0
    smaller.weights.load(HEAD)
    assert held.in_all == 1


def test_special_tokens_and_those_of_the_template_stay() -> None:
    tokenizer = TOKENIZERS["byte-level BPE"]()
    template = CHAT_TEMPLATE.replace("assistant", "The timber") + "{% if tools %}re-recorded{% endif %}"
    plain = set(tokenizer_of(trim(model_of(tokenizer), ["x"])[0]).get_vocab())
    kept = set(tokenizer_of(trim(model_of(tokenizer, template=template), ["x"])[0]).get_vocab())
    wanted = {*tokenizer.encode("The timber\n").tokens, *tokenizer.encode("re-recorded").tokens}
    assert wanted <= kept
    assert not wanted <= plain


def test_a_template_that_names_the_day_keeps_the_same_tokens_every_day() -> None:
    template = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"
    smaller, _ = trim(model_of(TOKENIZERS["byte-level BPE"](), template=template), ["x"])
    assert set(tokenizer_of(smaller).encode("%d %b %Y").tokens) <= set(tokenizer_of(smaller).get_vocab())


def test_ids_in_configs_are_the_new_ones() -> None:
    tokenizer = TOKENIZERS["byte-level BPE"]()
    old = {name: tokenizer.token_to_id(name) for name in ("<|start|>", "<|end|>", "Ġriver", "Ġthe")}
    config: dict[str, Any] = {
        "bos_token_id": old["<|start|>"],
        "eos_token_id": [old["<|end|>"], old["Ġthe"]],
        "pad_token_id": -1,
        "bad_words_ids": [[old["Ġriver"]], [old["Ġthe"], 5]],
        "inner": {"vocab_size": tokenizer.get_vocab_size(), "decoder_start_token_id": old["<|end|>"], "hidden_size": 5},
        "type_vocab_size": 2,
        "num_hidden_layers": 5,
    }
    model = model_of(tokenizer, config=config)
    settings = {"added_tokens_decoder": {str(old["<|end|>"]): {"content": "<|end|>"}}, "pad_token": "<|end|>"}
    info = dataclasses.replace(
        model.info,
        eos_token_ids=(old["<|end|>"],),
        bos_token_id=old["<|start|>"],
        tokenizer={**model.info.tokenizer, "tokenizer_config.json": json.dumps(settings).encode()},
    )
    smaller, kept = trim(dataclasses.replace(model, info=info), ["x"])
    new = tokenizer_of(smaller)
    start, end, river, the = (new.token_to_id(name) for name in old)
    changed = smaller.info.config
    assert changed["bos_token_id"] == smaller.info.bos_token_id == start
    assert changed["eos_token_id"] == [end, the]
    assert smaller.info.eos_token_ids == (end,)
    assert changed["pad_token_id"] == -1
    assert changed["bad_words_ids"] == [[river], [the, kept.old_ids.tolist().index(5)]]
    assert changed["inner"] == {"vocab_size": len(kept.old_ids), "decoder_start_token_id": end, "hidden_size": 5}
    assert (changed["vocab_size"], changed["type_vocab_size"]) == (len(kept.old_ids), 2)
    found = json.loads(smaller.info.tokenizer["tokenizer_config.json"])
    assert found == {"added_tokens_decoder": {str(end): {"content": "<|end|>"}}, "pad_token": "<|end|>"}


def test_ids_that_a_class_has_by_default_are_kept(family_dir: Callable[[str], Path]) -> None:
    """Xglm's config.json says nothing of token 2, with which its class begins to decode."""
    model = open_model(str(family_dir("xglm")))
    del (config := dict(model.info.config))["decoder_start_token_id"]
    smaller, kept = trim(dataclasses.replace(model, info=dataclasses.replace(model.info, config=config)), TEXTS)
    assert kept.old_ids[smaller.info.config["decoder_start_token_id"]] == 2


def test_a_row_without_a_token_that_the_config_names_stays() -> None:
    tokenizer = TOKENIZERS["byte-level BPE"]()
    rows = tokenizer.get_vocab_size() + 8
    smaller, kept = trim(model_of(tokenizer, rows=rows, config={"decoder_start_token_id": rows - 3}), ["x"])
    assert kept.old_ids[-1] == rows - 3
    assert smaller.info.config["decoder_start_token_id"] == len(kept.old_ids) - 1
    assert smaller.weights.float32(EMBEDDING)[-1].tolist() == [rows - 3] * 3


def test_the_padding_tokens_id_stays_when_it_is_among_the_first() -> None:
    """RoBERTa counts positions from it."""
    tokenizer = TOKENIZERS["byte-level BPE"]()
    smaller, kept = trim(model_of(tokenizer, config={"pad_token_id": 7}), ["x"])
    assert smaller.info.config["pad_token_id"] == 7
    assert kept.old_ids[:8].tolist() == list(range(8))


def test_tokens_without_a_row_go_unless_the_texts_use_them() -> None:
    tokenizer = TOKENIZERS["byte-level BPE"]()
    rows = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken("[PAD]", special=True)])
    smaller, _ = trim(model_of(tokenizer, rows=rows), ["The river"])
    assert tokenizer_of(smaller).token_to_id("[PAD]") is None
    message = rf"^the texts use '\[PAD\]', whose id {rows} has no row in the embedding of {rows}$"
    with pytest.raises(ConfigError, match=message):
        trim(model_of(tokenizer, rows=rows), ["The [PAD]"])


def test_what_is_counted(model: TorchModel) -> None:
    whole, kept = trim(model, ["The river the river", "", "The"])
    count = len(ids_of(model, "The river the river")) + len(ids_of(model, "The"))
    assert (kept.words, kept.tokens_before, kept.tokens_after, kept.covered) == (5, count, count, count)
    text = "Every spring the water rose, and every spring"
    smaller, kept = trim(model, [text], kept.permanent)
    assert len(kept.old_ids) == kept.permanent < len(trim(model, [text])[1].old_ids)
    assert kept.tokens_after == len(ids_of(smaller, text)) > kept.tokens_before == len(ids_of(model, text))
    assert kept.covered == sum(i in kept.old_ids for i in ids_of(model, text))
    assert kept.coverage < 1
    assert whole.info.fingerprint == model.info.fingerprint


def test_a_trimmed_model_saved_as_a_directory_opens_as_it_is(model: TorchModel, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    smaller, _ = trim(model, TEXTS)
    (tmp_path / "config.json").write_text(json.dumps(smaller.info.config), encoding="utf-8")
    for name, content in smaller.info.tokenizer.items():
        (tmp_path / name).write_bytes(content)
    save_file(
        {name: np.asarray(smaller.weights.load(name)) for name in smaller.weights}, tmp_path / "model.safetensors"
    )
    again = open_model(str(tmp_path))
    assert [ids_of(again, text) for text in TEXTS] == [ids_of(smaller, text) for text in TEXTS]
    assert (again.info.eos_token_ids, again.info.bos_token_id) == (
        smaller.info.eos_token_ids,
        smaller.info.bos_token_id,
    )
    check_trimmable(again)


@pytest.mark.parametrize("texts", [[], ["", " \n"]])
def test_no_text(model: TorchModel, texts: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^there is no text in the data: a vocabulary is trimmed to what texts use$"):
        trim(model, texts)


def test_a_size_below_what_must_stay(model: TorchModel) -> None:
    least = trim(model, TEXTS)[1].permanent
    with pytest.raises(ConfigError, match=rf"^trim\.size: {least - 1} tokens were asked for, but {least} must stay"):
        trim(model, TEXTS, least - 1)
    assert len(trim(model, TEXTS, least)[1].old_ids) == least


def test_text_that_is_no_text(model: TorchModel) -> None:
    with pytest.raises(ConfigError, match=r"^the texts can't be turned into tokens: "):
        trim(model, ["half of a \ud83d pair"])


def test_models_that_cannot_be_trimmed(model: TorchModel) -> None:
    def with_info(**changes: Any) -> TorchModel:
        return dataclasses.replace(model, info=dataclasses.replace(model.info, **changes))

    with pytest.raises(ConfigError, match=r"^llama reads no text, so it has no vocabulary to trim$"):
        check_trimmable(with_info(tokenizer={}))
    with pytest.raises(ConfigError, match=r"has two vocabularies, of source and of target: one can be trimmed$"):
        check_trimmable(with_info(config={**model.info.config, "decoder_vocab_size": 5}))
    with pytest.raises(ConfigError, match=r"has no embedding of the 385 rows that its config\.json promises$"):
        check_trimmable(with_info(config={**model.info.config, "vocab_size": 385}))


def test_a_table_of_positions_of_the_same_height_stays() -> None:
    tokenizer = TOKENIZERS["WordPiece"]()
    model = model_of(tokenizer)
    rows = tokenizer.get_vocab_size()
    position = stored("embeddings.position_embeddings.weight", np.zeros((rows, 3), np.float32))
    bias = stored("model.layers.0.mlp.up_proj.bias", np.zeros(rows, np.float32))
    held = {weight.name: weight for weight in [*model.weights.values(), position, bias]}
    names = (*model.info.embeddings, position.name)
    model = TorchModel(info=dataclasses.replace(model.info, embeddings=names), weights=WeightStore(held))
    smaller, kept = trim(model, ["The river"])
    shapes = {name: smaller.weights[name].shape[0] for name in smaller.weights}
    assert len(kept.old_ids) < rows
    assert shapes == {EMBEDDING: len(kept.old_ids), HEAD: len(kept.old_ids), position.name: rows, bias.name: rows}


def test_the_packaged_tokenizers() -> None:
    """SmolLM2 and MiniLM on a text of many kinds: the same tokens, and every id one that has its row."""
    text = (Path(__file__).parents[2] / "calibration" / "prose-eval.txt").read_text(encoding="utf-8")
    for name in ("smollm2-135m", "minilm-l6-v2"):
        model = open_model(name)
        smaller, kept = trim(model, [text, *text.splitlines()])
        old, new = tokenizer_of(model), tokenizer_of(smaller)
        assert isinstance(new, Tokenizer)
        assert new.get_vocab_size() == len(kept.old_ids) < 3500
        for line in (text, *text.splitlines()):
            assert new.encode(line).tokens == old.encode(line).tokens
            assert kept.old_ids[new.encode(line).ids].tolist() == old.encode(line).ids
