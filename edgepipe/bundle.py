"""Write a bundle: tokenizer, bill of materials and manifest beside graphs and weights (docs/bundle.md: the contract).

Everything in the manifest is decided by the recipe, the source's contents and the versions: the same three give the
same bytes. Seconds, machines and measurements live outside, in run.json.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import edgepipe
from edgepipe.artifacts import Json, ModelInfo, OnnxModel, StageRecord
from edgepipe.runtime.exits import PART
from edgepipe.sbom import FILE_NAME as BILL
from edgepipe.sbom import bill_of_materials
from edgepipe.store import file_sha256, versions, write_json
from edgepipe.weights import Weight, WeightStore

if TYPE_CHECKING:
    from edgepipe.engines.onnxruntime.planned import WeightsFile

SCHEMA, SCHEMA_DEFLATED = 2, 3  # a reader of the former would go wrong only where weights are deflated
MANIFEST = "manifest.json"
FILE_NAME, DEFLATED = "weights.bin", "weights.bin.z"  # of the weights: as graphs read them, and one zlib stream of that
TUNING = "tuning.json"  # how a compiled library's kernels go through their matrices, where that was searched for
_PIECE = 1 << 20  # bytes that are deflated at a time
_TOKENIZER = "tokenizer.json"
_TEMPLATE = "chat_template.jinja"
_PREPROCESSOR = "preprocessor_config.json"
_CACHE_BYTES = {"float32": 4, "float16": 2, "uint16": 2, "int8": 1}  # of one element of a key or value
_COMPILERS = {"tvm": "apache-tvm", "qnn": "onnxruntime-qnn"}  # packages that decide the bytes of one engine's bundles
_EMBEDDINGS = "embedding and head"
# What parameters of a part are called in the models of transformers; the first part that has a mark takes the weight.
_PARTS = (
    ("attention", ("attn", "attention", "SelfAttention", "EncDecAttention", "c_attn")),
    ("mlp", ("mlp.", "intermediate.", "output.dense", "DenseReluDense", "fc1.", "fc2.", "ffn.", "lin1.", "lin2.")),
    (_EMBEDDINGS, ("embed_tokens", "lm_head")),
)
_REST = "norms and rest"
# Read once for a source, not for every token: an encoder's layers, and the keys and values it gives a decoder.
_CROSS = ".cross_attn."
_READ_ONCE = re.compile(r"^(model\.)?encoder\.(layers|norm)\.|\.cross_attn\.(k|v)_")
_ENCODER = "encoder: "
_NORMS = ("norm", "LayerNorm", "ln_")


def write_bundle(
    model: OnnxModel,
    path: Path,
    file: WeightsFile | None,
    recipe: Json,
    cache_dtype: str,
    *,
    library: Json | None = None,
    npu: Json | None = None,
) -> Json:
    """Complete the bundle in `path`, where graphs and weights already are, deflated or not; return its manifest.

    `library` describes a compiled library, which then is the file of every graph; `npu` a chip's context binary, which
    then holds the weights in place of `file`, and the bytes of each weight in it under `stored`.
    """
    engine = "tvm" if library is not None else "qnn" if npu is not None else "onnxruntime"
    graphs = {name: f"{name}.onnx" if library is None else library["file"] for name in model.graphs}
    deflated = (path / DEFLATED).exists()
    stored = npu["file"] if npu is not None else DEFLATED if deflated else FILE_NAME
    names = [*dict.fromkeys(graphs.values()), stored]
    names += [TUNING] if (path / TUNING).exists() else []
    if model.info.tokenizer:
        (path / _TOKENIZER).write_bytes(model.info.tokenizer[_TOKENIZER])
        names.append(_TOKENIZER)
    for name, text in ((_TEMPLATE, model.info.chat_template), (_PREPROCESSOR, model.info.preprocessor)):
        if text is not None:
            (path / name).write_text(text, encoding="utf-8")
            names.append(name)
    files = {name: _facts(path / name) for name in names}
    others = tuple(package for name, package in _COMPILERS.items() if name != engine)
    made_with = {name: version for name, version in versions().items() if not name.startswith(others)}
    write_json(path / BILL, bill_of_materials(model.info, files, made_with))
    files[BILL] = _facts(path / BILL)
    spec = {key: value for key, value in model.spec.items() if key != "ends"}
    parameters = model.weights.parameters
    manifest: Json = {
        "schema": SCHEMA_DEFLATED if deflated else SCHEMA,
        "edgepipe": edgepipe.__version__,
        "name": model.info.name,
        "task": model.info.task,
        "engine": engine,
        "graphs": graphs,
        "ends": {name: ends for name, ends in model.spec.get("ends", {}).items() if not name.startswith(PART)},
        "weights": {
            "file": stored,
            "bytes": files[stored]["bytes"],
            **({"unpacked": {"file": FILE_NAME, "bytes": file.nbytes}} if deflated and file is not None else {}),
            "parameters": parameters,
            "bits_per_weight": round(8 * files[stored]["bytes"] / parameters, 4),
            "parts": weight_parts(model.weights, model.info.embeddings, file, npu and npu["stored"]),
        },
        "model": spec,
        "cache": _cache(model.spec, cache_dtype),
        "tokenizer": _tokenizer(model.info),
        "preprocessor": None if model.info.preprocessor is None else _PREPROCESSOR,
        "licence": dataclasses.asdict(model.info.licence),
        "source": {"model": model.info.licence.source, "sha256": model.info.fingerprint},
        "recipe": recipe,
        "history": [_recorded(record) for record in model.history],
        "versions": {**made_with, **({"zlib": zlib.ZLIB_RUNTIME_VERSION} if deflated else {})},
        "files": files,
    }
    if library is not None:
        manifest["library"] = library
    if npu is not None:
        manifest["npu"] = {key: value for key, value in npu.items() if key != "stored"}
    write_json(path / MANIFEST, manifest)
    return manifest


def deflate_weights(path: Path, most_share: float) -> tuple[int, int]:
    """Store the weights in `path` deflated, if that takes less than a share of their bytes; return both sizes.

    Huffman codes alone: weights repeat nowhere, so a search for repeats takes ten times as long and finds none.
    """
    plain, deflated = path / FILE_NAME, path / DEFLATED
    stream = zlib.compressobj(level=6, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    with plain.open("rb") as source, deflated.open("wb") as target:
        while piece := source.read(_PIECE):
            target.write(stream.compress(piece))
        target.write(stream.flush())
        target.flush()
        os.fsync(target.fileno())
    before, after = plain.stat().st_size, deflated.stat().st_size
    (plain if after < most_share * before else deflated).unlink()
    return before, after


def _cache(spec: Json, dtype: str) -> Json | None:
    """Describe the cache of one row when it is full; None for a model that keeps none."""
    if "kv_heads" not in spec:
        return None
    kind = "growing" if "ends" in spec else "preallocated"
    dtype = "float32" if kind == "growing" else dtype
    shape = [1, spec["kv_heads"], spec["context"], spec["head_dim"]]
    nbytes = 2 * spec["layers"] * _CACHE_BYTES[dtype] * math.prod(shape)
    return {"kind": kind, "bytes": nbytes, "dtype": dtype, "shape": shape, "layers": spec["layers"]}


def _tokenizer(info: ModelInfo) -> Json | None:
    """Describe the tokenizer; None for a model that reads no text."""
    if not info.tokenizer:
        return None
    return {
        "file": _TOKENIZER,
        "chat_template": None if info.chat_template is None else _TEMPLATE,
        "special_tokens": info.special_tokens,
    }


def _facts(file: Path) -> Json:
    """Return what the manifest says of a file."""
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}


def weight_parts(
    weights: WeightStore,
    embeddings: Sequence[str],
    file: WeightsFile | None = None,
    stored: Mapping[str, int] | None = None,
) -> list[Json]:
    """Sum parameters and bytes by part of the model and by storage, for tables; parts of an encoder before a decoder
    are named so.

    Bytes are those of the weights file where there is one, or of an NPU's levels in `stored`, else those of the store:
    a file packs 4-bit zero points.
    """
    has_source = any(_CROSS in name for name in weights)

    def part_of(weight: Weight) -> tuple[str, str]:
        part, storage = _part(weight, embeddings)
        storage = storage if stored is None else "levels of the NPU"
        return (_ENCODER + part if has_source and _READ_ONCE.search(weight.name) else part), storage

    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for weight in weights.values():
        row = sums[part_of(weight)]
        row[0] += weight.size
        row[1] += (weight.nbytes if file is None else 0) if stored is None else stored.get(weight.name, 0)
    for planned in () if file is None else file.tensors:  # tensors joined in one are of one part and one storage
        sums[part_of(weights[planned.name.partition("+")[0].partition(":")[0]])][1] += planned.nbytes
    return [
        {"part": part, "storage": storage, "parameters": size, "bytes": nbytes, "bits_per_weight": 8 * nbytes / size}
        for (part, storage), (size, nbytes) in sorted(sums.items())
    ]


def _part(weight: Weight, embeddings: Sequence[str]) -> tuple[str, str]:
    """Return the part of the model a weight belongs to, and how it is stored."""
    marked = (title for title, marks in _PARTS if any(mark in weight.name for mark in marks))
    rest = any(mark in weight.name for mark in _NORMS)
    part = _EMBEDDINGS if weight.name in embeddings else _REST if rest else next(marked, _REST)
    return part, f"{weight.dtype} {weight.grid}" if weight.grid else weight.dtype


def _recorded(record: StageRecord) -> Json:
    """Return a stage's record without its figures: seconds would make other bytes of every bundle."""
    return {key: value for key, value in dataclasses.asdict(record).items() if key != "figures"}
