"""Compile a graph of Q/DQ pairs into a context binary for one chip, and say which nodes lie on its NPU.

The compiler is Qualcomm's library, in a child process: it writes its log to stderr, and what goes wrong in it ends the
child alone. A node that the provider leaves out stands in the graph that ships beside the binary, and runs on the CPU;
the log says why.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx

from edgepipe.artifacts import Json
from edgepipe.engines.qnn.qdq import APART
from edgepipe.errors import TargetError

_PAIRS = ("QuantizeLinear", "DequantizeLinear")
_CONTEXT = "EPContext"
# Lines of the provider's log. Source: onnxruntime-qnn 2.7, qnn_model_wrapper.cc and qnn_execution_provider.cc
_REFUSED = re.compile(
    r"backendValidateOpConfig\(\) failed for node `(.+?)(?:_2)?` of type `(.+?)` with error code (\d+)"
)
_LEFT_OUT = re.compile(r"Operator type: (\S+) Node name: (\S+) Node index")
_REASON = re.compile(r"REASON : (.+)")
_ERROR = re.compile(r"\[E:onnxruntime[^\]]*\] (.+)")
_BOUNDARY = "turns 16 bits of the NPU into float32, or back, for what runs on the CPU"
_UNSAID = "the provider doesn't say why"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """Name a node that runs on the CPU, and why."""

    node: str
    operator: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Say how many nodes of a graph lie on the NPU."""

    nodes: int  # of the float graph, and the conversions that run beside it
    leftovers: tuple[Leftover, ...]  # of these, those that run on the CPU

    @property
    def share(self) -> float:
        """Return the share of nodes on the NPU, in [0, 1]."""
        return 1 - len(self.leftovers) / self.nodes

    def to_json(self) -> Json:
        """Return what a manifest says of it."""
        left = [asdict(one) for one in self.leftovers]
        return {"nodes": self.nodes, "on_npu": self.nodes - len(left), "share": round(self.share, 4), "leftovers": left}


def compile_context(rounded: Path, shipped: Path, *, htp_arch: int, soc_model: int) -> str:
    """Write the graph that ships to `shipped`, its context binary beside it, and return the provider's log.

    Raises TargetError when the compiler fails, in its own words.
    """
    words = [str(rounded), str(shipped), str(htp_arch), str(soc_model)]
    # -P: a module in the directory the user happens to work in must not be taken for another
    command = [sys.executable, "-P", "-m", "edgepipe.engines.qnn.child", *words]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not shipped.exists():
        said = _ERROR.findall(done.stderr) or [line for line in done.stdout.splitlines() if line] or [""]
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise TargetError(f"the NPU's compiler wrote no context binary ({how}): {said[-1].strip() or _UNSAID}")
    return done.stderr


def placement(plain: onnx.ModelProto, shipped: Path, log: str) -> Placement:
    """Compare a float graph with what its compiled form leaves to the CPU.

    A node of the float graph is on the NPU when nothing of what was made of it is left. A conversion between 16 bits
    and float32 that is left is a node of its own: the app is given float32. Constants that the CPU decodes are none.
    """
    names = {node.output[0]: node.op_type for node in plain.graph.node}
    graph = onnx.load(shipped, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    left = [n for n in graph.node if n.op_type != _CONTEXT and not (n.op_type in _PAIRS and n.input[0] in constants)]
    reasons = _reasons(log)
    found: dict[str, Leftover] = {}
    for node in left:
        whole = node.name.partition(APART)[0]
        name = node.output[0].partition(APART)[0]
        is_pair = node.op_type in _PAIRS
        if not is_pair and (operator := names.get(name, names.get(whole))):
            key = name if name in names else whole
            found.setdefault(key, Leftover(node=key, operator=operator, reason=_reason(reasons, node.name, key)))
        else:
            reason = _BOUNDARY if is_pair else _reason(reasons, node.name)
            found[node.output[0]] = Leftover(node=node.name, operator=node.op_type, reason=reason)
    beside = sum(key not in names for key in found)
    return Placement(nodes=len(names) + beside, leftovers=tuple(found.values()))


def _reason(reasons: Mapping[str, str], *names: str) -> str:
    return next((reasons[name] for name in names if name in reasons), _UNSAID)


def _reasons(log: str) -> dict[str, str]:
    """Return why the provider leaves nodes out, by their names."""
    found: dict[str, str] = {}
    group: list[str] = []
    for line in log.splitlines():
        if left := _LEFT_OUT.search(line):
            group.append(left[2])
        elif reason := _REASON.search(line):
            found.update({name: reason[1].strip().rstrip(".") for name in group if name not in found})
        elif refused := _REFUSED.search(line):
            found[refused[1]] = f"the HTP refuses {refused[2]} with these types or shapes (error {refused[3]})"
        if not left:
            group = []
    return found


def binaries(folder: Path, known: Sequence[str]) -> list[str]:
    """Return the names of the files that the compiler has left in a folder."""
    return sorted(one.name for one in folder.iterdir() if one.name not in known)
