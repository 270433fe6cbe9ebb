"""What ships, opened and counted: every weight once, on its grid, at its place; no copy in floats anywhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgepipe.artifacts import OnnxModel, QuantizedTensor, TorchModel
from edgepipe.engines import onnxruntime as engine
from edgepipe.engines.onnxruntime.planned import FILE_NAME, PlannedTensor, WeightsFile, plan_float, plan_part
from edgepipe.errors import ContractError
from edgepipe.numerics.grids import dequantize, quantized_nbytes, unpack
from edgepipe.stages.quantize import Quantize
from edgepipe.weights import WeightStore
from tests.decoders import CHANGES, Change, all_on, changed, context, exported, gguf_blocks, mixed, opened, stored

FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}
EMBEDDED_BYTES = 64  # the inverse frequencies of one tiny head, widths and scalars
EMBEDDING = "model.embed_tokens.weight"
PAGE, LARGE = 4096, 65536


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the tiny models of this file."""
    return tmp_path_factory.mktemp("decoders")


@dataclasses.dataclass(frozen=True)
class Shipped:
    """Hold what is in a bundle's graph and weights file."""

    inside: list[onnx.TensorProto]  # initializers in the graph
    outside: dict[str, tuple[int, int, onnx.TensorProto]]  # name → offset, length, initializer in the weights file
    content: bytes  # of the weights file
    planned: int  # bytes the plan promised

    def places(self) -> dict[int, int]:
        """Return the length of what lies at each offset; two initializers may be views of one place."""
        return {offset: length for offset, length, _ in self.outside.values()}


def ship(model: OnnxModel, directory: Path, *, level: int = 0, cache_dtype: str = "float16") -> Shipped:
    """Write a lowered model and open it again with onnx alone."""
    graphs, file = engine.lower(model, accuracy_level=level, cache_dtype=cache_dtype)
    engine.write(graphs, file, directory, lambda _done, _total: None)
    (name,) = graphs
    proto = onnx.load(directory / f"{name}.onnx", load_external_data=False)
    inside, outside = [], {}
    for tensor in proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            inside.append(tensor)
            continue
        where = {entry.key: entry.value for entry in tensor.external_data}
        assert where["location"] == FILE_NAME
        outside[tensor.name] = (int(where["offset"]), int(where["length"]), tensor)
    constants = [a.t for node in proto.graph.node for a in node.attribute if a.type == onnx.AttributeProto.TENSOR]
    return Shipped(inside + constants, outside, (directory / FILE_NAME).read_bytes(), file.nbytes)


def four_bits(model: TorchModel) -> TorchModel:
    """Quantize as by default: layers 4 bits, embedding and head 8, in groups of 32."""
    return Quantize()(model, context(Path()))


@pytest.mark.parametrize("kind", ["llama", "qwen2 tied", "llama biases", "qwen3", "gemma"])
@pytest.mark.parametrize("level", [0, 4])
def test_no_quantized_weight_is_there_as_floats(folder: Path, tmp_path: Path, kind: str, level: int) -> None:
    """Floats in the file are scales, norms and biases; what the graph itself holds are a few numbers each."""
    model = exported(four_bits(opened(folder, kind)))
    shipped = ship(model, tmp_path, level=level)
    assert max(onnx.numpy_helper.to_array(tensor).nbytes for tensor in shipped.inside) <= EMBEDDED_BYTES
    vectors = {name for name, weight in model.weights.items() if len(weight.shape) == 1}
    for name, (_, _, tensor) in shipped.outside.items():
        if tensor.data_type in FLOATS:
            parts = set(name.split("+"))
            assert name.endswith(":scale") or parts <= vectors, name
            if name.endswith(":scale"):
                assert tensor.data_type == onnx.TensorProto.FLOAT16
        else:
            assert tensor.data_type == onnx.TensorProto.UINT8
            assert name.partition("@")[0].endswith(":codes"), name


@pytest.mark.parametrize("kind", ["llama", "qwen2 tied", "llama biases", "gemma"])
@pytest.mark.parametrize("grid", ["4 bits", "4 bits zero points", "8 bits minima", "bfloat16", "mixed"])
def test_the_file_holds_the_weights_and_nothing_else(folder: Path, tmp_path: Path, kind: str, grid: str) -> None:
    """Its bytes are those of the store, zero points packed, and less than a page per large tensor to align them."""
    model = exported(mixed(opened(folder, kind)) if grid == "mixed" else all_on(opened(folder, kind), grid))
    shipped = ship(model, tmp_path)
    places = shipped.places()
    assert shipped.planned == len(shipped.content)
    expected = 0
    for weight in model.weights.values():
        value = weight.load()
        expected += value.nbytes
        if isinstance(value, QuantizedTensor) and value.zero_points is not None:
            rows, groups = value.zero_points.shape
            expected += rows * -(-groups * value.bits // 8) - value.zero_points.nbytes
    assert sum(places.values()) == expected
    end = 0
    for offset, length in sorted(places.items()):
        alignment = PAGE if length >= LARGE else 64
        assert 0 <= offset - end < alignment, "places overlap, or lie apart"
        end = offset + length
    assert end == len(shipped.content)


def test_bits_per_weight(folder: Path, tmp_path: Path) -> None:
    """Layers 4 bits and a float16 scale per 32, embedding 8: what the file weighs follows from the shapes alone."""
    model = exported(four_bits(opened(folder, "qwen2 tied")))
    shipped = ship(model, tmp_path)
    expected = 0
    for name, weight in model.weights.items():
        if len(weight.shape) == 1:
            expected += 4 * weight.size
        else:
            bits = 8 if name == EMBEDDING else 4
            expected += quantized_nbytes((weight.shape[0], weight.shape[1]), bits=bits, group=32)
    assert sum(shipped.places().values()) == model.weights.nbytes == expected
    whole = model.weights["model.layers.0.self_attn.q_proj.weight"]  # 96 × 96: rows are whole groups
    assert whole.bits_per_weight == 4.5
    assert model.weights[EMBEDDING].bits_per_weight == 8.5


@pytest.mark.parametrize("grid", ["float32", "bfloat16", "4 bits", "4 bits zero points", "8 bits", "4 bits minima"])
def test_a_tied_table_is_there_once(folder: Path, tmp_path: Path, grid: str) -> None:
    """Gathered from in one shape and multiplied by in another, at one place in the file."""
    model = exported(all_on(opened(folder, "qwen2 tied"), grid))
    shipped = ship(model, tmp_path)
    named = {name: place for name, place in shipped.outside.items() if EMBEDDING in name or "lm_head" in name}
    assert not [name for name in named if "lm_head" in name]
    value = model.weights.load(EMBEDDING)
    data = value.codes.tobytes() if isinstance(value, QuantizedTensor) else value.tobytes()
    assert shipped.content.count(data) == 1
    views = [place for name, place in named.items() if place[1] == len(data)]
    assert len({offset for offset, _, _ in views}) == 1
    if isinstance(value, QuantizedTensor):
        assert sorted(len(tensor.dims) for _, _, tensor in views) == [2, 3]


def test_an_untied_head_is_another_tensor(folder: Path, tmp_path: Path) -> None:
    shipped = ship(exported(all_on(opened(folder, "llama"), "4 bits")), tmp_path)
    places = {shipped.outside[name][0] for name in shipped.outside if name.startswith((EMBEDDING, "lm_head"))}
    assert len(places) == 4  # codes and scales of each


@pytest.mark.parametrize("grid", [name for name in CHANGES if "bits" in name])
def test_the_bytes_decode_to_the_weights(folder: Path, tmp_path: Path, grid: str) -> None:
    """Read back from the file without edgepipe's reader: joined codes and scales are those of q, k and v in turn."""
    model = exported(all_on(opened(folder, "llama grouped"), grid))
    shipped = ship(model, tmp_path)
    p = "model.layers.1.self_attn."
    names = [f"{p}{part}_proj.weight" for part in "qkv"]
    parts = {
        name.partition("@")[0].rpartition(":")[2]: np.frombuffer(shipped.content, np.uint8, length, offset)
        for name, (offset, length, _) in shipped.outside.items()
        if name.startswith("+".join(names))
    }
    sample = model.weights.load(names[0])
    assert isinstance(sample, QuantizedTensor)
    rows = sum(model.weights[name].shape[0] for name in names)
    zero_points = None
    if "zero_points" in parts:
        packed = parts["zero_points"].reshape(rows, -1)
        zero_points = unpack(packed, sample.bits)[:, : sample.groups]
    joined = dataclasses.replace(
        sample,
        shape=(rows, 96),
        codes=parts["codes"].reshape(rows, -1),
        scale=parts["scale"].view(sample.scale.dtype).reshape(rows, -1),
        zero_points=zero_points,
        minima=parts["minima"].view(sample.scale.dtype).reshape(rows, -1) if "minima" in parts else None,
    )
    expected = np.concatenate([model.weights.float32(name) for name in names])
    np.testing.assert_array_equal(dequantize(joined), expected)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
def test_imported_codes_ship_as_they_came(folder: Path, tmp_path: Path, name: str) -> None:
    def blocks(weight: str) -> Change:
        return (lambda value: gguf_blocks(value, name)) if "mlp.up" in weight else CHANGES["4 bits"]

    kept = changed(opened(folder, "llama grouped"), blocks)
    shipped = ship(exported(kept), tmp_path)
    value = kept.weights.load("model.layers.0.mlp.up_proj.weight")
    assert isinstance(value, QuantizedTensor) and value.source_grid == name
    assert shipped.content.count(value.codes.tobytes()) == 1
    assert shipped.content.count(value.scale.tobytes()) == 1


def planned(name: str, nbytes: int) -> PlannedTensor:
    """Plan a tensor of bytes that are all the same."""
    fill = len(name)
    return PlannedTensor(name=name, shape=(nbytes,), dtype="uint8", load=lambda: np.full(nbytes, fill, np.uint8))


def test_large_tensors_start_on_a_page(tmp_path: Path) -> None:
    file = WeightsFile()
    sizes = [1, 63, 64, 65, LARGE - 1, LARGE, 3, LARGE + 5, PAGE]
    for i, size in enumerate(sizes):
        tensor = file.place(planned("x" * (i + 1), size))
        assert tensor.offset is not None and tensor.length == size
        assert tensor.offset % (PAGE if size >= LARGE else 64) == 0
    said: list[tuple[int, int]] = []
    file.write(tmp_path / "weights.bin", lambda done, total: said.append((done, total)))
    content = (tmp_path / "weights.bin").read_bytes()
    assert len(content) == file.nbytes
    assert [tensor.nbytes for tensor in file.tensors] == sizes
    for i, size in enumerate(sizes):
        assert content.count(bytes([i + 1])) == size
    assert said[-1] == (file.nbytes, file.nbytes)
    assert [done for done, _ in said] == sorted(done for done, _ in said)


def test_a_tensor_is_placed_once_whatever_its_view(tmp_path: Path) -> None:
    file = WeightsFile()
    first = file.place(planned("table", 96))
    again = file.place(planned("table", 96), (3, 32))
    assert (again.offset, again.length) == (first.offset, first.length)
    assert first.name == "table"
    assert again.name == "table@3x32"
    assert tuple(again.shape) == (3, 32)
    assert file.nbytes == 96
    assert len(file.tensors) == 1


@pytest.mark.parametrize("got", [np.zeros(3, np.uint8), np.zeros((2, 2), np.uint8), np.zeros(4, np.float32)])
def test_a_value_unlike_its_plan_is_an_error(tmp_path: Path, got: np.ndarray) -> None:
    file = WeightsFile()
    file.place(PlannedTensor(name="w", shape=(4,), dtype="uint8", load=lambda: got))
    with pytest.raises(ContractError, match=r"w: planned \(4,\) in 4 bytes, got"):
        file.write(tmp_path / "weights.bin", lambda _done, _total: None)


def test_floats_of_several_kinds_are_joined_as_float32() -> None:
    values = {"a": np.ones((2, 3), np.float32), "b": np.full((1, 3), 2, np.float16)}
    store = WeightStore({name: stored(name, value) for name, value in values.items()}, {"tied": "b"})
    both = plan_float(store, ["a", "tied"])
    assert (both.name, both.shape, both.dtype, both.nbytes) == ("a+b", (3, 3), "float32", 36)
    np.testing.assert_array_equal(both.load(), [[1] * 3, [1] * 3, [2] * 3])
    alone = plan_float(store, ["b"])
    assert (alone.dtype, alone.nbytes) == ("float16", 6)


def test_a_plan_knows_its_bytes_before_anything_is_joined() -> None:
    one, two = (CHANGES["4 bits zero points"](np.random.default_rng(i).random((i + 1, 90))) for i in range(2))
    assert isinstance(one, QuantizedTensor)
    store = WeightStore({"a": stored("a", one), "b": stored("b", two)})
    for part, shape in (("codes", (3, 48)), ("scale", (3, 3)), ("zero_points", (3, 2))):
        plan = plan_part(store, ["a", "b"], part, one)
        value = plan.load()
        assert plan.name == f"a+b:{part}"
        assert (plan.shape, plan.dtype, plan.nbytes) == (value.shape, value.dtype.name, value.nbytes)
        assert plan.shape == shape
