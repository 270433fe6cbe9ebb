"""Run a bundle inside an app: `load(path)` → `Model` → `generate`, `logits`, `token_logprobs`.

Needs numpy, tokenizers, jinja2 and one engine; never torch.
"""

from __future__ import annotations

from pathlib import Path

from edgepipe.errors import ConfigError, TargetError
from edgepipe.runtime.bundle import Bundle, read_bundle, verify_hashes
from edgepipe.runtime.text_generation import Generation, Message, Model

__all__ = ["Bundle", "Generation", "Message", "Model", "load", "read_bundle", "verify_hashes"]


def load(path: str | Path, *, threads: int | None = None, callers: int = 4) -> Model:
    """Load the bundle in directory `path` and return a model that is safe for concurrent callers.

    At most `callers` calls run at a time, further ones wait. Each caller that runs beside others adds one key/value
    cache of `Model.cache_bytes` bytes, which is kept for the next; a batch of n rows allocates n more while it runs.
    A stream counts as a running call until it ends or is closed.

    :param threads: processor threads of the engine, shared by all callers; None = the engine's choice.
    :param callers: calls that may run at a time, ≥ 1.
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
    task, engine = bundle.manifest["task"], bundle.manifest["engine"]
    if task != "text-generation":
        raise TargetError(
            f"this edgepipe runs text-generation bundles, but {bundle.path} is for {task!r}: update edgepipe"
        )
    if engine != "onnxruntime":
        raise TargetError(
            f"this edgepipe runs onnxruntime bundles, but {bundle.path} is for {engine!r}: build it again"
        )
    # Imported only now: reading and checking bundles needs no engine.
    from edgepipe.runtime.onnxruntime import open_decoder

    decoder = open_decoder(bundle.path, bundle.manifest, threads)
    return Model(bundle, decoder, callers=callers)
