"""Load a compiled library with TVM's runtime alone, and run its functions over numpy's arrays.

The compiler is never imported: `libtvm_runtime` is opened from where the package (or TVM_LIBRARY_PATH) has it, and
`tvm_ffi` calls into it. Weights are views of the mapped file. Rows of a batch run one after the other, each over a
cache of its own. TVM's virtual machine serves one call at a time, so callers of one bundle take turns.

Kernels check no sizes of their own, so what they are given is checked here: ids against the vocabulary, tokens against
the context. A library is hashed before it is opened, since what is damaged in it would run.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe.errors import ConfigError, ContractError, TargetError
from edgepipe.runtime.bundle import verify_hashes
from edgepipe.runtime.exits import PART
from edgepipe.runtime.gpus import CUDA, Device, Recording, check_gpu, open_cuda_runtime
from edgepipe.runtime.library import STORED, FunctionFacts, LibraryFacts, check_processor, read_library
from edgepipe.runtime.source_reading import Source, SourceReader, reads_sources

_CPU, _POOLED = 1, 2  # DLPack's device type; TVM's allocator that keeps freed blocks
_MOST_SIZES = 16  # of inputs, for which a function keeps recorded calls
_BIG_CORES = 1  # TVM's mode of a thread pool
_ALIGNMENT = 64  # of an array that kernels load vectors from
_RUNTIME, _GPU_RUNTIME = "libtvm_runtime.so", "libtvm_runtime_cuda.so"
_POOL = threading.local()  # what the calling thread's pool is set to: TVM has one per thread, for all libraries
_IDS = ("input_ids", "decoder_input_ids", "token_ids")  # inputs that choose rows of the embedding


def open_package(*, gpu: bool = False) -> Any:
    """Return `tvm_ffi` with TVM's runtime opened, its part for GPUs too; TargetError where they aren't installed."""
    # Or every caller's thread would be moved to the first cores for good, whatever an app or taskset has set: two
    # bundles with a thread each would share one core. Read when the first pool of threads is made.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    # Or TVM takes half of the processors of an x86 for twins on shared cores, and never uses more, whoever asks.
    os.environ.setdefault("TVM_NUM_THREADS", str(_processors()))
    # Or tvm_ffi imports torch, where that is installed: 170 MB for conversions that nobody asks for here.
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tvm_ffi
    except ImportError as error:
        raise TargetError(
            f"the bundle runs on TVM's runtime, which isn't here ({error}): pip install 'edgepipe[tvm]'"
        ) from error
    finally:
        if hidden:
            del sys.modules["torch"]
    _open_runtime(_RUNTIME)
    if gpu:
        open_cuda_runtime()
        _open_runtime(_GPU_RUNTIME)
    return tvm_ffi


def _open_runtime(name: str) -> None:
    """Open a library of TVM's runtime for all that is loaded later; opening it again costs nothing."""
    folders = [Path(value) for value in (os.environ.get("TVM_LIBRARY_PATH"),) if value]
    found = importlib.util.find_spec("tvm")  # looks the package up, and doesn't import it
    if found is not None and found.origin is not None:
        folders.append(Path(found.origin).parent / "lib")
    for folder in folders:
        if (folder / name).is_file():
            try:
                ctypes.CDLL(os.fspath(folder / name), ctypes.RTLD_GLOBAL)
            except OSError as error:
                raise TargetError(f"TVM's runtime can't be opened: {error}") from error
            return
    raise TargetError(
        f"the bundle runs on TVM's {name}, which isn't here: pip install 'edgepipe[tvm]', or name its folder in "
        "TVM_LIBRARY_PATH"
    )


def use_threads(ffi: Any, threads: int) -> None:
    """Let kernels that the calling thread calls run on so many threads."""
    if getattr(_POOL, "threads", None) != threads:
        ffi.get_global_func("runtime.config_threadpool")(_BIG_CORES, threads)
        _POOL.threads = threads


def _processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _aligned(array: np.ndarray, dtype: str | np.dtype | None = None) -> np.ndarray:
    """Return an array that begins where kernels may load a vector; a copy only where it doesn't."""
    array = np.ascontiguousarray(array, dtype)
    if array.ctypes.data % _ALIGNMENT == 0 and array.flags.writeable:
        return array
    copy = _room(array.shape, array.dtype)
    copy[...] = array
    return copy


def _room(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Return zeros that begin where kernels may load a vector; pages are made when they are written."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = np.zeros(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    room: np.ndarray = memory[start : start + nbytes].view(dtype).reshape(shape)
    return room


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Say what the tables of a model have rows for; None: not known."""

    vocab_size: int | None
    tokens: int | None  # of a text that a graph without a cache reads


class Library:
    """Hold a loaded library and the weights of its functions. Safe for concurrent callers, who take turns."""

    def __init__(self, path: Path, facts: LibraryFacts, weights: Path, threads: int | None, limits: Limits) -> None:
        self._ffi = open_package(gpu=facts.gpu is not None)
        self.limits = limits
        self._facts = facts
        self._threads = _processors() if threads is None else threads
        self._lock = threading.RLock()
        try:
            self._module = self._ffi.load_module(os.fspath(path / facts.file))
            self._machine = self._module["vm_load_executable"]()
            devices = [CUDA, _CPU] if facts.gpu is not None else [_CPU]
            self._machine["vm_initialization"](*(part for kind in devices for part in (kind, 0, _POOLED)))
            self.device = None if facts.gpu is None else Device(self._ffi)
        except TargetError:
            raise
        except Exception as error:  # tvm_ffi raises what the C++ side named
            raise TargetError(f"TVM could not load {facts.file}: {str(error).splitlines()[0]}") from error
        self._mapped = _mapped(weights)
        self._tensors: dict[str, Any] = {}
        self._prepared: dict[str, list[Any]] = {}

    def function(self, name: str) -> Function:
        """Return a function of the library; ContractError when it isn't what the manifest says."""
        facts = self._facts.functions.get(name)
        if facts is None:
            raise ContractError(f"the manifest describes no function {name!r}: build the bundle again")
        prepared = [] if facts.prepared is None else self._prepare(facts.prepared)
        expected = len(facts.inputs) + len(facts.caches) + len(prepared) + len(facts.weights)
        try:
            call, found = self._machine[name], int(self._machine["get_function_arity"](name))
        except Exception as error:
            raise ContractError(f"the library has no function {name!r}: build the bundle again") from error
        if found != expected:
            raise ContractError(
                f"the library's function {name!r} should take {expected} values, but takes {found}: build it again"
            )
        return Function(self, call, facts, [*prepared, *(self._tensor(key) for key in facts.weights)])

    def _prepare(self, name: str) -> list[Any]:
        if name not in self._prepared:
            self._prepared[name] = list(self.function(name).call([]))
        return self._prepared[name]

    def _tensor(self, key: str) -> Any:
        if key not in self._tensors:
            facts = self._facts.tensors[key]
            array = self._mapped[facts.offset : facts.offset + facts.nbytes].view(STORED[facts.dtype])
            array = array.reshape(facts.shape)
            self._tensors[key] = self._ffi.from_dlpack(array) if self.device is None else self.device.put(array)
        return self._tensors[key]

    def wrap(self, array: np.ndarray) -> Any:
        """Return an array as TVM sees it, without a copy where it is aligned and the functions run here."""
        return self._ffi.from_dlpack(_aligned(array)) if self.device is None else self.device.put(array)

    def unwrap(self, tensor: Any) -> np.ndarray:
        """Return a tensor of TVM's as an array, without a copy where the functions run here."""
        return np.from_dlpack(tensor) if self.device is None else self.device.take(tensor)

    def run(self, call: Any, arguments: Sequence[Any]) -> Any:
        """Call a function of the virtual machine, one caller at a time, with the threads that were asked for."""
        with self._lock:
            use_threads(self._ffi, self._threads)
            try:
                with nullcontext() if self.device is None else self.device.ordered():
                    return call(*arguments)
            except Exception as error:
                raise ContractError(f"the library refused its arguments: {str(error).splitlines()[0]}") from error

    def record(self, call: Any, arguments: Sequence[Any]) -> Recording | None:
        """Make a call that is only recorded, on a GPU; None where CUDA doesn't let it."""
        assert self.device is not None
        with self._lock:
            return self.device.record(partial(self.run, call, arguments))

    def launch(self, recording: Recording) -> None:
        """Make a recorded call again, in turn with all others."""
        with self._lock:
            recording.launch()


def _mapped(file: Path) -> np.ndarray:
    """Map a file so that a write would not reach it: numpy hands on only arrays that may be written."""
    if not file.stat().st_size:
        return np.zeros(0, np.uint8)
    with file.open("rb") as opened:
        return np.frombuffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)


class Function:
    """Call one function of a library on arrays by name. Safe for concurrent calls."""

    def __init__(self, library: Library, call: Any, facts: FunctionFacts, rest: list[Any]) -> None:
        self._library = library
        self._call = call
        self._rest = rest
        self._repeated: dict[tuple[Any, ...], Repeated | None] = {}
        self.facts = facts

    def call(self, caches: Sequence[Any], feeds: Mapping[str, np.ndarray] | None = None) -> Sequence[Any]:
        """Return the outputs as TVM's tensors.

        Raises ConfigError for ids or tokens beyond what the model has, ContractError when the manifest names inputs
        that nobody gives.
        """
        inputs = [self._library.wrap(array) for array in self._checked(feeds or {})]
        found: Sequence[Any] = self._library.run(self._call, [*inputs, *caches, *self._rest])
        return found

    def repeated(self, caches: Sequence[Any]) -> Repeated | None:
        """Return what calls the function over the same caches again and again; None where nothing is gained by it."""
        if self._library.device is None:
            return None
        return Repeated(self._library, self._library.device, self._call, [*caches, *self._rest], self._checked)

    def _checked(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the inputs in order."""
        if missing := [name for name in self.facts.inputs if name not in feeds]:
            raise ContractError(f"the library reads {missing[0]!r}, which the model hasn't: build the bundle again")
        self._check_ids(feeds)
        return [feeds[name] for name in self.facts.inputs]

    def _check_ids(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Refuse ids and places that no row of a table has: a kernel would not."""
        size, tokens = self._library.limits.vocab_size, self._library.limits.tokens
        for name in _IDS:
            ids = feeds.get(name)
            if ids is None or not ids.size:
                continue
            if size is not None and (ids.min() < 0 or ids.max() >= size):
                raise ConfigError(f"{name} should be from 0 to {size - 1}, but go from {ids.min()} to {ids.max()}")
            if tokens is not None and ids.shape[-1] > tokens:
                raise ConfigError(f"{name} should have {tokens} tokens at most, but have {ids.shape[-1]}: cut the text")

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name."""
        repeated = self._of_shape(feeds)
        found = (
            [self._library.unwrap(value) for value in self.call([], feeds)] if repeated is None else repeated.run(feeds)
        )
        if len(found) != len(self.facts.outputs):
            raise ContractError(
                f"the library should give {', '.join(self.facts.outputs)}, but gives {len(found)}: build it again"
            )
        return dict(zip(self.facts.outputs, found, strict=True))

    def _of_shape(self, feeds: Mapping[str, np.ndarray]) -> Repeated | None:
        """Return what repeats calls with inputs of these sizes; None beyond the first sizes, or where nothing does."""
        sizes = tuple((name, array.shape) for name, array in sorted(feeds.items()))
        if sizes not in self._repeated and len(self._repeated) < _MOST_SIZES:
            self._repeated.setdefault(sizes, self.repeated([]))
        return self._repeated.get(sizes)


class Repeated:
    """Call a function on a GPU again and again over the same tensors, with inputs of the same sizes.

    The first call runs as any other does, and has its memory made. The second is recorded: it has the same memory, and
    all its kernels are launched by one request then, as those of every later call are. Where CUDA doesn't let a call be
    recorded, all run as the first did. Safe for concurrent callers, who take turns.
    """

    def __init__(
        self,
        library: Library,
        device: Device,
        call: Any,
        rest: Sequence[Any],
        checked: Callable[[Mapping[str, np.ndarray]], list[np.ndarray]],
    ) -> None:
        self._library, self._device, self._call, self._rest = library, device, call, rest
        self._checked = checked
        self._inputs: list[Any] = []
        self._recording: Recording | None = None
        self._records = True
        self._lock = threading.Lock()

    @property
    def is_recorded(self) -> bool:
        """Say whether calls are launched as one by now."""
        return self._recording is not None

    def run(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs in order; errors are those of `Function.call`."""
        arrays = self._checked(feeds)
        with self._lock:
            is_first = not self._inputs
            if is_first:
                self._inputs = [self._device.put(array) for array in arrays]
            else:
                for tensor, array in zip(self._inputs, arrays, strict=True):
                    self._device.write(tensor, array)
            return [self._device.take(tensor) for tensor in self._outputs(is_first)]

    def _outputs(self, is_first: bool) -> Sequence[Any]:
        arguments = [*self._inputs, *self._rest]
        if self._recording is None and self._records and not is_first:
            self._recording = self._library.record(self._call, arguments)
            self._records = self._recording is not None
        if self._recording is None:
            found: Sequence[Any] = self._library.run(self._call, arguments)
            return found
        self._library.launch(self._recording)
        outputs: Sequence[Any] = self._recording.result
        return outputs


class Row:
    """Hold the cache of one row, and what the encoder gave for its source."""

    def __init__(self, caches: list[Any]) -> None:
        self.caches = caches
        self.source: Source | None = None
        self.step: Repeated | None = None


class Decoder:
    """Run the decoder of a bundle over preallocated caches, behind its encoder if there is one."""

    def __init__(self, library: Library, manifest: Mapping[str, Any]) -> None:
        model, cache = manifest["model"], manifest["cache"]
        self._library = library
        self._prefill = library.function("decoder_prefill")
        self._step = library.function("decoder_step")
        self.reader = None
        if "encoder" in manifest["graphs"] and "source_context" in model:
            open_scorer = partial(library.function, "scorer") if "scorer" in manifest["graphs"] else None
            self.reader = SourceReader(library.function("encoder"), int(model["source_context"]), open_scorer)
        self._dtype = cache["dtype"]
        self._shape = (1, int(model["kv_heads"]), int(model["context"]), int(model["head_dim"]))
        self.context = int(model["context"])
        self.vocab_size = int(model["vocab_size"])
        one = int(np.prod(self._shape)) * np.dtype(self._dtype).itemsize
        self.cache_bytes = 2 * int(model["layers"]) * one
        if len(self._step.facts.caches) != 2 * int(model["layers"]):
            raise ContractError(f"the library should keep {2 * int(model['layers'])} caches: build the bundle again")

    def new_cache(self, batch: int) -> list[Row]:
        """Make an empty cache for `batch` sequences."""
        count = len(self._step.facts.caches)
        return [Row([self._library.wrap(_room(self._shape, self._dtype)) for _ in range(count)]) for _ in range(batch)]

    def read_source(self, cache: list[Row], row: int, ids: np.ndarray) -> None:
        """Run the encoder over ids [1, tokens] int64 and keep what the decoder reads of it for one row of the cache."""
        cache[row].source = reads_sources(self.reader).read(ids)

    def score(self, ids: np.ndarray, prefix: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return the logits [C] float32 of `tokens` [C] as the next after `prefix` [1, S], of a source [1, N]."""
        return reads_sources(self.reader).score(ids, prefix, tokens)

    def run(
        self, cache: list[Row], input_ids: np.ndarray, past: np.ndarray, lengths: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """Append tokens to the cache and return logits [batch, P, vocab] float32.

        input_ids [batch, sequence] int64, rows right-padded; past [batch]: tokens of each row already in the cache, a
        smaller number rewinds it; lengths [batch]: valid new tokens; positions [batch, P]: the new positions to score.
        """
        longest = int((past + lengths).max())
        if longest > self.context:
            raise ContractError(f"{longest} tokens do not fit the context of {self.context}")
        found = []
        for number, row in enumerate(cache):
            count = int(lengths[number])
            ids = input_ids[number : number + 1, :count]
            found.append(self._run_row(row, ids, int(past[number]), positions[number : number + 1]))
        return np.concatenate(found) if len(found) > 1 else found[0]

    def _run_row(self, row: Row, ids: np.ndarray, past: int, wanted: np.ndarray) -> np.ndarray:
        """Append ids [1, n] to one row; return logits [1, P, vocab]."""
        if self.reader is not None and row.source is None:
            raise ContractError("a row has no source: read one first")
        places = np.arange(past, past + ids.shape[1], dtype=np.int64)[None]
        feeds = {
            "input_ids": np.asarray(ids, np.int64),
            "position_ids": places,
            "logits_positions": np.asarray(wanted, np.int64),
            **(row.source or {}),
        }
        is_step = ids.shape[1] == 1 and wanted.shape[1] == 1
        if is_step and row.source is None:
            row.step = row.step or self._step.repeated(row.caches)
            if row.step is not None:
                return row.step.run(feeds)[0]
        (logits,) = (self._step if is_step else self._prefill).call(row.caches, feeds)
        return self._library.unwrap(logits)


def open_parts(library: Library, manifest: Mapping[str, Any]) -> list[Function]:
    """Return the functions between an encoder's exits, first to last; ContractError where their ends are others."""
    last, answer = len(manifest["model"]["exits"]), set(manifest["ends"]["model"]["outputs"])
    parts = []
    for number in range(last + 1):
        part = library.function(f"{PART}{number}")
        inputs = {"states" if number else "input_ids", "attention_mask"}
        leaving = set() if number == last else {"next_states", "gate"}
        wrong = sorted((set(part.facts.inputs) - inputs) | (set(part.facts.outputs) ^ (answer | leaving)))
        if wrong:
            raise ContractError(
                f"the library's function {PART}{number} should give and take what a part between exits does, but "
                f"differs in {wrong[0]!r}: build the bundle again"
            )
        parts.append(part)
    return parts


def open_library(path: Path, manifest: Mapping[str, Any], threads: int | None) -> Library:
    """Load the library of a bundle in directory `path`; `threads` None takes all processors.

    Raises ConfigError for a manifest that describes none, TargetError where processor or TVM are lacking, ContractError
    for a library that isn't the one that was built.
    """
    facts = read_library(manifest)
    check_processor(facts)
    if facts.gpu is not None:
        check_gpu(facts.gpu)
    verify_hashes(path, manifest, [facts.file])
    model, alone = manifest["model"], "model" in manifest["graphs"]
    limits = Limits(vocab_size=model.get("vocab_size"), tokens=model.get("context") if alone else None)
    return Library(path, facts, path / manifest["weights"]["file"], threads, limits)
