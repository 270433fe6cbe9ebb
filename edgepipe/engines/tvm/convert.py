"""Convert a graph of the portable dialect into functions of Relax, one node after the other.

Three kinds of functions come out. A graph's own takes its inputs, then caches, then what was prepared, then weights,
and returns its outputs as a tuple. Constants that are too large for a library (rotary tables) are computed by a
function `NAME_prepare` when the bundle is loaded. A decoder over a preallocated cache becomes two: `decoder_prefill`
for any number of tokens, and `decoder_step` for one, whose kernels know that there is one row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from onnx_ir import serde
from tvm import relax, tirx

from edgepipe.artifacts import Json, QuantizedTensor
from edgepipe.engines.onnxruntime.planned import PlannedTensor, WeightsFile
from edgepipe.engines.tvm import packed, products
from edgepipe.engines.tvm.products import Codes, Floats
from edgepipe.engines.tvm.tiling import Product, Tiling, default
from edgepipe.engines.tvm.values import Known, Size, Tensor, Value, Weight, known_sizes, on_sizes, size
from edgepipe.errors import ContractError, TargetError
from edgepipe.graph.dialect import weight_name
from edgepipe.graph.evaluate import run_node
from edgepipe.levels import Level
from edgepipe.weights import WeightStore

_T = TypeVar("_T")
_LARGE_CONSTANT = 4096  # bytes: above, a constant is computed when the library is loaded


@dataclass(slots=True, kw_only=True)
class Library:
    """Collect the functions of one library and the weights that they share."""

    weights: WeightStore
    file: WeightsFile
    level: Level
    integers: bool  # round activations to 8 bits, and multiply bytes
    has_threads: bool  # of a GPU; not where functions for one are only checked, on this machine's processor
    multiplied: frozenset[str]  # weights that some product reads: float ones are packed, and lie in the file once
    tilings: Mapping[str, Tiling] = field(default_factory=dict)  # in place of the defaults, by Product.key
    asked: Counter[Product] = field(default_factory=Counter)  # products, by how many matrices take each
    builder: Any = field(default_factory=relax.BlockBuilder)
    functions: dict[str, Json] = field(default_factory=dict)  # what the manifest says of each
    tensors: dict[str, Json] = field(default_factory=dict)  # of the weights file: offset, dtype, shape
    products: Counter[str] = field(default_factory=Counter)  # with weights, by their arithmetic: "int8", "float32"
    _kernels: dict[Any, Any] = field(default_factory=dict)

    def kernel(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Return the module's name for a kernel, made on first use."""
        if key not in self._kernels:
            self._kernels[key] = self.builder.add_func(make(), str(key[0]))
        return self._kernels[key]

    def tiling(self, w: Codes | Floats, rows: int | None, integers: str) -> Tiling:
        """Return how a product goes through its matrix."""
        product = Product(w=w, rows=rows, integers=integers)
        self.asked[product] += 1
        tiling = self.tilings.get(product.key) or default(product, self.level)
        return replace(tiling, table=tiling.table and self.level.table)

    def place(self, planned: PlannedTensor) -> str:
        """Give a tensor its place in the weights file; return its key."""
        if planned.name not in self.tensors:
            placed = self.file.place(planned)
            self.tensors[planned.name] = {
                "offset": placed.offset,
                "dtype": planned.dtype,
                "shape": list(planned.shape),
            }
        return planned.name


def symbol(value: Any, dims: dict[str, Size]) -> Size:
    """Return the size that a graph gives a dimension: a number, or the symbol of its name."""
    if isinstance(value, int):
        return value
    name = str(value.value)
    if name not in dims:
        dims[name] = tirx.Var(name, "int64")
    return dims[name]


class Function:
    """Convert one graph into one function; the handlers of operators.py call its methods."""

    def __init__(self, library: Library, name: str, graph: ir.Graph, dims: Mapping[str, Size]) -> None:
        self.library = library
        self.name = name
        self.builder = library.builder
        self.dims = dict(dims)
        self.cache: Any = None  # of a decoder over a preallocated cache: heads.Cached
        self._graph = graph
        self._values: dict[ir.Value, Value] = {}
        self._inputs: dict[str, Any] = {}  # parameters of each kind, by name
        self._caches: dict[str, Any] = {}
        self._prepared: dict[str, tuple[Any, ir.Value]] = {}
        self._weights: dict[str, Any] = {}
        self._once: dict[Any, Any] = {}
        self._keeps_large = False  # of the function that prepares constants

    # -----------------------------------------------------------------------------------------------------------------
    # what handlers use

    def te(self, compute: Callable[..., Any], *arguments: Any, name: str) -> Tensor:
        """Emit a computation written in TVM's tensor expressions.

        Sizes that it uses are among the arguments, or taken from the shapes of its tensors: symbols of the graph mean
        nothing inside.
        """
        return self.wrap(self.builder.emit_te(compute, *arguments, primfunc_name_hint=name))

    def wrap(self, expr: Any) -> Tensor:
        """Return a variable of Relax with its shape and dtype."""
        kind = expr.ty
        return Tensor(expr, tuple(size(n) for n in kind.shape.values), str(kind.dtype))

    def emit(self, call: Any) -> Tensor:
        """Emit an operator of Relax."""
        return self.wrap(self.builder.emit(call))

    def call(
        self, kernel: Any, arguments: Sequence[Tensor], outputs: Sequence[tuple[Sequence[Size], str]]
    ) -> list[Tensor]:
        """Call a kernel; `outputs` are shapes and dtypes."""
        types = [relax.TensorType(list(shape), dtype) for shape, dtype in outputs]
        found = self.builder.emit(relax.call_tir(kernel, [a.expr for a in arguments], types))
        if len(types) == 1:
            return [self.wrap(found)]
        return [self.wrap(self.builder.emit(relax.TupleGetItem(found, i))) for i in range(len(types))]

    def once(self, key: tuple[Any, ...], make: Callable[[], _T]) -> _T:
        """Return what `make` emits, emitted once for a key."""
        if key not in self._once:
            self._once[key] = make()
        found: _T = self._once[key]
        return found

    def call_in_place(self, kernel: Any, arguments: Sequence[Tensor], index: int) -> Tensor:
        """Call a kernel that writes into one of its arguments; return that argument as it is afterwards."""
        target = arguments[index]
        kind = relax.TensorType(list(target.shape), target.dtype)
        found = relax.op.call_tir_inplace(kernel, relax.Tuple([a.expr for a in arguments]), [index], [kind])
        return self.wrap(self.builder.emit(found))

    def reshape(self, x: Tensor, shape: Sequence[Size]) -> Tensor:
        """Look at a tensor in another shape."""
        same = len(shape) == len(x.shape) and all(_same(a, b) for a, b in zip(shape, x.shape, strict=True))
        return x if same else self.emit(relax.op.reshape(x.expr, relax.ShapeExpr([_expr(n) for n in shape])))

    def tensor(self, value: Value, source: ir.Value | None = None) -> Tensor:
        """Return a value as a tensor: constants are put into the library, weights are read and decoded."""
        if isinstance(value, Tensor):
            return value
        if isinstance(value, Weight):
            return self.decoded(value)
        if value.symbolic:
            flat = [_expr(n) for n in value.array.reshape(-1)]
            return self._sizes(flat, value.array.shape)
        array = np.ascontiguousarray(value.array)
        if array.nbytes > _LARGE_CONSTANT and source is not None and source.producer() is not None:
            return self._large(source, array)
        constant = relax.const(array, array.dtype.name)
        return Tensor(constant, array.shape, array.dtype.name)

    def _sizes(self, flat: list[Any], shape: tuple[int, ...]) -> Tensor:
        from tvm import te

        def compute(values: list[Any]) -> Any:
            def at(*index: Any) -> Any:
                value = values[-1]
                for number in range(len(values) - 2, -1, -1):
                    value = tirx.Select(tirx.EQ(index[0], number), values[number], value)
                return value

            return te.compute((len(values),), at, name="sizes")

        found = self.te(compute, flat, name="sizes")
        return self.reshape(found, shape)

    def _large(self, source: ir.Value, array: np.ndarray) -> Tensor:
        """Return a constant that is too large for the library."""
        if self._keeps_large:
            node = source.producer()
            assert node is not None
            found: Tensor = self._converted(node)[list(node.outputs).index(source)]
            return found
        name = source.name or ""
        if name not in self._prepared:
            expr = relax.Var(f"prepared_{len(self._prepared)}", relax.TensorType(array.shape, array.dtype.name))
            self._prepared[name] = (expr, source)
        return Tensor(self._prepared[name][0], array.shape, array.dtype.name)

    def weight(self, planned: PlannedTensor) -> Tensor:
        """Return a tensor of the weights file, made a parameter on first use; bfloat16 is seen as its bits."""
        key = self.library.place(planned)
        dtype = products.stored_dtype(planned.dtype)
        if key not in self._weights:
            self._weights[key] = relax.Var(f"weight_{len(self._weights)}", relax.TensorType(planned.shape, dtype))
        return Tensor(self._weights[key], planned.shape, dtype)

    def decoded(self, weight: Weight) -> Tensor:
        """Return a whole weight in float32."""
        from edgepipe.engines.tvm.matrices import gather_rows
        from edgepipe.engines.tvm.moves import transposed, widen

        record = self.library.weights[weight.name]
        if record.grid is None and record.name not in self.library.multiplied:
            plain = widen(self, self.weight(packed.plan_plain(self.library.weights, weight.name)), record.dtype)
        else:
            rows = Known(np.arange(record.shape[0], dtype=np.int64))
            plain = gather_rows(self, weight.name, self.tensor(rows))
        return transposed(self, plain, (1, 0)) if weight.transposed else plain

    def add_cache(self, name: str, shape: Sequence[int], dtype: str) -> Tensor:
        """Return a new parameter that keeps keys or values."""
        self._caches[name] = relax.Var(name, relax.TensorType(list(shape), dtype))
        return Tensor(self._caches[name], tuple(shape), dtype)

    def input(self, name: str) -> Tensor:
        """Return an input of the graph."""
        return self.wrap(self._inputs[name])

    # -----------------------------------------------------------------------------------------------------------------
    # the conversion

    def convert(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> None:
        """Emit the function that computes some values of the graph from others, and what prepares its constants."""
        for value in inputs:
            kind = relax.TensorType([_expr(n) for n in self._shape(value)], _dtype(value))
            name = value.name or ""
            self._inputs[name] = relax.Var(name, kind)
            self._values[value] = self.wrap(self._inputs[name])
        with self.builder.function(self.name):
            with self.builder.dataflow():
                found = [self.tensor(self._value(value), value) for value in outputs]
                result = self.builder.emit_output(relax.Tuple([t.expr for t in found]))
            self._finish(result)
        self.library.functions[self.name] = {
            "inputs": list(self._inputs),
            "outputs": [value.name for value in outputs],
            "caches": list(self._caches),
            "prepared": f"{self.name}_prepare" if self._prepared else None,
            "weights": list(self._weights),
        }
        if self._prepared:
            prepare = Function(self.library, f"{self.name}_prepare", self._graph, {})
            prepare._keeps_large = True
            prepare.convert([], [source for _, source in self._prepared.values()])

    def _finish(self, result: Any) -> None:
        prepared = [expr for expr, _ in self._prepared.values()]
        parameters = [*self._inputs.values(), *self._caches.values(), *prepared, *self._weights.values()]
        self.builder.emit_func_output(result, parameters)

    def _shape(self, value: ir.Value) -> list[Size]:
        assert value.shape is not None
        return [symbol(n, self.dims) for n in value.shape]

    def _value(self, value: ir.Value) -> Value:
        """Return what a value of the graph is here; nodes before it are converted when they are asked for."""
        if value in self._values:
            return self._values[value]
        named = weight_name(value.name or "")
        if named is not None and value.producer() is None:
            found: Value = Weight(*named)
        elif value.const_value is not None:
            found = Known(np.asarray(value.const_value.numpy()))
        else:
            node = value.producer()
            if node is None:
                raise ContractError(f"the graph {self._graph.name} reads {value.name}, which nothing gives")
            self._convert_node(node)
            return self._values[value]
        self._values[value] = found
        return found

    def _convert_node(self, last: ir.Node) -> None:
        """Convert a node and what it reads, without recursion: graphs are deeper than Python's stack."""
        waiting = [last]
        while waiting:
            node = waiting[-1]
            missing = [
                producer
                for value in self._reads(node)
                if value is not None and value not in self._values and (producer := value.producer()) is not None
            ]
            if missing:
                waiting += missing
                continue
            waiting.pop()
            if node.outputs[0] not in self._values:
                self._values |= dict(zip(node.outputs, self._results(node), strict=False))

    def _reads(self, node: ir.Node) -> Sequence[ir.Value | None]:
        """Return the inputs that a node's conversion looks at."""
        if self.cache is not None and node.op_type == "Attention" and self.cache.replaces(node):
            return list(node.inputs[:3])
        return list(node.inputs)

    def _results(self, node: ir.Node) -> Sequence[Value]:
        """Compute a node now where all it reads is known, else emit it."""
        if node.op_type == "Shape":
            return [self._shape_of(node)]
        values = [self._value(value) for value in self._reads(node) if value is not None]
        known = [value for value in values if isinstance(value, Known)]
        if len(known) == len(values):
            if not any(value.symbolic for value in known):
                feeds = {v.name or "": k.array for v, k in zip(self._present(node), known, strict=True)}
                return [Known(array) for array in run_node(serde.serialize_node(node), feeds)]
            found = on_sizes(node, known)
            if found is not None:
                return [found]
        return self._converted(node)

    @staticmethod
    def _present(node: ir.Node) -> list[ir.Value]:
        return [value for value in node.inputs if value is not None]

    def _converted(self, node: ir.Node) -> Sequence[Any]:
        from edgepipe.engines.tvm.operators import operators

        handler = operators(self.library.level).get(node.op_type)
        if handler is None or node.domain:
            raise TargetError(
                f"the tvm engine can't build node {node.name or node.outputs[0].name!r} of graph {self._graph.name!r}: "
                f"it has no operator {node.op_type}; take --engine onnxruntime"
            )
        found: Sequence[Value] = handler(self, node)
        return found

    def _shape_of(self, node: ir.Node) -> Known:
        value = node.inputs[0]
        assert value is not None
        sizes = list(self.shape_of(self._value(value)))
        start = node.attributes.get_int("start", 0)
        end = node.attributes.get_int("end", len(sizes))
        return known_sizes(sizes[start:end])

    def shape_of(self, value: Value) -> tuple[Size, ...]:
        """Return the shape of a value."""
        if isinstance(value, Tensor):
            return value.shape
        if isinstance(value, Known):
            return value.array.shape
        shape = self.library.weights[value.name].shape
        return shape[::-1] if value.transposed else shape

    # -----------------------------------------------------------------------------------------------------------------
    # how handlers read their nodes

    def value(self, node: ir.Node, index: int) -> Value | None:
        """Return an input as it is; None where the node has none."""
        inputs = node.inputs
        if index >= len(inputs) or inputs[index] is None:
            return None
        found = inputs[index]
        assert found is not None
        return self._value(found)

    def read(self, node: ir.Node, index: int) -> Tensor:
        """Return an input as a tensor."""
        found = node.inputs[index]
        assert found is not None
        return self.tensor(self._value(found), found)

    def sizes(self, node: ir.Node, index: int) -> list[Size] | None:
        """Return an input that says sizes or axes; None where the node has none."""
        found = self.value(node, index)
        if found is None:
            return None
        if not isinstance(found, Known):
            raise TargetError(
                f"the tvm engine can't build node {node.name or node.outputs[0].name!r} of graph {self._graph.name!r}: "
                f"{node.op_type} takes a shape that depends on the data; take --engine onnxruntime"
            )
        return [size(n) for n in found.array.reshape(-1)]

    def quantized(self, name: str) -> QuantizedTensor | None:
        """Return a weight that lies on a grid; None for a float one."""
        if self.library.weights[name].grid is None:
            return None
        value = self.library.weights.load(name)
        assert isinstance(value, QuantizedTensor)
        return value


def _dtype(value: ir.Value) -> str:
    assert value.dtype is not None
    return value.dtype.numpy().name


def _expr(value: Size) -> Any:
    return tirx.const(value, "int64") if isinstance(value, int) else value


def _same(a: Size, b: Size) -> bool:
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return bool(a.same_as(b))
