"""The long tail: optimum's own exporter, in an environment of its own, for what transformers' exporter can't trace.

optimum-onnx has a hand-written export configuration per architecture, but wants an older transformers than edgepipe's.
So nothing here imports it: the model is written to a folder, a child process of the other environment's Python traces
it (optimum_child.py), and the graph that comes back is adopted:

    initializers that are weights          → named weights (match.py)
    inputs that transformers fills itself  → zeros made in the graph (global_attention_mask, bbox …)
    last_hidden_state                      → pooled and normalized as well, where sentences are embedded
    opset 18                               → 23, then as every traced graph (adopt.py)

Tasks with one graph only: optimum's caches aren't laid out as edgepipe's.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepipe.artifacts import Json, ModelInfo
from edgepipe.errors import ConfigError, StageError, TargetError
from edgepipe.graph.adopt import to_dialect
from edgepipe.graph.dialect import OPSET
from edgepipe.graph.framework import Part, dims_of, quiet
from edgepipe.graph.match import name_weights
from edgepipe.graph.pooling import add_embedding
from edgepipe.graph.tasks import GENERATION, TASKS
from edgepipe.weights import WeightStore

PYTHON_VARIABLE = "EDGEPIPE_OPTIMUM_PYTHON"
_HOME = Path(".venv-optimum")  # where `make optimum` puts the environment
_PROGRAM = Path("Scripts", "python.exe") if os.name == "nt" else Path("bin", "python")
_CHILD = Path(__file__).with_name("optimum_child.py")
_OPTIONAL = ("token_type_ids",)  # zeros where nobody gives them: some of optimum's graphs have these inside
_ADVICE = "`make optimum` sets one up that can"
_LIMIT_S = 3600  # tracing takes seconds to minutes; a child that takes longer hangs


def environment_python() -> Path:
    """Return the Python of optimum's environment; TargetError when there is none."""
    named = os.environ.get(PYTHON_VARIABLE)
    path = Path(named) if named else _HOME / _PROGRAM
    if not path.is_file():
        where = f"{PYTHON_VARIABLE} names {named}, which is no file" if named else f"there is no {path} here"
        raise TargetError(
            f"optimum's exporter needs an environment of its own, and {where}: `make optimum` in a checkout of "
            f"edgepipe sets it up as .venv-optimum; elsewhere set {PYTHON_VARIABLE} to its python"
        )
    return path.absolute()  # not resolved: the link is what makes it that environment's


def check_optimum(info: ModelInfo) -> None:
    """Raise ConfigError for a task with several graphs or a cache, TargetError when the environment is missing."""
    if info.task in GENERATION or info.config.get("is_encoder_decoder"):
        what = f"the task {info.task}" if info.task in GENERATION else f"an encoder-decoder for {info.task}"
        raise ConfigError(
            f"export.exporter=optimum is for models of one graph, but this is {what}: leave the option out"
        )
    environment_python()


def trace_with_optimum(
    part: Part, module: Any, info: ModelInfo, weights: WeightStore, work_dir: Path, spec: Json
) -> tuple[bytes, str]:
    """Return one part of transformers' `module` as a graph of the dialect, and a note on how it was made.

    Raises StageError when optimum can't export it or its graph doesn't fit the part.
    """
    model, result = work_dir / "optimum-model", work_dir / "optimum-graph"
    result.mkdir()
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # a progress bar, which no setting of quiet's reaches
        module.save_pretrained(model)
    (model / "config.json").write_text(json.dumps(info.config), encoding="utf-8")  # as the model's source wrote it
    found = run_child(environment_python(), [str(model), str(result), info.task, TASKS[info.task].auto_class], result)
    traced = ir.load(result / found["graph"])
    by_name, by_content = name_weights(traced.graph, weights)
    _fit_inputs(traced.graph, dims_of(part))
    _fit_outputs(traced.graph, TASKS[info.task].outputs)
    if spec["pooling"] is not None:
        add_embedding(traced.graph, spec["pooling"], normalize=bool(spec["normalize"]))
    graph = to_dialect(_to_opset(traced), part.name)
    _check_operators(traced.graph)
    made_by = ", ".join(f"{name} {version}" for name, version in sorted(found["versions"].items()))
    return graph, f"traced by {made_by}; {by_name} weights found by name, {by_content} by content"


def run_child(python: Path, arguments: Sequence[str], directory: Path) -> Json:
    """Run the script in the other environment and return what it tells; StageError with its sentence otherwise.

    The child ends with this process: it watches its stdin, and a Ctrl-C or the time limit kills it.
    """
    log = directory / "log.txt"
    command = [str(python), "-I", str(_CHILD), *arguments]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    try:
        with log.open("wb") as file, subprocess.Popen(command, stdin=pipe, stdout=file, stderr=file, env=env) as child:
            try:
                child.wait(timeout=_LIMIT_S)
            except BaseException:
                child.kill()
                raise
    except subprocess.TimeoutExpired as error:
        raise StageError(f"optimum's exporter took longer than {_LIMIT_S // 60} minutes and was stopped") from error
    except OSError as error:
        raise TargetError(f"{python} can't be started ({error.strerror}): {_ADVICE}") from error
    told = directory / "result.json"
    if child.returncode or not told.is_file():
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"])[-1]
        raise StageError(f"optimum's exporter ended with exit code {child.returncode}: {last[:300]}")
    found: Json = json.loads(told.read_text(encoding="utf-8"))
    if "missing" in found:
        raise TargetError(
            f"{python} can't run optimum's exporter ({found['missing']}): `make optimum` sets one up that can"
        )
    if "error" in found:
        raise StageError(found["error"])
    return found


def _fit_inputs(graph: ir.Graph, dims: Mapping[str, Sequence[int | str]]) -> None:
    """Give the graph's inputs the shapes of the contract; those it has beyond that are made zeros inside."""
    inputs = {value.name or "": value for value in graph.inputs if not (value.name or "").startswith("weight/")}
    dims = {name: shape for name, shape in dims.items() if name in inputs or name not in _OPTIONAL}
    lacking = [name for name in dims if name not in inputs]
    if lacking:
        raise StageError(f"optimum's graph doesn't take {lacking[0]}: it takes {', '.join(inputs)}")
    renamed: dict[str, str] = {}
    for name, shape in dims.items():
        for old, new in zip(inputs[name].shape or (), shape, strict=True):
            if isinstance(old, ir.SymbolicDim) and isinstance(new, str) and old.value is not None:
                renamed[old.value] = new
        inputs[name].shape = ir.Shape(shape)
    first = next(iter(dims))
    for name in [name for name in inputs if name not in dims]:
        _zero_input(graph, inputs[name], inputs[first], renamed)
    kept = [value for value in graph.inputs if (value.name or "").startswith("weight/")]
    graph.inputs.clear()
    graph.inputs.extend([*(inputs[name] for name in dims), *kept])
    for value in [value for node in graph.all_nodes() for value in node.outputs]:
        value.shape = None  # noted with the names and sizes of the trace; inferred anew
    for value in graph.outputs:
        value.shape = None


def _zero_input(graph: ir.Graph, extra: ir.Value, like: ir.Value, renamed: Mapping[str, str]) -> None:
    """Replace an input by zeros of its shape, whose first dimensions are those of the input `like`.

    transformers takes zeros, or what comes to the same, where nobody gives these; the check against torch sees whether.
    """
    shape = [renamed.get(d.value or "", d.value) if isinstance(d, ir.SymbolicDim) else d for d in extra.shape or ()]
    lead = list(like.shape or ())
    own = shape[len(lead) :]
    lead_names = [d.value if isinstance(d, ir.SymbolicDim) else d for d in lead]
    if shape[: len(lead)] != lead_names or any(not isinstance(d, int) for d in own) or extra.dtype is None:
        raise StageError(f"optimum's graph takes {extra.name} {shape}, which edgepipe can't feed")
    nodes = [ir.node("Shape", [like])]
    dims = nodes[0].outputs[0]
    if own:
        tail = _constant(graph, f"{extra.name}.dims", np.array(own, np.int64))
        nodes.append(ir.node("Concat", [dims, tail], {"axis": 0}))
    zero = _constant(graph, f"{extra.name}.zero", np.zeros((), extra.dtype.numpy()))
    nodes.append(ir.node("Expand", [zero, nodes[-1].outputs[0]]))
    graph.insert_before(graph[0], nodes)
    extra.replace_all_uses_with(nodes[-1].outputs[0])


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    graph.initializers[name] = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    return graph.initializers[name]


def _fit_outputs(graph: ir.Graph, wanted: Sequence[str]) -> None:
    """Leave the outputs of the task alone, in its order."""
    outputs = {value.name or "": value for value in graph.outputs}
    lacking = [name for name in wanted if name not in outputs]
    if lacking:
        raise StageError(f"optimum's graph doesn't give {lacking[0]}: it gives {', '.join(outputs)}")
    graph.outputs.clear()
    graph.outputs.extend(outputs[name] for name in wanted)


def _to_opset(traced: Any) -> Any:
    """Return the model in the dialect's opset."""
    from onnxscript.version_converter import convert_version

    with quiet():
        convert_version(traced, OPSET, fallback=True)
    return traced


def _check_operators(graph: ir.Graph) -> None:
    """Refuse what the dialect can't say: operators of other domains, and branches that folding left."""
    nodes = list(graph.all_nodes())
    left = {node.op_type for node in nodes if node.domain not in ("", "ai.onnx")}
    left |= {node.op_type for node in nodes if node.op_type in ("If", "Loop", "Scan")}
    if left:
        raise StageError(f"optimum's graph has {', '.join(sorted(left))}, which the portable dialect hasn't")
