"""The doctor's findings as lines for people: machine, what can be built, run and measured, a verdict per target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgepipe.artifacts import Json

_COLUMN = 42
_UNKNOWN = "unknown"


def finding_lines(found: Json) -> Iterator[str]:
    """Yield the lines of `edgepipe doctor`."""
    for title, rows in (
        ("machine", _machine(found)),
        ("packages", _packages(found)),
        ("sources", _sources(found)),
        ("instruction sets", _outcomes(found["instructions"])),
        ("onnxruntime's kernels", _outcomes(found["kernels"])),
        ("timing", _timing(found)),
    ):
        yield title
        yield from (f"  {name:{_COLUMN}} {said}".rstrip() for name, said in rows)
        yield ""
    for target in found["targets"]:
        yield f"target {target['name']}"
        for kind, title in (("build", "can be built"), ("run", "can be run"), ("measure", "can be measured")):
            verdict = target[kind]
            yield f"  {title:{_COLUMN}} {'yes' if verdict['ok'] else 'no'}"
            yield from (f"    {sentence}" for sentence in verdict["problems"] + verdict["warnings"])


def _machine(found: Json) -> Iterable[tuple[str, str]]:
    machine = found["machine"]
    cores, memory = machine["cores"], machine["memory"]
    yield "processor", f"{machine['cpu']}, {machine['architecture']}"
    yield "virtual machine", machine["virtual"] or _UNKNOWN
    counts = [f"{_known(cores[kind])} {kind}" for kind in ("logical", "physical", "allowed")]
    quota = "" if cores["quota"] is None else f", {cores['quota']:g} cores' worth of time"
    yield "cores", ", ".join(counts) + quota
    limit = "" if memory["limit_bytes"] is None else f", a control group allows {_gigabytes(memory['limit_bytes'])}"
    yield "memory", f"{_gigabytes(memory['total_bytes'])}, {_gigabytes(memory['available_bytes'])} available{limit}"
    for name, folder in found["folders"].items():
        can = "can be written" if folder["writable"] else f"can't be written: {folder['problem']}"
        yield f"disk for {name}", f"{_gigabytes(folder['free_bytes'])} free, {can}: {folder['path']}"
    yield "system", ", ".join([machine["system"], machine["libc"] or "no glibc", f"Python {machine['python']}"])


def _packages(found: Json) -> Iterable[tuple[str, str]]:
    if found["packages"] is None:
        yield "edgepipe", "not installed as a package: what it needs is not known"
    for row in found["packages"] or []:
        wanted = f" (wanted: {row['wanted']})" if row["state"] == "other version" else ""
        here = f"{row['version']}{wanted}" if row["version"] else f"missing (wanted: {row['wanted']})"
        yield f"{row['name']} [{row['extra']}]", " ".join([here, row["detail"]]).strip()


def _sources(found: Json) -> Iterable[tuple[str, str]]:
    if not found["sources"]:
        yield "none", "the base install doesn't work"
    for row in found["sources"]:
        yield row["source"], row["detail"]


def _outcomes(rows: list[Json]) -> Iterable[tuple[str, str]]:
    for row in rows:
        said = row["detail"] if row["detail"].startswith(row["state"]) else f"{row['state']}: {row['detail']}"
        if row.get("reported") and row["state"] in ("dies", "wrong result"):
            said = f"reported by the CPU, but {said}"
        yield row["name"], said.removesuffix(": ")


def _timing(found: Json) -> Iterable[tuple[str, str]]:
    timing = found["timing"]
    yield "clock", f"steps of {1e9 * timing['clock_step_s']:.0f} ns"
    yield "peak memory of a process", "can be read" if timing["peak_memory_readable"] else "can't be read exactly"
    yield "load", _UNKNOWN if timing["load"] is None else f"{timing['load']:.2f}"
    yield "frequency governor", timing["governor"] or _UNKNOWN
    stolen = timing["stolen_share"]
    yield "time taken by the host", _UNKNOWN if stolen is None else f"{stolen:.1%}"
    times = f"{timing['samples']} times {timing['loop_ms']:.1f} ms"
    yield "spread of a fixed loop", f"{timing['spread_ratio']:.1%} of the median, {times}"


def _known(value: object) -> str:
    return _UNKNOWN if value is None else str(value)


def _gigabytes(nbytes: float | None) -> str:
    return _UNKNOWN if nbytes is None else f"{nbytes / 1e9:.1f} GB"
