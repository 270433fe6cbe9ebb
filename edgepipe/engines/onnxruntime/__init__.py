"""Lower the portable dialect for onnxruntime: fused operators, packed weights, one memory-mapped file for all graphs.

The order is the list below. Each pass is one file, says what it rewrites and what it leaves alone. Graphs that the
framework's exporter traced keep their inputs and outputs, and so do a student's encoder and scorer.

Lowered graph `decoder` of the builders (docs/bundle.md): input_ids, seqlens_k, total_sequence_length,
logits_positions and the caches past_key.i / past_value.i [batch, kv_heads, context, head_dim] → logits, and the same
buffers as present_key.i / …
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from edgepipe.artifacts import OnnxModel
from edgepipe.engines.onnxruntime.fuse_attention import fuse_attention
from edgepipe.engines.onnxruntime.fuse_norms import fuse_norms
from edgepipe.engines.onnxruntime.fuse_reading import fuse_reading
from edgepipe.engines.onnxruntime.integer_products import Arithmetic, Range, integer_products
from edgepipe.engines.onnxruntime.join_projections import join_projections
from edgepipe.engines.onnxruntime.place_weights import place_weights
from edgepipe.engines.onnxruntime.planned import FILE_NAME, WeightsFile
from edgepipe.engines.onnxruntime.round_tokens import round_tokens
from edgepipe.engines.onnxruntime.source_codes import source_codes
from edgepipe.engines.onnxruntime.whole_heads import whole_heads
from edgepipe.errors import TargetError
from edgepipe.runtime.exits import PART
from edgepipe.students.config import is_student

_HEAD_DIM_STEP = 16  # GroupQueryAttention refuses others (onnxruntime 1.31)
CACHE_DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "int8": ir.DataType.INT8}
_WHOLE_TEXT = re.compile(rf"encoder|model|{PART}\d+")  # graphs that run all tokens of a text at once, never one by one
_OPSETS = {"": 23, "com.microsoft": 1}


def lower(
    model: OnnxModel,
    *,
    accuracy_level: int,
    cache_dtype: str = "float32",
    scales: Mapping[str, np.ndarray] | None = None,
    exact: bool = False,
    ranges: Mapping[str, Mapping[str, Range]] | None = None,
    file: WeightsFile | None = None,
) -> tuple[dict[str, bytes], WeightsFile]:
    """Return the lowered graphs by name and the layout of the weights they share; nothing is written.

    `accuracy_level` is MatMulNBits': 0 computes in float32, 4 multiplies int8 activations. `cache_dtype` is what
    keys and values are kept in where the cache is preallocated: "float32", "float16", or "int8" with the `scales` that
    cache_scales.py finds. `exact` multiplies in float what the model's plan rounds; `ranges` are those
    of static activations: graph → input → range.
    `file` is the layout of an earlier lowering of the same model, whose weights these graphs share.
    """
    preallocated = "ends" not in model.spec
    built = preallocated or is_student(model.info.config)  # by edgepipe's own builders, in forms the passes know
    if preallocated:
        _check_head_size(model)
    file = WeightsFile() if file is None else file
    rounded = {model.weights[name].name for name in model.activations.layers} if model.activations else set()
    graphs = {}
    for name, portable in model.graphs.items():
        source = ir.from_proto(onnx.load_model_from_string(portable))
        graph = source.graph
        # Over many rows a call's own cost is nothing, and the Split copies: apart, an encoder takes 2–4 % less
        cached = preallocated and (name == "decoder" or name.startswith(PART))
        whole_text = bool(_WHOLE_TEXT.fullmatch(name)) and not cached
        if not whole_text:
            join_projections(graph, model.weights, rounded)
        if built:
            fuse_reading(graph)
        else:
            whole_heads(graph)
        if cached:
            fuse_attention(graph, model.spec, CACHE_DTYPES[cache_dtype], scales)
        if cache_dtype == "int8" and preallocated:
            source_codes(graph, scales or {})
        if built:
            fuse_norms(graph)
        if model.activations is not None:
            _round_activations(graph, model, file, exact=exact, ranges=(ranges or {}).get(name, {}))
        place_weights(graph, model.weights, file, accuracy_level, many_rows=whole_text)
        _drop_unused(graph, inputs=cached)
        graph.opset_imports.update(_OPSETS)
        graphs[name] = bytes(ir.to_proto(source).SerializeToString(deterministic=True))
    return graphs, file


def _round_activations(
    graph: ir.Graph, model: OnnxModel, file: WeightsFile, *, exact: bool, ranges: Mapping[str, Range]
) -> None:
    """Let products read rounded activations, as the model's plan says."""
    plan = model.activations
    assert plan is not None
    if plan.tokens is None:
        integer_products(graph, model.weights, file, Arithmetic(kind="exact" if exact else plan.kind, ranges=ranges))
    elif not exact:
        round_tokens(graph, model.weights, file, plan)


def _check_head_size(model: OnnxModel) -> None:
    """Refuse a head size that the attention kernel has no code for."""
    head_dim = model.spec["head_dim"]
    if head_dim % _HEAD_DIM_STEP:
        raise TargetError(
            f"onnxruntime's attention kernel needs a head size that is a multiple of {_HEAD_DIM_STEP}, "
            f"and this model's is {head_dim}"
        )


def write(
    graphs: Mapping[str, bytes], file: WeightsFile, directory: Path, progress: Callable[[int, int], None]
) -> None:
    """Write graphs and weights into `directory`: NAME.onnx for each, and one file of weights."""
    for name, graph in graphs.items():
        (directory / f"{name}.onnx").write_bytes(graph)
    file.write(directory / FILE_NAME, progress)


def _drop_unused(graph: ir.Graph, *, inputs: bool) -> None:
    """Remove nodes, last to first, then initializers that nothing reads, and inputs where the contract has others."""
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(o.uses() or o in outputs for o in node.outputs):
            graph.remove([node], safe=True)
    for value in list(graph.inputs) if inputs else ():
        if not value.uses():
            graph.inputs.remove(value)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
