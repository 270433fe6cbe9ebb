"""Open a bundle for a Hexagon NPU through Qualcomm's QNN provider: on the chip, or in its emulator on an x86-64.

The package onnxruntime-qnn brings the provider and Qualcomm's closed libraries under Qualcomm's own licence; nothing of
it is in a bundle. On an x86-64 the same library emulates the NPU: results are those of its arithmetic, times say
nothing about a chip. Graphs take one text of a fixed length, or one token (npu_step.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import platform
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort

from edgepipe.errors import ConfigError, TargetError
from edgepipe.runtime.npu_step import ends_of_step
from edgepipe.runtime.onnxruntime import Graph, check_graph_ends

PACKAGE = "onnxruntime_qnn"
_PROVIDER = "QNNExecutionProvider"
_EMULATING = ("x86_64", "AMD64")  # machines that no Hexagon NPU stands beside
_REGISTERED = threading.Lock()  # one thread at a time registers the provider and moves the standard output


def is_emulated() -> bool:
    """Say whether this machine can only emulate the NPU."""
    return platform.machine() in _EMULATING


def said_of(manifest: Mapping[str, Any]) -> str:
    """Return the sentence that goes with what an emulated bundle gives; empty for any other bundle."""
    if manifest["engine"] != "qnn" or not is_emulated():
        return ""
    return (
        "This machine has no Hexagon NPU: Qualcomm's emulator computes what one would, in seconds that say nothing of "
        "the chip."
    )


def is_installed() -> bool:
    """Say whether the provider's package is here; it isn't imported for that."""
    return importlib.util.find_spec(PACKAGE) is not None


def open_context(path: Path, manifest: Mapping[str, Any], role: str, threads: int | None) -> Graph:
    """Open one graph of a bundle; its work on the NPU is in the context binary beside it.

    Raises TargetError where the provider isn't here or refuses, ContractError when the graph's ends are others than
    the manifest says.
    """
    facts = read_npu(manifest)
    session = open_npu_session(path / manifest["graphs"][role], facts["htp_arch"], facts["soc_model"], threads)
    check_graph_ends(session, manifest["ends"].get(role) or ends_of_step(manifest["model"]))
    return Graph(session)


def read_npu(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Return the numbers of the chip that a manifest's `npu` names; ConfigError where it has none."""
    found = manifest.get("npu")
    chip = {name: found.get(name) if isinstance(found, dict) else None for name in ("htp_arch", "soc_model")}
    if not all(type(value) is int and 0 < value < 1 << 16 for value in chip.values()):
        raise ConfigError("manifest.json: npu must have htp_arch and soc_model: the bundle is damaged, copy it again")
    return {name: int(value) for name, value in chip.items() if value is not None}


def open_npu_session(
    graph: Path, htp_arch: int, soc_model: int, threads: int | None, *, context: Path | None = None
) -> ort.InferenceSession:
    """Open a session whose nodes lie on the NPU where it takes them, and on the CPU where not.

    `context` compiles a graph of Q/DQ pairs for the chip ahead of time: the graph that ships is written there, its
    binary beside it, and the provider says in its log, on stderr, why it leaves a node out.
    """
    if not is_installed():
        raise TargetError("the bundle runs through Qualcomm's provider, which isn't here: pip install 'edgepipe[qnn]'")
    import onnxruntime_qnn

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    if context is not None:
        options.log_severity_level, options.log_verbosity_level = 0, 0
        options.add_session_config_entry("ep.context_enable", "1")
        options.add_session_config_entry("ep.context_file_path", os.fspath(context))
        options.add_session_config_entry("ep.context_embed_mode", "0")
    settings = {"backend_path": onnxruntime_qnn.get_qnn_htp_path()}
    if is_emulated() or context is not None:
        settings |= {"htp_arch": str(htp_arch), "soc_model": str(soc_model)}
    try:
        with _REGISTERED, _standard_output_kept():
            options.add_provider_for_devices(_devices(onnxruntime_qnn.get_library_path())[:1], settings)
            return ort.InferenceSession(os.fspath(graph), options)
    except TargetError:
        raise
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        raise TargetError(f"the QNN provider could not load the bundle: {str(error).splitlines()[0]}") from error


def _devices(library: str) -> list[Any]:
    """Return the provider's devices, the NPU first; the provider is registered once for a process."""
    found = [device for device in ort.get_ep_devices() if device.ep_name == _PROVIDER]
    if not found:
        ort.register_execution_provider_library(_PROVIDER, library)
        found = [device for device in ort.get_ep_devices() if device.ep_name == _PROVIDER]
    if not found:
        raise TargetError(f"{_PROVIDER} offers no device here")
    return sorted(found, key=lambda one: one.device.type != ort.OrtHardwareDeviceType.NPU)


@contextlib.contextmanager
def _standard_output_kept() -> Iterator[None]:
    """Send what Qualcomm's library prints when it is loaded to stderr: programs read stdout."""
    if os.name != "posix":
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # it lies in C's buffer still
        os.dup2(kept, 1)
        os.close(kept)
