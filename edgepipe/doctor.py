"""Doctor: the library function behind `edgepipe doctor`: what this machine can build, run and measure.

Whatever may end a process is tried in a child (`edgepipe/machine/`), so a crash is a finding and the rest goes on. For
the same reason nothing here imports numpy before a child has. No network is touched. Needs the base install.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe.errors import TargetError
from edgepipe.machine.children import DIES, REFUSED, WORKS, WRONG, try_in_children
from edgepipe.machine.executing import execute
from edgepipe.machine.facts import (
    describe_folder,
    describe_system,
    reported_flags,
    sysctl_is_set,
    usable_memory_bytes,
)
from edgepipe.machine.instructions import InstructionPath, paths_for
from edgepipe.machine.kernel_names import KERNEL_NAMES, needed_kernels
from edgepipe.machine.packages import BASE, MISSING, OTHER_VERSION, examine_packages
from edgepipe.machine.timing import BUSY, COARSEST_CLOCK_S, STEADY, describe_timing
from edgepipe.target import Target, list_targets, load_target

if TYPE_CHECKING:
    from edgepipe.artifacts import Json

ABSENT = "absent"
_KERNELS_TIMEOUT_S = 120.0
# Importing torch and transformers takes about 0.5 GB and `compress` streams weights one at a time; twice what the
# README's runs took is asked for before a warning.
_BUILD_MEMORY_BYTES = 2 << 30
_BUILD_DISK_BYTES = 2 << 30  # the stages of a model of SmolLM2's size and of its float32 twin, twice over


def examine(target: str | None = None, *, runs: Path = Path("runs")) -> Json:
    """Return what was found, in the form that docs/doctor.md describes.

    With a target (name or TOML file) only the kernels it needs are tried; without one those that are this machine are
    judged. `ok` says whether each can be used here, `problem` is the first sentence why not. Raises ConfigError for an
    unknown target.
    """
    targets = [load_target(name) for name in ([target] if target is not None else list_targets())]
    targets = [one for one in targets if target is not None or not (one.tvm.level or one.tvm.gpu or one.qnn)]
    names = KERNEL_NAMES if target is None else needed_kernels(targets[0].onnxruntime.accuracy_level)
    timing = describe_timing()  # first, while nothing of ours runs beside it
    with ThreadPoolExecutor(1) as other:
        imported = other.submit(examine_packages, ["compress"])
        instructions = _examine_instructions()
        kernels = [
            {**asdict(outcome), "needed_by": [t.name for t in targets if _needs(t, outcome.name)]}
            for outcome in try_in_children("edgepipe.machine.kernels", names, timeout_s=_KERNELS_TIMEOUT_S)
        ]
        packages = imported.result()
    found: Json = {
        "machine": describe_system(),
        "packages": None if packages is None else [asdict(package) for package in packages],
        "folders": {"runs": describe_folder(runs)},
        "instructions": instructions,
        "kernels": kernels,
        "timing": timing,
    }
    found["sources"] = _sources(found)
    found["targets"] = [_judge(target, found) for target in targets]
    problems = [problem for verdict in found["targets"] for problem in _unusable(verdict)]
    found["ok"], found["problem"] = not problems, problems[0] if problems else None
    return found


def _needs(target: Target, kernel: str) -> bool:
    return kernel in needed_kernels(target.onnxruntime.accuracy_level)


# ---------------------------------------------------------------------------------------------------------------------
# instruction sets


def _examine_instructions() -> list[Json]:
    """Execute every path that the CPU reports, each in its own child; what it doesn't report is absent."""
    paths = paths_for(platform.machine())
    present = [path for path in paths if _is_reported(path)]
    outcomes = {outcome.name: outcome for outcome in (execute(present) if os.name == "posix" else ())}
    found = []
    for path in paths:
        outcome = outcomes.get(path.name)
        if outcome is not None:
            state, detail = outcome.state, outcome.detail
        elif path in present:
            state, detail = REFUSED, f"how to call machine code on {platform.system()} is not known here"
        else:
            state, detail = ABSENT, ""
        found.append({"name": path.name, "reported": path in present, "state": state, "detail": detail})
    return found


def _is_reported(path: InstructionPath) -> bool:
    flags = reported_flags()
    return path.flag in flags if flags is not None else bool(path.sysctl) and sysctl_is_set(path.sysctl)


# ---------------------------------------------------------------------------------------------------------------------
# sources


def _sources(found: Json) -> list[Json]:
    """Say for each kind of MODEL whether it can be read here; nothing is downloaded or asked for."""
    if all(kernel["state"] != WORKS for kernel in found["kernels"]):
        return []  # their child imports what the readers import, and that may be what fails
    from edgepipe.sources import PACKAGED
    from edgepipe.sources.packaged import cache_directory

    cache = found["folders"]["cache"] = describe_folder(cache_directory())
    rows: list[Json] = [{"source": "a directory or a .gguf file", "ready": True, "detail": "read where it lies"}]
    for model in PACKAGED:
        there = (cache_directory() / f"{model.name}-{model.version}").is_dir()
        said = "in the cache" if there else f"pip would be asked for {model.package}, once"
        rows.append({"source": model.name, "ready": there or cache["writable"], "detail": said})
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    said = "HF_HUB_OFFLINE is set: only from its cache" if offline else "not tried: `edgepipe inspect ORG/NAME` does"
    rows.append({"source": "a hub id", "ready": None, "detail": said})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# verdicts


def _judge(target: Target, found: Json) -> Json:
    """Say whether a target's bundles can be built, run and measured here: problems forbid it, warnings don't."""
    here = target.measurable == "here"
    # `compile` runs what it has built beside the portable graph, so building needs the kernels too
    works = _instruction_problems(found) + _kernel_problems(target, found)
    run = _package_problems(found, [BASE]) + works if here else [f"target {target.name} is another machine"]
    measure = [*run, *_clock_problems(found)] if here else [f"target {target.name} can't be measured from here"]
    return {
        "name": target.name,
        "measurable": target.measurable,
        "build": _verdict(_build_problems(found) + _library_problems(target, found) + works, _build_warnings(found)),
        "run": _verdict(run, _run_warnings(found)),
        "measure": _verdict(measure, _measure_warnings(found) if here else []),
    }


def _verdict(problems: list[str], warnings: list[str]) -> Json:
    return {"ok": not problems, "problems": problems, "warnings": warnings}


def _unusable(verdict: Json) -> list[str]:
    """Return why a target is of no use here: it can't be run, or, when it is another machine, can't be built."""
    kind = "run" if verdict["measurable"] == "here" else "build"
    return [f"target {verdict['name']} can't be {_DONE[kind]} here: {problem}" for problem in verdict[kind]["problems"]]


_DONE = {"run": "run", "build": "built"}


def _package_problems(found: Json, extras: Sequence[str]) -> list[str]:
    """Name what is missing, of another version or broken among the packages of some extras, and what to do."""
    rows = [row for row in found["packages"] or [] if row["extra"] in extras]
    broken = [row for row in rows if row["state"] in (DIES, WRONG)]
    problems = [f"{row['name']} {row['version']} can't be imported ({row['detail']})" for row in broken]
    wrong = [row for row in rows if row["state"] in (MISSING, OTHER_VERSION)]
    if wrong:
        said = ", ".join(f"{row['name']} is {row['version'] or 'missing'}" for row in wrong)
        asked = " ".join(f'"{row["name"]}{row["wanted"]}"' for row in wrong)
        problems.append(f"{said}: python -m pip install {asked}")
    return problems


def _instruction_problems(found: Json) -> list[str]:
    return [
        f"the CPU reports {row['name']}, but executing it gives: {row['detail']}"
        for row in found["instructions"]
        if row["state"] in (DIES, WRONG)
    ]


def _kernel_problems(target: Target, found: Json) -> list[str]:
    """Name what fails, and how; what fails alike, as all do where a package is missing, in one sentence."""
    alike: dict[str, list[str]] = {}
    for row in found["kernels"]:
        if row["state"] != WORKS and target.name in row["needed_by"]:
            alike.setdefault(row["detail"], []).append(row["name"])
    return [
        f"onnxruntime's {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {detail}"
        for detail, names in alike.items()
    ]


def _build_problems(found: Json) -> list[str]:
    problems = _package_problems(found, [BASE, "compress"])
    runs = found["folders"]["runs"]
    if not runs["writable"]:
        problems.append(f"{runs['path']} can't be written ({runs['problem']}): change to a folder where it can")
    return problems


def _library_problems(target: Target, found: Json) -> list[str]:
    """Say why a target's library or context binary can't be compiled here; nothing where its engine needs none."""
    if target.engines[0] == "onnxruntime" or all(kernel["state"] != WORKS for kernel in found["kernels"]):
        return []  # in the second case it may be numpy that fails, which the stage imports
    from edgepipe.stages.compile import Compile

    try:
        Compile().meets(target)
    except TargetError as error:
        return [str(error)]
    except ImportError:
        return []  # of a package that is named as missing already
    return []


def _build_warnings(found: Json) -> list[str]:
    warnings = []
    if found["packages"] is None:
        warnings.append("edgepipe isn't installed as a package: what it needs can't be compared with what is here")
    memory, folders = usable_memory_bytes(found["machine"]["memory"]), found["folders"]
    if memory is not None and memory < _BUILD_MEMORY_BYTES:
        warnings.append(f"{memory / 1e9:.1f} GB of memory are free: `compress` may need more, even for a small model")
    for folder in folders.values():
        if folder["free_bytes"] is not None and folder["free_bytes"] < _BUILD_DISK_BYTES:
            warnings.append(f"{folder['free_bytes'] / 1e9:.1f} GB of disk are free for {folder['path']}: it may fill")
    cache = folders.get("cache")
    if cache is not None and not cache["writable"]:
        warnings.append(f"{cache['path']} can't be written ({cache['problem']}): packaged models can't be unpacked")
    return warnings


def _run_warnings(found: Json) -> list[str]:
    """Name kernels that fail and are needed by recipes only, and paths that weren't tried."""
    unused = [row for row in found["kernels"] if row["state"] != WORKS and not row["needed_by"]]
    warnings = [f"onnxruntime's {row['name']}, which no target needs: {row['detail']}" for row in unused]
    if not found["instructions"]:
        warnings.append(f"no instruction set is known for {found['machine']['architecture']}: none was tried")
    return warnings


def _clock_problems(found: Json) -> list[str]:
    timing = found["timing"]
    problems = []
    if max(timing["clock_step_s"], timing["clock_resolution_s"]) > COARSEST_CLOCK_S:
        problems.append(f"the clock moves in steps of {1e6 * timing['clock_step_s']:.0f} µs: too coarse for a token")
    return problems


def _measure_warnings(found: Json) -> list[str]:
    timing, cores = found["timing"], found["machine"]["cores"]
    count = cores["allowed"] or cores["logical"] or 1
    warnings = []
    if timing["load"] is not None and timing["load"] > BUSY * count:
        warnings.append(f"the load is {timing['load']:.1f} on {count} cores: others are at work, wait for them")
    if timing["spread_ratio"] > STEADY:
        warnings.append(f"a fixed loop's times spread by {timing['spread_ratio']:.0%} of their median: so will figures")
    if timing["stolen_share"]:
        warnings.append(f"the host took {timing['stolen_share']:.1%} of the time for others")
    if timing["governor"] not in (None, "performance"):
        warnings.append(f"the clock frequency follows the load (governor {timing['governor']}): first runs are slower")
    if cores["quota"] is not None and cores["quota"] < count:
        warnings.append(f"a control group allows {cores['quota']:g} cores' worth of time: threads beyond that wait")
    if not timing["peak_memory_readable"]:
        warnings.append("the peak memory of a process can't be read exactly here")
    return warnings
