"""From a traced graph to the dialect: weights by name, views, folded constants, nothing of the tracing machine."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgepipe.errors import ConfigError, ContractError
from edgepipe.graph.adopt import adopt
from edgepipe.graph.evaluate import evaluate
from edgepipe.weights import WeightStore
from tests.decoders import stored

W = np.random.default_rng(0).standard_normal((4, 6), np.float32)
B = np.random.default_rng(1).standard_normal(4).astype(np.float32)
X = np.random.default_rng(2).standard_normal((2, 6)).astype(np.float32)
NAMES = {"model.fc.weight": "fc.weight", "model.fc.bias": "fc.bias", "model.tied": "tied"}
STORED = {**NAMES, "model.table": "table"}
DIMS = {"features": ["batch", 6]}


def initializer(name: str, value: np.ndarray) -> ir.Value:
    """Return what the exporter writes for a parameter or a buffer; its values mean nothing."""
    made = ir.Value(name=name, const_value=ir.tensor(np.zeros_like(value), name=name))
    made.type, made.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(value.shape)
    return made


def traced(*, extra: int = 0, trans_b: int = 1) -> ir.Model:
    """Return y = Gemm(x, W, b) + tied Wᵀ product + table, as an exporter would write it."""
    x = ir.Value(name="arg0", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["s0", 6]))
    weight, bias = initializer("model.fc.weight", W), initializer("model.fc.bias", B)
    tied, table = initializer("model.tied", W), initializer("model.table", B)
    unused = initializer("model.unused", W)
    constants = [weight, bias, tied, table, unused]
    operand = weight
    nodes = []
    if not trans_b:
        nodes.append(ir.node("Transpose", [weight], {"perm": [1, 0]}, doc_string="/home/somebody/model.py"))
        operand = nodes[0].outputs[0]
    gemm = ir.node("Gemm", [x, operand, bias], {"transB": trans_b})
    turned = ir.node("Transpose", [tied], {"perm": [1, 0]})
    product = ir.node("MatMul", [x, turned.outputs[0]])
    shift = ir.node("Add", [gemm.outputs[0], table])
    total = ir.node("Add", [shift.outputs[0], product.outputs[0]])
    total.metadata_props["pkg.torch.onnx.stack_trace"] = "/home/somebody/model.py, line 3"
    nodes += [gemm, turned, product, shift, total]
    if extra:
        large = ir.Value(name="large", const_value=ir.tensor(np.ones(extra, np.float32), name="large"))
        large.type, large.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([extra])
        constants.append(large)
        nodes.append(ir.node("Slice", [large, *(_number(constants, n) for n in (0, 4, 0))]))
        nodes.append(ir.node("Add", [total.outputs[0], nodes[-1].outputs[0]]))
    y = nodes[-1].outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["s0", 4])
    graph = ir.Graph([x], [y], nodes=nodes, initializers=constants, opset_imports={"": 23}, name="main_graph")
    graph.doc_string = "/home/somebody/model.py"
    return ir.Model(graph, ir_version=10, producer_name="pytorch")


def _number(constants: list[ir.Value], value: int) -> ir.Value:
    made = ir.Value(name=f"int_{value}_{len(constants)}", const_value=ir.tensor(np.array([value], np.int64)))
    made.type, made.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
    constants.append(made)
    return made


def store(**more: np.ndarray) -> WeightStore:
    """Return the weights that belong to `traced`; the tied one is an alias."""
    values = {"fc.weight": W, "fc.bias": B, **more}
    return WeightStore({name: stored(name, value) for name, value in values.items()}, {"tied": "fc.weight"})


@pytest.mark.parametrize("trans_b", [0, 1])
def test_parameters_become_named_weights(trans_b: int) -> None:
    """One view for a tied pair, MatMul and Add instead of Gemm, and the values are the store's."""
    graph = adopt(traced(trans_b=trans_b), "model", store(), NAMES, DIMS)
    proto = onnx.load_model_from_string(graph).graph
    assert {value.name for value in proto.input} == {"features", "weight/fc.weight.T", "weight/fc.bias"}
    assert {node.op_type for node in proto.node} == {"MatMul", "Add"}
    assert [dim.dim_param or dim.dim_value for dim in proto.input[0].type.tensor_type.shape.dim] == ["batch", 6]
    # both products read one weight and one value: computed once
    assert [node.op_type for node in proto.node].count("MatMul") == 1
    (y,) = evaluate(graph, store(), {"features": X}).values()
    np.testing.assert_allclose(y, 2 * X @ W.T + B, rtol=1e-5, atol=1e-5)


def test_a_buffer_that_the_store_lacks_stays_a_constant() -> None:
    """Tables that a model computes from its config are in no file."""
    graph = onnx.load_model_from_string(adopt(traced(), "model", store(), NAMES, DIMS)).graph
    assert "model.table" in {tensor.name for tensor in graph.initializer}


def test_a_buffer_that_the_store_has_is_read_from_there() -> None:
    """The running mean of a batch norm was trained."""
    graph = adopt(traced(), "model", store(table=B), STORED, DIMS)
    assert "weight/table" in {value.name for value in onnx.load_model_from_string(graph).graph.input}
    (y,) = evaluate(graph, store(table=B), {"features": X}).values()
    np.testing.assert_allclose(y, 2 * X @ W.T + 2 * B, rtol=1e-5, atol=1e-5)


def test_a_parameter_that_the_store_lacks_is_refused() -> None:
    """Random values must never ship."""
    with pytest.raises(ConfigError, match=r"have no table, which this task needs: name the task .* --task"):
        adopt(traced(), "model", store(), STORED, DIMS)


def test_large_constants_are_refused() -> None:
    """They would ship as floats, whatever the bits."""
    with pytest.raises(ContractError, match="65 MiB of constants stayed inside the traced graph"):
        adopt(traced(extra=65 << 18), "model", store(), NAMES, DIMS)


def test_another_number_of_inputs_is_refused() -> None:
    """The contract's names would land on the wrong ones."""
    with pytest.raises(ContractError, match="takes 1 inputs, where 2 were given"):
        adopt(traced(), "model", store(), NAMES, {**DIMS, "more": [1]})


def test_nothing_of_the_machine_is_left() -> None:
    """Stack traces hold paths, which would make the bytes another machine's."""
    graph = adopt(traced(trans_b=0), "model", store(), NAMES, DIMS)
    assert b"somebody" not in graph and b"pytorch" not in graph
    assert graph == adopt(traced(trans_b=0), "model", store(), NAMES, DIMS)
