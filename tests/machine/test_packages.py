"""Packages: what is missing, of another version or can't be imported, each said of the right one."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgepipe.machine.children import DIES, WORKS, WRONG
from edgepipe.machine.packages import BASE, MISSING, OTHER_VERSION, Needed, examine_packages


def install(folder: Path, name: str, version: str, *requirements: str, module: str | None = None) -> None:
    """Put a distribution's metadata, and the module it is, into a folder of sys.path."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
    (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if module is not None:
        (folder / f"{name}.py").write_text(module, encoding="utf-8")


def test_each_package_gets_its_own_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed edgepipe whose requirements are met in every way they can be met or not."""
    install(
        tmp_path,
        "edgepipe",
        "9.9",
        "edgepipe_fine>=1",
        "edgepipe_old>=2",
        "edgepipe_killed",
        "edgepipe_broken",
        "edgepipe_absent>=1; extra == 'compress'",
        "edgepipe_elsewhere; extra == 'dev'",
        "edgepipe_windows; sys_platform == 'beos'",
    )
    install(tmp_path, "edgepipe_fine", "1.5", module="")
    install(tmp_path, "edgepipe_old", "1.5", module="")
    install(tmp_path, "edgepipe_killed", "1", module="import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    install(tmp_path, "edgepipe_broken", "1", module="raise ImportError('libthing.so is not there')\n")
    root = str(Path(__file__).resolve().parent.parent.parent)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}")

    def needed(name: str, extra: str, wanted: str, version: str | None, state: str, detail: str = "") -> Needed:
        return Needed(name=name, extra=extra, wanted=wanted, version=version, state=state, detail=detail)

    assert examine_packages(["compress"]) == (
        needed("edgepipe_fine", BASE, ">=1", "1.5", WORKS),
        needed("edgepipe_old", BASE, ">=2", "1.5", OTHER_VERSION),
        needed("edgepipe_killed", BASE, "", "1", DIES, "dies with SIGILL"),
        needed("edgepipe_broken", BASE, "", "1", WRONG, "ImportError: libthing.so is not there"),
        needed("edgepipe_absent", "compress", ">=1", None, MISSING),
    )
