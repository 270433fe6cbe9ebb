"""Sensitivity against the plain way: a module per choice, filled with a store in which one matrix is rounded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from edgepipe.artifacts import TorchModel
from edgepipe.errors import StageError
from edgepipe.numerics.grids import dequantize, round_to_nearest
from edgepipe.quantizers.modules import module_of, run_batch
from edgepipe.quantizers.outputs import DISTRIBUTIONS, EMBEDDINGS, STATES, distances
from edgepipe.quantizers.sensitivity import Key, Unit, measure, readers
from edgepipe.quantizers.texts import Batch
from edgepipe.search.units import units_of
from edgepipe.sources import open_model
from edgepipe.stages.quantize import Quantize
from tests.decoders import stored
from tests.encoders import save_encoder
from tests.families import FAMILIES, save_family
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sensitivity")


def model_of(folder: Path, kind: str) -> TorchModel:
    """Open a tiny model: a decoder, an encoder of sentences or an encoder-decoder."""
    path = folder / kind
    if not path.exists():
        if kind == "bert":
            save_encoder(path, "bert")
        elif kind == "llama":
            save_tiny_model(path, "llama", tie_word_embeddings=True)
        else:
            save_family(path, kind)
    return open_model(str(path), FAMILIES[kind].task if kind in FAMILIES else None)


def batch_of(model: TorchModel) -> Batch:
    """Return two rows of ids, the second one padded."""
    random = np.random.default_rng(0)
    ids = random.integers(3, 300, (2, 9))
    mask = np.ones_like(ids)
    mask[1, 6:] = 0
    answers = random.integers(3, 300, (2, 4)) if model.info.task == "text2text-generation" else None
    return Batch(
        input_ids=ids,
        attention_mask=mask,
        decoder_input_ids=answers,
        decoder_mask=None if answers is None else np.array([[1, 1, 1, 1], [1, 1, 0, 0]]),
    )


def plainly(model: TorchModel, name: str, bits: int) -> float:
    """Return the loss of one matrix on symmetric groups of 32, with numpy on the outputs of two whole modules."""
    rounded = dequantize(round_to_nearest(model.weights.float32(name), bits=bits, group=32, symmetric=True))
    changed = dataclasses.replace(model, weights=model.weights.replace({name: stored(name, rounded)}))
    batch = batch_of(model)
    ours, theirs = (run_batch(module_of(one), batch) for one in (changed, model))
    if model.info.task == "feature-extraction":
        weight = batch.attention_mask[..., None]
        a, b = ((one.last_hidden_state.double().numpy() * weight).sum(1) / weight.sum(1) for one in (ours, theirs))
        return float(np.mean(1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)))
    mask = batch.attention_mask if batch.decoder_mask is None else batch.decoder_mask
    p, q = (torch.softmax(one.logits.double(), -1).numpy()[mask > 0] for one in (theirs, ours))
    return float(np.mean((p * np.log(p / q)).sum(-1)))


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_a_loss_is_that_of_the_model_with_one_unit_rounded(folder: Path, kind: str) -> None:
    """Every matrix alone at 2 bits, and the store and the module stay what they were."""
    model = model_of(folder, kind)
    module, stage = module_of(model), Quantize()
    units = [unit for unit in units_of(model, stage, module, batch_of(model)) if len(unit.tensors) == 1]
    units = [Unit(name=u.name, choices={c: u.choices[c] for c in ("8/32", "2/32")}) for u in units[:5]]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    heard: dict[Key, float] = {}
    found = measure(
        module,
        model.info,
        model.weights,
        units,
        [batch_of(model)],
        known={},
        keep=heard.__setitem__,
        progress=lambda _what, _done, _total: None,
    )
    assert found == heard and len(found) == 2 * len(units)
    for unit in units:
        if (expected := plainly(model, unit.name, 2)) > 1e-12:
            assert found[unit.name, "2/32"] == pytest.approx(expected, rel=1e-3, abs=1e-9), unit.name
            assert found[unit.name, "8/32"] < found[unit.name, "2/32"], unit.name
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_what_is_known_is_not_measured_again(folder: Path) -> None:
    """A number that no measurement gives comes back as it was; only what lacks is run."""
    model = model_of(folder, "llama")
    units = units_of(model, Quantize(), module_of(model), batch_of(model))[:1]
    known = {(units[0].name, choice): 42.0 for choice in units[0].choices if choice != "4/32"}
    heard: list[Key] = []
    found = measure(
        module_of(model),
        model.info,
        model.weights,
        units,
        [batch_of(model)],
        known=known,
        keep=lambda key, _loss: heard.append(key),
        progress=lambda _what, _done, _total: None,
    )
    assert heard == [(units[0].name, "4/32")]
    assert found.items() >= known.items() and 0 < found[units[0].name, "4/32"] < 42


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]),
        ("bert", [["query", "key", "value"], ["output"], ["intermediate"], ["output"]]),
    ],
)
def test_matrices_that_read_one_tensor_stand_together(folder: Path, kind: str, expected: list[list[str]]) -> None:
    model = model_of(folder, kind)
    found = readers(module_of(model), list(model.weights), batch_of(model))
    linear = [
        [name.removesuffix(".weight").removesuffix(".dense").rpartition(".")[2] for name in group]
        for group in found
        if ("layers." in group[0] or "layer." in group[0]) and group[0].endswith(".weight") and "orm" not in group[0]
    ]
    assert linear == expected * 2
    assert sorted(name for group in found for name in group) == sorted(model.weights)


def test_a_tied_embedding_is_one_unit_with_a_choice_of_its_own(folder: Path) -> None:
    model = model_of(folder, "llama")
    units = units_of(model, Quantize(), module_of(model), batch_of(model))
    (tied,) = [unit for unit in units if "embed_tokens" in unit.name]
    assert tied.tensors == ("model.embed_tokens.weight",)
    assert tied.nbytes("4/32") < tied.nbytes("8/32") < tied.nbytes("16") == 2 * model.weights[tied.name].size


def test_a_model_that_gives_no_numbers_is_refused(folder: Path) -> None:
    model = model_of(folder, "llama")
    units = units_of(model, Quantize(), module_of(model), batch_of(model))[:1]
    module = module_of(model)
    module.model.norm.weight.data[0] = float("nan")
    with pytest.raises(StageError, match="outputs aren't finite"):
        measure(
            module,
            model.info,
            model.weights,
            units,
            [batch_of(model)],
            known={},
            keep=lambda _key, _loss: None,
            progress=lambda _what, _done, _total: None,
        )


def test_distances() -> None:
    """Against the formulas, and a row of NaN is farther than any other."""
    a, b = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[0.0, 1.0, 3.0]])
    p, q = (torch.softmax(x.double(), -1).numpy()[0] for x in (b, a))
    x, y = a.double().numpy()[0], b.double().numpy()[0]
    expected = {
        DISTRIBUTIONS: float((p * np.log(p / q)).sum()),
        EMBEDDINGS: float(1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y)),
        STATES: float(((x - y) ** 2).sum() / (y**2).sum()),
    }
    for kind, value in expected.items():
        assert distances(kind, a, b).item() == pytest.approx(value)
        assert distances(kind, a, a).item() == pytest.approx(0, abs=1e-12)
        assert distances(kind, a * float("nan"), b).item() == 1e9
