"""Which packages edgepipe needs, which of them are here in a version it takes, and whether they can be imported.

The ranges are those of the installed edgepipe's own metadata. Each package is imported in a child process: on a
processor it wasn't built for, an import can end a process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version

from edgepipe.machine.child import attempt_all
from edgepipe.machine.children import DIES, WORKS, WRONG, try_in_children

MISSING = "missing"
OTHER_VERSION = "other version"
BASE = "base"
_TIMEOUT_S = 120.0  # torch on a slow card, read for the first time
_MODULES = {"cyclonedx-python-lib": "cyclonedx"}  # where the name isn't the package's with underscores


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """Say what edgepipe asks for and what is here."""

    name: str
    extra: str  # BASE, or the extra that asks for it
    wanted: str  # as pip writes it: ">=2.1"; empty: any
    version: str | None  # None: not installed
    state: str  # WORKS, MISSING, OTHER_VERSION, DIES or WRONG: it can't be imported
    detail: str = ""

    @property
    def requirement(self) -> str:
        """Return what pip is to be asked for."""
        return f"{self.name}{self.wanted}"


def examine_packages(extras: Sequence[str]) -> tuple[Needed, ...] | None:
    """Return the packages of the base install and of some extras; None when edgepipe isn't installed as a package."""
    try:
        from packaging.requirements import Requirement

        lines = requires("edgepipe") or []
    except (ImportError, PackageNotFoundError):
        return None
    needed = []
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            extra = BASE
        else:
            extra = next((name for name in extras if marker.evaluate({"extra": name})), "")
        if not extra:
            continue
        wanted = str(requirement.specifier)
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = None
        right = found is not None and requirement.specifier.contains(found, prereleases=True)
        state = MISSING if found is None else WORKS if right else OTHER_VERSION
        needed.append(Needed(name=requirement.name, extra=extra, wanted=wanted, version=found, state=state))
    return _imported(needed)


def _imported(needed: list[Needed]) -> tuple[Needed, ...]:
    """Import what is here in children; what fails there gets the finding."""
    here = [package.name for package in needed if package.version is not None]
    outcomes = {o.name: o for o in try_in_children("edgepipe.machine.packages", here, timeout_s=_TIMEOUT_S)}
    examined = []
    for package in needed:
        outcome = outcomes.get(package.name)
        if outcome is not None and outcome.state in (DIES, WRONG):
            package = replace(package, state=outcome.state, detail=outcome.detail)
        examined.append(package)
    return tuple(examined)


def _import(name: str) -> tuple[str, str]:
    import_module(_MODULES.get(name, name.replace("-", "_")))
    return WORKS, ""


if __name__ == "__main__":
    attempt_all(sys.argv[1:], _import)
