"""Libraries for other machines: what is refused before any work, and where one is opened; slow/test_cross.py has
what runs elsewhere.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import platform
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgepipe.cli import main
from edgepipe.compress import compress, why_not_measured
from edgepipe.engines import linking, native
from edgepipe.errors import ConfigError, TargetError
from edgepipe.levels import LEVELS, Level, level_named
from edgepipe.recipe import resolve
from edgepipe.runtime import library as runtime
from edgepipe.runtime.library import LibraryFacts, check_processor
from edgepipe.stages.compile import Compile
from edgepipe.target import TvmSettings, list_targets, load_target
from tests.listener import Silent

CROSS = [name for name in list_targets() if load_target(name).tvm.level]
ELSEWHERE = "rpi5" if platform.machine() != "aarch64" else "x86-64-v3"


def facts(level: Level) -> LibraryFacts:
    """Return what the manifest says of a library for a level."""
    return LibraryFacts(
        file="library.so",
        level=level.name,
        machine=level.machine,
        system=level.system,
        flags=frozenset(level.flags),
        gpu=level.gpu,
        functions={},
        tensors={},
    )


def test_every_level_has_a_target_of_its_own_name_or_board() -> None:
    """Those that are listed name a level, its instructions are LLVM's and its flags the kernel's."""
    boards = {"android-arm64", "graviton", "jetson-orin", "riscv64", "rpi4", "rpi5"}
    assert boards | {"x86-64-v3", "x86-64-v4-vnni"} == set(CROSS)
    for name in CROSS:
        target = load_target(name)
        level = target.tvm.named
        assert level is not None and target.engines == ("tvm",)
        assert level.triple == f"{level.machine}-{target.tvm.system}"
        assert (target.measurable == "here") == (level.machine == "x86_64")
    assert len({level.name for level in LEVELS}) == len(LEVELS)


def test_levels_and_systems_that_nobody_knows() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown level 'armv8\.2' \(did you mean 'armv8\.2-a'\?\): known are x86-64"
    ):
        TvmSettings(level="armv8.2")
    with pytest.raises(ConfigError, match=r"tvm\.system=linux-android wants a tvm\.level: this machine's is Linux"):
        TvmSettings(system="linux-android")


@pytest.mark.parametrize("name", [name for name in CROSS if load_target(name).measurable == "no"])
def test_the_linker_is_asked_for_before_any_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library for another machine wants Zig, and the sentence names the extra."""
    pytest.importorskip("tvm", reason="TVM isn't here: pip install 'edgepipe[tvm]'")
    level = load_target(name).tvm.named
    assert level is not None
    monkeypatch.setattr(linking, "linked_here", lambda other: other != level)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == "ziglang" else find(asked))
    with pytest.raises(
        TargetError, match=rf"a library for {level.triple} is linked by Zig.*install 'edgepipe\[cross\]'"
    ):
        Compile().meets(load_target(name))


def test_a_library_is_opened_where_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine, system and features are compared with what is here, in this order; one sentence each."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with pytest.raises(TargetError, match=r"library is for aarch64 \(armv8\.2-a\), but this machine is x86_64: build"):
        check_processor(facts(level_named("armv8.2-a")))
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(runtime, "system_here", lambda: "linux-gnu")
    with pytest.raises(TargetError, match=r"library is for linux-android, but this system is linux-gnu: build"):
        check_processor(facts(level_named("armv8-a", "linux-android")))
    monkeypatch.setattr(runtime, "_granted", lambda: frozenset({"asimd", "crc32"}))
    check_processor(facts(level_named("armv8-a")))
    with pytest.raises(TargetError, match=r"is for armv8\.2-a, but this processor has no asimddp, asimdhp, asimdrdm,"):
        check_processor(facts(level_named("armv8.2-a")))
    runs = {name: native.runs_here(level_named(name)) for name in ("armv8-a", "armv8.2-a", "x86-64-v3")}
    assert runs == {"armv8-a": True, "armv8.2-a": False, "x86-64-v3": False}
    monkeypatch.setattr(native, "system_here", lambda: "linux-android")
    assert not native.runs_here(level_named("armv8-a"))


def test_names_of_arm_features_stand_at_the_kernel_s_bits() -> None:
    """HWCAP_ASIMDDP is bit 20, HWCAP_SVE 22: arch/arm64/include/uapi/asm/hwcap.h."""
    known = {"asimd": 1, "crc32": 7, "atomics": 8, "fphp": 9, "asimdhp": 10, "asimdrdm": 12, "lrcpc": 15, "asimddp": 20}
    assert {name: runtime._ARM_FLAGS.index(name) for name in known} == known
    wanted = {flag for level in LEVELS if level.machine == "aarch64" for flag in level.flags}
    assert wanted <= set(runtime._ARM_FLAGS)


def test_why_a_bundle_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the target, or by the instructions that this machine lacks."""
    assert why_not_measured(resolve(target="rpi5")) == "the target rpi5 can't be measured from here"
    here = resolve(target="x86-64-v3")
    monkeypatch.setattr(native, "processor_flags", frozenset)
    assert why_not_measured(here) == "this machine has not all instructions of x86-64-v3"
    assert why_not_measured(resolve(target="cpu")) == ""


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--max-drop", "1%"], "--max-drop measures on this machine, and the target rpi5 can't be measured from here"),
        (["--budget-ms", "9"], "--budget-ms measures on this machine, and the target rpi5 can't be"),
        (["--engine", "onnxruntime"], "the target rpi5 runs tvm, and the recipe asks for onnxruntime"),
    ],
)
def test_what_is_refused(options: list[str], sentence: str, tiny_model_dir: Path) -> None:
    result = CliRunner().invoke(main, ["compress", str(tiny_model_dir), "--target", "rpi5", *options])
    assert result.exit_code in (1, 2) and sentence in result.stderr and "Traceback" not in result.stderr


def test_no_engine_is_chosen_where_none_can_be_measured(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Before anything is built."""
    file = tmp_path / "board.toml"
    file.write_text('description = "a board"\nengines = ["tvm", "onnxruntime"]\nmeasurable = "no"\n', encoding="utf-8")
    command = ["compress", str(tiny_model_dir), "--target", str(file), "--engine", "auto"]
    result = CliRunner().invoke(main, command)
    said = "--engine auto measures on this machine, and the target board can't be measured from here: name an engine"
    assert result.exit_code == 2 and said in result.stderr


def test_a_run_that_cannot_be_measured(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The bundle and a report are there, and both say why there are no figures."""
    file = tmp_path / "board.toml"
    file.write_text('description = "a board"\nengines = ["onnxruntime"]\nmeasurable = "no"\n', encoding="utf-8")
    recipe = resolve(target=str(file), settings=[("compile", "check_tokens", 0), ("export", "check_tokens", 0)])
    made = compress(str(tiny_model_dir), recipe, listener=Silent(), out=tmp_path / "out", runs=tmp_path / "runs")
    assert made["not_measured"] == "the target board can't be measured from here" and "figures" not in made
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["recipe"]["stages"] == ["quantize", "export", "compile"]
    report = json.loads(Path(made["report"]).with_name("report.json").read_text(encoding="utf-8"))
    (bundle,) = report["bundles"]
    assert bundle["measured"] is None
    assert bundle["remarks"][0].startswith("Not measured: the target board can't be measured from here. `edgepipe")
    assert [stage["stage"] for stage in bundle["stages"]] == ["quantize", "export", "compile"]
    assert dataclasses.asdict(recipe.target)["measurable"] == "no"
