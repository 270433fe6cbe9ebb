"""onnxruntime's kernels: they compute what numpy does, a wrong result would be noticed, and none is forgotten."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgepipe.machine import kernels
from edgepipe.machine.children import WORKS, WRONG, try_in_children
from edgepipe.machine.kernel_names import KERNEL_NAMES, NEEDED_AT, needed_kernels
from edgepipe.machine.kernels import KERNELS, Kernel, Pair, check_kernel
from edgepipe.machine.onnx_bytes import BFLOAT16, FLOAT, Node, graph_bytes
from edgepipe.runtime.onnxruntime import run_graph
from tests.students.test_models import PAIRS
from tests.students.tiny import save_tiny_student


def test_every_kernel_works_here() -> None:
    outcomes = try_in_children("edgepipe.machine.kernels", KERNEL_NAMES, timeout_s=120)
    assert [(o.name, o.state) for o in outcomes] == [(name, WORKS) for name in KERNEL_NAMES], outcomes


def test_the_two_tables_name_the_same_kernels() -> None:
    assert tuple(KERNELS) == KERNEL_NAMES


@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_one_wrong_element_is_noticed(name: str) -> None:
    """A hundredth of the largest result, added to one element of the last case; and a result that isn't a number."""
    kernel = KERNELS[name]
    for error in (0.01, float("nan")):

        def damaged(error: float = error) -> Iterator[Pair]:
            *right, (came, expected) = kernel.cases()
            yield from right
            came = came.astype(np.float64)
            came[(0,) * came.ndim] += error * np.abs(expected).max()
            yield came, expected

        state, detail = check_kernel(dataclasses.replace(kernel, cases=damaged))
        assert state == WRONG and "expected" in detail


def test_the_other_attention_is_another_implementation() -> None:
    """The environment variable is heard: results differ in their last bits from those of flash attention."""
    flash, other = (
        [came for came, _ in KERNELS[name].cases()]
        for name in ("GroupQueryAttention, float32 cache", "GroupQueryAttention, float32 cache, not flash")
    )
    assert any((a != b).any() for a, b in zip(flash, other, strict=True))
    assert kernels._NO_FLASH not in os.environ


def test_another_shape_is_wrong() -> None:
    kernel = Kernel(cases=lambda: iter([(np.ones(3), np.ones(4))]))
    assert check_kernel(kernel)[0] == WRONG


def test_a_wrong_code_of_a_weight_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The int8 kernel is held to the exact product: one code that is off by one shows."""
    whole = kernels._weight

    def with_a_slip(*arguments: Any) -> Any:
        weight = whole(*arguments)
        weight.codes[0, 0] ^= 1
        return weight

    monkeypatch.setattr(kernels, "_weight", with_a_slip)
    for name in KERNEL_NAMES:
        if name.startswith(("MatMulNBits", "Gather")):
            assert check_kernel(KERNELS[name])[0] == WRONG, name


@pytest.fixture(scope="module")
def graphs() -> list[bytes]:
    """Return every graph the checks run."""
    seen: list[bytes] = []

    def record(graph: bytes, feeds: Mapping[str, np.ndarray], in_place: Mapping[str, str]) -> dict[str, np.ndarray]:
        seen.append(graph)
        return run_graph(graph, feeds, in_place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "run_graph", record)
        for kernel in KERNELS.values():
            list(kernel.cases())
    return seen


def test_onnx_reads_the_graphs(graphs: list[bytes]) -> None:
    """The bytes are protobuf as onnx understands it, all of it, and its checker has nothing to say."""
    assert len(graphs) > 60
    for graph in graphs:
        model = onnx.load_model_from_string(graph)
        whole = model.ByteSize()
        model.DiscardUnknownFields()
        assert model.ByteSize() == whole
        for node in model.graph.node:
            if node.op_type == "SimplifiedLayerNormalization":  # onnxruntime's, although it has no domain
                node.domain = "com.microsoft"
        onnx.checker.check_model(model)


def test_a_graph_says_what_it_was_told() -> None:
    x = np.zeros((2, 300), np.float32)
    node = Node(
        op_type="FusedMatMul",
        inputs=["x", "", "w"],
        outputs=["y"],
        domain="com.microsoft",
        attributes={"transB": 1, "axis": -1, "alpha": 0.5},
    )
    weight = np.arange(6, dtype=np.uint16).reshape(2, 3)
    graph = onnx.load_model_from_string(graph_bytes([node], {"x": x}, {"w": (BFLOAT16, weight)}, {"y": (FLOAT, 2)}))
    (read,) = graph.graph.node
    assert (read.op_type, read.domain, list(read.input), list(read.output)) == (
        "FusedMatMul",
        "com.microsoft",
        ["x", "", "w"],
        ["y"],
    )
    values = {a.name: onnx.helper.get_attribute_value(a) for a in read.attribute}
    assert values == {"transB": 1, "axis": -1, "alpha": 0.5}
    (shown,) = graph.graph.input
    assert [d.dim_value for d in shown.type.tensor_type.shape.dim] == [2, 300]
    assert {o.domain: o.version for o in graph.opset_import} == {"": 23, "com.microsoft": 1}
    (result,) = graph.graph.output
    assert len(result.type.tensor_type.shape.dim) == 2 and result.type.tensor_type.elem_type == FLOAT
    (held,) = graph.graph.initializer
    assert (held.data_type, list(held.dims), held.raw_data) == (BFLOAT16, [2, 3], weight.tobytes())


def test_no_operator_of_a_bundle_is_forgotten(
    graphs: list[bytes], tiny_model_dir: Path, tiny_bundle: Path, build_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Whatever the lowering takes from onnxruntime's own operators is checked."""
    bundles = [
        tiny_bundle,
        build_tiny(tiny_model_dir, ("quantize", "bits", 16), ("quantize", "embedding_bits", 16)),
        build_tiny(tiny_model_dir, ("compile", "accuracy_level", 4)),
        build_tiny(save_tiny_student(tmp_path / "student", PAIRS["qwen3"])),
    ]
    files = [file for bundle in bundles for file in bundle.glob("*.onnx")]
    used = set().union(*(own_operators(file.read_bytes()) for file in files))
    checked = set().union(*(own_operators(graph) for graph in graphs))
    assert {"MatMulNBits", "GroupQueryAttention", "FusedMatMul", "MultiHeadAttention"} <= used
    assert used - checked == set()


def own_operators(graph: bytes) -> set[str]:
    """Return the operators that are no standard ones."""
    own = {"com.microsoft"}
    nodes = list(onnx.load_model_from_string(graph).graph.node)
    for node in nodes:  # those of branches come behind
        nodes += [inner for attribute in node.attribute for inner in attribute.g.node]
    return {node.op_type for node in nodes if node.domain in own or node.op_type == "SimplifiedLayerNormalization"}


def test_what_a_target_needs_follows_its_arithmetic() -> None:
    assert "MatMulNBits 4 bits, int8" not in needed_kernels(0)
    assert "MatMulNBits 4 bits, float32" not in needed_kernels(4)
    assert "MatMulNBits 8 bits, int8" in needed_kernels(0)  # its float32 path isn't used: two_parts.py
    assert all(levels <= {0, 1, 2, 3, 4} for levels in NEEDED_AT.values())
