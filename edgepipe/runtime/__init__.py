"""Run a bundle inside an app: `load(path)` → `Model` (generates text) or `Encoder` (embeds, classifies, runs arrays).

Needs numpy, tokenizers, jinja2 and one engine; never torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgepipe.errors import ConfigError, ContractError, TargetError
from edgepipe.runtime.bundle import GENERATION, Bundle, read_bundle, verify_hashes
from edgepipe.runtime.encoder import Encoder
from edgepipe.runtime.exits import USUAL_THRESHOLD, LeavingGraph, check_threshold, has_exits
from edgepipe.runtime.leaving import LeavingDecoder, above
from edgepipe.runtime.prompts import Message
from edgepipe.runtime.text_generation import Generation, Model

__all__ = [
    "Bundle",
    "Encoder",
    "Generation",
    "Message",
    "Model",
    "load",
    "open_graphs",
    "read_bundle",
    "verify_hashes",
]


def load(
    path: str | Path, *, threads: int | None = None, callers: int = 4, exit_threshold: float | None = None
) -> Model | Encoder:
    """Load the bundle in directory `path` and return a model that is safe for concurrent callers.

    A bundle for text-generation or text2text-generation gives a `Model`, any other an `Encoder`.

    Of a `Model`, at most `callers` calls run at a time, further ones wait. Each caller that runs beside others adds one
    key/value cache of `Model.cache_bytes` bytes, which is kept for the next; a batch of n rows allocates n more while
    it runs. A stream counts as a running call until it ends or is closed.

    :param threads: processor threads of the engine, shared by all callers; None = the engine's choice.
    :param callers: calls that may run at a time, ≥ 1.
    :param exit_threshold: of a model with exits, from 0 to 1: a text, or a token of a decoder, leaves at the first exit
        whose gate gives a higher probability that the answer there is right already; 1: none leaves. None = 0.5 for an
        encoder, 1 for a decoder.
    :raises ConfigError: when `path` is no bundle, or a value is out of range.
    :raises ContractError: when a file of the bundle is missing or has the wrong size, or the graph isn't the one
        the manifest describes. Hashes are not read here: see `verify_hashes`.
    :raises TargetError: when the bundle is for an engine or task this edgepipe does not run.
    """
    for name, value in (("threads", threads), ("callers", callers)):
        if value is None and name == "threads":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1, but is {value!r}")
    bundle = read_bundle(path)
    loaded = open_graphs(bundle, threads, check_threshold(exit_threshold, bundle.manifest))
    if bundle.manifest["task"] in GENERATION:
        return Model(bundle, loaded, callers=callers)
    return Encoder(bundle, loaded)


def open_graphs(
    bundle: Bundle, threads: int | None, exit_threshold: float = USUAL_THRESHOLD, *, in_parts: bool = True
) -> Any:
    """Open the graphs of a bundle in its engine: a decoder (text_generation.py says what it offers), or one graph.

    Of a model with exits the parts are opened, and offered as one graph (exits.py, leaving.py); not `in_parts`, and of
    a decoder at 1, its graph of all layers.

    Raises TargetError when the engine isn't there or can't load them, ContractError when the manifest describes others.
    """
    manifest = bundle.manifest
    # Engines are imported only now: reading and checking bundles needs none.
    if manifest["engine"] == "tvm":
        return _open_library(bundle, threads, exit_threshold if in_parts else None)
    if manifest["engine"] == "qnn":
        return _open_npu(bundle, threads)
    if manifest["engine"] != "onnxruntime":
        raise TargetError(
            f"this edgepipe runs onnxruntime, tvm and qnn bundles, but {bundle.path} is for {manifest['engine']!r}: "
            "build it again"
        )
    from edgepipe.runtime import onnxruntime as engine
    from edgepipe.runtime.growing import GrowingDecoder
    from edgepipe.runtime.packed import unpack_weights

    if not manifest["ends"]:
        if has_exits(manifest) and in_parts and exit_threshold < 1:
            parts = engine.open_leaving(bundle.path, manifest, threads)
            return LeavingDecoder(parts, manifest["model"], manifest["cache"]["dtype"], above(exit_threshold))
        return engine.open_decoder(bundle.path, manifest, threads)
    if has_exits(manifest) and in_parts:
        return LeavingGraph(engine.open_parts(bundle.path, manifest, threads), _depths(manifest), exit_threshold)
    weights, several = unpack_weights(bundle.path, manifest), len(manifest["ends"]) > 1
    graphs = {
        role: engine.open_graph(bundle.path / manifest["graphs"][role], threads, ends, others=several, weights=weights)
        for role, ends in manifest["ends"].items()
    }
    if manifest["task"] in GENERATION:
        return GrowingDecoder(graphs["decoder"], graphs.get("encoder"), manifest["model"])
    return graphs["model"]


def _depths(manifest: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the layers behind each part of a model with exits, all of them last."""
    return (*manifest["model"]["exits"], manifest["model"]["layers"])


def _open_npu(bundle: Bundle, threads: int | None) -> Any:
    """Open the graph of a bundle for an NPU, on the chip or in its emulator."""
    from edgepipe.runtime.npu_step import Decoder
    from edgepipe.runtime.qnn import open_context

    if bundle.manifest["task"] == "text-generation" and not bundle.manifest["ends"]:
        return Decoder(open_context(bundle.path, bundle.manifest, "decoder", threads), bundle.manifest)
    if set(bundle.manifest["ends"]) != {"model"}:
        raise ConfigError("manifest.json: a bundle for an NPU must have ends of one graph, model: build it again")
    return open_context(bundle.path, bundle.manifest, "model", threads)


def _open_library(bundle: Bundle, threads: int | None, exit_threshold: float | None) -> Any:
    """Open the functions of a bundle's library; without a threshold that of all layers in place of parts."""
    from edgepipe.runtime.growing import GrowingDecoder
    from edgepipe.runtime.tvm import Decoder, open_library, open_parts

    manifest = bundle.manifest
    library = open_library(bundle.path, manifest, threads)
    if not manifest["ends"]:
        return Decoder(library, manifest)
    if has_exits(manifest) and exit_threshold is not None:
        return LeavingGraph(open_parts(library, manifest), _depths(manifest), exit_threshold)
    functions = {role: library.function(role) for role in manifest["ends"]}
    for role, ends in manifest["ends"].items():
        facts = functions[role].facts
        if wrong := sorted((set(facts.inputs) - set(ends["inputs"])) | (set(ends["outputs"]) - set(facts.outputs))):
            raise ContractError(
                f"the library's function {role!r} and the ends of the manifest differ in {wrong[0]!r}: build it again"
            )
    if manifest["task"] in GENERATION:
        return GrowingDecoder(functions["decoder"], functions.get("encoder"), manifest["model"])
    return functions["model"]
