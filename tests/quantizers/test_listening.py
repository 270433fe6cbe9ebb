"""Whether a decoder listens to its encoder: beside a naive figure, on a planted deaf model; what calibration sees."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgepipe.artifacts import TorchModel
from edgepipe.engines import onnxruntime as engine
from edgepipe.engines.onnxruntime.ranges import observe_ranges
from edgepipe.numerics.grids import round_to_nearest
from edgepipe.quantizers.layers import blocks_of, inputs_of
from edgepipe.quantizers.listening import Heard, heard, listening, note_listening
from edgepipe.quantizers.modules import answers, module_of
from edgepipe.quantizers.smoothquant import smoothing_scales
from edgepipe.quantizers.texts import Batch, Calibration, batches
from edgepipe.sources import open_model
from edgepipe.stages.export import Export
from edgepipe.stages.quantize import Quantize
from edgepipe.weights import held_weight
from tests.decoders import context
from tests.reference import softmax_naively
from tests.students.test_models import PAIR
from tests.students.tiny import save_tiny_student

FEW = Calibration(samples=8, tokens=24, rows=4)
CROSS = "decoder.layers.0.cross_attn."
PROJECTIONS = tuple(f"{CROSS}{name}_proj.weight" for name in "qkv")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    """A tiny encoder-decoder whose decoder hangs on its source: what cross-attention gives is the larger part."""
    model = open_model(str(save_tiny_student(tmp_path_factory.mktemp("students") / "pair", PAIR)))
    name = f"{CROSS}o_proj.weight"
    return with_values(model, {name: 12 * model.weights.float32(name)})


def with_values(model: TorchModel, values: dict[str, np.ndarray]) -> TorchModel:
    """Return a model in which some weights have other values."""
    changed = {name: held_weight(name, value) for name, value in values.items()}
    return dataclasses.replace(model, weights=model.weights.replace(changed))


def listens_naively(module: Any, texts: list[Heard]) -> float:
    """Return the mean gain, token by token: each answer alone, each source alone and without its padding."""
    gains = []
    for text in texts:
        own, mask = text.own, text.own.decoder_mask
        assert own.decoder_input_ids is not None and mask is not None
        for row in range(len(own.input_ids)):
            length = int(mask[row].sum())
            target = torch.from_numpy(own.decoder_input_ids[row : row + 1, :length])
            logits = []
            for source in (row, row - 1):
                ids = own.input_ids[source][own.attention_mask[source] > 0][None]
                given = torch.from_numpy(ids), torch.ones(ids.shape, dtype=torch.int64), target
                logits.append(module(*given).logits[0].detach().numpy())
            for step in range(length):
                token = int(logits[0][step].argmax())
                first, second = (np.log(softmax_naively(one[step], 1.0)[token]) for one in logits)
                gains.append(first - second)
    return float(np.mean(gains))


def test_listening_is_the_naive_one(pair: TorchModel) -> None:
    module = module_of(pair)
    texts = heard(module, batches(pair, FEW, module=module))
    assert len(texts) == 2
    found = listening(module, texts)
    assert found > 0.05
    assert found == pytest.approx(listens_naively(module, texts), rel=1e-3)


def test_a_deaf_decoder_gains_nothing(pair: TorchModel) -> None:
    """One that reads the same of any source, and one whose source is noise to the answer."""
    module = module_of(pair)
    texts = heard(module, batches(pair, FEW, module=module))
    before = listening(module, texts)
    with torch.no_grad():
        module.get_parameter(PROJECTIONS[2]).zero_()
    assert abs(listening(module, texts)) < 1e-6 < before


def planted(model: TorchModel) -> TorchModel:
    """Return the same model with one huge column in queries, keys and values, that meets inputs of zero.

    Zeros come from norms whose weight there is 0; a grid with one scale a row has no code left for the others.
    """
    changed = {}
    for norm in ("encoder.norm.weight", "decoder.layers.0.cross_attention_layernorm.weight"):
        changed[norm] = model.weights.float32(norm).copy()
        changed[norm][0] = 0
    for name in PROJECTIONS:
        changed[name] = model.weights.float32(name).copy()
        changed[name][:, 0] = 300
    return with_values(model, changed)


def notes_of(model: TorchModel, bits: int, group: int, directory: Path) -> tuple[list[str], dict[str, Any]]:
    """Return what is noted when cross-attention's projections are on a grid of these bits and group."""
    notes: list[str] = []
    figures: dict[str, Any] = {}
    grids = {
        name: held_weight(name, round_to_nearest(model.weights.float32(name), bits=bits, group=group, symmetric=True))
        for name in PROJECTIONS
    }
    ctx = dataclasses.replace(context(directory, notes), figures=figures.update)
    note_listening(model, model.weights.replace(grids), FEW, ctx)
    return notes, figures["listening"]


def test_a_grid_that_makes_a_decoder_deaf_is_warned_of(pair: TorchModel, tmp_path: Path) -> None:
    notes, figures = notes_of(planted(pair), 4, 128, tmp_path)
    assert len(notes) == 2 and notes[1].startswith("the decoder listens too little to its encoder: ")
    assert figures["after"] < 0.2 * figures["before"]


def test_a_sound_grid_is_not(pair: TorchModel, tmp_path: Path) -> None:
    notes, figures = notes_of(pair, 8, 32, tmp_path)
    assert len(notes) == 1 and notes[0].startswith("the decoder's gain by its source went from ")
    assert figures["after"] > 0.8 * figures["before"] and figures["steps"] > 8


def test_the_stage_says_it_where_texts_are_looked_at(pair: TorchModel, tmp_path: Path) -> None:
    def said(stage: Quantize) -> list[str]:
        notes: list[str] = []
        stage(pair, context(tmp_path, notes))
        return [note for note in notes if "gain by its source" in note]

    assert len(said(Quantize(bits=8, method="gptq", samples=4, tokens=16))) == 1
    assert not said(Quantize(bits=8))


@pytest.fixture
def found(pair: TorchModel) -> list[Batch]:
    return batches(pair, FEW)


def seen_naively(module: Any, found: list[Batch]) -> dict[str, np.ndarray]:
    """Return what queries [n, hidden], keys and values read, computed row by row without padding and step by step."""
    queries, sources = [], []
    block = module.decoder.blocks[0]
    for batch in found:
        assert batch.decoder_input_ids is not None and batch.decoder_mask is not None
        for row in range(len(batch.input_ids)):
            ids = torch.from_numpy(batch.input_ids[row][batch.attention_mask[row] > 0][None])
            mask = torch.ones_like(ids)
            sources.append(module.encode(ids, mask)[0][0])
            state = module.start(ids, mask)
            kept: list[torch.Tensor] = []
            handle = block.cross_attn.q_proj.register_forward_pre_hook(
                lambda _, given, kept=kept: kept.append(given[0])
            )
            for token in batch.decoder_input_ids[row][batch.decoder_mask[row] > 0]:
                module.step(state, torch.tensor([[int(token)]]))
            handle.remove()
            queries += [one[0] for one in kept]
    q, s = (torch.cat(one).detach().numpy().astype(np.float64) for one in (queries, sources))
    return {"q": q, "k": s, "v": s}


def test_methods_see_cross_attention_over_real_steps(pair: TorchModel, found: list[Batch]) -> None:
    """Queries of every step of an answer, keys and values of every token of a source, and no padding of either."""
    module = module_of(pair)
    expected = seen_naively(module, found)
    names = {name: f"{CROSS}{name}_proj.weight" for name in "qkv"}
    modules = {path.removesuffix(".weight"): path for path in names.values()}
    linear = {path for path, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert set(modules) <= linear  # the store's names are the module's
    grams = {}
    for block in blocks_of(module, set(names.values())):
        grams |= inputs_of(module, block, found)
    for name, path in names.items():
        x = expected[name]
        np.testing.assert_allclose(grams[path].gram.numpy(), x.T @ x / len(x), rtol=1e-3, atol=1e-3 * (x * x).mean())
        np.testing.assert_allclose(grams[path].magnitude.numpy(), np.abs(x).mean(0), rtol=1e-3, atol=1e-5)
    scales = smoothing_scales(module, pair.weights, list(names.values()), found, 1.0)
    for name, path in names.items():
        reached = 1 / scales[path].astype(np.float64)  # at α = 1 a channel is divided by its largest value
        np.testing.assert_allclose(reached, np.abs(expected[name]).max(0), rtol=2e-3)


def test_static_ranges_are_those_of_real_steps(pair: TorchModel, tmp_path: Path) -> None:
    """What the lowering's integer products will round: queries of all steps, and every token of a source."""
    quantized = Quantize(bits=8, activations="static", samples=8, tokens=24)(pair, context(tmp_path))
    plan = quantized.activations
    assert plan is not None
    portable = Export(context=64, check_tokens=0)(quantized, context(tmp_path))
    graphs, file = engine.lower(portable, accuracy_level=0, exact=True)
    engine.write(graphs, file, tmp_path, lambda _done, _total: None)
    files = {name: f"{name}.onnx" for name in graphs}
    ranges = observe_ranges(portable, plan, tmp_path, files, "float32", lambda _done, _total: None)
    expected = seen_naively(module_of(quantized), [Batch(**batch) for batch in plan.batches])
    for graph, name in (("decoder", "q"), ("encoder", "k")):
        x = expected[name]
        assert ranges[graph][f"rounded:{CROSS}{name}_proj.weight"] == pytest.approx((x.min(), x.max()), rel=1e-3)


def test_answers_as_long_as_their_sources_are_told_apart(pair: TorchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask is found by the shape of a state: of one shape, a decoder's states would be cut by their source's mask."""
    calibration = Calibration(samples=4, tokens=12, rows=4)

    def as_long(module: Any, batch: Batch, *, start: int, ends: frozenset[int], tokens: int) -> Batch:
        return answers(module, batch, start=start, ends=frozenset(), tokens=batch.input_ids.shape[1])

    monkeypatch.setattr("edgepipe.quantizers.modules.answers", as_long)
    (batch,) = batches(pair, calibration)
    assert batch.decoder_input_ids is not None and batch.decoder_mask is not None
    assert batch.decoder_input_ids.shape == batch.decoder_mask.shape == (4, batch.input_ids.shape[1] + 1)
    assert not batch.decoder_mask[:, -1].any() and batch.decoder_mask[:, :-1].all()
