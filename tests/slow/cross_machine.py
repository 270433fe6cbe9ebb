"""An emulated 64-bit Arm machine in .cross/: qemu, Debian's Python for arm64, the wheels that a bundle's runtime needs.

    python -m tests.slow.cross_machine      download and unpack what isn't there yet; `make test-cross` calls it

Nothing is installed: apt-get and pip only download, apt-get with lists and an empty dpkg status of its own, as if this
were an arm64 machine. What can't be had is written to .cross/missing.txt, and the tests skip with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".cross"
_MISSING = HOME / "missing.txt"
_ROOT_FOLDER, _SITE = HOME / "root", HOME / "site"
_DEBIAN = ("python3-minimal", "libpython3-stdlib", "libstdc++6")
_WHEELS = ("apache-tvm", "apache-tvm-ffi", "jinja2", "markupsafe", "numpy", "tokenizers", "typing_extensions")
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
_RUNTIME = "tvm/lib/libtvm_runtime.so"  # all that a device needs of the wheel with the compiler


def missing() -> str | None:
    """Say what keeps the machine from being used; None when it is ready."""
    if _MISSING.exists():
        return _MISSING.read_text(encoding="utf-8").strip()
    return None if _python().exists() and (_SITE / _RUNTIME).exists() else "not set up: make test-cross"


def command(code: str, arguments: Sequence[str], *, processor: str) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs Python code on the machine as a processor that qemu knows, and its environment."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(map(str, (_SITE, ROOT))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TVM_LIBRARY_PATH": str((_SITE / _RUNTIME).parent),
        "OMP_NUM_THREADS": "1",
    }
    emulator = [str(qemu("aarch64")), "-L", str(_ROOT_FOLDER), "-cpu", processor]
    return [*emulator, str(_python()), "-c", code, *arguments], environment


def wheels_libraries() -> list[Path]:
    """Return the libraries of TVM's runtime that a device has."""
    return [_SITE / _RUNTIME, *(_SITE / "tvm_ffi" / "lib").glob("libtvm_ffi.so")]


def _python() -> Path:
    return _ROOT_FOLDER / "usr" / "bin" / "python3"


def qemu(machine: str) -> Path | None:
    """Return the emulator of a kind of processor: one that is installed, or the unpacked one."""
    folder = HOME / "qemu" / "usr" / "bin"
    names = (f"qemu-{machine}-static", f"qemu-{machine}")  # the second is Debian's since trixie, static too
    found = [shutil.which(name) for name in names]
    there = [Path(path) for path in found if path] + [folder / name for name in names if (folder / name).exists()]
    return there[0] if there else None


def set_up() -> None:
    """Download and unpack what isn't there; SystemExit says what can't be had."""
    shutil.rmtree(HOME, ignore_errors=True)
    (HOME / "debs").mkdir(parents=True)
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise SystemExit("an emulated machine is made of Debian's packages, and there is no apt-get here")
    if qemu("aarch64") is None:
        _unpack_qemu()
    _unpack_debian()
    version = _python().resolve().name.removeprefix("python")
    folder = HOME / "wheels"
    platforms = [part for name in _PLATFORMS for part in ("--platform", name)]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    pip += ["--only-binary=:all:", *platforms, "--implementation", "cp", "--python-version", version]
    _run([*pip, "--constraint", str(ROOT / "constraints.txt"), "--dest", str(folder), *_WHEELS])
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as packed:
            whole = not wheel.name.startswith("apache_tvm-")
            packed.extractall(_SITE, members=None if whole else [_RUNTIME])
    shutil.rmtree(folder)
    shutil.rmtree(HOME / "debs")
    code, environment = command("import numpy, tokenizers, tvm_ffi", [], processor="cortex-a76")
    _run(code, environment)


def _unpack_qemu() -> None:
    """Unpack qemu for this machine: the package is called otherwise since Debian trixie."""
    for package in ("qemu-user-static", "qemu-user"):
        done = subprocess.run(["apt-get", "download", package], cwd=HOME / "debs", capture_output=True, text=True)
        for deb in (HOME / "debs").glob(f"{package}_*.deb"):
            _run(["dpkg-deb", "-x", str(deb), str(HOME / "qemu")])
        if qemu("aarch64") is not None:
            return
    raise SystemExit(f"qemu-aarch64 is neither installed nor to be had: {done.stderr.strip().splitlines()[-1]}")


def _unpack_debian() -> None:
    """Let apt resolve Python for an empty arm64 machine, and unpack what it downloads."""
    apt = HOME / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True)
    (apt / "status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Dir::State::lists": apt / "lists",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "Debug::NoLocking": "1",
    }
    get = ["apt-get", "--quiet", *(f"-o{key}={value}" for key, value in settings.items())]
    _run([*get, "update"])
    _run([*get, "install", "--yes", "--download-only", "--no-install-recommends", *_DEBIAN])
    for deb in sorted((apt / "cache" / "archives").glob("*.deb")):
        _run(["dpkg-deb", "-x", str(deb), str(_ROOT_FOLDER)])
    shutil.rmtree(apt)


def _run(words: Sequence[str], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
        raise SystemExit(f"{words[0]} ended with {done.returncode}: {said}")


def main() -> None:
    """Set the machine up unless it is ready; what can't be had is kept for the tests to say."""
    if missing() is None:
        return
    sys.stderr.write(f"Setting up an emulated machine in {HOME.name}: 130 MB, a minute or two\n")
    try:
        set_up()
    except SystemExit as error:
        _MISSING.write_text(f"{error}\n", encoding="utf-8")
        sys.stderr.write(f"no emulated machine, its tests will be skipped: {error}\n")


if __name__ == "__main__":
    main()
