"""Token agreement: against free greedy decoding, a planted bad scale and who is blamed for it, the fall-back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edgepipe.artifacts import Json, QuantizedTensor, TorchModel
from edgepipe.errors import ConfigError
from edgepipe.quantizers.agreement import Answered, Held, agreement, answered, blame, hold
from edgepipe.quantizers.modules import module_of, slots_of, swapped
from edgepipe.quantizers.sensitivity import readers
from edgepipe.quantizers.texts import Batch, Calibration, batches
from edgepipe.search.units import grid_of
from edgepipe.sources import open_model
from edgepipe.stages.quantize import Quantize
from edgepipe.target import Budgets
from edgepipe.weights import Weight, WeightStore
from tests.decoders import TARGET, context, stored
from tests.encoders import save_encoder
from tests.families import save_family
from tests.tiny_models import save_tiny_model

PLANTED = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    """A Llama of two layers."""
    return open_model(str(save_tiny_model(tmp_path_factory.mktemp("agreement") / "llama", "llama")))


def texts_of(model: TorchModel) -> tuple[list[Answered], list[Batch]]:
    """Return the float model's answers to a few prompts."""
    found = batches(model, Calibration(samples=6, tokens=24, rows=3))
    return answered(module_of(model), model.info, found), found


def rounded(model: TorchModel, choice: str) -> dict[str, Weight]:
    """Return the layers' matrices on one grid."""
    stage, grid = Quantize(), grid_of(choice, symmetric=True)
    return {
        name: stage.stored(model.weights[name], grid)
        for name in model.weights
        if "layers." in name and "norm" not in name
    }


def planted(model: TorchModel, choice: str, factor: float) -> dict[str, Weight]:
    """Return the same with every scale of one matrix too large by a factor."""
    found = rounded(model, choice)
    value = found[PLANTED].load()
    assert isinstance(value, QuantizedTensor)
    scale = (value.scale.astype(np.float32) * factor).astype(np.float16)
    return {**found, PLANTED: stored(PLANTED, dataclasses.replace(value, scale=scale))}


def held(model: TorchModel, quantized: dict[str, Weight], floor: float, spare: float = np.inf) -> Held:
    """Let the guard work: the next wider grid of 8 bits is 16."""
    texts, found = texts_of(model)
    module, stage = module_of(model), Quantize()
    units = [unit for unit in readers(module, list(quantized), found[0]) if all(name in quantized for name in unit)]

    def widen(name: str, now: Weight) -> Weight | None:
        return stage.stored(model.weights[name], grid_of("16", symmetric=True)) if now.dtype == "q8" else None

    return hold(
        module,
        model.weights,
        quantized,
        units,
        texts,
        floor=floor,
        spare_bytes=spare,
        widen=widen,
        tick=lambda _done, _total: None,
    )


def test_one_run_says_where_two_greedy_texts_part(model: TorchModel) -> None:
    """The quantized model writes by itself, token by token; both texts part where the guard says they do."""
    texts, _ = texts_of(model)
    module = module_of(model)
    with swapped(
        slots_of(module, model.weights), {n: WeightStore({n: w}).float32(n) for n, w in rounded(model, "4/32").items()}
    ):
        found = agreement(module, texts)
        parts: list[int | None] = []
        for text in texts:
            for ids, mask, scored in zip(text.batch.input_ids, text.batch.attention_mask, text.scored, strict=True):
                first = int(scored.argmax())
                own = ids[: first + 1].tolist()
                wanted = ids[first + 1 : mask.sum()].tolist()
                for _ in wanted:
                    own.append(int(module(input_ids=torch.tensor([own])).logits[0, -1].argmax()))
                differ = [i for i, (a, b) in enumerate(zip(own[first + 1 :], wanted, strict=True)) if a != b]
                parts.append(differ[0] if differ else None)
    known = [one for one in found.parts_at if one is not None]
    assert len(known) >= 3, "the test shows little when hardly any text parts"
    assert list(found.parts_at) == parts
    assert 0 < found.share < 1 and found.kl > 0 and len(found.kl_by_token) == 32


def test_a_model_agrees_with_itself(model: TorchModel) -> None:
    texts, _ = texts_of(model)
    found = agreement(module_of(model), texts)
    assert found.share == 1 and set(found.parts_at) == {None} and found.median_parting is None
    assert found.kl == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("factor", [1.5, 3.0])
def test_a_planted_bad_scale_is_caught_and_blamed_on_its_layer(model: TorchModel, factor: float) -> None:
    """Without it, 8 bits hold the floor by themselves; with it, that layer alone falls back."""
    floor = 0.9
    fine = held(model, rounded(model, "8/32"), floor)
    assert fine.before.share >= floor and not fine.raised and not fine.blamed and not fine.weights
    bad = held(model, planted(model, "8/32", factor), floor)
    assert bad.before.share < floor <= bad.after.share
    assert [one.unit for one in bad.raised] == [(PLANTED,)] == [bad.blamed[0].unit]
    assert bad.blamed[0].kl < 0.2 * bad.before.kl and bad.blamed[1].kl > 0.8 * bad.before.kl
    assert list(bad.weights) == [PLANTED] and bad.weights[PLANTED].dtype == "float16"


def test_blame_is_the_model_with_one_unit_in_float(model: TorchModel) -> None:
    texts, _ = texts_of(model)
    quantized = planted(model, "8/32", 3.0)
    values = {name: WeightStore({name: weight}).float32(name) for name, weight in quantized.items()}
    module = module_of(model)
    slots = slots_of(module, model.weights)
    with swapped(slots, values):
        (found,) = blame(module, slots, model.weights, [(PLANTED,)], texts, lambda _done, _total: None)
    del values[PLANTED]
    with swapped(slots, values):
        assert found.kl == agreement(module, texts).kl


def test_the_bytes_that_are_left_bound_it(model: TorchModel) -> None:
    found = held(model, planted(model, "8/32", 3.0), 0.9, spare=1000)
    assert not found.weights and not found.raised and (PLANTED,) in found.unaffordable
    assert found.after == found.before


def stage_notes(model: TorchModel, ratio: float | None, tmp_path: Path) -> tuple[TorchModel, list[str], Json]:
    """Run the stage with one layer at 2 bits and a floor."""
    notes: list[str] = []
    figures: Json = {}
    target = dataclasses.replace(TARGET, budgets=Budgets(shipped_ratio=ratio))
    ctx = dataclasses.replace(context(tmp_path, notes), target=target, figures=figures.update)
    stage = Quantize(bits=8, overrides=(f"{PLANTED}=2",), agreement=0.9)
    return stage(model, ctx), notes, figures


def test_the_stage_undoes_what_the_floor_forbids(model: TorchModel, tmp_path: Path) -> None:
    """A layer at 2 bits among 8: it alone gets more bits, and the record says why."""
    found, notes, figures = stage_notes(model, None, tmp_path)
    assert found.weights[PLANTED].dtype in ("q4", "q8")
    others = {found.weights[n].dtype for n in found.weights if "proj" in n and n != PLANTED}
    assert others == {"q8"}
    assert any(note.startswith(f"{PLANTED} went from q2 to q4: with it in float, KL is") for note in notes)
    assert figures["agreement"]["before"]["share"] < 0.9 <= figures["agreement"]["after"]["share"]
    assert figures["agreement"]["blamed"][0]["unit"] == (PLANTED,)
    json.dumps(figures)


def test_the_stage_keeps_to_the_size_budget_and_says_so(model: TorchModel, tmp_path: Path) -> None:
    found, notes, _ = stage_notes(model, 0.01, tmp_path)
    assert found.weights[PLANTED].dtype == "q2"
    assert any("does NOT hold" in note and "the size budget leaves no room" in note for note in notes)


def test_an_encoder_decoder_agrees_over_its_answers(tmp_path: Path) -> None:
    model = open_model(str(save_family(tmp_path / "t5", "t5")))
    texts, _ = texts_of(model)
    assert agreement(module_of(model), texts).share == 1
    bad = held(
        model,
        {
            n: Quantize().stored(model.weights[n], grid_of("8/32", symmetric=True))
            for n in model.weights
            if "EncDecAttention" in n
        },
        0.5,
    )
    assert 0.5 <= bad.before.share <= 1


def test_what_is_refused(model: TorchModel, tmp_path: Path) -> None:
    encoder = open_model(str(save_encoder(tmp_path / "bert", "bert")))
    with pytest.raises(ConfigError, match=r"expected a model that writes tokens, but .* is for feature-extraction"):
        Quantize(agreement=0.9).check(encoder)
    with pytest.raises(ConfigError, match="awq scales layers against each other"):
        Quantize(agreement=0.9, method="awq").check(model)
    with pytest.raises(ConfigError, match=r"expected a share from 0 \(off\) to 1, got 1.5"):
        Quantize(agreement=1.5)
