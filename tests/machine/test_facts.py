"""What the machine says of itself, held against what Python and the system say in other ways."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import psutil
import pytest

from edgepipe.machine import facts
from edgepipe.machine.timing import STEADY, describe_timing, spread


def test_cores_and_memory_are_those_psutil_counts() -> None:
    cores, memory = facts.describe_cores(), facts.describe_memory()
    assert cores["logical"] == psutil.cpu_count()
    assert cores["physical"] in (psutil.cpu_count(logical=False), None)
    if sys.platform == "linux":
        assert cores["allowed"] == len(psutil.Process().cpu_affinity())
        assert memory["total_bytes"] == psutil.virtual_memory().total
        assert abs(memory["available_bytes"] - psutil.virtual_memory().available) < 2e9


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_fewer_cores_are_noticed() -> None:
    """A process that was given one core may not count on two."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert facts.describe_cores()["allowed"] == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("lines", "files", "quota", "limit"),
    [
        ("0::/app", {"app/cpu.max": "150000 100000", "app/memory.max": "1073741824"}, 1.5, 1 << 30),
        ("0::/gone", {"cpu.max": "max 100000", "memory.max": "max"}, None, None),  # a container sees its own root
        (
            "4:memory:/app\n2:cpu,cpuacct:/app",
            {
                "cpu/app/cpu.cfs_quota_us": "50000",
                "cpu/app/cpu.cfs_period_us": "100000",
                "memory/app/memory.limit_in_bytes": "2147483648",
            },
            0.5,
            2 << 30,
        ),
        (
            "4:memory:/\n2:cpu:/",
            {"cpu/cpu.cfs_quota_us": "-1", "memory/memory.limit_in_bytes": "9223372036854771712"},
            None,
            None,
        ),
        ("", {}, None, None),
    ],
    ids=["version 2", "no limit", "version 1", "version 1, no limit", "none"],
)
def test_control_groups_of_both_versions(
    lines: str,
    files: dict[str, str],
    quota: float | None,
    limit: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The folders of a control group, as the two versions of Linux's interface lay them out."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(lines + "\n")
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:  4000000 kB\nMemAvailable:  3000000 kB\n")
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text + "\n")
    monkeypatch.setattr(facts, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(facts, "_CGROUPS", tmp_path / "groups")
    assert facts.describe_cores()["quota"] == quota
    memory = facts.describe_memory()
    assert memory == {"total_bytes": 4096000000, "available_bytes": 3072000000, "limit_bytes": limit}
    assert facts.usable_memory_bytes(memory) == min(3072000000, limit or 3072000000)


def test_a_processor_without_a_name_is_told_by_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc/cpuinfo of an arm64 board with cores of two kinds: a flag counts when every core has it."""
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\nCPU part\t: 0xd05\n\n"
        "processor\t: 1\nFeatures\t: fp asimd asimddp i8mm\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n"
    )
    monkeypatch.setattr(facts, "_PROC", tmp_path)
    if sys.platform == "linux":
        assert facts.cpu_name() == f"{platform.machine()}, implementer 0x41, part 0xd05, 0xd0b"
    assert facts.reported_flags() == {"fp", "asimd", "asimddp"}


def test_a_folder_that_is_not_there_is_judged_by_its_parent(tmp_path: Path) -> None:
    found = facts.describe_folder(tmp_path / "runs" / "deep")
    assert found["writable"] and found["problem"] is None
    assert found["free_bytes"] == pytest.approx(psutil.disk_usage(str(tmp_path)).free, rel=0.05)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("in the way")
    found = facts.describe_folder(tmp_path / "runs")
    assert not found["writable"] and found["problem"] == "Not a directory"


def test_the_clock_and_a_loop() -> None:
    timing = describe_timing()
    assert 0 < timing["clock_step_s"] < 1e-3
    assert timing["samples"] >= 20 and timing["loop_ms"] > 0
    assert timing["spread_ratio"] >= 0
    assert timing["peak_memory_readable"] == (sys.platform in ("linux", "darwin"))
    if sys.platform == "linux":
        assert timing["stolen_share"] is None or 0 <= timing["stolen_share"] <= 1


def test_what_counts_as_steady() -> None:
    """Times between 95 and 105 are; one in ten that takes twice as long is not."""
    even = [95 + i / 10 for i in range(101)]
    assert spread(even) == pytest.approx(0.09, abs=0.005) and spread(even) < STEADY
    assert spread([100.0] * 90 + [200.0] * 10) > STEADY
    assert spread([100.0] * 99 + [200.0]) == 0  # a single turn of somebody else's
