"""What a task's graphs are given: pooling against its naive twin, limits of length, what can't be fed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgepipe.artifacts import ModelInfo
from edgepipe.errors import ConfigError
from edgepipe.graph.framework import build_module, check_model, flatten, nest
from edgepipe.graph.modules import one_graph
from edgepipe.graph.parts import plan_parts, seeded_feeds
from edgepipe.sources import open_model
from tests.families import tiny_family
from tests.reference import pooled


def info_of(name: str, family_dir: Callable[[str], Path], **changes: Any) -> ModelInfo:
    """Open a tiny family and return its facts, with some of the config's others."""
    info = open_model(str(family_dir(name))).info
    return dataclasses.replace(info, config={**info.config, **changes})


def plan(info: ModelInfo, **asked: Any) -> dict[str, Any]:
    """Return the spec that a model is planned with."""
    given: dict[str, Any] = {"context": 0, "pooling": "", "normalize": None, **asked}
    return plan_parts(info, build_module(info), **given).spec


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max"])
def test_pooling_is_that_of_its_naive_twin(pooling: str, normalize: bool) -> None:
    """Over ragged rows, whose padding has the largest values of all."""
    import torch

    hidden = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    hidden[mask == 0] = 1e3
    module = one_graph(
        lambda **_: SimpleNamespace(last_hidden_state=hidden), ("last_hidden_state",), pooling, normalize
    )
    found = module(input_ids=mask, attention_mask=mask)
    assert list(found) == ["embedding", "last_hidden_state"]
    expected = pooled(hidden.numpy(), mask.numpy(), pooling, normalize=normalize)
    np.testing.assert_allclose(found["embedding"].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "context"),
    [("bert", 160), ("roberta", 158), ("gpt2", 160), ("bloom", 2048), ("t5", 512), ("bart", 160), ("xlnet", 512)],
)
def test_the_context_is_the_positions_a_model_has(name: str, context: int, family_dir: Callable[[str], Path]) -> None:
    """RoBERTa's positions begin behind the padding id; ALiBi and relative buckets end nowhere."""
    assert plan(info_of(name, family_dir))["context"] == context


def test_a_context_beyond_the_positions_is_refused(family_dir: Callable[[str], Path]) -> None:
    """The table of positions would be read beyond its end."""
    info = info_of("roberta", family_dir)
    assert plan(info, context=158)["context"] == 158
    with pytest.raises(ConfigError, match="--context 159 is more than the 158 positions"):
        plan(info, context=159)


def test_what_the_files_say_of_pooling_gives_way_to_options(family_dir: Callable[[str], Path]) -> None:
    """sentence-transformers' settings, then export.pooling and export.normalize."""
    info = info_of("bert", family_dir)
    info = dataclasses.replace(info, sentence={"pooling": "cls", "normalize": False, "max_tokens": 24})
    assert {"pooling": "cls", "normalize": False, "context": 24}.items() <= plan(info).items()
    asked = plan(info, pooling="max", normalize=True, context=32)
    assert {"pooling": "max", "normalize": True, "context": 32}.items() <= asked.items()


def test_labels_stand_in_the_order_of_the_logits(family_dir: Callable[[str], Path]) -> None:
    """Keys of id2label are texts in the file: 10 must not come before 2."""
    labels = {str(i): f"class {i}" for i in range(12)}
    info = info_of("bert as classifier", family_dir, id2label=labels, label2id={v: int(k) for k, v in labels.items()})
    assert plan(info)["labels"] == [f"class {i}" for i in range(12)]


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("t5", {"decoder_start_token_id": None}, "no decoder_start_token_id, which every answer begins with"),
        ("mamba", {}, "isn't keys and values of every layer"),
        ("vit", {"image_size": "large"}, "should have an image_size, but has 'large'|config.json was refused"),
        ("resnet", {}, "should have an image_size, but has None"),
    ],
)
def test_what_cannot_be_fed_is_refused(
    name: str, changes: dict[str, Any], sentence: str, family_dir: Callable[[str], Path]
) -> None:
    """One sentence, before anything is traced."""
    with pytest.raises(ConfigError, match=sentence):
        plan(info_of(name, family_dir, **changes))


def test_a_task_that_transformers_has_no_class_for_is_refused(family_dir: Callable[[str], Path]) -> None:
    """Before the weights are read."""
    info = dataclasses.replace(info_of("vit", family_dir), task="text2text-generation")
    with pytest.raises(ConfigError, match="has no class for text2text-generation of model_type 'vit'"):
        check_model(info)


def test_an_answer_begins_with_a_forced_language(family_dir: Callable[[str], Path]) -> None:
    """NLLB and mBART: the code of the language is forced behind the start."""
    assert plan(info_of("bart", family_dir))["decoder_prefix_ids"] == [2]
    assert plan(info_of("bart", family_dir, forced_bos_token_id=7))["decoder_prefix_ids"] == [2, 7]


def test_nesting_undoes_flattening() -> None:
    """Pairs per layer ↔ past_key.0, past_value.0, …; ten layers and more stay in order."""
    import torch

    pairs = [(torch.full((1,), i), torch.full((1,), -i)) for i in range(12)]
    flat = flatten({"input_ids": torch.ones(1), "past": pairs})
    assert list(flat)[:3] == ["input_ids", "past_key.0", "past_value.0"]
    nested = nest({name: tensor.numpy() for name, tensor in flat.items()})
    assert [(int(key), int(value)) for key, value in nested["past"]] == [(i, -i) for i in range(12)]


def test_seeded_inputs_have_padding_and_other_sizes() -> None:
    """What is compared with torch must not be what was traced."""
    text = {"dtype": "int64", "shape": ["batch", "sequence"]}
    pixels = {"dtype": "float32", "shape": ["batch", 3]}
    feeds = seeded_feeds({"input_ids": text, "attention_mask": text, "pixel_values": pixels}, 10, 0)
    assert feeds["input_ids"].shape == (3, 13) and feeds["input_ids"].max() < 10
    assert feeds["attention_mask"].sum(1).tolist() == [13, 9, 5]
    assert feeds["pixel_values"].dtype == np.float32


def test_a_tiny_family_is_the_same_every_time() -> None:
    """Two makings of a tiny model are the same."""
    one, other = tiny_family("bert"), tiny_family("bert")
    assert all((a == b).all() for a, b in zip(one.parameters(), other.parameters(), strict=True))
