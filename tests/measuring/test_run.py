"""Measuring bundles: they take turns, in processes of their own, and a failing one is a sentence."""

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
from edgepipe.measuring.run import Plan, describe_machine, measure_bundles, take_blocks

QUICK = Plan(threads=1, blocks=1, turns=1, tokens=8)


def unheard(_what: str, _done: int, _total: int) -> None:
    """Hear nothing."""


class Script:
    """Stand in for the children: keep who was asked what, in order; answer with numbers that say who and when."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        self.texts: set[str] = set()

    def open(self, name: str, arguments: list[str], program: tuple[str, ...] = ()) -> ScriptedChild:
        """Start a child."""
        self.texts.add(Path(arguments[2]).read_text(encoding="utf-8"))
        self.log.append((name, f"open {arguments[0]} {arguments[3]} {' '.join(program)}".strip()))
        return ScriptedChild(name, self)


class ScriptedChild:
    """Answer as a worker does."""

    def __init__(self, name: str, script: Script) -> None:
        self._name, self._script = name, script
        self.ready: Json = {"prompt_tokens": [32, 128], "bursts": 2, "burst_tokens": 3 if name == "before" else 4}

    def __enter__(self) -> ScriptedChild:
        return self

    def __exit__(self, *_: object) -> None:
        self._script.log.append((self._name, "close"))

    def ask(self, question: Json) -> Json:
        """Take a turn."""
        self._script.log.append((self._name, " ".join(f"{key} {value}" for key, value in question.items())))
        if "prompts" in question:
            return {"ttft": {"32": [1.0, 2.0], "128": [3.0, 4.0 + question["prompts"]]}}
        if "tokens" in question:
            return {"token_ms": [5.0] * (question["tokens"] - 1), "memory_peak_bytes": len(self._script.log)}
        return {"index_ms": float(len(self._script.log))}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Let a script stand in for the processes."""
    script = Script()
    monkeypatch.setattr(run, "Child", script.open)
    return script


def test_bundles_take_turns(tmp_path: Path, script: Script) -> None:
    """Who goes first alternates, the index comes after every pair of bursts, and every prompt has its own number."""
    file = tmp_path / "text"
    file.write_text("grüne Hügel", encoding="utf-8")
    bundles = {"baseline": Path("before"), "bundle": Path("after")}
    plan = Plan(threads=2, blocks=1, turns=2, tokens=0)
    heard: list[str] = []
    found = take_blocks(bundles, file, plan, heard.append, {"bundle": ("-P", "other.py")})
    index = ("the index", "")
    pair = [("before", "tokens 3"), ("after", "tokens 3"), index]  # as many tokens as the one with less room has
    swapped = [("after", "tokens 3"), ("before", "tokens 3"), index]
    assert script.log == [
        ("the index", "open index 2"),
        ("after", "open speed 2 -P other.py"),
        ("before", "open speed 2 -P -m edgepipe.measuring.worker"),
        ("before", "prompts 0 of 2"),
        ("after", "prompts 0 of 2"),
        ("the index", "sustained True"),
        *pair,
        *swapped,
        ("after", "prompts 1 of 2"),
        ("before", "prompts 1 of 2"),
        ("the index", "sustained True"),
        *pair,
        *swapped,
        ("before", "close"),
        ("after", "close"),
        ("the index", "close"),
    ]
    assert script.texts == {"grüne Hügel"}
    assert heard == ["block 1 of 1, turn 1 of 2", "block 1 of 1, turn 2 of 2"]
    (block,) = found["bundle"]
    assert block["ttft_ms"] == [7.0, 8.0]
    assert block["ttft"]["32"] == {"tokenize_ms": [1.0, 1.0], "first_step_ms": [2.0, 2.0]}
    assert block["token_ms"] == [[5.0] * 4, [5.0] * 4]
    assert block["index_ms"] == found["baseline"][0]["index_ms"] == [[9.0, 12.0], [18.0, 21.0]]
    assert block["prompt_index_ms"] == [6.0, 15.0]
    assert block["memory_peak_bytes"] == 19  # of the last answer


def test_every_block_is_a_process_of_its_own(tmp_path: Path, script: Script) -> None:
    file = tmp_path / "text"
    file.write_text("text", encoding="utf-8")
    plan = Plan(threads=0, blocks=3, turns=1, tokens=0)
    found = take_blocks({"bundle": Path("after")}, file, plan, lambda _: None)
    assert [what for name, what in script.log if name == "after" and "prompts" in what] == [
        "prompts 0 of 3",
        "prompts 1 of 3",
        "prompts 2 of 3",
    ]
    assert sum(what == "close" for name, what in script.log if name == "after") == 3
    assert len(found["bundle"]) == 3


def test_a_bundle_is_measured_in_processes_of_its_own(
    tiny_bundle: Path, tiny_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files in the working directory that are called like Python's modules are not taken for them."""
    monkeypatch.chdir(tmp_path)
    for name in ("json", "platform", "numpy", "tokenizers"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')\n", encoding="utf-8")
    steps: list[tuple[str, int, int]] = []
    plan = Plan(threads=1, blocks=2, turns=2, tokens=80)
    found = measure_bundles({"bundle": tiny_bundle}, tiny_text, plan, progress=lambda *step: steps.append(step))
    figures = found["bundle"]
    assert figures["perplexity_tokens"] == 79
    assert 1 < figures["perplexity"] < 1e9
    assert [len(block["ttft_ms"]) for block in figures["samples"]] == [2, 2]
    assert [[len(times) for times in block["token_ms"]] for block in figures["samples"]] == [[48, 48]] * 2
    assert figures["ttft_ms"] == statistics.median(t for block in figures["samples"] for t in block["ttft_ms"])
    assert 30e6 < figures["memory_without_model_bytes"] < figures["memory_peak_bytes"] < 1e9  # without torch
    assert found["method"]["prompt_tokens"] == [32, 68]  # what a context of 128 allows beside 60 new tokens
    assert found["baseline"] is None and found["ratios"] is None
    assert 0 < found["index"]["low"] <= found["index"]["ms"] <= found["index"]["high"]
    assert found["index"]["samples"] == 2 * 2 * 12
    assert [(done, total) for _, done, total in steps] == [(i, 7) for i in range(7)]
    assert json.loads(json.dumps(found)) == found


def test_a_failing_block_is_a_stage_error(tiny_bundle: Path, tiny_text: str, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_bundle, tmp_path / "broken"))
    (broken / "weights.bin").write_bytes(b"")
    with pytest.raises(StageError) as caught:
        measure_bundles({"bundle": broken}, tiny_text, QUICK, progress=unheard)
    message = str(caught.value)
    assert message.startswith("measuring broken ended with exit code 1: ")
    assert "weights.bin should have" in message
    assert "\n" not in message


def test_the_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    found = describe_machine(3)
    assert found["threads"] == 3
    assert found["cores"] >= 1
    assert all(isinstance(found[key], str) and found[key] for key in ("cpu", "system", "python"))
    assert set(found["versions"]) == {"edgepipe", "numpy", "onnxruntime", "tokenizers"}


def cpuinfo(monkeypatch: pytest.MonkeyPatch, content: str | OSError) -> None:
    """Let /proc/cpuinfo hold this."""
    read_text = Path.read_text

    def read(self: Path, encoding: str | None = None) -> str:
        if str(self) != "/proc/cpuinfo":
            return read_text(self, encoding)  # packages' versions
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

    def measured(bundles: dict[str, Path], text: str, plan: Plan, **more: Any) -> Json:
        asked.append({"bundles": dict(bundles), "text": text, "plan": plan, **more})
        return {"bundle": {"perplexity": 1.0}, "baseline": None}

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
    assert asked[0]["plan"] == Plan(threads=5, blocks=4, turns=4, tokens=100)
    assert asked[0]["bundles"] == {"bundle": tiny_bundle}
    assert asked[0]["work_dir"] == tmp_path
    assert figures["baseline"] is None and len(notes) == 1
    assert figures["text"] == "prose-eval"
    beside = Context(target=target, work_dir=tmp_path, note=notes.append, baseline=compiled)
    Measure(threads=2, turns=3)(compiled, beside)
    assert asked[1]["plan"] == Plan(threads=2, blocks=2, turns=3, tokens=8192)
    assert list(asked[1]["bundles"]) == ["baseline", "bundle"]
    assert len(notes) == 1
