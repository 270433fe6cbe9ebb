"""Measuring bundles: blocks alternate, medians are those of the raw samples, and a failing block is a sentence."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepipe.artifacts import Json
from edgepipe.errors import StageError
from edgepipe.measuring import run
from edgepipe.measuring.run import describe_machine, measure_bundles


def unheard(_what: str, _done: int, _total: int) -> None:
    """Hear nothing."""


def block(load_ms: float, ttft_ms: list[float], token_ms: list[list[float]], peak: int) -> Json:
    """Return what one process of a speed measurement prints."""
    return {
        "import_ms": 1.0,
        "load_ms": load_ms,
        "ttft_ms": ttft_ms,
        "token_ms": token_ms,
        "prompt_tokens": 128,
        "memory_after_load_bytes": peak - 5,
        "memory_peak_bytes": peak,
    }


SPEED = [
    block(30.0, [100.0, 102.0, 300.0], [[5.0, 7.0], [6.0, 100.0], [4.0, 6.0]], 1000),
    block(50.0, [101.0, 99.0, 105.0], [[1.0, 2.0], [3.0, 9.0], [8.0, 6.5]], 3000),
    block(10.0, [98.0, 97.0, 96.0], [[6.0, 6.0], [6.2, 5.0], [5.5, 9.5]], 2000),
]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Let blocks return fixed samples instead of running; keep what was asked for."""
    asked: list[tuple[str, ...]] = []

    def work(kind: str, bundle: Path, file: Path, threads: int, *more: str) -> Json:
        asked.append((kind, bundle.name, file.read_text(encoding="utf-8"), str(threads), *more))
        if kind == "perplexity":
            return {"perplexity": 12.5, "tokens": 77, "window_tokens": 512}
        return SPEED[sum(a[:2] == ("speed", bundle.name) for a in asked) - 1]

    monkeypatch.setattr(run, "_work", work)
    return asked


def two_bundles(folder: Path) -> dict[str, Path]:
    """Make two directories with what the figures are read from."""
    bundles = {"baseline": folder / "before", "bundle": folder / "after"}
    for factor, path in enumerate(bundles.values(), start=1):
        path.mkdir()
        manifest = {"weights": {"bytes": 100 * factor, "bits_per_weight": 4.5}, "cache": {"bytes": 64}}
        (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        (path / "weights.bin").write_bytes(bytes(100 * factor))
    return bundles


def test_blocks_of_the_bundles_alternate(tmp_path: Path, scripted: list[tuple[str, ...]]) -> None:
    """Whatever drifts on a machine meets both alike; perplexity comes last, once each."""
    heard: list[tuple[str, int, int]] = []
    measure_bundles(
        two_bundles(tmp_path),
        "grüne Hügel",
        threads=2,
        blocks=3,
        tokens=99,
        progress=lambda *step: heard.append(step),
    )
    speed = [("speed", name, "grüne Hügel", "2", "3") for _ in range(3) for name in ("before", "after")]
    assert scripted == [*speed, *(("perplexity", name, "grüne Hügel", "2", "99") for name in ("before", "after"))]
    assert [(done, total) for _, done, total in heard] == [(i, 8) for i in range(8)]
    assert [what for what, _, _ in heard][-3:] == [
        "speed of the bundle",
        "perplexity of the baseline",
        "perplexity of the bundle",
    ]


def test_figures_are_the_medians_of_the_samples(tmp_path: Path, scripted: list[tuple[str, ...]]) -> None:
    bundles = two_bundles(tmp_path)
    found = measure_bundles(bundles, "text", threads=1, blocks=3, tokens=0, progress=unheard)
    assert list(found) == ["baseline", "bundle"]
    figures = found["bundle"]
    tokens = [t for b in SPEED for times in b["token_ms"] for t in times]
    assert figures["load_ms"] == 30.0
    assert figures["ttft_ms"] == 100.0  # of all nine, not of the blocks' medians
    assert figures["token_ms"] == pytest.approx(statistics.median(tokens)) == 6.0
    assert figures["tokens_per_second"] == pytest.approx(1000 / 6.0)
    assert figures["token_ms_p95"] == pytest.approx(statistics.quantiles(tokens, n=20, method="inclusive")[-1])
    assert figures["memory_peak_bytes"] == 3000
    assert (figures["perplexity"], figures["perplexity_tokens"], figures["prompt_tokens"]) == (12.5, 77, 128)
    assert (figures["weight_bytes"], figures["bits_per_weight"], figures["cache_bytes"]) == (200, 4.5, 64)
    assert figures["bundle_bytes"] == sum(f.stat().st_size for f in bundles["bundle"].iterdir())
    assert figures["samples"] == SPEED


def test_a_bundle_is_measured_in_processes_of_its_own(
    tiny_bundle: Path, tiny_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files in the working directory that are called like Python's modules are not taken for them."""
    monkeypatch.chdir(tmp_path)
    for name in ("json", "platform", "numpy", "tokenizers"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')\n", encoding="utf-8")
    found = measure_bundles({"bundle": tiny_bundle}, tiny_text, threads=1, blocks=1, tokens=80, progress=unheard)
    figures = found["bundle"]
    assert figures["perplexity_tokens"] == 79
    assert 1 < figures["perplexity"] < 1e9
    (samples,) = figures["samples"]
    assert len(samples["ttft_ms"]) == len(samples["token_ms"]) == 3
    assert figures["ttft_ms"] == statistics.median(samples["ttft_ms"])
    assert 30e6 < figures["memory_peak_bytes"] < 1e9  # without torch: the runtime's own


def test_a_failing_block_is_a_stage_error(tiny_bundle: Path, tiny_text: str, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_bundle, tmp_path / "broken"))
    (broken / "weights.bin").write_bytes(b"")
    with pytest.raises(StageError) as caught:
        measure_bundles({"bundle": broken}, tiny_text, threads=1, blocks=1, tokens=8, progress=unheard)
    message = str(caught.value)
    assert message.startswith("measuring broken ended with exit code 1: ")
    assert "weights.bin should have" in message
    assert "\n" not in message


def test_a_block_that_dies_without_a_word(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Killed for memory, for example."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -9 $$\n", encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(run.sys, "executable", str(python))
    with pytest.raises(StageError, match=r"ended with exit code -9: no message"):
        measure_bundles({"bundle": tiny_bundle}, "text", threads=1, blocks=1, tokens=8, progress=unheard)


def test_a_block_that_hangs_is_stopped(tiny_bundle: Path, tiny_text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_BLOCK_TIMEOUT_S", 0.05)
    with pytest.raises(StageError, match=r"took longer than 0\.05 s: it was stopped"):
        measure_bundles({"bundle": tiny_bundle}, tiny_text, threads=1, blocks=1, tokens=8, progress=unheard)


def test_the_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    found = describe_machine(3)
    assert found["threads"] == 3
    assert found["cores"] >= 1
    assert all(isinstance(found[key], str) and found[key] for key in ("cpu", "system", "python"))


def cpuinfo(monkeypatch: pytest.MonkeyPatch, content: str | OSError) -> None:
    """Let /proc/cpuinfo hold this."""

    def read(self: Path, encoding: str | None = None) -> str:
        assert str(self) == "/proc/cpuinfo"
        if isinstance(content, OSError):
            raise content
        return content

    monkeypatch.setattr(Path, "read_text", read)


@pytest.mark.parametrize("content", ["processor : 0\nFeatures : asimd\n", FileNotFoundError(2, "No such file")])
def test_the_machine_is_described_without_a_model_name(monkeypatch: pytest.MonkeyPatch, content: str | OSError) -> None:
    """Boards with ARM processors have no such line, other systems no such file."""
    cpuinfo(monkeypatch, content)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert describe_machine(0)["cpu"] == "aarch64"


def test_the_model_name_of_the_processor_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo(monkeypatch, "processor\t: 0\nmodel name\t: Fast CPU: the 2nd\nmodel name\t: other\n")
    assert describe_machine(0)["cpu"] == "Fast CPU: the 2nd"


def test_the_stage_passes_its_options_on(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manifest_of: Callable[[Path], dict[str, Any]]
) -> None:
    """Threads: the option, else the target's; text: the set's; baseline: only where there is one."""
    from edgepipe.artifacts import CompiledModel, Context
    from edgepipe.stages.measure import Measure
    from edgepipe.target import OnnxruntimeSettings, Target

    asked: list[dict[str, Any]] = []

    def measured(bundles: dict[str, Path], text: str, **more: Any) -> dict[str, Json]:
        asked.append({"bundles": dict(bundles), "text": text, **more})
        return {name: {"perplexity": 1.0} for name in bundles}

    monkeypatch.setattr(run, "measure_bundles", measured)
    target = Target(
        name="t",
        description="t",
        engines=("onnxruntime",),
        measurable="here",
        onnxruntime=OnnxruntimeSettings(threads=5),
    )
    compiled = CompiledModel(info=None, path=tiny_bundle, manifest=manifest_of(tiny_bundle))  # type: ignore[arg-type]
    notes: list[str] = []
    context = Context(target=target, work_dir=tmp_path, note=notes.append)
    figures = Measure(blocks=4, tokens=100)(compiled, context).figures
    assert asked[0]["threads"] == 5 and asked[0]["blocks"] == 4 and asked[0]["tokens"] == 100
    assert asked[0]["bundles"] == {"bundle": tiny_bundle}
    assert asked[0]["work_dir"] == tmp_path
    assert figures["baseline"] is None and len(notes) == 1
    assert figures["machine"]["threads"] == 5
    beside = Context(target=target, work_dir=tmp_path, note=notes.append, baseline=compiled)
    figures = Measure(threads=2)(compiled, beside).figures
    assert asked[1]["threads"] == 2
    assert list(asked[1]["bundles"]) == ["baseline", "bundle"]
    assert figures["baseline"] == {"perplexity": 1.0} and len(notes) == 1
