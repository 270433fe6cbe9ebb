"""Gather what a report is made from: bundles, and the figures that were taken of them.

A bundle's figures are those of its run (`run.json` beside the run's directory `bundle`), or of a file that
`edgepipe measure` printed. They belong to a bundle when they carry the hash of its manifest, as the bundle or as the
baseline that it was measured beside, so figures of another build are never shown as this one's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgepipe.artifacts import Json
from edgepipe.errors import ConfigError
from edgepipe.report.build import build
from edgepipe.report.record import Material, Report
from edgepipe.runtime.bundle import MANIFEST, read_bundle

RUN = "run.json"
_RUN_ABOVE = 3  # a run's baseline lies at baseline/NN-compile/bundle, below its run.json
_BESIDE = "the other bundle"  # what a baseline is called that `edgepipe measure --against` measured
_SIDES = ("bundle", "baseline")
_COMPILED = re.compile(r"\d\d-compile(-\w+)?")  # the stage's directory, whose bundle is the one that was published


@dataclass(frozen=True, slots=True, kw_only=True)
class _Taken:
    """Hold one measurement, and where it was found."""

    file: Path
    record: Json  # of a run: recipe, figures, budgets, history; of a printed measurement: the figures alone
    printed: bool  # by `edgepipe measure`

    @property
    def figures(self) -> Json:
        """Return the figures."""
        return dict(self.record["figures"])


def gather(paths: Sequence[Path], files: Sequence[Path] = ()) -> Report:
    """Return the report of bundles or run directories, with the figures of their runs or of `files`.

    Raises ConfigError for a path that is neither or comes twice, and for a file without figures of any of the bundles;
    ContractError for a damaged bundle.
    """
    bundles = [bundle_in(path) for path in paths]
    _refuse_twins(paths, bundles)
    printed = [_read_printed(file) for file in files]
    runs = [_run_of(path, bundle) for path, bundle in zip(paths, bundles, strict=True)]
    manifests = [_manifest_sha256(bundle) for bundle in bundles]
    for one in printed:
        if not any(_side_of(one, sha256) for sha256 in manifests):
            raise ConfigError(
                f"{one.file} has figures of another bundle than {', '.join(map(str, paths))}: give the file that "
                "`edgepipe measure` printed for one of them"
            )
    materials = []
    for path, bundle, sha256, own, label in zip(paths, bundles, manifests, runs, _labels(paths), strict=True):
        known = [*printed[::-1], *([own] if own else []), *(run for run in runs if run is not None and run is not own)]
        materials.append(_material(bundle, sha256, own, known, label=label, path=path))
    return _checked(materials)


def report_of_run(directory: Path, bundle: Path) -> Report:
    """Return the report of a run that has just ended, whose bundle may lie elsewhere."""
    run = _read_run(directory / RUN)
    assert run is not None
    sha256 = _manifest_sha256(bundle)
    return _checked([_material(bundle, sha256, run, [run], label=directory.name, path=bundle)])


def report_of_unmeasured(label: str, bundle: Path, record: Json) -> Report:
    """Return the report of a run that has just ended and measured nothing; `record` says what it did, and why not."""
    reason = str(record["not_measured"])
    how = "`edgepipe measure` does it there: keep what it prints in a file, and give that with --figures."
    material = replace(
        _material(bundle, _manifest_sha256(bundle), None, [], label=label, path=bundle),
        remarks=(f"Not measured: {reason}. {how}",),
        recipe=record["recipe"],
        history=record["history"],
        search=record.get("search"),
        products=record.get("products") or (),
        engines=record.get("engines"),
    )
    return _checked([material])


def _checked(materials: Sequence[Material]) -> Report:
    try:
        return build(materials)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        where = ", ".join(material.path for material in materials)
        raise ConfigError(
            f"a manifest or the figures of {where} lack what a report needs ({type(error).__name__}: {error}): build "
            "the bundle again, or measure it again"
        ) from error


def _material(
    bundle: Path, sha256: str, own: _Taken | None, known: Sequence[_Taken], *, label: str, path: Path
) -> Material:
    """Choose the figures of a bundle: printed ones first, then its run's, then those of another one's baseline."""
    chosen = next(((one, side) for one in known if (side := _side_of(one, sha256, older=one is own))), None)
    manifest = read_bundle(bundle).manifest
    if chosen is None:
        remarks = _how_to_measure(bundle, own)
        return Material(
            label=label,
            path=str(path),
            manifest=manifest,
            manifest_sha256=sha256,
            manifest_bytes=(bundle / MANIFEST).stat().st_size,
            remarks=remarks,
        )
    taken, side = chosen
    figures = taken.figures
    if side == "baseline":
        figures = figures | {"bundle": figures["baseline"], "baseline": None, "ratios": None}
    run = own.record if own is not None and _side_of(own, sha256, older=True) == "bundle" else {}
    return Material(
        label=label,
        path=str(path),
        manifest=manifest,
        manifest_sha256=sha256,
        manifest_bytes=(bundle / MANIFEST).stat().st_size,
        figures=figures,
        beside=_BESIDE if taken.printed else "float32",
        recipe=run.get("recipe"),
        history=run.get("history"),
        budgets=run.get("budgets"),
        search=run.get("search"),
        products=run.get("products") or (),
        engines=run.get("engines"),
    )


def _how_to_measure(bundle: Path, own: _Taken | None) -> tuple[str, ...]:
    """Say why there are no figures, and how to get them."""
    command = f"`edgepipe measure {bundle}`"
    other = () if own is None else (f"The figures in {own.file} are of another build of it.",)
    return (*other, f"Not measured yet: keep what {command} prints in a file, and give that with --figures.")


def bundle_in(path: Path) -> Path:
    """Return the bundle that is meant: `path` itself, or that of the run in it. The bundle is checked."""
    bundle = path
    if not (path / MANIFEST).exists() and (run := _read_run(path / RUN)) is not None:
        places = [path / "bundle", *sorted(path.glob("[0-9][0-9]-compile*/bundle"))]
        there = [place for place in places if (place / MANIFEST).exists()]
        # Of several engines' bundles the one that was measured
        measured = [place for place in there if _side_of(run, _manifest_sha256(place)) == "bundle"]
        own = [place for place in there if place == path / "bundle"]
        bundle = next(iter([*own, *measured, *there]), path)
    read_bundle(bundle)
    return bundle


def _run_of(path: Path, bundle: Path) -> _Taken | None:
    """Return what the run that made a bundle kept, if it lies there: above it, or in the directory that was named."""
    above = bundle.resolve().parents[:_RUN_ABOVE]
    return next((run for folder in (path, *above) if (run := _read_run(folder / RUN))), None)


def _read_run(file: Path) -> _Taken | None:
    """Return a run's record; None where there is none."""
    if not file.is_file():
        return None
    return _Taken(file=file, record=_with_figures(file, _read(file)), printed=False)


def _read_printed(file: Path) -> _Taken:
    """Return a measurement that was given: what `edgepipe measure` printed, or another run's run.json."""
    found = _read(file)
    printed = not (isinstance(found, dict) and "figures" in found)
    return _Taken(file=file, record=_with_figures(file, {"figures": found} if printed else found), printed=printed)


def _read(file: Path) -> object:
    """Return the JSON of a file: the whole of it, or its last line."""
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} can't be read ({error}): give what `edgepipe measure` printed") from None
    for part in (text, text.rpartition("\n")[2]):
        try:
            return json.loads(part)
        except (ValueError, RecursionError):
            continue
    return None


def _with_figures(file: Path, record: object) -> Json:
    """Return a record whose figures are there in outline; ConfigError when they aren't."""
    figures = record.get("figures") if isinstance(record, dict) else None
    parts = figures if isinstance(figures, dict) else {}
    whole = isinstance(parts.get("machine"), dict) and isinstance(parts.get("bundle"), dict)
    if not whole or not isinstance(parts.get("baseline") or {}, dict):
        raise ConfigError(f"{file} holds no figures of a bundle: give what `edgepipe measure` printed")
    assert isinstance(record, dict)
    return record


def _side_of(taken: _Taken, sha256: str, *, older: bool = False) -> str | None:
    """Return as what the measurement has the bundle with this manifest: "bundle", "baseline" or None.

    Versions before kept no hash; `older` takes such figures for the bundle's own, as what lies beside it.
    """
    found = next((s for s in _SIDES if (taken.figures.get(s) or {}).get("manifest_sha256") == sha256), None)
    return "bundle" if found is None and older and "manifest_sha256" not in taken.figures["bundle"] else found


def _manifest_sha256(bundle: Path) -> str:
    return hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()


def _refuse_twins(paths: Sequence[Path], bundles: Sequence[Path]) -> None:
    seen: dict[Path, Path] = {}
    for path, bundle in zip(paths, bundles, strict=True):
        place = bundle.resolve()
        if place in seen:
            raise ConfigError(f"{path} is the bundle that {seen[place]} is already: name each one once")
        seen[place] = path


def _labels(paths: Sequence[Path]) -> list[str]:
    """Name bundles by their run or their own directory; by their whole path where that isn't enough."""
    names = [_name(path) for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


def _name(path: Path) -> str:
    """Return the name of a bundle's own directory, or of the run that it is the bundle or the baseline of."""
    place = path.resolve()
    if place.name != "bundle":
        return place.name
    run = place.parent.parent if _COMPILED.fullmatch(place.parent.name) else place.parent
    return f"{run.parent.name} {run.name}" if run.name == "baseline" else run.name
