"""The embedding that is added to a graph computes what torch's modules compute."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgepipe.errors import StageError
from edgepipe.graph.dialect import OPSET
from edgepipe.graph.evaluate import evaluate
from edgepipe.graph.modules import one_graph
from edgepipe.graph.parts import POOLINGS
from edgepipe.graph.pooling import add_embedding
from edgepipe.weights import WeightStore

MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], np.int64)


def pooled_graph(pooling: str, normalize: bool, *inputs: str) -> bytes:
    """Return a graph that hands `hidden` on as last_hidden_state, pooled."""
    values = {
        "hidden": ir.Value(name="hidden", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", "n", 6])),
        "attention_mask": ir.Value(
            name="attention_mask", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "n"])
        ),
    }
    node = ir.node("Identity", [values["hidden"]])
    (out,) = node.outputs
    out.name, out.type, out.shape = "last_hidden_state", values["hidden"].type, values["hidden"].shape
    graph = ir.Graph(
        inputs=[values[name] for name in inputs], outputs=[out], nodes=[node], opset_imports={"": OPSET}, name="g"
    )
    add_embedding(graph, pooling, normalize=normalize)
    return bytes(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_same_as_torch(pooling: str, normalize: bool) -> None:
    hidden = np.random.default_rng(0).standard_normal((3, 5, 6), dtype=np.float32)

    class Body(torch.nn.Module):
        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return SimpleNamespace(last_hidden_state=input_ids)

    module = one_graph(Body(), ("last_hidden_state",), pooling, normalize)
    expected = module(torch.from_numpy(hidden), torch.from_numpy(MASK))["embedding"].numpy()
    graph = pooled_graph(pooling, normalize, "hidden", "attention_mask")
    got = evaluate(graph, WeightStore({}), {"hidden": hidden, "attention_mask": MASK})
    assert list(got) == ["embedding", "last_hidden_state"]
    np.testing.assert_allclose(got["embedding"], expected, atol=1e-6)


def test_pooling_over_tokens_needs_a_mask() -> None:
    pooled_graph("cls", True, "hidden")
    with pytest.raises(StageError, match="takes no attention_mask, which the pooling 'mean' needs"):
        pooled_graph("mean", True, "hidden")
