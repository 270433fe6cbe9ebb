"""SmoothQuant's statistics: seen where tokens are, shared by matrices that read one value, lossless before rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgepipe.artifacts import TorchModel
from edgepipe.errors import StageError
from edgepipe.numerics.smoothing import column_scales, smoothed
from edgepipe.quantizers.modules import module_of, run_batch
from edgepipe.quantizers.smoothquant import smoothing_scales
from edgepipe.quantizers.texts import Batch
from edgepipe.sources import open_model
from tests.encoders import save_encoder

LAYER = "encoder.layer.0."
QKV = [f"{LAYER}attention.self.{name}.weight" for name in ("query", "key", "value")]
UP, DOWN = f"{LAYER}intermediate.dense.weight", f"{LAYER}output.dense.weight"
ALPHA = 0.6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    """A BERT of two layers, 64 wide."""
    return open_model(str(save_encoder(tmp_path_factory.mktemp("smooth") / "bert", "bert")))


def batch(padding: int = 0) -> Batch:
    """Return two rows of 9 ids, with padding on the right."""
    ids = np.random.default_rng(0).integers(3, 384, (2, 9))
    fill = [(0, 0), (0, padding)]
    return Batch(input_ids=np.pad(ids, fill), attention_mask=np.pad(np.ones_like(ids), fill))


def test_scales_are_those_of_what_was_read(model: TorchModel) -> None:
    """The embeddings' states are what queries, keys and values read together; padding changes nothing."""
    module = module_of(model)
    with torch.inference_mode():
        states = module.embeddings(input_ids=torch.from_numpy(batch().input_ids)).numpy()
    expected = column_scales(np.abs(states).max(axis=(0, 1)), [model.weights.float32(n) for n in QKV], ALPHA)
    for padding in (0, 5):
        found = smoothing_scales(module, model.weights, [*QKV, UP, DOWN], [batch(padding)], ALPHA)
        assert list(found) == [*sorted(QKV), UP, DOWN]
        for name in QKV:
            np.testing.assert_allclose(found[name], expected, rtol=2e-3)
        assert found[UP].shape == (64,) and found[DOWN].shape == (96,)
    assert not module.encoder.layer[0].intermediate.dense._forward_pre_hooks


def test_smoothing_a_model_is_lossless_in_float(model: TorchModel) -> None:
    """With x scaled and W divided, every output stays what it was, to float32 rounding."""
    module, names = module_of(model), [*QKV, UP, DOWN]
    before = run_batch(module, batch()).last_hidden_state.numpy()
    scales = smoothing_scales(module, model.weights, names, [batch()], ALPHA)
    assert all(np.ptp(scale.astype(np.float32)) > 0.01 for scale in scales.values())
    for name in names:
        linear, scale = module.get_submodule(name.removesuffix(".weight")), scales[name]
        linear.weight.data = torch.from_numpy(smoothed(model.weights.float32(name), scale))
        factor = torch.from_numpy(scale.astype(np.float32))
        linear.register_forward_pre_hook(lambda _module, given, factor=factor: (given[0] * factor,))
    after = run_batch(module, batch()).last_hidden_state.numpy()
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


def test_values_that_are_not_finite(model: TorchModel) -> None:
    module = module_of(model)
    module.embeddings.LayerNorm.bias.data[3] = float("inf")
    with pytest.raises(StageError, match="isn't finite: it can't be smoothed"):
        smoothing_scales(module, model.weights, QKV, [batch()], ALPHA)
