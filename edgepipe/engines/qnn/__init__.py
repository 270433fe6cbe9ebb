"""Lower the portable dialect for a Hexagon NPU: a text of fixed length or a token, 16-bit activations, 8-bit weights.

    portable graph → fix_sizes → plain_attention     float, what the ranges are seen on
                   → rotate                          of a decoder's step (cached_attention), float as well
                   → to_qdq                          pairs of Q and DQ, what the compiler reads
                   → compile_context                 the graph that ships, and its context binary

Each pass is one file, and says what it rewrites and what it leaves alone.
"""

from __future__ import annotations

import numpy as np
import onnx

from edgepipe.artifacts import OnnxModel
from edgepipe.engines.qnn.fix_sizes import fix_sizes
from edgepipe.engines.qnn.plain_attention import plain_attention
from edgepipe.engines.qnn.rotate import rotate
from edgepipe.errors import TargetError

GRAPH, DECODER = "model", "decoder"  # the one graph that is lowered: that of an encoder, or of a decoder
_MOST_BYTES = (1 << 31) - 1  # of a graph with its weights inside, as protocol buffers have it


def lower(model: OnnxModel, tokens: int, most_axes: int) -> onnx.ModelProto:
    """Return an encoder's graph for one text of `tokens` tokens, in float and in operators that an NPU has.

    Of a decoder it is the graph of one token behind a cache of as many places.

    Raises TargetError for what the NPU's shapes can't hold.
    """
    tied = model.weights.aliases.values() if DECODER in model.graphs else ()  # the head is another constant here
    floats = sum(4 * one.size for one in [*model.weights.values(), *(model.weights[name] for name in tied)])
    if floats > _MOST_BYTES:
        raise TargetError(
            f"an NPU's graph is compiled from float weights of {_MOST_BYTES / 1e9:.1f} GB at most, and "
            f"{model.info.name} has {floats / 1e9:.1f} GB: distil or prune it first"
        )
    if DECODER in model.graphs:
        plain = _step(model, tokens)
    else:
        sizes = {"batch": 1, "sequence": tokens}
        plain = plain_attention(fix_sizes(model.graphs[GRAPH], model.weights, sizes))
    graph = plain.graph
    for value in [*graph.input, *graph.value_info, *graph.output]:
        axes = len(value.type.tensor_type.shape.dim)
        if axes > most_axes:
            raise TargetError(
                f"the NPU takes tensors of {most_axes} axes at most, and {value.name} has {axes}: take another target"
            )
    return plain


def _step(model: OnnxModel, context: int) -> onnx.ModelProto:
    """Return a decoder's graph for one token behind a cache of `context` places."""
    sizes = {"batch": 1, "sequence": 1, "past": context, "wanted": 1}
    only = {"logits_positions": np.zeros((1, 1), np.int64)}
    return rotate(plain_attention(fix_sizes(model.graphs[DECODER], model.weights, sizes, only)))
