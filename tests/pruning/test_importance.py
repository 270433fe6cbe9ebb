"""Scores against loops over texts, tokens and units."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgepipe.artifacts import TorchModel
from edgepipe.pruning.families import anatomy_of
from edgepipe.pruning.importance import by_activations, by_magnitude, choose_layers, observe
from edgepipe.pruning.sizes import Wanted, sizes_of
from edgepipe.quantizers.modules import module_of
from edgepipe.quantizers.texts import Calibration, batches
from edgepipe.sources import open_model
from tests.decoders import opened
from tests.encoders import save_encoder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    return open_model(str(save_encoder(tmp_path_factory.mktemp("scored") / "bert", "bert")))


def quiet(_what: str, _done: int, _total: int) -> None:
    """Report no progress."""


def test_activations_are_the_energy_that_goes_missing(bert: TorchModel) -> None:
    """Texts run one by one, without padding; what each unit adds is computed and squared."""
    anatomy, module = anatomy_of(bert), module_of(bert)
    texts = batches(bert, Calibration(samples=6, tokens=24, rows=3))
    scores = by_activations(bert.weights, anatomy, [(0, 1)], observe(bert, anatomy, module, texts, quiet))
    given: dict[str, list[np.ndarray]] = {"ffn": [], "heads": [], "before": [], "after": []}
    layer = module.encoder.layer[1]
    layer.output.dense.register_forward_pre_hook(lambda _, x: given["ffn"].append(x[0][0].numpy()))
    layer.attention.output.dense.register_forward_pre_hook(lambda _, x: given["heads"].append(x[0][0].numpy()))
    for batch in texts:
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            with torch.no_grad():
                module(input_ids=torch.from_numpy(ids[mask > 0])[None])
    down = bert.weights.float32("encoder.layer.1.output.dense.weight")
    ffn = np.concatenate(given["ffn"])
    name = "encoder.layer.1.output.dense.weight"
    for j in (0, 7, 95):
        added = [np.sum(np.square(a[j] * down[:, j])) for a in ffn]
        assert scores.ffn[name][j] == pytest.approx(np.mean(added), rel=1e-4)
    output = bert.weights.float32("encoder.layer.1.attention.output.dense.weight")
    for g in range(4):
        added = [np.sum(np.square(output[:, 16 * g : 16 * g + 16] @ a[16 * g : 16 * g + 16])) for a in
                 np.concatenate(given["heads"])]  # fmt: skip
        found = scores.groups["encoder.layer.1.attention.output.dense.weight"][g]
        assert found == pytest.approx(np.mean(added), rel=1e-4)


def test_magnitude_is_what_the_weights_say(tmp_path: Path) -> None:
    model = opened(tmp_path, "qwen2 tied")
    scores = by_magnitude(model.weights, anatomy_of(model), [(1,)])
    p = "model.layers.1."
    gate, up, down = (model.weights.float32(f"{p}mlp.{part}_proj.weight") for part in ("gate", "up", "down"))
    norms = [np.linalg.norm(gate[9]) * np.linalg.norm(up[9]) * np.linalg.norm(down[:, 9])]
    assert scores.ffn[f"{p}mlp.down_proj.weight"][9] == pytest.approx(norms[0])
    q, k, v, o = (model.weights.float32(f"{p}self_attn.{part}_proj.weight") for part in "qkvo")
    whole = np.sum(q[48:] ** 2) + np.sum(k[16:] ** 2) + np.sum(v[16:] ** 2) + np.sum(o[:, 48:] ** 2)
    assert scores.groups[f"{p}self_attn.o_proj.weight"][1] == pytest.approx(whole, rel=1e-5)


def test_the_layer_that_changes_nothing_goes_first(tmp_path: Path) -> None:
    from tests.pruning.zeroed import with_values

    model = opened(tmp_path, "llama")
    names = ("model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight")
    idle = with_values(model, {name: np.zeros(model.weights[name].shape, np.float32) for name in names})
    anatomy = anatomy_of(idle)
    seen = observe(idle, anatomy, module_of(idle), batches(idle, Calibration(samples=2, tokens=16)), quiet)
    assert seen.changes["model.layers.0"] == pytest.approx(0, abs=1e-6)
    sizes = sizes_of(anatomy, Wanted(layers=1), "tiny", idle.info.config)
    assert choose_layers(anatomy, sizes, seen.changes) == ((1,),)
    assert choose_layers(anatomy, sizes, None) == ((0,),)
