"""Export: the graph's facts, the check against torch that ends it, and what is refused before it begins."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe.artifacts import TorchModel
from edgepipe.errors import ConfigError, ContractError
from edgepipe.graph import llama
from edgepipe.graph.evaluate import prompt_logits
from edgepipe.graph.shape import read_shape
from edgepipe.stages.export import Export
from tests.decoders import DECODERS, all_on, context, difference, module_logits, opened, random_ids, saved, stored


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the tiny models of this file."""
    return tmp_path_factory.mktemp("decoders")


@pytest.mark.parametrize("kind", DECODERS)
def test_every_member_passes_the_check(folder: Path, kind: str) -> None:
    notes: list[str] = []
    Export(tolerance=1e-5)(opened(folder, kind), context(folder, notes))
    (note,) = notes
    assert re.fullmatch(r"agrees with torch on 16 tokens to \d\.\de-0\d of the largest logit", note)


def test_the_artifact(folder: Path) -> None:
    """The graph goes over the same store, unread and unchanged; the runtime's facts are in the spec."""
    model = all_on(opened(folder, "qwen3"), "4 bits")
    exported = Export(context=64)(model, context(folder))
    assert exported.weights is model.weights
    assert (exported.info, exported.history) == (model.info, model.history)
    assert list(exported.graphs) == ["decoder"]
    assert exported.spec == {
        "layers": 2,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 32,
        "hidden_size": 96,
        "vocab_size": 384,
        "context": 64,
        "bos_token_id": 0,
        "eos_token_ids": [1],
    }
    ids = random_ids(model)
    expected = module_logits(saved(folder, "qwen3"), model.weights, ids)
    assert difference(prompt_logits(exported, ids), expected) < 1e-5


@pytest.mark.parametrize(("wish", "got"), [(0, 256), (8, 8), (100, 100), (256, 256)])
def test_the_context(folder: Path, wish: int, got: int) -> None:
    """Without a wish it's 2048, or what the model was made for if that's less."""
    exported = Export(context=wish, check_tokens=4)(opened(folder, "llama"), context(folder))
    assert exported.spec["context"] == got


def test_the_context_of_a_long_model() -> None:
    config = {"model_type": "llama", "max_position_embeddings": 8192}
    shape = read_shape(config, None, 2048)
    assert shape.context == 2048


def test_a_context_beyond_the_models_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--context 257 is more than the 256 positions"):
        Export(context=257).check(opened(folder, "llama"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": 7}, "export.context: expected at least 8 tokens, got 7"),
        ({"context": -1}, "export.context"),
        ({"check_tokens": -1}, "export.check_tokens must not be negative"),
        ({"tolerance": 0.0}, "export.tolerance must be positive"),
        ({"tolerance": -1e-3}, "export.tolerance must be positive"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Export(**options)


def wrong_graph(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Let the builder build the graph of a model that differs from the config in some facts."""
    build = llama.build_decoder
    monkeypatch.setattr(
        llama, "build_decoder", lambda shape, config: build(dataclasses.replace(shape, **changes), config)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_eps": 0.1},
        {"attention_scale": 0.26},
        {"ropes": (True, False)},
        {"windows": (None, 3)},
        {"residual_scale": 0.99},
        {"activation": "gelu"},
        {"logits_divisor": 1.01},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_graph_that_computes_something_else_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    wrong_graph(monkeypatch, **changes)
    with pytest.raises(ContractError, match=r"differs from torch by \d\.\de.\d\d of the largest logit; allowed 1e-03"):
        Export()(opened(folder, "llama"), context(folder))


def test_the_tolerance_decides(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One and the same small difference is too large for one tolerance and not for another; 0 tokens don't look."""
    wrong_graph(monkeypatch, logits_divisor=1.01)
    model = opened(folder, "llama")
    with pytest.raises(ContractError, match="allowed 9e-03"):
        Export(tolerance=9e-3)(model, context(folder))
    notes: list[str] = []
    Export(tolerance=1.1e-2)(model, context(folder, notes))
    assert notes == ["agrees with torch on 16 tokens to 9.9e-03 of the largest logit"]
    notes.clear()
    Export(check_tokens=0)(model, context(folder, notes))
    assert notes == []


def test_the_check_has_the_tokens_asked_for(folder: Path) -> None:
    """No more than the context holds."""
    for asked, got in ((3, 3), (50, 20)):
        notes: list[str] = []
        Export(check_tokens=asked, context=20)(opened(folder, "llama"), context(folder, notes))
        assert f"on {got} tokens" in notes[0]


def with_weight(model: TorchModel, name: str, value: np.ndarray) -> TorchModel:
    """Return a model with another value for one weight."""
    return dataclasses.replace(model, weights=model.weights.replace({name: stored(name, value)}))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_logits_that_are_not_numbers_fail(folder: Path) -> None:
    """NaN is no number below a tolerance."""
    broken = with_weight(opened(folder, "llama"), "model.norm.weight", np.full(112, np.nan, np.float32))
    with pytest.raises(ContractError, match="differs from torch by nan"):
        Export()(broken, context(folder))


def test_a_model_that_does_not_fit_its_config_is_refused_before_anything_is_read(folder: Path) -> None:
    model = opened(folder, "llama")
    odd = with_weight(model, "model.norm.weight", np.zeros(111, np.float32))
    for act in (Export().check, lambda model: Export()(model, context(folder))):
        with pytest.raises(ConfigError, match=r"promises model\.norm\.weight \[112\], but the weights hold \[111\]"):
            act(odd)
    assert Export()(model, context(folder)).spec["context"] == 256


def test_progress_names_both_runs(folder: Path) -> None:
    said: list[tuple[str, int, int]] = []
    ctx = dataclasses.replace(context(folder), progress=lambda *what: said.append(what))
    Export(check_tokens=2)(opened(folder, "llama"), ctx)
    assert said == [("torch's logits", 0, 2), ("the graph's logits", 1, 2)]
