"""What a decoder's step for an NPU needs beside an encoder's graph: texts token by token, and checks of its logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from edgepipe.artifacts import Json, ModelInfo, OnnxModel
from edgepipe.compiling.checks import worst_error, worst_loss
from edgepipe.engines.qnn.ranges import stepped
from edgepipe.quantizers.texts import Calibration, check_calibration, rows_of
from edgepipe.runtime.npu_step import PAST, PAST_MASK, Decoder

_STEPS = 256  # that ranges are seen over: each is a run of the whole model
_ROW = 64  # tokens of a row of these
CHECKED = 4  # tokens that the emulator checks: seconds for each
_EXACT = 12  # tokens that the float graph is checked on


def rows_of_steps(info: ModelInfo, calibration: Calibration, context: int, seed: int) -> list[list[int]]:
    """Return rows of a calibration's ids that the step runs one by one, as many as `_STEPS` allows."""
    check_calibration(info, calibration)
    length = min(_ROW, context)
    rows = rows_of(info, replace(calibration, tokens=max(8, length)), seed=seed)
    return [row[:length] for row in rows[-max(1, _STEPS // length) :]]  # short ones stand first


def cache_zeros(graph: onnx.ModelProto) -> dict[str, int]:
    """Return the level that means 0 in every tensor of a rounded step's cache."""
    held = {tensor.name: tensor for tensor in graph.graph.initializer}
    names = [v.name for v in graph.graph.input if v.name.startswith(PAST) and v.name != PAST_MASK]
    return {name: int(onnx.numpy_helper.to_array(held[f"{name}/zero"])) for name in names}


def check_step(
    model: OnnxModel, plain: onnx.ModelProto, path: Path, manifest: Json, row: list[int], work: Path
) -> tuple[float, float]:
    """Return the error of the float step beside the portable graph, and of what ships, over a row of ids."""
    from edgepipe.graph.evaluate import prompt_logits
    from edgepipe.runtime.onnxruntime import open_graph
    from edgepipe.runtime.qnn import open_context

    ids = row[:_EXACT]
    expected = prompt_logits(model, np.array([ids], np.int64))[0]
    file = work / "plain.onnx"
    onnx.save(plain, file)
    exact = open_graph(file, None)
    file.unlink()
    ours = np.stack([values["logits"][0, 0] for _, values in stepped(exact, plain, ids)])
    decoder = Decoder(open_context(path, manifest, "decoder", None), manifest)
    count = min(CHECKED, len(ids))
    got = decoder.run(
        decoder.new_cache(1),
        np.array([ids[:count]], np.int64),
        np.zeros(1, np.int64),
        np.array([count]),
        np.arange(count)[None],
    )
    return worst_error([ours], [expected]), worst_loss([got[0]], [expected[:count]])


def is_decoder(model: OnnxModel) -> bool:
    """Say whether a model is a decoder whose graph edgepipe wrote, with positions and a cache of its own."""
    return set(model.graphs) == {"decoder"} and "ends" not in model.spec and bool(model.spec.get("context"))
