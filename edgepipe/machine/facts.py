"""What this machine is: processor, cores, memory, disk, system. Read, not tried; what can't be read is None.

Linux tells in /proc and /sys, macOS through sysctl; elsewhere little is known. The standard library suffices.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgepipe.artifacts import Json

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # version 1 of control groups writes a number of about 2^63 for "no limit"
_HYPERVISORS = ("kvm", "qemu", "vmware", "virtualbox", "xen", "microsoft", "amazon", "google", "parallels")


def describe_system() -> Json:
    """Return processor, cores, memory and system as the doctor's JSON has them."""
    return {
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "virtual": is_virtual(),
        "cores": describe_cores(),
        "memory": describe_memory(),
        "system": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    """Return the processor's name as the system spells it, or its architecture."""
    name = next(iter(_cpuinfo("model name")), "") or _sysctl("machdep.cpu.brand_string")
    if not name and (parts := set(_cpuinfo("CPU part"))):  # arm64 Linux has numbers only
        maker = next(iter(_cpuinfo("CPU implementer")), "?")
        name = f"{platform.machine()}, implementer {maker}, part {', '.join(sorted(parts))}"
    return name or platform.processor() or platform.machine()


def reported_flags() -> frozenset[str] | None:
    """Return the instruction sets that Linux lists for every core, in its own words; None where there is no list."""
    lines = [*_cpuinfo("flags"), *_cpuinfo("Features")]
    return frozenset.intersection(*(frozenset(line.split()) for line in lines)) if lines else None


def sysctl_is_set(name: str) -> bool:
    """Say whether a switch of macOS is 1."""
    return _sysctl(name) == "1"


def is_virtual() -> str | None:
    """Return who runs this virtual machine ("yes" if unnamed), "no sign of it", or None where nothing tells."""
    vendor = " ".join(read_text(Path("/sys/class/dmi/id") / name) for name in ("sys_vendor", "product_name")).lower()
    named = next((name for name in _HYPERVISORS if name in vendor), None)
    flags = reported_flags()
    if flags is not None and platform.machine() == "x86_64":  # the CPU itself says so
        return (named or "yes") if "hypervisor" in flags else "no sign of it"
    return named or ("no sign of it" if vendor.strip() else None)


def describe_cores() -> Json:
    """Return how many cores there are, how many this process may use, and how much time a control group allows."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else None
    return {
        "logical": os.cpu_count(),
        "physical": _physical_cores(),
        "allowed": allowed,
        "quota": _cpu_quota(),  # cores' worth of time, None: unlimited
    }


def _physical_cores() -> int | None:
    siblings = {
        text
        for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
        if (text := read_text(path))
    }
    if siblings:
        return len(siblings)
    counted = _sysctl("hw.physicalcpu")
    return int(counted) if counted.isdigit() else None


def _cpu_quota() -> float | None:
    quota, _, period = _cgroup("cpu", "cpu.max").partition(" ")  # "max 100000" where there is no limit
    if not period:
        quota, period = _cgroup("cpu", "cpu.cfs_quota_us"), _cgroup("cpu", "cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit() and int(period):
        return int(quota) / int(period)
    return None


def describe_memory() -> Json:
    """Return bytes of memory in all, available, and what a control group still allows (None: no limit)."""
    lines = (line.split() for line in read_text(_PROC / "meminfo").splitlines())
    told = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) > 1}
    total = told.get("MemTotal")
    if total is None and (text := _sysctl("hw.memsize")).isdigit():
        total = int(text)
    limit = _cgroup("memory", "memory.max") or _cgroup("memory", "memory.limit_in_bytes")
    return {
        "total_bytes": total,
        "available_bytes": told.get("MemAvailable"),
        "limit_bytes": int(limit) if limit.isdigit() and int(limit) < _UNLIMITED else None,
    }


def usable_memory_bytes(memory: Json) -> int | None:
    """Return the least of what is available and what a control group allows."""
    known: list[int] = [memory[key] for key in ("available_bytes", "limit_bytes") if memory[key] is not None]
    return min(known, default=memory["total_bytes"])


def describe_folder(path: Path) -> Json:
    """Return free bytes where `path` lies or would be made, and whether it can be written; nothing is left there."""
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    problem = None
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"edgepipe")
    except OSError as error:
        problem = error.strerror or str(error)
    try:
        free = shutil.disk_usage(there).free
    except OSError:
        free = None
    return {"path": str(path), "free_bytes": free, "writable": problem is None, "problem": problem}


def _cpuinfo(key: str) -> list[str]:
    """Return the values of one key of /proc/cpuinfo, a core each."""
    lines = (line.partition(":") for line in read_text(_PROC / "cpuinfo").splitlines())
    return [value.strip() for name, _, value in lines if name.strip() == key]


def _cgroup(controller: str, file: str) -> str:
    """Return a file of the control group this process is in, of version 2 or 1; empty where there is none."""
    return next((text for folder in _cgroup_folders(controller) if (text := read_text(folder / file))), "")


def _cgroup_folders(controller: str) -> Iterable[Path]:
    """Yield where the group may lie: inside a container its own folder is the root of what can be seen."""
    for line in read_text(_PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield _CGROUPS / path.lstrip("/")
            yield _CGROUPS
        elif controller in controllers.split(","):
            yield _CGROUPS / controller / path.lstrip("/")
            yield _CGROUPS / controller


def read_text(path: Path) -> str:
    """Return a small text file of the system, stripped; empty where it isn't or can't be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _sysctl(name: str) -> str:
    """Return a value of macOS's sysctl; empty elsewhere."""
    if sys.platform != "darwin":
        return ""
    done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
