"""The methods on tiny models of every kind: every matrix on its grid, less lost than by rounding, the model kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgepipe.artifacts import QuantizedTensor, TorchModel
from edgepipe.errors import ConfigError, StageError, TargetError
from edgepipe.numerics.grids import Grid, dequantize, quantized_nbytes, round_to_nearest
from edgepipe.quantizers import awq
from edgepipe.quantizers.choose import Found, choose_codes
from edgepipe.quantizers.layers import blocks_of, calls_of, first_tensor, inputs_of, kept_rows
from edgepipe.quantizers.modules import module_of, run_batch
from edgepipe.quantizers.texts import Batch, Calibration, batches
from edgepipe.sources import open_model
from edgepipe.weights import WeightStore, held_weight
from tests.decoders import opened
from tests.families import save_family
from tests.reference import decode_naively
from tests.students.test_models import PAIR, PLAIN
from tests.students.tiny import save_tiny_student

FEW = Calibration(samples=16, tokens=32)
PACKAGES = {"hqq": "neural_compressor", "autoround": "auto_round"}
METHODS = ("gptq", "awq", "hqq", "autoround")
KINDS = ("bert", "llama grouped", "t5", "pair", "encoder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the tiny models of this file."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let AutoRound learn for a moment only."""
    monkeypatch.setattr("edgepipe.quantizers.autoround.STEPS", 24)


def model_of(folder: Path, kind: str) -> TorchModel:
    """Open a tiny model of a kind; widths are no whole groups."""
    if kind in ("pair", "encoder"):
        path = folder / f"student-{kind}"
        return open_model(str(path if path.exists() else save_tiny_student(path, PAIR if kind == "pair" else PLAIN)))
    if kind.startswith("llama"):
        return opened(folder, kind)
    return open_model(str(save_family(folder / kind, kind)))


def matrices(model: TorchModel) -> list[str]:
    """Return the names of the matrices that are no embeddings."""
    shapes = {name: weight.shape for name, weight in model.weights.items()}
    return [n for n, s in shapes.items() if len(s) == 2 and min(s) > 1 and n not in model.info.embeddings]


def chosen(model: TorchModel, method: str, *, bits: int = 4, symmetric: bool = True, **options: Any) -> Found:
    """Return what a method chooses in groups of 32; skip where its package isn't there."""
    if method in PACKAGES:
        pytest.importorskip(PACKAGES[method], reason=f"needs the extra quantize for {method}")
    grids = {name: Grid(bits=bits, group=32, symmetric=symmetric) for name in matrices(model)}
    return choose_codes(model, grids, method, FEW, seed=0, progress=lambda *_: None, **options)


def output(model: TorchModel, found: dict[str, np.ndarray]) -> np.ndarray:
    """Return what a model with other weights gives for its calibration."""
    weights = model.weights.replace({name: held_weight(name, value) for name, value in found.items()})
    batch, module = batches(model, FEW)[-1], module_of(dataclasses.replace(model, weights=weights))
    values: np.ndarray = kept_rows(first_tensor(run_batch(module, batch)), batch).numpy()
    return values


def rounded(model: TorchModel, bits: int, symmetric: bool = True) -> dict[str, np.ndarray]:
    """Return the values that rounding to nearest gives."""
    return {
        name: dequantize(round_to_nearest(model.weights.float32(name), bits=bits, group=32, symmetric=symmetric))
        for name in matrices(model)
    }


def values_of(found: Found) -> dict[str, np.ndarray]:
    """Return the values that a method chose, vectors among them."""
    return {**{name: dequantize(value) for name, value in found.tensors.items()}, **found.vectors}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_every_linear_layer_lies_on_its_grid(folder: Path, kind: str, method: str, symmetric: bool) -> None:
    model = model_of(folder, kind)
    found = chosen(model, method, symmetric=symmetric)
    linear = {name for block in blocks_of(module_of(model), matrices(model)) for name in block.layers}
    assert set(found.tensors) == linear and linear <= set(matrices(model))
    for name, value in found.tensors.items():
        check_grid(model, name, value, method, symmetric)
    (note,) = found.notes
    assert note.startswith(f"{method}: {len(linear)} matrices in ") and " tokens" in note


def check_grid(model: TorchModel, name: str, value: QuantizedTensor, method: str, symmetric: bool) -> None:
    """Hold that a tensor has the form that the rest of the river takes, and the bytes of its grid."""
    shape = model.weights[name].shape
    assert (value.shape, value.bits, value.group, value.source_grid) == (shape, 4, 32, method)
    assert value.scale.dtype == np.float16 and value.minima is None
    assert (value.zero_points is None) == symmetric
    assert value.nbytes == quantized_nbytes((shape[0], shape[1]), bits=4, group=32, offset_bytes=0 if symmetric else 1)
    np.testing.assert_array_equal(dequantize(value), decode_naively(value))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["bert", "pair"])
def test_autoround_on_its_grid(folder: Path, kind: str, symmetric: bool) -> None:
    """Encoders and students, which the library's own driver refuses or leaves alone."""
    model = model_of(folder, kind)
    found = chosen(model, "autoround", symmetric=symmetric)
    learned = 0
    for name, value in found.tensors.items():
        check_grid(model, name, value, "autoround", symmetric)
        plain = round_to_nearest(model.weights.float32(name), bits=4, group=32, symmetric=symmetric)
        assert np.abs(dequantize(value)).max() <= 1.1 * np.abs(model.weights.float32(name)).max()  # ranges only shrink
        learned += int(np.count_nonzero(dequantize(value) != dequantize(plain)))
    assert learned  # a block that ends worse than it began stays as it was


def test_hqq_on_its_grid(folder: Path) -> None:
    model = model_of(folder, "bert")
    found = chosen(model, "hqq", symmetric=False)
    assert set(found.tensors) == set(matrices(model))
    for name, value in found.tensors.items():
        check_grid(model, name, value, "hqq", symmetric=False)
        error = np.abs(dequantize(value) - model.weights.float32(name))
        assert error.mean() < 0.4 * value.scale.astype(np.float32).mean()  # a quarter of a step, and what is cut


@pytest.mark.parametrize("method", ["gptq", "awq", "autoround"])
@pytest.mark.parametrize("kind", ["bert", "llama grouped"])
def test_the_model_loses_less_than_by_rounding(folder: Path, kind: str, method: str) -> None:
    """Its output on what it was calibrated with, at 2 bits."""
    model = model_of(folder, kind)
    whole = output(model, {})
    before = np.square(output(model, rounded(model, 2)) - whole).mean()
    after = np.square(output(model, values_of(chosen(model, method, bits=2))) - whole).mean()
    assert after < before


@pytest.mark.parametrize("kind", ["bert", "llama grouped", "t5", "pair"])
def test_scales_change_nothing_but_the_rounding(folder: Path, kind: str) -> None:
    """Without rounding, a model with AWQ's scales gives what it gave: what multiplies one side divides the other."""
    model = model_of(folder, kind)
    module = module_of(model)
    found = batches(model, FEW, module=module)
    before = [first_tensor(run_batch(module, batch)) for batch in found]
    pairs = 0
    for block in blocks_of(module, matrices(model)):
        for names, absorber in awq._pairs(block, calls_of(module, block, found[:1])[0]):
            scales = torch.rand(block.layers[names[0]].in_features) + 0.5
            awq._divide(absorber, scales)
            for name in names:
                block.layers[name].weight.data.mul_(scales)
            pairs += 1
    assert pairs >= 2
    for was, batch in zip(before, found, strict=True):
        torch.testing.assert_close(first_tensor(run_batch(module, batch)), was, rtol=1e-3, atol=1e-4)


def test_berts_norms_take_no_scales(folder: Path) -> None:
    """Their results are also added to what attention gives, so they can't be divided; biases of values can."""
    found = chosen(model_of(folder, "bert"), "awq")
    assert found.vectors and all(name.endswith("value.bias") for name in found.vectors)


def test_llamas_norms_do(folder: Path) -> None:
    """Before the projections of attention and of the MLP, in both layers."""
    found = chosen(model_of(folder, "llama grouped"), "awq")
    assert sorted(name.split(".", 3)[3] for name in found.vectors) == sorted(
        ["input_layernorm.weight", "post_attention_layernorm.weight"] * 2
    )


def test_the_same_seed_gives_the_same_codes(folder: Path) -> None:
    for method in ("gptq", "awq"):
        first, second = (chosen(model_of(folder, "bert"), method).tensors for _ in range(2))
        assert all(np.array_equal(first[name].codes, second[name].codes) for name in first)


def test_what_no_linear_layer_is_is_left_out(folder: Path) -> None:
    """GPT-2 keeps its matrices transposed, in modules of its own."""
    model = model_of(folder, "gpt2")
    with pytest.raises(ConfigError, match=r"quantize\.method=gptq: gpt2 has no linear layer to work on: take rtn"):
        chosen(model, "gptq")


@pytest.mark.parametrize(
    ("value", "said"),
    [(np.nan, " has values that are not finite$"), (-1e6, "'s values reach 1e\\+06, and 4-bit codes")],
)
def test_weights_that_no_grid_holds_are_named(folder: Path, value: float, said: str) -> None:
    model = model_of(folder, "bert")
    name = matrices(model)[3]
    changed = model.weights.float32(name).copy()
    changed[1, 2] = value
    broken = dataclasses.replace(model, weights=model.weights.replace({name: held_weight(name, changed)}))
    with pytest.raises(StageError, match=rf"^{name} cannot be quantized: the weight ?{said}"):
        chosen(broken, "gptq")


@pytest.mark.parametrize(("method", "module"), PACKAGES.items())
def test_a_missing_package_names_the_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch, method: str, module: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    model = model_of(folder, "bert")
    with pytest.raises(TargetError, match=rf"quantize\.method={method} needs the package .*edgepipe\[quantize\]"):
        choose_codes(model, {}, method, FEW, seed=0, progress=lambda *_: None)


def test_inputs_leave_padding_out(folder: Path) -> None:
    """The gram matrix of a padded batch is that of its rows one by one."""
    model = model_of(folder, "bert")
    module = module_of(model)
    block = blocks_of(module, matrices(model))[0]
    padded = next(batch for batch in batches(model, Calibration(rows=4)) if batch.attention_mask.min() == 0)
    rows = [
        Batch(input_ids=padded.input_ids[i : i + 1, :n], attention_mask=padded.attention_mask[i : i + 1, :n])
        for i, n in enumerate(padded.attention_mask.sum(1))
    ]
    together, alone = inputs_of(module, block, [padded]), inputs_of(module, block, rows)
    for name in block.layers:
        torch.testing.assert_close(together[name].gram, alone[name].gram, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(together[name].magnitude, alone[name].magnitude, rtol=1e-3, atol=1e-4)


def test_the_store_is_untouched(folder: Path) -> None:
    model = model_of(folder, "llama grouped")
    before = {name: model.weights.float32(name).copy() for name in model.weights}
    chosen(model, "awq")
    assert isinstance(model.weights, WeightStore)
    for name, value in before.items():
        np.testing.assert_array_equal(model.weights.float32(name), value)
