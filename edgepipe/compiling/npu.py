"""Compile an encoder, or a decoder's step, for a Hexagon NPU, check it, and write the bundle.

Two checks: the float graph of fixed shapes against the portable one (rewritten right, to float32 rounding), and what
ships against it, through the runtime that ships: in the emulator, or on the chip where this machine has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from edgepipe.artifacts import Context, Json, OnnxModel, QuantizedTensor
from edgepipe.bundle import write_bundle
from edgepipe.compiling.checks import within, worst_error, worst_loss
from edgepipe.engines.qnn.rotate import TURNED
from edgepipe.errors import ConfigError, TargetError
from edgepipe.graph.dialect import weight_name
from edgepipe.graph.parts import ends_of
from edgepipe.quantizers.texts import Calibration
from edgepipe.runtime.npu_step import CACHE_DTYPE
from edgepipe.target import QnnSettings, Target

if TYPE_CHECKING:
    from edgepipe.engines.qnn.context import Placement

_USUAL_TOKENS = 64  # of a text: a sentence or two; every text costs as much as this many
_USUAL_CONTEXT = 512  # of a decoder's cache, all of which is read at every step
_CHECKED = 2  # texts of the checks: the emulator takes seconds for each
_QUALCOMM = "Qualcomm's, of the package onnxruntime-qnn, under Qualcomm's own licence (Qualcomm_LICENSE.pdf in it)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Say what a graph for an NPU must be like."""

    tokens: int  # of every text, or of a decoder's cache; 0: 64 or 512, or the model's context where that is less
    least_share: float  # of the nodes that must lie on the NPU
    calibration: Calibration
    checked: bool
    exact_tolerance: float  # largest error of the float graph, in largest outputs
    shipped_tolerance: float  # RMS difference as shipped, in RMS


def check_npu(target: Target) -> QnnSettings:
    """Refuse, before any work, a target without a chip, or a machine without the compiler; return the chip's facts."""
    from edgepipe.runtime.qnn import is_installed

    if target.qnn is None:
        raise ConfigError(
            f"the target {target.name} runs qnn: its file needs a table [qnn] with htp_arch and soc_model"
        )
    if not is_installed():
        raise TargetError(
            f"the compiler for {target.name} isn't here: pip install 'edgepipe[qnn]' (for Linux and Windows)"
        )
    return target.qnn


def build_npu(model: OnnxModel, wanted: Wanted, path: Path, ctx: Context) -> Json:
    """Compile the model's graph and write it beside its context binary in `path`; return the bundle's manifest."""
    from edgepipe.compiling.npu_step import cache_zeros, is_decoder, rows_of_steps
    from edgepipe.engines import qnn as engine
    from edgepipe.engines.qnn.context import binaries, compile_context, placement
    from edgepipe.engines.qnn.qdq import to_qdq
    from edgepipe.engines.qnn.ranges import observe, observe_steps

    chip = check_npu(ctx.target)
    tokens, decodes = _tokens(model, wanted, ctx.target), is_decoder(model)
    role = engine.DECODER if decodes else engine.GRAPH
    ctx.progress("the graph of fixed shapes", 0, 4)
    plain = engine.lower(model, tokens, chip.most_axes)

    def seen(done: int, total: int) -> None:
        ctx.progress("ranges", done, total)

    rows: list[list[int]] = []
    texts: list[dict[str, np.ndarray]] = []
    if decodes:
        rows = rows_of_steps(model.info, wanted.calibration, tokens, ctx.seed)
        found = observe_steps(plain, rows, ctx.work_dir, seen)
    else:
        texts = _texts(model, plain, wanted.calibration, tokens, ctx.seed)
        found = observe(plain, texts, ctx.work_dir, seen)
    rounded, shipped = ctx.work_dir / "rounded.onnx", path / f"{role}.onnx"
    graph = to_qdq(plain, found, model.weights)
    onnx.save(graph, rounded)
    ctx.progress("compiling for the NPU", 2, 4)
    log = compile_context(rounded, shipped, htp_arch=chip.htp_arch, soc_model=chip.soc_model)
    placed = placement(plain, shipped, log)
    if placed.share < wanted.least_share:
        first = placed.leftovers[0]
        raise TargetError(
            f"{ctx.target.name} takes {placed.share:.0%} of the nodes on its NPU, and compile.npu_share asks for "
            f"{wanted.least_share:.0%}: it leaves {len(placed.leftovers)} to the CPU, the first {first.operator} "
            f"{first.node} ({first.reason})"
        )
    files = binaries(path, [shipped.name])
    if len(files) != 1:
        raise TargetError(f"the NPU's compiler should write one context binary, but wrote {', '.join(files) or 'none'}")
    npu = {
        "htp_arch": chip.htp_arch,
        "soc_model": chip.soc_model,
        "tokens": tokens,
        "activations": "uint16",
        "weights": "int8, a scale for each output channel",
        "libraries": _QUALCOMM,
        **placed.to_json(),
        **({"cache_zeros": cache_zeros(graph)} if decodes else {}),
    }
    _tell(ctx, placed, model, plain, _said(wanted, tokens, len(texts), sum(map(len, rows))))
    shape = {key: value for key, value in model.spec.items() if key != "exits"}
    ends = {} if decodes else {"ends": {role: ends_of(plain.SerializeToString())}}
    compiled = replace(model, graphs={role: model.graphs[role]}, spec={**shape, "context": tokens, **ends})
    if wanted.checked and decodes:
        _check_step(compiled, plain, path, npu, rows[-1], wanted, ctx)
    elif wanted.checked:
        _check(compiled, plain, path, npu, texts, wanted, ctx)
    cache = CACHE_DTYPE if decodes else ""
    return write_bundle(
        compiled,
        path,
        None,
        ctx.recipe,
        cache,
        npu={**npu, "file": files[0], "stored": _stored(graph, model.graphs[role])},
    )


def _said(wanted: Wanted, tokens: int, texts: int, steps: int) -> str:
    """Say what runs, and what its ranges come from."""
    from edgepipe.quantizers.texts import DEFAULT_SET

    source = wanted.calibration.source or DEFAULT_SET
    if steps:
        return f"a token a call, a cache of {tokens}, ranges from {steps} steps over {source}"
    return f"texts of {tokens} tokens, ranges from {texts} rows of {source}"


def _tell(ctx: Context, placed: Placement, model: OnnxModel, plain: onnx.ModelProto, said: str) -> None:
    """Note what lies where, and what was rounded again."""
    on_npu = placed.nodes - len(placed.leftovers)
    ctx.note(f"{on_npu} of {placed.nodes} nodes ({placed.share:.1%}) lie on the NPU of {ctx.target.name}; {said}")
    for one in placed.leftovers:
        ctx.note(f"on the CPU: {one.operator} {one.node}, since it {one.reason}")
    if again := _rounded_again(model, plain):
        ctx.note(f"{again} matrices came on other grids than int8 with a scale a row, and were rounded once more")


def _tokens(model: OnnxModel, wanted: Wanted, target: Target) -> int:
    """Return the length of every text; refuse models without one, and lengths that don't fit."""
    from edgepipe.compiling.npu_step import is_decoder

    context, decodes = int(model.spec.get("context") or 0), is_decoder(model)
    if not decodes and ("ends" not in model.spec or "model" not in model.graphs or not context):
        raise TargetError(
            f"{target.name} runs encoders of texts and decoders of the Llama family, and {model.info.name} is for "
            f"{model.info.task}: take --target cpu"
        )
    tokens = wanted.tokens or min(_USUAL_CONTEXT if decodes else _USUAL_TOKENS, context)
    if tokens > context:
        raise ConfigError(f"compile.tokens: expected at most the model's context of {context}, got {tokens}")
    assert target.qnn is not None
    if tokens > target.qnn.most_tokens:
        raise TargetError(
            f"compile.tokens: {target.name} takes texts of {target.qnn.most_tokens} tokens at most, got {tokens}"
        )
    return tokens


def _texts(
    model: OnnxModel, plain: onnx.ModelProto, calibration: Calibration, tokens: int, seed: int
) -> list[dict[str, np.ndarray]]:
    """Return what the graph is given for the calibration texts."""
    from edgepipe.engines.qnn.ranges import padded
    from edgepipe.quantizers.texts import check_calibration, padding_of, rows_of

    check_calibration(model.info, calibration)
    inputs = [value.name for value in plain.graph.input]
    rows = rows_of(model.info, replace(calibration, tokens=max(8, tokens)), seed=seed)
    return [padded(row, tokens, inputs, padding_of(model.info)) for row in rows]


def _check(
    model: OnnxModel,
    plain: onnx.ModelProto,
    path: Path,
    npu: Json,
    texts: list[dict[str, np.ndarray]],
    wanted: Wanted,
    ctx: Context,
) -> None:
    """Compare the float graph with the portable one, and what ships with the float graph, on calibration texts."""
    from edgepipe.graph.evaluate import evaluate
    from edgepipe.runtime.onnxruntime import open_graph
    from edgepipe.runtime.qnn import open_context

    ctx.progress("checking what ships", 3, 4)
    file = ctx.work_dir / "plain.onnx"
    onnx.save(plain, file)
    exact = open_graph(file, None)
    file.unlink()
    graph = model.graphs["model"]
    manifest = {"npu": npu, "graphs": {"model": "model.onnx"}, "ends": model.spec["ends"]}
    shipped = open_context(path, manifest, "model", None)
    errors, losses = [], []
    for feeds in (texts[0], texts[len(texts) // 2])[:_CHECKED]:
        everything = {**feeds, "token_type_ids": np.zeros_like(feeds["input_ids"])}
        expected = _counted(evaluate(graph, model.weights, everything), feeds)
        ours = _counted(exact.run(feeds), feeds)
        got = _counted(shipped.run(feeds), feeds)
        errors.append(worst_error([ours[name] for name in expected], list(expected.values())))
        losses.append(worst_loss([got[name] for name in expected], list(expected.values())))
    _note_agreement(f"{len(errors)} texts", float(np.max(errors)), float(np.max(losses)), wanted, ctx)


def _check_step(
    model: OnnxModel, plain: onnx.ModelProto, path: Path, npu: Json, row: list[int], wanted: Wanted, ctx: Context
) -> None:
    """Compare a decoder's float step with the portable graph, and what ships with it, on a calibration text."""
    from edgepipe.compiling.npu_step import CHECKED, check_step

    ctx.progress("checking what ships", 3, 4)
    manifest = {"npu": npu, "graphs": {"decoder": "decoder.onnx"}, "ends": {}, "model": model.spec}
    error, loss = check_step(model, plain, path, manifest, row, ctx.work_dir)
    _note_agreement(f"{CHECKED} tokens", error, loss, wanted, ctx)


def _note_agreement(what: str, error: float, loss: float, wanted: Wanted, ctx: Context) -> None:
    from edgepipe.runtime.qnn import is_emulated

    where = "in the emulator" if is_emulated() else "on this machine's NPU"
    ctx.note(
        f"agrees with the portable graph on {what}: {within('exact', error, wanted.exact_tolerance)}, "
        f"{within('as shipped', loss, wanted.shipped_tolerance)} {where}"
    )


def _counted(outputs: Mapping[str, np.ndarray], feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return outputs without what stands at padding."""
    mask = feeds["attention_mask"].astype(bool)
    return {name: value[mask] if value.shape[:2] == mask.shape else value for name, value in outputs.items()}


def _rounded_again(model: OnnxModel, plain: onnx.ModelProto) -> int:
    """Count the matrices whose grid isn't the NPU's."""
    named = (weight_name(tensor.name.removeprefix(TURNED)) for tensor in plain.graph.initializer)
    turned = any(tensor.name.startswith(TURNED) for tensor in plain.graph.initializer)
    tensors = (model.weights.load(found[0]) for found in named if found is not None and found[1])
    return sum(isinstance(one, QuantizedTensor) and (turned or not one.has_integer_rows) for one in tensors)


def _stored(graph: onnx.ModelProto, portable: bytes) -> dict[str, int]:
    """Return the bytes of every weight's levels, by its name in the store."""
    # 1 + weight, as some norms have it, is a constant called after its sum
    sums = {n.output[0]: n.input[0] for n in onnx.load_model_from_string(portable).graph.node if n.op_type == "Add"}
    found: dict[str, int] = {}
    for tensor in graph.graph.initializer:
        whole, _, rest = tensor.name.removeprefix(TURNED).partition("/")
        name = f"{sums.get(whole, whole)}/{rest}"
        view, _, rest = name.removeprefix("weight/").partition("/")
        is_weight = name.startswith("weight/") and rest.endswith("/levels")
        named = weight_name(f"weight/{view}") if is_weight else None
        if named is not None:
            found[named[0]] = found.get(named[0], 0) + len(onnx.numpy_helper.to_array(tensor).tobytes())
    return found
