"""Load graphs with onnxruntime, and run a lowered decoder over preallocated key/value caches.

Past and present are bound to the same memory, so a step moves nothing but the new token. Behind an encoder, the keys
and values of a row's source are bound once, when it has been read. onnxruntime maps the weights file, makes its packed
copy of each matrix and gives the mapping back, except for what it only gathers from.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from edgepipe.errors import ContractError, TargetError
from edgepipe.runtime.exits import PART
from edgepipe.runtime.leaving import Parts, ends_of_parts, join_parts
from edgepipe.runtime.packed import Unpacked, unpack_weights
from edgepipe.runtime.source_reading import SOURCE_MASK, Source, SourceReader, reads_sources

# Add + LayerNormalization → SkipLayerNormalization: 1.93 ms instead of 0.28 on 1,024 rows of 384 (one thread of an AMD
# EPYC, onnxruntime 1.31), a sixth of an 8-bit encoder's time, and no gain on a single row.
_NOT_FASTER = ["SkipLayerNormFusion"]
_TENSORS = {"float32": "tensor(float)", "float16": "tensor(float16)", "int8": "tensor(int8)"}  # onnxruntime's words


class Cache:
    """Hold the key/value buffers of `batch` sequences: per layer two of [batch, kv_heads, context, head_dim].

    The buffers are zero pages until tokens are written, so an unused context costs address space, not memory.
    """

    def __init__(
        self, session: ort.InferenceSession, layers: int, shape: tuple[int, int, int, int], dtype: str
    ) -> None:
        self.batch = shape[0]
        self.layers: list[tuple[int, str, ort.OrtValue]] = []
        self._buffers = []  # the memory behind the values
        for layer in range(layers):
            for kind in ("key", "value"):
                self._buffers.append(np.zeros(shape, dtype))
                self.layers.append((layer, kind, ort.OrtValue.ortvalue_from_numpy(self._buffers[-1])))
        self.binding = self.bind(session)
        self.step: _Step | None = None  # made when the first single token is run
        self._sources: list[Source | None] = [None] * self.batch
        self._bound: dict[str, ort.OrtValue] | None = None  # the sources of all rows, None when one has changed
        self._arrays: list[np.ndarray] = []  # the memory behind those

    def bind(self, session: ort.InferenceSession) -> ort.IOBinding:
        """Return a new binding whose past and present are this cache."""
        binding = session.io_binding()
        for layer, kind, value in self.layers:
            binding.bind_ortvalue_input(f"past_{kind}.{layer}", value)
            binding.bind_ortvalue_output(f"present_{kind}.{layer}", value)
        return binding

    def set_source(self, row: int, source: Source) -> None:
        """Keep what the encoder gave for a row."""
        self._sources[row], self._bound = source, None

    def held(self, tokens: int) -> dict[str, np.ndarray]:
        """Return what the cache holds for the first tokens of its rows, and of the sources where there are such.

        → key.i, value.i [batch, kv_heads, tokens, head_dim], not copied; cross_key.i, cross_value.i of the first row
        """
        names = [f"{kind}.{layer}" for layer, kind, _ in self.layers]
        own = {name: buffer[:, :, :tokens] for name, buffer in zip(names, self._buffers, strict=True)}
        return own | {n: x for n, x in (self._sources[0] or {}).items() if n != SOURCE_MASK}

    def bind_sources(self) -> None:
        """Bind the sources of all rows to the bindings of this cache, unless they are; ContractError without one."""
        if self._bound is None:
            joined = _joined_sources(self._sources)
            self._arrays = list(joined.values())
            self._bound = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in joined.items()}
            for binding in (self.binding, *(() if self.step is None else (self.step.binding,))):
                self.bind_sources_to(binding)

    def bind_sources_to(self, binding: ort.IOBinding) -> None:
        """Bind what is bound to the others to a new binding too."""
        for name, value in (self._bound or {}).items():
            binding.bind_ortvalue_input(name, value)


def _joined_sources(sources: Sequence[Source | None]) -> Source:
    """Return the sources of all rows as one batch, padded on the right to the longest; a single one as it is."""
    read = [source for source in sources if source is not None]
    if len(read) < len(sources):
        raise ContractError(f"{len(sources) - len(read)} of {len(sources)} rows have no source: read one first")
    if len(read) == 1:
        return read[0]
    longest = max(source[SOURCE_MASK].shape[1] for source in read)

    def padded(array: np.ndarray, axis: int) -> np.ndarray:
        return np.pad(array, [(0, longest - size if a == axis else 0) for a, size in enumerate(array.shape)])

    axes = {name: 1 if name == SOURCE_MASK else 2 for name in read[0]}  # of the tokens
    return {name: np.concatenate([padded(source[name], axis) for source in read]) for name, axis in axes.items()}


class _Step:
    """Run one token of every row with all inputs and outputs bound once: binding anew costs 0.4 ms a token."""

    def __init__(self, session: ort.InferenceSession, cache: Cache, vocab_size: int) -> None:
        batch = cache.batch
        self.ids = np.zeros((batch, 1), np.int64)
        self.lengths = np.zeros(batch, np.int32)
        self.total = np.zeros(1, np.int32)
        self.logits = np.zeros((batch, 1, vocab_size), np.float32)
        self.binding = cache.bind(session)
        cache.bind_sources_to(self.binding)
        positions = np.zeros((batch, 1), np.int64)  # the only new token of each row
        inputs = {
            "input_ids": self.ids,
            "seqlens_k": self.lengths,
            "total_sequence_length": self.total,
            "logits_positions": positions,
        }
        self._values = [ort.OrtValue.ortvalue_from_numpy(array) for array in (*inputs.values(), self.logits)]
        for name, value in zip(inputs, self._values, strict=False):
            self.binding.bind_ortvalue_input(name, value)
        self.binding.bind_ortvalue_output("logits", self._values[-1])
        self._positions = positions


class Decoder:
    """Run the graph `decoder` of a bundle, behind its graph `encoder` if there is one.

    Safe for concurrent calls on different caches.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        model: dict[str, Any],
        cache_dtype: str,
        reader: SourceReader | None = None,
    ) -> None:
        """Join the opened graph, and what reads sources where there is an encoder."""
        self._session = session
        self.reader = reader
        self._cache_dtype = cache_dtype
        self._layers = int(model["layers"])
        self._cache_shape = (int(model["kv_heads"]), int(model["context"]), int(model["head_dim"]))
        self.context = int(model["context"])
        self.vocab_size = int(model["vocab_size"])
        self.cache_bytes = 2 * np.dtype(cache_dtype).itemsize * self._layers * math.prod(self._cache_shape)

    def new_cache(self, batch: int) -> Cache:
        """Make an empty cache for `batch` sequences."""
        return Cache(self._session, self._layers, (batch, *self._cache_shape), self._cache_dtype)

    def read_source(self, cache: Cache, row: int, ids: np.ndarray) -> None:
        """Run the encoder over ids [1, tokens] int64 and keep what the decoder reads of it for one row of the cache.

        Raises ContractError for a source that is too long, or a decoder that has no encoder in front.
        """
        cache.set_source(row, reads_sources(self.reader).read(ids))

    def score(self, ids: np.ndarray, prefix: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return the logits [C] float32 of `tokens` [C] int64 as the next after `prefix` [1, S], of a source [1, N]."""
        return reads_sources(self.reader).score(ids, prefix, tokens)

    def run(
        self, cache: Cache, input_ids: np.ndarray, past: np.ndarray, lengths: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """Append tokens to the cache and return logits [batch, P, vocab] float32, valid until the cache's next run.

        input_ids [batch, sequence] int64, rows right-padded; past [batch]: tokens of each row already in the cache;
        lengths [batch]: valid new tokens of each row; positions [batch, P] int64: the new positions to score.
        More than one row may take more than one token only at past 0; a smaller past rewinds a row.
        """
        batch, sequence = input_ids.shape
        longest = int(past.max())
        if longest + sequence > self.context:
            raise ContractError(f"{longest + sequence} tokens do not fit the context of {self.context}")
        if batch > 1 and sequence > 1 and past.any():
            raise ContractError("several rows can only take several tokens when all start at past 0")
        if self.reader is not None:
            cache.bind_sources()
        if sequence == 1 and positions.shape[1] == 1:
            return self._run_step(cache, input_ids, past)
        totals = past + lengths
        # a prompt's rows are padded to one length, and the operator wants to know that length
        total = int(totals.max()) if longest else sequence
        binding = cache.binding
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(input_ids, np.int64))
        binding.bind_cpu_input("seqlens_k", np.ascontiguousarray(totals - 1, np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array([total], np.int32))
        binding.bind_cpu_input("logits_positions", np.ascontiguousarray(positions, np.int64))
        binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(binding)
        # the one value that's wanted: get_outputs() would wrap every layer's cache as well
        outputs = binding.get_outputs_as_ortvaluevector()
        logits: np.ndarray = outputs[len(outputs) - 1].numpy()
        return logits

    def _run_step(self, cache: Cache, input_ids: np.ndarray, past: np.ndarray) -> np.ndarray:
        """Append one token to every row; return logits [batch, 1, vocab]."""
        if cache.step is None:
            cache.step = _Step(self._session, cache, self.vocab_size)
        step = cache.step
        step.ids[:] = input_ids
        step.lengths[:] = past  # past tokens and one new, less one
        step.total[0] = past.max() + 1
        self._session.run_with_iobinding(step.binding)
        return step.logits


def open_decoder(path: Path, manifest: dict[str, Any], threads: int | None) -> Decoder:
    """Open a bundle's decoder, and its encoder; `threads` None takes onnxruntime's choice (one per physical core).

    Raises TargetError when onnxruntime can't load one, ContractError when it isn't the graph the manifest describes.
    """
    model, graphs, dtype = manifest["model"], manifest["graphs"], manifest["cache"]["dtype"]
    has_source = "encoder" in graphs and "source_context" in model
    weights = unpack_weights(path, manifest)
    session = open_session(path / graphs["decoder"], threads, others=has_source, weights=weights)
    check_ends(session, model, dtype, has_source=has_source)
    if not has_source:
        return Decoder(session, model, dtype)

    def opened(role: str, ends: tuple[_Ends, _Ends], weights: Unpacked | None) -> Graph:
        other = open_session(path / graphs[role], threads, others=True, weights=weights)
        _compare_ends(other, *ends)
        return Graph(other)

    cross, ids = _cross_ends(model, dtype), ("tensor(int64)", (None, None))
    encoder = opened("encoder", ({"input_ids": ids, "attention_mask": ids}, cross), weights)
    scored = {"input_ids": ids, "token_ids": ("tensor(int64)", (None,)), **cross, SOURCE_MASK: ids}
    logits = ("tensor(float)", (None, None))

    def open_scorer() -> Graph:  # perhaps never: the weights aren't kept for it
        return opened("scorer", (scored, {"logits": logits}), unpack_weights(path, manifest))

    reader = SourceReader(encoder, int(model["source_context"]), open_scorer if "scorer" in graphs else None)
    return Decoder(session, model, dtype, reader)


def _cross_ends(model: dict[str, Any], cache_dtype: str) -> _Ends:
    """Return what a decoder reads of its source: keys and values of every layer, as codes where its cache is int8."""
    dtype = "int8" if cache_dtype == "int8" else "float32"
    end = (_TENSORS[dtype], (None, model["kv_heads"], None, model["head_dim"]))
    return {f"cross_{kind}.{layer}": end for layer in range(model["layers"]) for kind in ("key", "value")}


def open_session(
    file: Path, threads: int | None, *, others: bool = False, weights: Unpacked | None = None
) -> ort.InferenceSession:
    """Open a session; `others`: one of several of a bundle, whose threads would be in each other's way.

    `weights` are those of a bundle that stores them deflated.

    A session's threads spin for 40 ms after a run, waiting for the next. On two cores a decoder's steps after its
    encoder took 6.8 ms instead of 2.6, and a source of 128 tokens 71 ms instead of 44.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    # Weights that DequantizeLinear decodes become constants now, not at every run (there is no other use of it here).
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if others:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if weights is not None:
        options.add_external_initializers_from_files_in_memory(
            [weights.name], [weights.content], [weights.content.nbytes]
        )
    try:
        return ort.InferenceSession(
            os.fspath(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=_NOT_FASTER
        )
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        raise TargetError(f"onnxruntime could not load the bundle: {str(error).splitlines()[0]}") from error


class Graph:
    """Run one graph on arrays by name. Safe for concurrent calls."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name."""
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(feeds)), strict=True))


class Bindable:
    """Bind one graph to arrays that stay where they are. Safe for concurrent calls on different arrays."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Callable[[], None]:
        """Return what computes the graph once; an array that is input and output is changed where it lies."""
        binding = self._session.io_binding()
        arrays = {id(array): array for array in (*inputs.values(), *outputs.values())}
        values = {key: ort.OrtValue.ortvalue_from_numpy(array) for key, array in arrays.items()}
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, values[id(array)])
        for name, array in outputs.items():
            binding.bind_ortvalue_output(name, values[id(array)])

        def compute(_alive: object = (values, arrays)) -> None:
            self._session.run_with_iobinding(binding)

        return compute


def open_graph(
    file: Path,
    threads: int | None,
    ends: Mapping[str, Any] | None = None,
    *,
    others: bool = False,
    weights: Unpacked | None = None,
) -> Graph:
    """Open a graph of a bundle, one of several if `others`; `ends` is what its manifest says of inputs and outputs.

    Raises TargetError when onnxruntime can't load it, ContractError when its ends are others.
    """
    session = open_session(file, threads, others=others, weights=weights)
    if ends is not None:
        check_graph_ends(session, ends)
    return Graph(session)


def check_graph_ends(session: ort.InferenceSession, ends: Mapping[str, Any]) -> None:
    """Raise ContractError unless a graph's inputs and outputs are those that a manifest describes."""
    _compare_ends(session, _expected(ends["inputs"]), _expected(ends["outputs"]))


def open_parts(path: Path, manifest: Mapping[str, Any], threads: int | None) -> list[Graph]:
    """Open the graphs between an encoder's exits, first to last.

    Raises TargetError when onnxruntime can't load one, ContractError when its ends are others than the model's facts
    make them.
    """
    model, weights = manifest["model"], unpack_weights(path, dict(manifest))
    ids, states = ("tensor(int64)", (None, None)), ("tensor(float)", (None, None, model["hidden_size"]))
    answer = _expected(manifest["ends"]["model"]["outputs"])
    last = len(model["exits"])
    parts = []
    for number in range(last + 1):
        session = open_session(path / manifest["graphs"][f"{PART}{number}"], threads, others=True, weights=weights)
        inputs: _Ends = {"states": states} if number else {"input_ids": ids}
        leaving: _Ends = {} if number == last else {"next_states": states, "gate": ("tensor(float)", (None,))}
        _compare_ends(session, {**inputs, "attention_mask": ids}, {**answer, **leaving})
        parts.append(Graph(session))
    return parts


def open_leaving(path: Path, manifest: Mapping[str, Any], threads: int | None) -> Parts:
    """Open the graphs of a decoder with exits, but for that of all layers; raises what `open_parts` does."""
    weights, graphs = unpack_weights(path, dict(manifest)), {}
    for role, ends in ends_of_parts(manifest["model"], manifest["cache"]["dtype"]).items():
        session = open_session(path / manifest["graphs"][role], threads, others=True, weights=weights)
        check_graph_ends(session, ends)
        graphs[role] = Bindable(session)
    return join_parts(graphs, manifest["model"])


_Ends = dict[str, tuple[str, tuple[int | None, ...]]]
_NUMPY_TENSORS = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
    "uint16": "tensor(uint16)",
    "bool": "tensor(bool)",
}


def _expected(described: Mapping[str, Any]) -> _Ends:
    """Return ends as onnxruntime describes them; an axis with a name is free."""
    return {
        name: (
            _NUMPY_TENSORS.get(facts["dtype"], facts["dtype"]),
            tuple(size if isinstance(size, int) else None for size in facts["shape"]),
        )
        for name, facts in described.items()
    }


def bind_products(
    graph: bytes, pairs: Sequence[tuple[np.ndarray, np.ndarray]], dtype: str, threads: int | None
) -> list[Callable[[], None]]:
    """Open a graph y = product(a, b) and return, for every pair a [m, k], b [k, n], what computes it once.

    Operands and results are bound beforehand, so nothing is copied: it times this machine, with a decoder's threads.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.enable_cpu_mem_arena = False
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    results: dict[tuple[int, int], np.ndarray] = {}  # nobody reads them: one per shape

    def bound(a: np.ndarray, b: np.ndarray) -> Callable[[], None]:
        shape = (a.shape[0], b.shape[1])
        arrays = {"a": a, "b": b, "y": results.setdefault(shape, np.zeros(shape, dtype))}
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        binding = session.io_binding()
        binding.bind_ortvalue_input("a", values["a"])
        binding.bind_ortvalue_input("b", values["b"])
        binding.bind_ortvalue_output("y", values["y"])

        def compute(_alive: object = (values, arrays)) -> None:
            session.run_with_iobinding(binding)

        return compute

    return [bound(a, b) for a, b in pairs]


def check_ends(
    session: ort.InferenceSession, model: dict[str, Any], cache_dtype: str, *, has_source: bool = False
) -> None:
    """Raise ContractError unless the graph's inputs and outputs are those of the contract (docs/bundle.md)."""
    cache = (_TENSORS[cache_dtype], (None, model["kv_heads"], model["context"], model["head_dim"]))
    layers = [f"{kind}.{layer}" for layer in range(model["layers"]) for kind in ("key", "value")]
    inputs = {
        "input_ids": ("tensor(int64)", (None, None)),
        "seqlens_k": ("tensor(int32)", (None,)),
        "total_sequence_length": ("tensor(int32)", (1,)),
        "logits_positions": ("tensor(int64)", (None, None)),
        **{f"past_{layer}": cache for layer in layers},
    }
    if has_source:
        inputs |= {**_cross_ends(model, cache_dtype), SOURCE_MASK: ("tensor(int64)", (None, None))}
    outputs = {
        "logits": ("tensor(float)", (None, None, model["vocab_size"])),
        **{f"present_{layer}": cache for layer in layers},
    }
    _compare_ends(session, inputs, outputs)


def _compare_ends(session: ort.InferenceSession, inputs: _Ends, outputs: _Ends) -> None:
    """Raise ContractError unless a graph has just these inputs and outputs."""
    for kind, found, expected in (("input", session.get_inputs(), inputs), ("output", session.get_outputs(), outputs)):
        names = [end.name for end in found]
        if differing := sorted(set(names) ^ set(expected)):
            there = "one too many" if differing[0] in names else "missing"
            raise ContractError(f"the graph's {kind} {differing[0]!r} is {there}: build the bundle again")
        for end in found:
            # a free dimension has a name, or none; how it is called decides nothing
            shape = tuple(size if isinstance(size, int) else None for size in end.shape)
            if (end.type, shape) != expected[end.name]:
                raise ContractError(
                    f"the graph's {kind} {end.name!r} should be {_spoken(*expected[end.name])}, "
                    f"but is {_spoken(end.type, shape)}: build the bundle again"
                )


def _spoken(tensor: str, shape: tuple[int | None, ...]) -> str:
    """Return a type and shape for a message; a free dimension is an asterisk."""
    return f"{tensor} [{', '.join('*' if size is None else str(size) for size in shape)}]"


def run_graph(graph: bytes, feeds: Mapping[str, np.ndarray], in_place: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Run a small graph once and return its outputs by name.

    `in_place` names, for outputs that are written over an input, that input: its array in `feeds` is changed. Raises
    TargetError when onnxruntime can't load or run the graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    try:
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        names = [end.name for end in session.get_outputs()]
        for name in names:
            if name in in_place:
                binding.bind_ortvalue_output(name, values[in_place[name]])
            else:
                binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        return dict(zip(names, (value.numpy() for value in binding.get_outputs()), strict=True))
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        raise TargetError(f"onnxruntime could not run the graph: {str(error).splitlines()[0]}") from error
