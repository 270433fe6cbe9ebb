"""Save and load artifacts, hash contents, make cache keys.

A weight store on disk is `weights.bin` (one value after another, as stored) and `weights.json` (where each lies). It
comes back as memory-mapped arrays: opening it reads nothing. An artifact whose weights already lie in another stage's
folder, or still come from the source, only refers to them, so weights are on disk once per stage that changed them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe.artifacts import (
    ActivationPlan,
    CompiledModel,
    Json,
    Licence,
    Measured,
    ModelInfo,
    OnnxModel,
    QuantizedTensor,
    StageRecord,
    TokenGrid,
    TorchModel,
)
from edgepipe.errors import ContractError
from edgepipe.weights import Value, Weight, WeightStore

Artifact = TorchModel | OnnxModel | CompiledModel | Measured

_ALIGNMENT = 64
_SEAL = "key.json"
_BATCHES = "calibration.npz"
_PARTS = ("codes", "scale", "zero_points", "minima", "column_scale")
# what decides the bytes of a result, beside edgepipe's own code
_PRODUCERS = (
    *("numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "torch", "transformers"),
    *("apache-tvm", "apache-tvm-ffi", "gguf", "onnxruntime-qnn", "safetensors", "tokenizers"),
)


def save_weights(store: WeightStore, directory: Path, progress: Callable[[str, int, int], None]) -> WeightStore:
    """Compute every weight, one at a time, into `directory`; return the store that reads them back."""
    index: list[Json] = []
    with (directory / "weights.bin").open("wb") as file:
        for done, name in enumerate(store):
            progress(name, done, len(store))
            value = store.load(name)
            index.append(_write_value(file, store[name], value))
            del value
        file.flush()
        os.fsync(file.fileno())
    write_json(directory / "weights.json", {"tensors": index, "aliases": store.aliases})
    return load_weights(directory)


def load_weights(directory: Path) -> WeightStore:
    """Open a saved weight store; values are views of one memory-mapped file."""
    index = read_json(directory / "weights.json")
    path = directory / "weights.bin"
    file = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    weights = {}
    for entry in index["tensors"]:
        weights[entry["name"]] = Weight(
            name=entry["name"],
            shape=tuple(entry["shape"]),
            dtype=entry["dtype"],
            nbytes=entry["nbytes"],
            grid=entry["grid"],
            load=_reader(file, entry),
        )
    return WeightStore(weights, index["aliases"], origin=str(directory.resolve()))


def save_artifact(artifact: Artifact, directory: Path, progress: Callable[[str, int, int], None]) -> None:
    """Write an artifact into an empty directory."""
    record: Json = {"kind": type(artifact).__name__, "history": [dataclasses.asdict(r) for r in artifact.history]}
    if isinstance(artifact, Measured):
        record |= {"figures": artifact.figures}
    else:
        _save_info(artifact.info, directory)
    if isinstance(artifact, TorchModel | OnnxModel):
        origin = artifact.weights.origin
        if origin is None:
            save_weights(artifact.weights, directory, progress)
        record["weights"] = origin if origin in (None, "source") else os.path.relpath(origin, directory)
        record["activations"] = _save_plan(artifact.activations, directory)
    if isinstance(artifact, OnnxModel):
        record["spec"] = artifact.spec
        record["graphs"] = sorted(artifact.graphs)
        for name, graph in artifact.graphs.items():
            (directory / f"{name}.onnx").write_bytes(graph)
    if isinstance(artifact, CompiledModel) and artifact.path.resolve() != (directory / "bundle").resolve():
        shutil.move(artifact.path, directory / "bundle")
    write_json(directory / "artifact.json", record)


def load_artifact(directory: Path, source: TorchModel, compiled: CompiledModel | None = None) -> Artifact:
    """Read an artifact back. `source` lends its weights to artifacts that refer to it, `compiled` its bundle."""
    record = read_json(directory / "artifact.json")
    history = tuple(StageRecord(**{**r, "notes": tuple(r["notes"])}) for r in record["history"])
    if record["kind"] == "Measured":
        if compiled is None:
            raise ContractError(f"{directory} holds measurements, but the bundle they belong to is gone")
        return Measured(model=compiled, figures=record["figures"], history=history)
    info = _load_info(directory)
    if record["kind"] == "CompiledModel":
        path = directory / "bundle"
        return CompiledModel(info=info, path=path, manifest=read_json(path / "manifest.json"), history=history)
    origin = record["weights"]
    if origin == "source":
        weights = source.weights
    else:
        weights = load_weights(directory if origin is None else directory / origin)
    plan = _load_plan(record["activations"], directory)
    if record["kind"] == "TorchModel":
        return TorchModel(info=info, weights=weights, activations=plan, history=history)
    graphs = {name: (directory / f"{name}.onnx").read_bytes() for name in record["graphs"]}
    spec = record["spec"]
    return OnnxModel(info=info, weights=weights, graphs=graphs, spec=spec, activations=plan, history=history)


def cache_key(*contents: object) -> str:
    """Hash the contents a result depends on, edgepipe's own code and its producers' versions among them."""
    text = json.dumps([*contents, code_fingerprint(), versions()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def code_fingerprint() -> str:
    """Hash edgepipe's own source files."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def versions(names: Sequence[str] = _PRODUCERS) -> dict[str, str]:
    """Return the installed versions of packages: by default those that decide the bytes of any result."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def file_sha256(path: Path) -> str:
    """Return a file's sha256, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write JSON the same way every time: sorted keys, two spaces, a last newline; whole, or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    staged = path.with_name(f".{path.name}.tmp")
    try:
        staged.write_text(text, encoding="utf-8")
        with staged.open("r+b") as file:
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Read a JSON file of ours."""
    return json.loads(path.read_text(encoding="utf-8"))


def publish(staged: Path, target: Path) -> None:
    """Put a finished directory in its place: whole, or not at all; an earlier one goes only when the new one stands.

    What the directory holds is on the disk before it gets its name: after a power cut it is whole too.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _flush_tree(staged)
    old, gone = (target.with_name(f".{target.name}.{word}-{os.getpid()}") for word in ("old", "gone"))
    try:
        if target.exists():
            for path in (old, gone):
                shutil.rmtree(path, ignore_errors=True)  # of a run that was killed and had our process id
            target.rename(old)
        staged.rename(target)
    except BaseException:  # Ctrl-C between the two as well
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    _flush_directory(target.parent)
    with contextlib.suppress(OSError):
        old.rename(gone)  # a name that `tidy` restores is always that of a whole directory
    shutil.rmtree(gone, ignore_errors=True)


def tidy(folder: Path, names: str) -> None:
    """Clear away what killed runs left in `folder` around the `names` (a regular expression).

    A directory that `publish` had moved aside comes back when its successor never got its place.
    """
    if not folder.is_dir():
        return
    left = re.compile(rf"\.({names})\.(?:tmp|work|gone-\d+|(old-\d+))")
    for path in sorted(folder.iterdir()):
        match = left.fullmatch(path.name)
        if match is None:
            continue
        with contextlib.suppress(OSError):
            if match[2] and not (folder / match[1]).exists():
                path.rename(folder / match[1])
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _flush_tree(directory: Path) -> None:
    """Wait until files and names below a directory are on the disk; what is there already costs nothing."""
    for path in directory.rglob("*"):
        if path.is_dir():
            _flush_directory(path)
        else:
            with path.open("r+b") as file:
                os.fsync(file.fileno())
    _flush_directory(directory)


def _flush_directory(directory: Path) -> None:
    """Wait until the names in a directory are on the disk, where a system can do that."""
    with contextlib.suppress(OSError):  # Windows opens no directories, some file systems flush none
        file = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def seal(directory: Path, key: str) -> None:
    """Note what a finished stage's directory holds, and the key of the contents it depends on."""
    write_json(directory / _SEAL, {"key": key, "files": _sizes(directory)})


def is_sealed(directory: Path, key: str) -> bool:
    """Say whether a directory holds the finished stage of this key, with every file and its size as they were."""
    try:
        return bool(read_json(directory / _SEAL) == {"key": key, "files": _sizes(directory)})
    except (OSError, ValueError):
        return False


def _sizes(directory: Path) -> dict[str, int]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != _SEAL)
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}


def _write_value(file: Any, weight: Weight, value: Value) -> Json:
    entry: Json = {"name": weight.name, "shape": list(weight.shape), "dtype": weight.dtype, "grid": weight.grid}
    arrays: dict[str, np.ndarray]
    if isinstance(value, QuantizedTensor):
        arrays = {part: getattr(value, part) for part in _PARTS if getattr(value, part) is not None}
        entry |= {"bits": value.bits, "group": value.group}
        shape: tuple[int, ...] = value.shape
    else:
        arrays = {"value": value}
        shape = value.shape
    entry["nbytes"] = sum(a.nbytes for a in arrays.values())
    if shape != weight.shape or entry["nbytes"] != weight.nbytes:
        raise ContractError(
            f"{weight.name}: planned {weight.shape} in {weight.nbytes} bytes, got {shape} in {entry['nbytes']}"
        )
    entry["parts"] = {}
    for part, array in arrays.items():
        file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
        entry["parts"][part] = {"offset": file.tell(), "dtype": array.dtype.name, "shape": list(array.shape)}
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return entry


def _reader(file: np.ndarray, entry: Json) -> Callable[[], Value]:
    def load() -> Value:
        arrays = {part: _view(file, place) for part, place in entry["parts"].items()}
        if "value" in arrays:
            return arrays["value"]
        out, n_in = entry["shape"]
        return QuantizedTensor(
            shape=(out, n_in), bits=entry["bits"], group=entry["group"], source_grid=entry["grid"], **arrays
        )

    return load


def _view(file: np.ndarray, place: Json) -> np.ndarray:
    import ml_dtypes

    dtype = np.dtype(getattr(ml_dtypes, place["dtype"], place["dtype"]))
    size = int(np.prod(place["shape"], dtype=np.int64)) * dtype.itemsize
    return file[place["offset"] : place["offset"] + size].view(dtype).reshape(place["shape"])


def _save_plan(plan: ActivationPlan | None, directory: Path) -> Json | None:
    """Write the batches of a plan and return the rest of it."""
    if plan is None:
        return None
    arrays = {f"{number} {name}": array for number, batch in enumerate(plan.batches) for name, array in batch.items()}
    np.savez(directory / _BATCHES, allow_pickle=False, **arrays)
    record = dataclasses.asdict(dataclasses.replace(plan, batches=()))
    return {**record, "batches": len(plan.batches)}


def _load_plan(record: Json | None, directory: Path) -> ActivationPlan | None:
    if record is None:
        return None
    batches: list[dict[str, np.ndarray]] = [{} for _ in range(record["batches"])]
    with np.load(directory / _BATCHES) as file:
        for key in file.files:
            number, _, name = key.partition(" ")
            batches[int(number)][name] = file[key]
    tokens = None if record["tokens"] is None else TokenGrid(**record["tokens"])
    layers = tuple(record["layers"])
    return ActivationPlan(**{**record, "tokens": tokens, "layers": layers, "batches": tuple(batches)})


def _save_info(info: ModelInfo, directory: Path) -> None:
    record = dataclasses.asdict(dataclasses.replace(info, tokenizer={}))
    record["tokenizer"] = sorted(info.tokenizer)
    folder = directory / "tokenizer"
    folder.mkdir()
    for name, content in info.tokenizer.items():
        (folder / name).write_bytes(content)
    write_json(directory / "info.json", record)


def _load_info(directory: Path) -> ModelInfo:
    record = read_json(directory / "info.json")
    record["tokenizer"] = {name: (directory / "tokenizer" / name).read_bytes() for name in record["tokenizer"]}
    record["licence"] = Licence(**{**record["licence"], "lineage": tuple(record["licence"]["lineage"])})
    record["eos_token_ids"] = tuple(record["eos_token_ids"])
    record["embeddings"] = tuple(record["embeddings"])
    return ModelInfo(**record)
