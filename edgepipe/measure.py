"""Measure: the library function behind `edgepipe measure`: a bundle where it will run. The base install is enough."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe.artifacts import Json
from edgepipe.errors import TargetError

if TYPE_CHECKING:
    from edgepipe.pipeline import Listener
    from edgepipe.runtime.bundle import Bundle
    from edgepipe.stages.measure import Measure


def measure(
    bundle: Path, options: Measure, *, listener: Listener, against: Path | None = None, since: Path | None = None
) -> Json:
    """Return a bundle's figures as the stage `measure` takes them (docs/measure.md: their shape).

    `against` is another bundle, measured in turn with this one; `since` a file with an earlier measurement of this
    machine, and the key `since` of the result then says whether the two agree. Raises ConfigError or ContractError for
    a directory that is no whole bundle or a file that can't be compared, TargetError for a bundle that this machine can
    only emulate, StageError when a process fails.
    """
    from edgepipe.measuring.agreement import check_comparable, compare, read_measurement
    from edgepipe.measuring.run import describe_machine
    from edgepipe.runtime.bundle import read_bundle

    for path in (bundle, against):
        if path is not None:
            _refuse_emulated(read_bundle(path))
    earlier = None if since is None else read_measurement(since)
    if earlier is not None:
        check_comparable(earlier, describe_machine(options.threads))
    bundles = {"bundle": bundle} if against is None else {"baseline": against, "bundle": bundle}
    listener.begin("measure", 1, 1)
    started = time.perf_counter()
    figures = options.figures(bundles, default_threads=0, progress=listener.progress)
    if earlier is not None:
        figures["since"] = compare(figures, earlier)
    listener.end("measure", time.perf_counter() - started, reused=False, notes=())
    return figures


def _refuse_emulated(bundle: Bundle) -> None:
    if bundle.manifest["engine"] == "qnn":
        from edgepipe.runtime.qnn import is_emulated

        if is_emulated():
            raise TargetError(
                f"{bundle.path} is for an NPU, which this machine only emulates: measure it on the device; `edgepipe "
                "eval` says here how good it is"
            )
