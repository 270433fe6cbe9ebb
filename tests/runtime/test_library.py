"""What a manifest may say of a compiled library, and which processors may load it; none of it needs TVM."""

from __future__ import annotations

import copy
import platform
from pathlib import Path
from typing import Any

import pytest

from edgepipe.errors import ConfigError, TargetError
from edgepipe.runtime import library
from edgepipe.runtime.library import check_processor, processor_flags, read_library

MANIFEST: dict[str, Any] = {
    "files": {"library.so": {"bytes": 10}, "weights.bin": {"bytes": 1024}},
    "weights": {"file": "weights.bin"},
    "library": {
        "file": "library.so",
        "level": "x86-64-v3",
        "machine": platform.machine(),
        "flags": [],
        "functions": {
            "model": {"inputs": ["x"], "outputs": ["y"], "caches": [], "prepared": None, "weights": ["w"]},
        },
        "tensors": {"w": {"offset": 64, "dtype": "float16", "shape": [4, 8]}},
    },
}


def changed(*where: str, to: Any) -> dict[str, Any]:
    """Return the manifest with one value of its library replaced."""
    manifest = copy.deepcopy(MANIFEST)
    holder = manifest["library"]
    for key in where[:-1]:
        holder = holder[key]
    holder[where[-1]] = to
    return manifest


def test_a_library_is_read() -> None:
    facts = read_library(MANIFEST)
    assert facts.functions["model"].weights == ("w",)
    assert facts.tensors["w"].nbytes == 64


@pytest.mark.parametrize(
    ("where", "to", "sentence"),
    [
        (("tensors", "w", "offset"), 8, r"library\.tensors\.w\.offset must be a multiple of 64"),
        (("tensors", "w", "offset"), -64, r"offset must be a multiple of 64"),
        (("tensors", "w", "offset"), True, r"offset must be a multiple of 64"),
        (("tensors", "w", "offset"), 1024, r"library\.tensors\.w must be inside the 1024 bytes of the weights"),
        (("tensors", "w", "shape"), [1 << 40], r"shape must be a list of numbers"),
        (("tensors", "w", "shape"), [512, 2], r"must be inside the 1024 bytes"),
        (("tensors", "w", "dtype"), "object", r"dtype must be one of float32"),
        (("functions", "model", "weights"), ["v"], r"must be tensors that are listed, but has 'v'"),
        (("tensors", "w", "shape"), [512] * 8, r"must be inside the 1024 bytes"),  # 2 ** 72 elements
        (("functions", "model", "prepared"), "other", r"prepared must be the name of a function"),
        (("functions", "model", "prepared"), "model", r"prepared must be the name of a function that takes weights"),
        (("functions", "model", "inputs"), "x", r"inputs must be a list of texts"),
        (("functions", "model"), 3, r"library\.functions\.model must be an object"),
        (("flags",), ["sse; rm"], r"flags must be names of processor features"),
        (("file",), "../other.so", r"library\.file must be one of files"),
        (("gpu",), "sm_87", r"library\.gpu must be an object"),
        (("gpu",), {"name": "sm_87", "compiled": [], "readable": 0}, r"gpu\.compiled must be numbers of architectures"),
        (("gpu",), {"name": "sm_87", "compiled": [87], "readable": -1}, r"gpu\.readable must be the number of an arch"),
        (("machine",), None, r"library\.machine must be a text"),
    ],
)
def test_a_damaged_one_is_refused(where: tuple[str, ...], to: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_library(changed(*where, to=to))


def test_deflated_weights_are_refused() -> None:
    """A library reads them as they lie."""
    weights = {"file": "weights.bin", "unpacked": {"file": "weights.bin", "bytes": 4096}}
    with pytest.raises(ConfigError, match=r"weights must be stored as they are where there is a library"):
        read_library({**MANIFEST, "weights": weights})


def test_another_machine_is_refused() -> None:
    facts = read_library(changed("machine", to="sparc64"))
    with pytest.raises(TargetError, match=r"library is for sparc64 .*, but this machine is .*: build a bundle for it"):
        check_processor(facts)


def test_instructions_that_a_processor_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are named, before anything is loaded."""
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(library, "_CPUINFO", cpuinfo)
    facts = read_library(changed("flags", to=["avx2", "avx512f", "fma"]))
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\n", encoding="utf-8")
    with pytest.raises(TargetError, match=r"is for x86-64-v3, but this processor has no avx512f: build"):
        check_processor(facts)
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fma avx512f avx2\n", encoding="utf-8")
    check_processor(facts)
    cpuinfo.unlink()
    assert processor_flags() == frozenset()
    with pytest.raises(TargetError, match=r"has no avx2, avx512f, fma"):
        check_processor(facts)
