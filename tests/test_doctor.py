"""Doctor: findings of every kind on this machine, verdicts that follow from them, exit codes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgepipe import doctor
from edgepipe.cli import main
from edgepipe.doctor import ABSENT, examine
from edgepipe.errors import ConfigError
from edgepipe.machine.children import WORKS
from edgepipe.machine.instructions import InstructionPath, paths_for
from edgepipe.machine.kernel_names import KERNEL_NAMES, needed_kernels
from edgepipe.report.findings import finding_lines
from edgepipe.target import list_targets

ROOT = Path(__file__).resolve().parent.parent
HERE = paths_for(platform.machine())


def run(*words: str) -> Result:
    """Run the command."""
    return CliRunner().invoke(main, ["doctor", *words])


def last(result: Result) -> dict[str, Any]:
    """Return the JSON document on the last line of stdout."""
    return dict(json.loads(result.stdout.strip().splitlines()[-1]))


def write_target(path: Path, measurable: str, level: int) -> Path:
    """Write a target's file."""
    path.write_text(
        f'description = "a target"\nengines = ["onnxruntime"]\nmeasurable = "{measurable}"\n'
        f"[onnxruntime]\naccuracy_level = {level}\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Examine this machine once, for all targets."""
    return examine()


def test_this_machine_can_do_everything(found: dict[str, Any]) -> None:
    assert (found["ok"], found["problem"]) == (True, None)
    (cpu,) = found["targets"]
    assert cpu["name"] == "cpu"
    assert [cpu[kind]["problems"] for kind in ("build", "run", "measure")] == [[], [], []]
    assert [(k["name"], k["state"]) for k in found["kernels"]] == [(name, WORKS) for name in KERNEL_NAMES]
    assert {row["name"] for row in found["instructions"]} == {path.name for path in HERE}
    assert all(row["state"] == ABSENT or row["reported"] for row in found["instructions"])
    assert json.loads(json.dumps(found)) == found


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="not the environment that make sets up")
def test_what_make_installs_is_whole(found: dict[str, Any]) -> None:
    """In the environment of the tests nothing that the base install or the extra asks for is missing or broken."""
    packages = found["packages"]
    assert [package for package in packages if package["state"] != WORKS] == []
    assert {"numpy", "onnxruntime"} <= {package["name"] for package in packages if package["extra"] == "base"}
    assert {"torch", "onnx"} <= {package["name"] for package in packages if package["extra"] == "compress"}


def test_every_finding_has_a_line(found: dict[str, Any]) -> None:
    text = "\n".join(finding_lines(found))
    names = [row["name"] for key in ("instructions", "kernels", "packages") for row in found[key] or []]
    names += [row["source"] for row in found["sources"]]
    assert [name for name in names if f"\n  {name}" not in text] == []
    assert found["machine"]["cpu"] in text
    assert "\ntarget cpu\n" in text


def test_the_lines_of_a_machine_that_tells_little(found: dict[str, Any]) -> None:
    """What can't be read is called unknown, and nothing falls over it."""
    bare = json.loads(json.dumps(found))
    bare["machine"] |= {"virtual": None, "libc": None}
    bare["machine"]["cores"] = dict.fromkeys(bare["machine"]["cores"])
    bare["machine"]["memory"] = dict.fromkeys(bare["machine"]["memory"])
    bare["timing"] |= {"load": None, "governor": None, "stolen_share": None}
    bare |= {"packages": None, "sources": [], "instructions": []}
    assert "\n".join(finding_lines(bare)).count("unknown") >= 8


def test_the_command_prints_lines_and_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target of its own with int8 arithmetic: only what it needs is tried."""
    monkeypatch.setattr(doctor, "examine_packages", lambda extras: None)
    file = write_target(tmp_path / "board.toml", "here", 4)
    result = run("--target", str(file))
    assert result.exit_code == 0, result.output
    told = last(result)
    assert [kernel["name"] for kernel in told["kernels"]] == list(needed_kernels(4))
    assert all(kernel["needed_by"] == ["board"] for kernel in told["kernels"])
    assert "target board" in result.stderr and "target cpu" not in result.stderr


def test_an_unknown_target_is_a_wrong_request() -> None:
    result = run("--target", "cqu")
    assert result.exit_code == 2
    known = ", ".join(list_targets())
    assert result.stderr == f"edgepipe: unknown target 'cqu' (did you mean 'cpu'?): known are {known}\n"
    with pytest.raises(ConfigError):
        examine("cqu")


def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what a test isn't about and takes seconds: imports, half a second of loops, all but one kernel."""
    monkeypatch.setattr(doctor, "examine_packages", lambda extras: None)
    monkeypatch.setattr(doctor, "needed_kernels", lambda level: KERNEL_NAMES[:1])


def test_a_reported_instruction_set_that_dies_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real machine code that dies with SIGILL, under a flag that this CPU does report."""
    if not HERE or sys.platform != "linux":
        pytest.skip("no path is known for this machine")
    light(monkeypatch)
    illegal = {"x86_64": "0f0b", "aarch64": "00000000"}[HERE[0].architecture]

    def with_a_broken_one(architecture: str) -> tuple[InstructionPath, ...]:
        return (dataclasses.replace(HERE[0], name="planted", code=illegal), HERE[0])

    monkeypatch.setattr(doctor, "paths_for", with_a_broken_one)
    result = run("--target", "cpu")
    assert result.exit_code == 1
    sentence = "the CPU reports planted, but executing it gives: dies with SIGILL"
    assert result.stderr.endswith(f"edgepipe: target cpu can't be run here: {sentence}\n")
    assert "planted                                    reported by the CPU, but dies with SIGILL" in result.stderr
    told = last(result)
    assert [row["state"] for row in told["instructions"]] == ["dies", "works"]
    assert told["targets"][0]["build"]["problems"] == told["targets"][0]["run"]["problems"] == [sentence]
    assert not told["targets"][0]["measure"]["ok"]


def test_another_machine_s_target_can_be_built_but_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch)
    told = examine(str(write_target(tmp_path / "phone.toml", "no", 0)))
    (phone,) = told["targets"]
    assert phone["build"]["ok"] and told["ok"]
    assert phone["run"]["problems"] == ["target phone is another machine"]
    assert phone["measure"]["problems"] == ["target phone can't be measured from here"]


def test_a_target_whose_library_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    told = examine("rpi5")
    (board,) = told["targets"]
    assert board["build"]["problems"] == [
        "the tvm engine needs packages that aren't here: pip install 'edgepipe[tvm]'",
    ]
    assert told["problem"].startswith("target rpi5 can't be built here: the tvm engine needs packages")


def test_a_folder_that_cannot_be_written_forbids_building_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("in the way")
    told = examine("cpu")
    (cpu,) = told["targets"]
    assert cpu["build"]["problems"] == ["runs can't be written (Not a directory): change to a folder where it can"]
    assert cpu["run"]["ok"] and told["ok"]


def test_missing_packages_are_lines_with_a_command(found: dict[str, Any]) -> None:
    """The extra forbids building, the base forbids running; other versions count like missing ones."""
    from edgepipe.target import load_target

    told = json.loads(json.dumps(found))
    rows = [("numpy", "base", ">=2.1", "1.26"), ("torch", "compress", "==2.13.0", None), ("onnx", "compress", "", "2")]
    states = ("other version", "missing", "works")
    told["packages"] = [
        {"name": name, "extra": extra, "wanted": wanted, "version": version, "state": state, "detail": ""}
        for (name, extra, wanted, version), state in zip(rows, states, strict=True)
    ]
    verdict = doctor._judge(load_target("cpu"), told)
    assert verdict["run"]["problems"] == ['numpy is 1.26: python -m pip install "numpy>=2.1"']
    both = 'numpy is 1.26, torch is missing: python -m pip install "numpy>=2.1" "torch==2.13.0"'
    assert verdict["build"]["problems"] == [both]


def test_what_makes_figures_doubtful_is_a_warning(found: dict[str, Any]) -> None:
    told = json.loads(json.dumps(found))
    told["machine"]["cores"] |= {"allowed": 4, "quota": 1.5}
    told["timing"] |= {
        "load": 3.5,
        "spread_ratio": 0.31,
        "stolen_share": 0.02,
        "governor": "schedutil",
        "peak_memory_readable": False,
    }
    warnings = "\n".join(doctor._measure_warnings(told))
    for part in ("load is 3.5 on 4 cores", "by 31%", "took 2.0%", "schedutil", "1.5 cores' worth", "peak memory"):
        assert part in warnings
    told["timing"] |= {"load": 0.1, "spread_ratio": 0.02, "stolen_share": 0.0, "governor": "performance"}
    told["timing"]["peak_memory_readable"] = True
    told["machine"]["cores"]["quota"] = None
    assert doctor._measure_warnings(told) == []
    assert doctor._clock_problems(told) == []
    told["timing"]["clock_step_s"] = 0.016
    assert doctor._clock_problems(told) == ["the clock moves in steps of 16000 µs: too coarse for a token"]


def test_little_memory_and_disk_are_warnings(found: dict[str, Any]) -> None:
    told = json.loads(json.dumps(found))
    told["machine"]["memory"]["limit_bytes"] = 500_000_000
    for name, folder in told["folders"].items():
        folder["free_bytes"] = 10_000_000 if name == "runs" else 10**12
    warnings = doctor._build_warnings(told)
    assert len(warnings) == 2 and "0.5 GB of memory" in warnings[0] and "0.0 GB of disk" in warnings[1]


def test_a_numpy_that_kills_its_process_is_a_finding(tmp_path: Path) -> None:
    """A wheel built for another processor dies when it is imported: the doctor lives and says so."""
    (tmp_path / "numpy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n", encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-P", "-m", "edgepipe", "doctor", "--target", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert {kernel["detail"] for kernel in told["kernels"]} == {"dies with SIGILL"}
    assert told["sources"] == []
    assert "Traceback" not in done.stderr
    assert "dies with SIGILL" in done.stderr.splitlines()[-1]
    assert all(row["state"] in ("works", "absent", "refused") for row in told["instructions"])
