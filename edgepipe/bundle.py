"""Write a bundle: tokenizer, bill of materials and manifest beside graphs and weights (docs/bundle.md: the contract).

Everything in the manifest is decided by the recipe, the source's contents and the versions: the same three give the
same bytes. Seconds, machines and measurements live outside, in run.json.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import edgepipe
from edgepipe.artifacts import Json, OnnxModel
from edgepipe.sbom import FILE_NAME as BILL
from edgepipe.sbom import bill_of_materials
from edgepipe.store import file_sha256, versions, write_json
from edgepipe.weights import Weight, WeightStore

if TYPE_CHECKING:
    from edgepipe.engines.onnxruntime.planned import WeightsFile

SCHEMA = 1
MANIFEST = "manifest.json"
_CACHE_BYTES = {"float32": 4, "float16": 2}  # of one element of a key or value
_PARTS = (("embedding and head", ("embed_tokens", "lm_head")), ("attention", ("self_attn.",)), ("mlp", ("mlp.",)))


def write_bundle(model: OnnxModel, path: Path, file: WeightsFile, recipe: Json, cache_dtype: str) -> Json:
    """Complete the bundle in `path`, where graphs and weights already are; return its manifest."""
    (path / "tokenizer.json").write_bytes(model.info.tokenizer["tokenizer.json"])
    names = ["decoder.onnx", "weights.bin", "tokenizer.json"]
    if model.info.chat_template is not None:
        (path / "chat_template.jinja").write_text(model.info.chat_template, encoding="utf-8")
        names.append("chat_template.jinja")
    files = {name: _facts(path / name) for name in names}
    write_json(path / BILL, bill_of_materials(model.info, files, versions()))
    files[BILL] = _facts(path / BILL)
    spec = model.spec
    shape = [1, spec["kv_heads"], spec["context"], spec["head_dim"]]
    cache_bytes = 2 * spec["layers"] * _CACHE_BYTES[cache_dtype] * math.prod(shape)
    parameters = model.weights.parameters
    manifest: Json = {
        "schema": SCHEMA,
        "edgepipe": edgepipe.__version__,
        "name": model.info.name,
        "task": model.info.task,
        "engine": "onnxruntime",
        "graphs": {"decoder": "decoder.onnx"},
        "weights": {
            "file": "weights.bin",
            "bytes": file.nbytes,
            "parameters": parameters,
            "bits_per_weight": round(8 * file.nbytes / parameters, 4),
            "parts": weight_parts(model.weights, file),
        },
        "model": spec,
        "cache": {"bytes": cache_bytes, "dtype": cache_dtype, "shape": shape, "layers": spec["layers"]},
        "tokenizer": {
            "file": "tokenizer.json",
            "chat_template": "chat_template.jinja" if model.info.chat_template is not None else None,
            "special_tokens": _special_tokens(model),
        },
        "licence": dataclasses.asdict(model.info.licence),
        "source": {"model": model.info.licence.source, "sha256": model.info.fingerprint},
        "recipe": recipe,
        "history": [dataclasses.asdict(record) for record in model.history],
        "versions": versions(),
        "files": files,
    }
    write_json(path / MANIFEST, manifest)
    return manifest


def _facts(file: Path) -> Json:
    """Return what the manifest says of a file."""
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}


def weight_parts(weights: WeightStore, file: WeightsFile | None = None) -> list[Json]:
    """Sum parameters and bytes by part of the model and by storage, for tables.

    Bytes are those of the weights file where there is one, else those of the store: a file packs 4-bit zero points.
    """
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for weight in weights.values():
        row = sums[_part(weight)]
        row[0] += weight.size
        row[1] += weight.nbytes if file is None else 0
    for planned in () if file is None else file.tensors:  # tensors joined in one are of one part and one storage
        sums[_part(weights[planned.name.partition("+")[0].partition(":")[0]])][1] += planned.nbytes
    return [
        {"part": part, "storage": storage, "parameters": size, "bytes": nbytes, "bits_per_weight": 8 * nbytes / size}
        for (part, storage), (size, nbytes) in sorted(sums.items())
    ]


def _part(weight: Weight) -> tuple[str, str]:
    """Return the part of the model a weight belongs to, and how it is stored."""
    part = next((title for title, marks in _PARTS if any(m in weight.name for m in marks)), "norms and rest")
    return part, f"{weight.dtype} {weight.grid}" if weight.grid else weight.dtype


def _special_tokens(model: OnnxModel) -> dict[str, str | None]:
    """Read the special tokens a chat template may name from tokenizer_config.json."""
    config = json.loads(model.info.tokenizer.get("tokenizer_config.json", b"{}"))
    found: dict[str, str | None] = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(key)
        found[key] = token.get("content") if isinstance(token, dict) else token
    return found
