"""Targets: what ships loads, and a file that doesn't fit is refused with the line to look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgepipe.errors import ConfigError
from edgepipe.target import Budgets, OnnxruntimeSettings, Target, list_targets, load_target

GOOD = """\
description = "a board"
engines = ["onnxruntime"]
measurable = "no"

[onnxruntime]
accuracy_level = 1
threads = 2

[budgets]
shipped_ratio = 0.3
ttft_ms = 800
"""


def write(folder: Path, text: str) -> Path:
    """Write a target file and return its path."""
    path = folder / "board.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", list_targets())
def test_every_shipped_target_loads(name: str) -> None:
    """Each file in targets/ fits the record and keeps its file's name."""
    assert load_target(name).name == name


def test_the_cpu_target_is_this_machine() -> None:
    """The default target runs on onnxruntime with int8 activations and can be measured here."""
    cpu = load_target("cpu")
    assert cpu.engines == ("onnxruntime", "tvm") and cpu.measurable == "here"
    assert cpu.onnxruntime == OnnxruntimeSettings(accuracy_level=0, threads=0)
    assert cpu.budgets == Budgets()


def test_a_path_loads_with_the_name_of_its_file(tmp_path: Path) -> None:
    """A path gives a target called after the file, whole numbers become floats where floats are meant."""
    expected = Target(
        name="board",
        description="a board",
        engines=("onnxruntime",),
        measurable="no",
        onnxruntime=OnnxruntimeSettings(accuracy_level=1, threads=2),
        budgets=Budgets(shipped_ratio=0.3, ttft_ms=800.0),
    )
    path = write(tmp_path, GOOD)
    assert load_target(path) == load_target(str(path)) == expected
    assert isinstance(load_target(path).budgets.ttft_ms, float)


def test_optional_tables_may_be_left_out(tmp_path: Path) -> None:
    """A file without engine settings and budgets takes the defaults."""
    target = load_target(write(tmp_path, GOOD.split("\n\n")[0]))
    assert target.onnxruntime == OnnxruntimeSettings() and target.budgets == Budgets()


def test_an_unknown_name_lists_the_known_ones() -> None:
    """A typing error is answered with the closest name and the list."""
    with pytest.raises(ConfigError, match=r"unknown target 'cpuu' \(did you mean 'cpu'\?\): known are .*cpu"):
        load_target("cpuu")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "threads = 2",
            "thread = 2",
            r"board\.toml, line 7: unknown key 'onnxruntime\.thread' \(did you mean 'threads'",
        ),
        ("[budgets]", "[budget]", r"line 9: unknown key 'budget' \(did you mean 'budgets'"),
        ("threads = 2", "threads = 2\nthreads = 3", r"not valid TOML: .*line 8"),
        ('description = "a board"', "description = ", r"not valid TOML: .*line 1"),
        ('description = "a board"\n', "", r"the key 'description' is missing"),
        ("threads = 2", 'threads = "2"', r"line 7: 'onnxruntime\.threads' must be a whole number, not '2'"),
        ("threads = 2", "threads = 2.0", r"line 7: 'onnxruntime\.threads' must be a whole number, not 2\.0"),
        ("threads = 2", "threads = true", r"line 7: 'onnxruntime\.threads' must be a whole number, not True"),
        ("threads = 2", "threads = -1", r"board\.toml: onnxruntime\.threads must be 0 .* not -1"),
        ("accuracy_level = 1", "accuracy_level = 5", r"accuracy_level must be 0 to 4, not 5"),
        ('["onnxruntime"]', '"onnxruntime"', r"line 2: 'engines' must be a list of strings"),
        ('["onnxruntime"]', "[]", r"engines is empty"),
        ('["onnxruntime"]', '["onnxrt"]', r"unknown engine 'onnxrt' \(did you mean 'onnxruntime'"),
        ('["onnxruntime"]', '["onnxruntime", "onnxruntime"]', r"one engine twice"),
        ('"no"', '"maybe"', r"line 3: 'measurable' must be one of 'here', 'emulated', 'no', not 'maybe'"),
        ("ttft_ms = 800", "ttft_ms = 0", r"budgets\.ttft_ms must be a finite number above 0"),
        ("ttft_ms = 800", "ttft_ms = nan", r"budgets\.ttft_ms must be a finite number above 0"),
        ("measurable", 'name = "x"\nmeasurable', r"line 3: unknown key 'name'"),
        ("[onnxruntime]\naccuracy_level = 1\nthreads = 2\n", "", None),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, old: str, new: str, message: str | None) -> None:
    """Unknown keys, wrong types, values out of range and broken TOML name what was expected and where."""
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    if message is None:  # the one harmless change: a whole table less
        assert load_target(path).onnxruntime == OnnxruntimeSettings()
        return
    with pytest.raises(ConfigError, match=message):
        load_target(path)


def test_a_table_given_as_a_value_is_refused(tmp_path: Path) -> None:
    """A plain value where a table belongs is told apart from an unknown key."""
    with pytest.raises(ConfigError, match="line 4: 'budgets' must be a table, not 3"):
        load_target(write(tmp_path, GOOD.split("\n\n")[0] + "\nbudgets = 3\n"))


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    """A missing path, a folder, binary data and a huge file each get one sentence."""
    with pytest.raises(ConfigError, match="No such file"):
        load_target("nowhere/board.toml")
    with pytest.raises(ConfigError, match="can't be read"):
        load_target(tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_target(binary)
    huge = tmp_path / "huge.toml"
    huge.write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(ConfigError, match="at most"):
        load_target(huge)
