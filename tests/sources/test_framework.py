"""Models outside the Llama family: names and values as transformers reads them, and what it refuses in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from edgepipe.errors import ConfigError
from edgepipe.sources import open_model
from edgepipe.sources.framework import read_sentence_settings
from tests.families import save_text_tokenizer, tiny_family


def test_names_and_values_are_the_module_s(family_dir: Callable[[str], Path]) -> None:
    """Every parameter under its own name, as stored."""
    model = open_model(str(family_dir("bert")))
    module = tiny_family("bert")
    expected = dict(module.named_parameters())
    assert set(model.weights) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(model.weights.load(name), value.detach().numpy())
    assert model.info.task == "feature-extraction"
    assert set(model.info.embeddings) == {n for n in expected if n.startswith("embeddings.") and "Norm" not in n}


def test_tied_weights_are_one_entry(family_dir: Callable[[str], Path]) -> None:
    """T5's shared embedding serves encoder, decoder and head."""
    weights = open_model(str(family_dir("t5"))).weights
    assert {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"} <= set(weights.aliases)
    assert {weights.aliases[name] for name in weights.aliases} == {"shared.weight"}
    assert weights["lm_head.weight"].name == "shared.weight"


def test_buffers_that_were_trained_are_weights(family_dir: Callable[[str], Path]) -> None:
    """The mean and variance of a batch norm are no parameters, but in no config either."""
    weights = open_model(str(family_dir("mobilenet_v2"))).weights
    assert any(name.endswith("running_mean") for name in weights)
    assert not any(name.endswith("num_batches_tracked") for name in weights)


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    """Half the bytes, the same bits."""
    import torch

    module = tiny_family("bert").to(torch.bfloat16)
    module.save_pretrained(tmp_path / "half")
    save_text_tokenizer(tmp_path / "half", 384)
    weights = open_model(str(tmp_path / "half")).weights
    name = "encoder.layer.0.attention.self.query.weight"
    value = weights.load(name)
    assert isinstance(value, np.ndarray) and value.dtype == ml_dtypes.bfloat16
    assert weights[name].nbytes == 2 * weights[name].size
    np.testing.assert_array_equal(value.astype(np.float32), module.state_dict()[name].float().numpy())


@pytest.mark.parametrize("task", ["text-classification", "fill-mask", "question-answering"])
def test_a_missing_head_is_refused(task: str, family_dir: Callable[[str], Path]) -> None:
    """A body has none, and a random one must not ship."""
    with pytest.raises(ConfigError, match=f"which {task} needs .bert.: the checkpoint was saved for another task"):
        open_model(str(family_dir("bert")), task)


def test_a_head_that_the_task_does_not_need_is_left_out(family_dir: Callable[[str], Path]) -> None:
    """A classifier's body embeds, under the body's own names."""
    model = open_model(str(family_dir("bert as classifier")), "feature-extraction")
    assert "encoder.layer.0.attention.self.query.weight" in model.weights
    assert not any("classifier" in name for name in model.weights)


def test_a_task_that_a_family_has_no_class_for_is_refused(family_dir: Callable[[str], Path]) -> None:
    """In one line, however long transformers' list is."""
    with pytest.raises(ConfigError, match="can't be opened for text2text-generation by transformers") as caught:
        open_model(str(family_dir("vit")), "text2text-generation")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_model_of_pictures_has_no_tokenizer(family_dir: Callable[[str], Path]) -> None:
    """Its preprocessor's settings travel instead."""
    info = open_model(str(family_dir("vit"))).info
    assert info.tokenizer == {} and json.loads(info.preprocessor or "")["do_normalize"] is True


def test_sound_is_not_text(family_dir: Callable[[str], Path]) -> None:
    """A Wav2Vec2ForSequenceClassification judges sound."""
    assert open_model(str(family_dir("wav2vec2 as classifier"))).info.task == "audio-classification"


def sentence_encoder(path: Path, pooling: dict[str, Any] | None, **files: Any) -> Path:
    """Write the settings of a sentence-transformers directory."""
    kinds = ["Transformer", *(["Pooling"] if pooling is not None else []), *files.pop("modules", [])]
    folders = {"Transformer": "", "Pooling": "1_Pooling"}
    path.mkdir()
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": folders.get(kind, f"{i}_{kind}"),
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    if pooling is not None:
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return path


MEAN = {"word_embedding_dimension": 48, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}


@pytest.mark.parametrize(
    ("mode", "pooling"),
    [("mean_tokens", "mean"), ("cls_token", "cls"), ("max_tokens", "max"), ("lasttoken", "last")],
)
def test_the_pooling_is_read(mode: str, pooling: str, tmp_path: Path) -> None:
    """Of the four that edgepipe builds; without a Normalize module lengths stay."""
    made = sentence_encoder(tmp_path / "st", {f"pooling_mode_{mode}": True, "pooling_mode_other": False})
    assert read_sentence_settings(made) == {"pooling": pooling, "normalize": False, "max_tokens": None}


def test_length_and_normalisation_are_read(tmp_path: Path) -> None:
    """From the list of modules and sentence_bert_config.json."""
    limits = {"max_seq_length": 24, "do_lower_case": False}
    made = sentence_encoder(tmp_path / "st", MEAN, modules=["Normalize"], sentence_bert_config=limits)
    assert read_sentence_settings(made) == {"pooling": "mean", "normalize": True, "max_tokens": 24}


def test_any_other_directory_has_no_settings(tmp_path: Path) -> None:
    """None, not a guess."""
    assert read_sentence_settings(tmp_path) is None


@pytest.mark.parametrize(
    ("pooling", "files", "sentence"),
    [
        ({**MEAN, "pooling_mode_cls_token": True}, {}, "asks for pooling_mode_mean_tokens, pooling_mode_cls_token"),
        ({"pooling_mode_weightedmean_tokens": True}, {}, "edgepipe builds one of mean, cls, max, last"),
        ({"pooling_mode_mean_tokens": False}, {}, "asks for no pooling"),
        (MEAN, {"modules": ["Dense"]}, "has a module sentence_transformers.models.Dense"),
        (MEAN, {"sentence_bert_config": {"do_lower_case": True}}, "asks for small letters before the tokenizer"),
    ],
)
def test_settings_without_a_graph_are_refused(
    pooling: dict[str, Any], files: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    """Embeddings that differ without a word would be worse."""
    with pytest.raises(ConfigError, match=sentence):
        read_sentence_settings(sentence_encoder(tmp_path / "st", pooling, **files))


@pytest.mark.parametrize("content", ["{", "{}", '["x"]', "\ufeff["])
def test_damaged_lists_are_refused(content: str, tmp_path: Path) -> None:
    """modules.json is a list of objects."""
    (tmp_path / "modules.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"modules.json .*take the file from its source again"):
        read_sentence_settings(tmp_path)


def test_settings_decide_the_fingerprint(family_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """Another pooling is another model: nothing of an earlier run may be reused."""
    path = Path(shutil.copytree(family_dir("bert"), tmp_path / "bert"))
    before = open_model(str(path)).info.fingerprint
    made = sentence_encoder(tmp_path / "st", MEAN)
    shutil.copytree(made, path, dirs_exist_ok=True)
    with_mean = open_model(str(path)).info
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}), encoding="utf-8")
    with_cls = open_model(str(path)).info
    assert len({before, with_mean.fingerprint, with_cls.fingerprint}) == 3
    assert with_cls.sentence is not None and with_cls.sentence["pooling"] == "cls"
