"""Lower the portable dialect for TVM: functions of Relax with kernels of our own, one library for all graphs.

`lower` converts the graphs and lays out the weights, `build` compiles the library, `write` writes both. Weights are
parameters of the functions, in a file beside the library: as constants TVM would fold what decodes them, and the
library would hold them as floats.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import tvm
from tvm import relax

from edgepipe.artifacts import Json, OnnxModel
from edgepipe.engines.linking import link, linked_by, linked_here
from edgepipe.engines.native import level_here, linker
from edgepipe.engines.nvcc import compiled_by
from edgepipe.engines.onnxruntime.planned import FILE_NAME, WeightsFile
from edgepipe.engines.tvm import schedules
from edgepipe.engines.tvm.convert import Function, Library
from edgepipe.engines.tvm.heads import Cached
from edgepipe.engines.tvm.kernels import pack
from edgepipe.engines.tvm.tiling import Tiling
from edgepipe.errors import TargetError
from edgepipe.graph.dialect import weight_name
from edgepipe.levels import Level

__all__ = ["LIBRARY_NAME", "Level", "Library", "build", "describe", "level_here", "lower", "write"]

LIBRARY_NAME = "library.so"
_INTEGER_LEVEL = 4
_KEEP_SOURCE = "TVM_COMPILE_FORCE_FALLBACK"


def lower(
    model: OnnxModel,
    level: Level,
    *,
    accuracy_level: int,
    cache_dtype: str = "float32",
    exact: bool = False,
    file: WeightsFile | None = None,
    tilings: Mapping[str, Tiling] | None = None,
) -> Library:
    """Return the functions of a model's graphs and the layout of the weights they share; nothing is compiled.

    `accuracy_level` is MatMulNBits': from 4 on activations are rounded to 8 bits, where the processor multiplies
    bytes. `exact` multiplies in float what the model's plan multiplies as integers, and takes none of the kernels that
    only a GPU's threads run. `file` is the layout of an earlier lowering of the same model. `tilings` take the place of
    the default ones, by Product.key.
    """
    plan = model.activations
    if plan is not None and plan.kind == "static":
        raise TargetError("the tvm engine rounds activations as they come: take quantize.activations=dynamic")
    preallocated = "ends" not in model.spec
    bytes_multiply = bool(level.byte_products) and level.gpu is None
    graphs = {name: ir.from_proto(onnx.load_model_from_string(graph)).graph for name, graph in model.graphs.items()}
    library = Library(
        weights=model.weights,
        file=WeightsFile() if file is None else file,
        level=level,
        integers=bytes_multiply and not exact and (accuracy_level >= _INTEGER_LEVEL or plan is not None),
        has_threads=level.gpu is not None and not exact,
        multiplied=_multiplied(graphs, model) if level.gpu is None else frozenset(),
        tilings=tilings or {},
    )
    for name, graph in graphs.items():
        if preallocated and name == "decoder":
            _lower_decoder(library, graph, model.spec, cache_dtype)
            continue
        inputs = [value for value in graph.inputs if weight_name(value.name or "") is None]
        Function(library, name, graph, {}).convert(inputs, list(graph.outputs))
    return library


def _lower_decoder(library: Library, graph: ir.Graph, spec: Json, cache_dtype: str) -> None:
    """Convert a decoder over a preallocated cache twice: for any number of tokens, and for one."""
    logits = [value for value in graph.outputs if value.name == "logits"]
    for name, dims in (
        ("decoder_prefill", {"batch": 1}),
        ("decoder_step", {"batch": 1, "sequence": 1, "wanted": 1}),
    ):
        function = Function(library, name, graph, dims)
        function.cache = Cached(spec=spec, dtype=cache_dtype, positions="position_ids")
        inputs = [
            value
            for value in graph.inputs
            if weight_name(value.name or "") is None and not str(value.name).startswith("past_")
        ]
        function.convert(inputs, logits)


def _multiplied(graphs: Mapping[str, ir.Graph], model: OnnxModel) -> frozenset[str]:
    """Return the weights that are the matrix of a product in some graph."""
    found = set()
    for graph in graphs.values():
        for node in graph:
            matrix = node.inputs[1] if node.op_type == "MatMul" else None
            named = None if matrix is None else weight_name(matrix.name or "")
            if named is not None and named[1]:
                found.add(model.weights[named[0]].name)
    return frozenset(found)


def build(library: Library, path: Path, level: Level | None = None) -> None:
    """Compile and link the functions of a library into the file `path`; TargetError when there is no linker.

    `level` takes the place of the library's own, for functions that have no instructions of it.
    """
    level = library.level if level is None else level
    target = tvm.target.Target(level.target())
    # No FoldConstant: the converter has computed what is constant, and it would put tables of every position, which
    # are computed when a bundle is loaded, into the library. No KillAfterLastUse: memory is planned, so all it does is
    # to write an instruction for every tensor, a tenth of a decoder's library.
    module = library.builder.get()
    marking = [relax.transform.LegalizeOps(), relax.transform.AnnotateTIROpPattern()]
    fusing = [
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.RewriteDataflowReshape(),
    ]
    planning = [
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        relax.transform.LowerAllocTensor(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(emit_err_ctx=False),  # a sentence for each weight: 0.1 MB of text
        relax.transform.AttachGlobalSymbol(),
    ]
    with target:
        marked = tvm.transform.Sequential(marking)(module)
        if level.gpu is not None:
            marked = schedules.products_join(marked)
        fused = tvm.transform.Sequential(fusing)(marked)
        if level.gpu is not None:  # without functions of reshapes that have become views
            used = relax.transform.DeadCodeElimination(list(library.functions))(fused)
            fused = schedules.share_out(used, target)
        lowered = tvm.transform.Sequential(planning)(fused)
    with nullcontext() if level.gpu is None else source_kept():
        built: Any = relax.build(lowered, target=target, relax_pipeline=None)
    options: dict[str, Any]
    if linked_here(level):
        program = linker()
        options = {"cc": program, "options": ["-Wl,-s", "-Wl,--build-id=none"]}
    else:
        program, options = "Zig", {"fcompile": partial(link, level=level)}
    if level.gpu is not None:
        options["fpack_imports"] = partial(pack, gpu=level.gpu)
    try:
        built.export_library(str(path), **options)
    except (RuntimeError, subprocess.SubprocessError) as error:
        raise TargetError(f"{program} could not link the library: {str(error).strip().splitlines()[-1]}") from error


@contextmanager
def source_kept() -> Iterator[None]:
    """Have TVM keep kernels as source: where it finds a GPU's driver, it would compile them for that GPU."""
    before = os.environ.get(_KEEP_SOURCE)
    os.environ[_KEEP_SOURCE] = "1"
    try:
        yield
    finally:
        del os.environ[_KEEP_SOURCE]
        os.environ |= {} if before is None else {_KEEP_SOURCE: before}


def write(library: Library, directory: Path, progress: Callable[[int, int], None]) -> None:
    """Write the weights of a library into `directory`."""
    library.file.write(directory / FILE_NAME, progress)


def describe(library: Library, level: Level | None = None) -> Json:
    """Return what the manifest says of a library: for which processor, its functions, where their weights lie."""
    level = library.level if level is None else level
    return {
        "file": LIBRARY_NAME,
        "level": level.name,
        "machine": level.machine,
        "system": level.system,
        "processor": level.mcpu,
        "features": list(level.mattr),
        "flags": list(level.flags),
        **linked_by(level),
        **({} if level.gpu is None else {"gpu": {**asdict(level.gpu), "compiled": list(level.gpu.compiled)}}),
        **compiled_by(level),
        "arithmetic": max(sorted(library.products), key=library.products.__getitem__, default="float32"),
        "functions": library.functions,
        "tensors": library.tensors,
    }
