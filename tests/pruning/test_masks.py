"""Masks on models: they hold through recovery and quantization, and what can't be divided is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe.artifacts import TorchModel
from edgepipe.errors import ConfigError
from edgepipe.pruning.families import anatomy_of
from edgepipe.pruning.masks import matrices_of
from edgepipe.sources import open_model
from edgepipe.stages.prune import Prune
from edgepipe.stages.quantize import Quantize
from tests.decoders import context, opened
from tests.encoders import save_encoder

WORDS = [f"The river carried {i} boards down to mill {i % 7}." for i in range(40)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    return open_model(str(save_encoder(tmp_path_factory.mktemp("masked") / "bert", "bert")))


def zeros_of(model: TorchModel) -> dict[str, np.ndarray]:
    """Return where the matrices of a model's blocks are zero."""
    return {name: model.weights.float32(name) == 0 for name in matrices_of(model, anatomy_of(model))}


@pytest.mark.parametrize("mask", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_masks_hold_through_recovery_and_quantization(mask: str, method: str, bert: TorchModel, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(WORDS), encoding="utf-8")
    notes: list[str] = []
    teach = {"recover_steps": 3, "data": str(texts), "batch": 8, "precision": "no"} if method == "rtn" else {}
    stage = Prune(ratio=0.25, pattern="2:4", mask=mask, samples=8, tokens=16, **teach)
    model = stage(bert, context(tmp_path, notes))
    zeros = zeros_of(model)
    for name, where in zeros.items():
        assert (where.reshape(-1, 4).sum(1) >= 2).all(), name
        assert where.mean() < 0.55
    assert any("50.0% of the weights of 12 matrices are zero (2:4" in note for note in notes)
    assert any(note.startswith("zeros buy no speed on the target test: its kernels multiply them") for note in notes)
    options: dict[str, Any] = {} if method == "rtn" else {"samples": 8, "tokens": 16}
    rounded = Quantize(bits=4, method=method, **options)(model, context(tmp_path))
    for name, where in zeros.items():
        assert (rounded.weights.float32(name)[where] == 0).all(), name


@pytest.mark.parametrize(
    "options",
    [{"bits": 4, "activations": "dynamic", "activation_bits": 4}, {"bits": 1.58, "ternary": "mean"}],
    ids=["4 bits", "ternary"],
)
@pytest.mark.parametrize("scratch", [False, True])
def test_masks_hold_while_layers_are_trained_on_their_grid(
    options: dict[str, Any], scratch: bool, bert: TorchModel, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(WORDS), encoding="utf-8")
    model = Prune(ratio=0.0, pattern="2:4", mask="magnitude")(bert, context(tmp_path))
    train: dict[str, Any] = {"steps": 3, "data": str(texts), "batch": 8, "learning_rate": 1e-2, "precision": "no"}
    rounded = Quantize(**options, **train, scratch=scratch)(model, context(tmp_path))
    moved = 0
    for name, where in zeros_of(model).items():
        value = rounded.weights.float32(name)
        assert (value[where] == 0).all(), name
        moved += int((np.sign(value) != np.sign(model.weights.float32(name))).sum())
    assert moved, "nothing was trained"


def test_the_median_of_weights_that_are_half_zero_is_no_scale(bert: TorchModel, tmp_path: Path) -> None:
    import dataclasses

    from edgepipe.artifacts import StageRecord

    masked = Prune(ratio=0.0, pattern="2:4", mask="magnitude")
    model = masked(bert, context(tmp_path))
    record = StageRecord(stage="prune", options=dataclasses.asdict(masked), key="")
    stage = Quantize(bits=1.58, steps=3, data="unread.txt")
    with pytest.raises(ConfigError, match=r"half of the weights are zero or more \(2:4\).* set quantize.ternary=mean"):
        stage.check(dataclasses.replace(model, history=(record,)))


def test_a_share_without_a_pattern_and_nothing_cut(bert: TorchModel, tmp_path: Path) -> None:
    model = Prune(ratio=0.0, sparsity=0.6, mask="magnitude")(bert, context(tmp_path))
    assert model.info.config["intermediate_size"] == 96
    for name, where in zeros_of(model).items():
        assert where.mean() == pytest.approx(0.6, abs=0.01), name


def test_masks_after_quantize_stay_on_the_grid(bert: TorchModel, tmp_path: Path) -> None:
    import dataclasses

    from edgepipe.artifacts import StageRecord

    model = Quantize(bits=4)(bert, context(tmp_path))
    model = dataclasses.replace(model, history=(StageRecord(stage="quantize", options={}, key=""),))
    masked = Prune(ratio=0.0, pattern="2:4", samples=8, tokens=16)(model, context(tmp_path))
    for name, where in zeros_of(masked).items():
        assert (masked.weights[name].dtype, masked.weights[name].nbytes) == ("q4", model.weights[name].nbytes)
        assert (where.reshape(-1, 4).sum(1) >= 2).all(), name


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"pattern": "4:2"}, "prune.pattern: expected N:M"),
        ({"pattern": "half"}, "prune.pattern: expected N:M, .* got 'half'"),
        ({"pattern": "2:4", "sparsity": 0.5}, "give one of them"),
        ({"sparsity": 1.0}, "prune.sparsity: expected a share from 0 to below 1"),
        ({"mask": "random"}, "prune.mask: expected one of magnitude, wanda, sparsegpt"),
        ({"mask": "sparsegpt"}, "prune.mask is for zeros"),
    ],
)
def test_masks_that_cannot_be(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Prune(**options)


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        (
            "llama grouped",
            {"pattern": "4:8", "ratio": 0.25},
            "8 divides, but 75 columns .*: the nearest possible is prune.ffn=72, or",
        ),
        ("llama grouped", {"pattern": "4:8", "ffn": 99}, "99 columns .* the nearest possible is prune.ffn=96"),
        ("llama grouped", {"pattern": "3:7", "ffn": 98}, "96 columns .* prune.hidden counts: .* prune.hidden=91"),
        ("llama grouped", {"pattern": "5:64", "ffn": 64, "hidden": 64}, "96 columns .* prune.kv_heads counts: take"),
        ("llama grouped", {"sparsity": 0.999, "ratio": 0.0}, "0.999 .* nothing of rows of 96 columns: .* is 0.994"),
        ("llama grouped", {"sparsity": 0.99, "ffn": 40}, "0.99 .* nothing of rows of 40 columns: .* possible is 0.987"),
    ],
)
def test_a_width_that_a_pattern_does_not_divide(
    kind: str, options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Prune(**options).check(opened(tmp_path, kind))
