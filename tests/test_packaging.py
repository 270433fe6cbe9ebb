"""What is shipped: the wheel carries its data, the Dockerfile's steps work, and the base install has no torch."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HADOLINT = Path(sys.executable).parent / "hadolint"
PINNED = re.compile(r"([A-Za-z0-9._-]+)==([^\s;]+)")


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run a command to its end and return its stdout; a failure shows what it wrote."""
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def project() -> dict[str, object]:
    """Read pyproject.toml's project table."""
    table: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def normal(name: str) -> str:
    """Spell a distribution's name as PEP 503 does."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str = "constraints.txt") -> dict[str, str]:
    """Read a file of constraints: normalised name → version."""
    lines = [x for x in (ROOT / file).read_text().splitlines() if x and not x.startswith("#")]
    found = [PINNED.fullmatch(line) for line in lines]
    assert all(found), f"not a plain pin: {[line for line, match in zip(lines, found, strict=True) if not match]}"
    return {normal(match[1]): match[2] for match in found if match}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    # The dev extra holds the build backend; without it pip fetches one into an environment of its own.
    offline = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *offline, "-w", folder, ROOT, cwd=folder)
    (built,) = folder.glob("edgepipe-*.whl")
    return built


def test_the_wheel_holds_code_data_and_licence(wheel: Path) -> None:
    """Every module, target and calibration file of the checkout is in the wheel, and nothing else is."""
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    skipped = {".pyc", ".pyo"}
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / "edgepipe").rglob("*") if p.is_file()}
    for kind in ("targets", "calibration"):
        expected |= {f"edgepipe/_data/{p.relative_to(ROOT)}" for p in (ROOT / kind).rglob("*") if p.is_file()}
    expected = {name for name in expected if Path(name).suffix not in skipped}
    assert held == expected
    assert {"edgepipe/py.typed", "edgepipe/_data/targets/cpu.toml"} <= held
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_the_installed_wheel_finds_its_data_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    """From an empty directory the installed package lists its targets and opens its evaluation text."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel, cwd=empty)
    code = """
import json, edgepipe
from edgepipe.calibration import open_text
from edgepipe.target import list_targets, load_target
names = [load_target(name).name for name in list_targets()]
print(json.dumps([edgepipe.__file__, names, len(open_text("prose-eval"))]))
"""
    file, names, characters = json.loads(run(sys.executable, "-c", code, cwd=empty, env={"PYTHONPATH": str(site)}))
    assert Path(file).is_relative_to(site)
    assert names == sorted(path.stem for path in (ROOT / "targets").glob("*.toml"))
    assert characters > 10_000


def test_the_version_is_written_once(wheel: Path) -> None:
    """The wheel's version is the one in edgepipe/__init__.py."""
    match = re.search(r'__version__ = "(.+)"', (ROOT / "edgepipe" / "__init__.py").read_text())
    assert match and wheel.name.startswith(f"edgepipe-{match[1]}-")


def test_the_base_install_is_the_runtime_alone() -> None:
    """An app that embeds a bundle pays for six packages, none of which trains or exports."""
    names = {re.split(r"[<>=!~ ]", requirement)[0] for requirement in project()["dependencies"]}  # type: ignore[attr-defined]
    assert names == {"click", "jinja2", "numpy", "onnxruntime", "packaging", "tokenizers"}


def test_everything_installed_is_pinned() -> None:
    """All that the extras bring in is in constraints.txt: walks the requirements of what is installed here."""
    from importlib.metadata import distribution

    from packaging.requirements import Requirement

    pinned = pins()
    extras: dict[str, list[str]] = project()["optional-dependencies"]  # type: ignore[assignment]
    base: list[str] = project()["dependencies"]  # type: ignore[assignment]
    del extras["optimum"]  # never beside the others
    waiting = [Requirement(text) for text in [*base, *(text for extra in extras.values() for text in extra)]]
    seen: set[tuple[str, frozenset[str]]] = set()
    loose = set()
    while waiting:
        requirement = waiting.pop()
        key = (normal(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        if key[0] not in pinned:
            loose.add(key[0])
            continue
        assert requirement.specifier.contains(pinned[key[0]], prereleases=True), f"{key[0]} isn't {requirement}"
        if not _installed(key[0]):
            continue  # bench or eval, on a machine that has not set them up
        for text in distribution(key[0]).requires or []:
            below = Requirement(text)
            marker = below.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*requirement.extras, "")):
                waiting.append(below)
    assert not loose, f"not in constraints.txt: {sorted(loose)}"


def test_optimum_s_environment_differs_where_it_must() -> None:
    """The pins of the extra `optimum` fit it and the base, and are the main ones but for transformers' kin."""
    from packaging.requirements import Requirement

    main, own = pins(), pins("constraints-optimum.txt")
    extras: dict[str, list[str]] = project()["optional-dependencies"]  # type: ignore[assignment]
    base: list[str] = project()["dependencies"]  # type: ignore[assignment]
    for requirement in map(Requirement, [*base, *extras["optimum"]]):
        assert requirement.specifier.contains(own[normal(requirement.name)]), str(requirement)
    kin = {"transformers", "tokenizers", "huggingface-hub", "hf-xet", "setuptools"}
    assert {name for name in main.keys() & own.keys() if main[name] != own[name]} <= kin
    assert own["transformers"].startswith("4.57.")


def _installed(name: str) -> bool:
    """Say whether a distribution of that name is installed here."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint comes with the dev extra, where it is built for")
def test_the_dockerfile_passes_hadolint() -> None:
    """The Dockerfile has none of the mistakes hadolint knows."""
    run(HADOLINT, "--no-color", "Dockerfile", cwd=ROOT)


def test_every_file_the_dockerfile_copies_is_sent_to_the_builder() -> None:
    """COPY's sources exist, and .dockerignore, which keeps everything else out, lets them through."""
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for stage in dockerfile() for step in stage.steps for source in step.sources if not step.stage}
    assert copied and copied <= let_through
    assert all((ROOT / source).exists() for source in copied)


def test_the_image_does_not_run_as_root() -> None:
    """The last stage drops root after its last RUN, and starts edgepipe."""
    words = [step.verb for step in dockerfile()[-1].steps]
    assert words.index("USER") > max(i for i, word in enumerate(words) if word == "RUN")
    assert words[-1] == "ENTRYPOINT" and dockerfile()[-1].steps[-1].text == '["edgepipe"]'


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Hold one instruction of a Dockerfile."""

    verb: str
    text: str
    stage: str | None = None  # COPY --from
    sources: tuple[str, ...] = ()  # COPY


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Hold one FROM and what follows it."""

    name: str
    steps: list[Step] = field(default_factory=list)


def dockerfile() -> list[Stage]:
    """Parse the Dockerfile, which keeps to one instruction per line."""
    stages: list[Stage] = []
    for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        verb, text = line.split(maxsplit=1)
        assert not text.endswith("\\"), "one instruction per line, or teach this parser"
        if verb == "FROM":
            stages.append(Stage(name=text.partition(" AS ")[2]))
        elif verb == "COPY":
            words = text.split()
            stage = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else None
            stages[-1].steps.append(Step(verb=verb, text=words[-1], stage=stage, sources=tuple(words[:-1])))
        else:
            stages[-1].steps.append(Step(verb=verb, text=text))
    return stages


def replay(stage: Stage, root: Path, others: dict[str, Path]) -> Iterator[str]:
    """Carry out a stage's WORKDIR, COPY and `RUN pip` below `root` with a fresh Python there; yield what was run."""
    venv.create(root / "venv", with_pip=True)
    path = f"{root / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    here = root
    for step in stage.steps:
        if step.verb == "WORKDIR":
            here = root / step.text.lstrip("/")
            here.mkdir(parents=True, exist_ok=True)
        elif step.verb == "COPY":
            for source in step.sources:
                copy(others[step.stage] / source.lstrip("/") if step.stage else ROOT / source, here, step.text)
        elif step.verb == "RUN" and step.text.startswith("pip "):  # not useradd: that would change this machine
            run("sh", "-c", step.text, cwd=here, env={"PATH": path, "PYTHONPATH": ""})
            yield step.text


def copy(source: Path, here: Path, to: str) -> None:
    """Copy as COPY does: a directory's contents into a directory, a file into a directory."""
    if source.is_dir():
        shutil.copytree(source, here / to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, here / to)


@pytest.mark.slow
def test_the_dockerfile_s_steps_give_a_runtime_without_torch(tmp_path: Path) -> None:
    """Both stages' install steps, run in fresh environments, end in a working `edgepipe` that can't import torch."""
    others: dict[str, Path] = {}
    for stage in dockerfile():
        root = tmp_path / (stage.name or "final")
        others[stage.name] = root
        assert list(replay(stage, root, others)), "a stage without a pip step: nothing was tested"
    bin_, empty = tmp_path / "final" / "venv" / "bin", tmp_path / "empty"
    empty.mkdir()
    find = "import importlib.util as u; print([n for n in ('torch', 'transformers', 'onnx', 'gguf') if u.find_spec(n)])"
    assert run(bin_ / "python", "-c", find, cwd=empty, env={"PYTHONPATH": ""}).strip() == "[]"
    run(bin_ / "python", "-m", "pip", "check", cwd=empty, env={"PYTHONPATH": ""})
    run(bin_ / "python", "-c", "import edgepipe.runtime", cwd=empty, env={"PYTHONPATH": ""})
    assert "cpu" in run(bin_ / "edgepipe", "targets", cwd=empty, env={"PYTHONPATH": ""})


def test_make_help_names_every_target() -> None:
    """`make help` lists all that can be made, each with a sentence."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.+)$", text, re.MULTILINE)
    shown = [line.split()[1] for line in run("make", "--no-print-directory", "help", cwd=ROOT).splitlines()]
    assert sorted(shown) == sorted(phony.split())


def test_ci_runs_the_fast_suite_and_nothing_else() -> None:
    """What CI runs is what a developer runs."""
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert "set -euo pipefail" in lines and lines[-1] == "make test"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_set_up_says_so_when_no_python_fits(tmp_path: Path) -> None:
    """Without Python 3.11 on the PATH, make stops with one sentence."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("make", "sh", "test", "echo", "env"):
        found = shutil.which(name)
        if found:
            (tools / name).symlink_to(found)
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, clone)
    make = shutil.which("make")
    assert make
    done = subprocess.run([make, "test"], cwd=clone, env={"PATH": str(tools)}, capture_output=True, text=True)
    assert done.returncode == 2 and "edgepipe needs Python 3.11 or newer, and none is on the PATH" in done.stderr
