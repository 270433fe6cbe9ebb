"""Evaluate: the library function behind `edgepipe eval`: quality of a bundle by one metric over one file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe.artifacts import Json
from edgepipe.measuring.evaluation import evaluate_bundle
from edgepipe.measuring.metrics import Evaluation

if TYPE_CHECKING:
    from edgepipe.pipeline import Listener


def evaluate(bundle: Path, data: str, options: Evaluation, *, listener: Listener, against: Path | None = None) -> Json:
    """Return what `measuring.evaluation.evaluate_bundle` finds; the listener hears how far it is."""
    listener.begin("eval", 1, 1)
    started = time.perf_counter()
    found = evaluate_bundle(bundle, data, options, progress=listener.progress, against=against)
    notes = tuple(dict.fromkeys(filter(None, (_emulated(path) for path in (bundle, against) if path is not None))))
    listener.end("eval", time.perf_counter() - started, reused=False, notes=notes)
    return found


def _emulated(bundle: Path) -> str:
    """Return what is said of a bundle for an NPU that this machine emulates; empty for others."""
    from edgepipe.runtime.bundle import read_manifest

    manifest = read_manifest(bundle)
    if manifest["engine"] != "qnn":
        return ""
    from edgepipe.runtime.qnn import said_of

    return said_of(manifest)
