"""Measure: the library function behind `edgepipe measure`: a bundle where it will run. The base install is enough."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe.artifacts import Json

if TYPE_CHECKING:
    from edgepipe.pipeline import Listener
    from edgepipe.stages.measure import Measure


def measure(bundle: Path, options: Measure, *, listener: Listener, against: Path | None = None) -> Json:
    """Return a bundle's figures as the stage `measure` takes them, beside those of another bundle where one is given.

    The result has the keys `bundle`, `baseline` (the other one, or None), `text` and `machine`. Blocks of the two
    alternate. Raises ConfigError or ContractError for a directory that is no whole bundle, StageError when one fails.
    """
    from edgepipe.runtime.bundle import read_bundle

    for path in (bundle, against):
        if path is not None:
            read_bundle(path)
    bundles = {"bundle": bundle} if against is None else {"baseline": against, "bundle": bundle}
    listener.begin("measure", 1, 1)
    started = time.perf_counter()
    figures = options.figures(bundles, default_threads=0, progress=listener.progress)
    listener.end("measure", time.perf_counter() - started, reused=False, notes=())
    return figures
