"""How tests build bundles with TVM."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from edgepipe.artifacts import CompiledModel, OnnxModel
from edgepipe.stages.compile import Compile
from edgepipe.stages.export import Export
from tests.decoders import TARGET, all_on, context, opened

BOTH = dataclasses.replace(TARGET, engines=("onnxruntime", "tvm"))
NOTE = r"agrees with the portable graphs: \de-\d\d exact"


def built(model: OnnxModel, path: Path, notes: list[str] | None = None, **options: object) -> CompiledModel:
    """Compile a model with TVM, checked against the portable graph."""
    path.mkdir()
    settings = {"engine": "tvm", "cache_dtype": "float32", **options}
    ctx = dataclasses.replace(context(path, notes), target=BOTH, recipe={"target": "test", "stages": ["compile"]})
    return Compile(**settings)(model, ctx)  # type: ignore[arg-type]


def decoder(folder: Path, kind: str, grid: str = "float32", *, tokens: int = 64) -> OnnxModel:
    """Export one of DECODERS with all its matrices on a grid."""
    return Export(context=tokens, check_tokens=0)(all_on(opened(folder, kind), grid), context(Path()))
