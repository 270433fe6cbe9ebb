"""The worker: perplexity is what the logits say, samples are counted right, memory is this process's."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgepipe.measuring import quality, worker
from edgepipe.runtime import load
from edgepipe.runtime.tokenizer import Tokenizer

CONTEXT = 128  # of the tiny bundle: shorter than a window of 512


def naive_perplexity(bundle: Path, ids: list[int], window: int) -> tuple[float, int]:
    """Score windows one by one from their logits, in float64; return perplexity and tokens."""
    model = load(bundle)
    losses: list[float] = []
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        logits = model.logits(part).astype(np.float64)
        for i in range(1, len(part)):
            row = logits[i - 1]
            losses.append(float(np.log(np.exp(row - row.max()).sum()) + row.max() - row[part[i]]))
    return float(np.exp(np.mean(losses))), len(losses)


@pytest.mark.parametrize(
    ("tokens", "scored"),
    [
        (300, 127 + 127 + 43),  # a last window that is shorter
        (2 * CONTEXT + 1, 127 + 127),  # a last window of one token, which predicts nothing
        (CONTEXT, 127),
        (2, 1),
    ],
)
def test_perplexity_is_what_the_logits_say(tiny_bundle: Path, tiny_text: str, tokens: int, scored: int) -> None:
    text = tiny_text * 3
    found = worker.measure_perplexity(tiny_bundle, text, 1, tokens)
    ids = load(tiny_bundle).encode(text)[:tokens]
    assert len(ids) == tokens
    expected, count = naive_perplexity(tiny_bundle, ids, CONTEXT)
    assert found["tokens"] == count == scored
    assert found["window_tokens"] == CONTEXT
    assert found["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_a_cap_of_nothing_scores_the_whole_text(tiny_bundle: Path, tiny_text: str) -> None:
    ids = load(tiny_bundle).encode(tiny_text)
    windows = -(-len(ids) // CONTEXT)
    assert worker.measure_perplexity(tiny_bundle, tiny_text, 1, 0)["tokens"] == len(ids) - windows
    assert worker.measure_perplexity(tiny_bundle, tiny_text, 1, 10_000)["tokens"] == len(ids) - windows


def test_windows_end_at_512_tokens(tiny_bundle: Path, tiny_text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a context beyond it, the window is the constant's."""
    assert quality.WINDOW_TOKENS == 512
    monkeypatch.setattr(quality, "WINDOW_TOKENS", 50)
    found = worker.measure_perplexity(tiny_bundle, tiny_text, 1, 120)
    ids = load(tiny_bundle).encode(tiny_text)[:120]
    expected, count = naive_perplexity(tiny_bundle, ids, 50)
    assert (found["window_tokens"], found["tokens"], count) == (50, 117, 117)
    assert found["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_speed_counts_its_samples(tiny_bundle: Path, tiny_text: str) -> None:
    found = worker.measure_speed(tiny_bundle, tiny_text, 1, 3)
    assert len(found["ttft_ms"]) == 3
    assert [len(times) for times in found["token_ms"]] == [CONTEXT // 2] * 3  # 64 new tokens fit
    assert all(0 < t < 10_000 for t in found["ttft_ms"])
    assert all(0 < t < 10_000 for times in found["token_ms"] for t in times)
    assert found["load_ms"] > 0 and found["import_ms"] >= 0
    assert 0 < CONTEXT - 64 - 4 <= found["prompt_tokens"] <= CONTEXT - 64
    assert 20e6 < found["memory_after_load_bytes"] <= found["memory_peak_bytes"] < 16e9


@pytest.mark.parametrize("text", ["Ünïcödé 王伟王伟 – ", "The river carried the timber. "])
def test_a_prompt_leaves_room_for_the_new_tokens(tiny_bundle: Path, tmp_path: Path, text: str) -> None:
    """Text cut inside a letter, or a tokenizer that begins every text with a token, makes more tokens than were cut."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    tokenizer = json.loads((bundle / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [0], "tokens": ["<|im_start|>"]}},
    }
    changed = json.dumps(tokenizer)
    (bundle / "tokenizer.json").write_text(changed, encoding="utf-8")
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"]["tokenizer.json"]["bytes"] = len(changed.encode())
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert load(bundle).encode("a")[0] == 0
    found = worker.measure_speed(bundle, text * 40, 1, 2)
    assert found["prompt_tokens"] == CONTEXT - 64
    assert [len(times) for times in found["token_ms"]] == [64, 64]


@pytest.mark.parametrize("repeats", [1, 30])
def test_prompts_differ_and_are_as_long_as_asked(tiny_bundle: Path, tiny_text: str, repeats: int) -> None:
    tokenizer = Tokenizer(tiny_bundle / "tokenizer.json")
    text = tiny_text[:150] * repeats
    prompts = worker._prompts(tokenizer, text, 40, 5)
    assert len(set(prompts)) == 5
    assert all(35 <= len(tokenizer.encode(prompt)) <= 45 for prompt in prompts)


def test_memory_is_the_peak_of_the_process() -> None:
    """60 MB that were there for a moment are in the peak of a fresh process, and stay in it when they are gone."""
    code = (
        "import numpy as np; from edgepipe.measuring.worker import peak_memory_bytes as peak\n"
        "before = peak(); held = np.ones(60_000_000, np.uint8); during = peak(); del held\n"
        "print(before, during, peak())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, during, after = map(int, done.stdout.split())
    assert 10e6 < before < 200e6
    assert 55e6 < during - before < 70e6
    assert abs(after - during) < 2e6  # the kernel's counters lag by some pages


def test_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /proc isn't there, getrusage is asked; both know the same peak."""
    here = worker.peak_memory_bytes()

    def absent(self: Path, encoding: str | None = None) -> str:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(Path, "read_text", absent)
    there = worker.peak_memory_bytes()
    if sys.platform == "linux":
        assert there == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 0.5 < there / here < 2


def test_the_last_line_of_a_worker_is_json(
    tiny_bundle: Path, tiny_text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(tiny_text, encoding="utf-8")
    worker.main(["perplexity", str(tiny_bundle), str(file), "0", "50"])
    assert json.loads(capsys.readouterr().out)["tokens"] == 49
    worker.main(["speed", str(tiny_bundle), str(file), "1", "1"])
    assert len(json.loads(capsys.readouterr().out)["ttft_ms"]) == 1
