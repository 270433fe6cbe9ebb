"""The worker: perplexity is what the logits say, samples are counted right, memory is this process's."""

from __future__ import annotations

import io
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe.measuring import generation, index, memory, quality, worker
from edgepipe.measuring.child import Child, answer_of
from edgepipe.runtime import load

LENGTHS = (128, 80)  # tokens of prompt and output
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


def open_speed(bundle: Path, text: str) -> tuple[dict[str, Any], worker.Turn]:
    """Load a bundle for turns."""
    ready, turn = worker.open_block("speed", bundle, text, 1, LENGTHS)
    assert turn is not None
    return ready, turn


def test_a_turn_counts_its_samples(tiny_bundle: Path, tiny_text: str) -> None:
    ready, turn = open_speed(tiny_bundle, tiny_text)
    assert ready["prompt_tokens"] == [32, CONTEXT - 12 * 5]  # 512 and 128 do not fit beside 60 new tokens
    assert (ready["bursts"], ready["burst_tokens"]) == (12, 5)
    assert ready["import_ms"] >= 0 and ready["load_ms"] > 0 and ready["first_token_ms"] > 0
    prompts = turn({"prompts": 0, "of": 2})
    assert list(prompts["ttft"]) == ["32", "68"]
    assert all(0 < part < 10_000 for parts in prompts["ttft"].values() for part in parts)
    for _ in range(12):
        burst = turn({"tokens": 5})
        assert len(burst["token_ms"]) == 4  # the first found cold caches
        assert all(0 < time < 10_000 for time in burst["token_ms"])
    assert 20e6 < ready["memory_after_load_bytes"] <= burst["memory_peak_bytes"] < 16e9
    turn({"prompts": 1, "of": 2})  # the context was full: a prompt begins anew
    assert len(turn({"tokens": 5})["token_ms"]) == 4


def test_every_prompt_is_another_one_and_starts_from_nothing(
    tiny_bundle: Path, tiny_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All prompts of all processes differ, and the cache is rewound for each."""
    from edgepipe.runtime.onnxruntime import Decoder

    asked: list[tuple[int, tuple[int, ...]]] = []
    run = Decoder.run

    def heard(self: Decoder, cache: Any, ids: np.ndarray, past: np.ndarray, *more: Any) -> np.ndarray:
        asked.append((int(past[0]), tuple(ids[0].tolist())))
        return run(self, cache, ids, past, *more)

    monkeypatch.setattr(Decoder, "run", heard)
    monkeypatch.setattr(generation, "PROMPT_TOKENS", (16, 24))
    _, turn = worker.open_block("speed", tiny_bundle, tiny_text * 3, 1, (24, 80))
    assert turn is not None
    for number in range(4):
        turn({"prompts": number, "of": 4})
    prompts = [ids for past, ids in asked if len(ids) > 1]
    assert all(past == 0 for past, ids in asked if len(ids) > 1)
    assert len(prompts) == 9
    assert not any(b[: len(a)] == a for a in prompts for b in prompts if a is not b)


@pytest.mark.parametrize(
    ("context", "lengths", "bursts"),
    [
        (2048, (32, 512, 128), (16, 5)),
        (256, (32, 176, 128), (16, 5)),
        (128, (32, 68), (12, 5)),
        (40, (20,), (4, 5)),
        (6, (3,), (1, 3)),
        (2, (1,), (1, 1)),
    ],
)
def test_lengths_leave_room(context: int, lengths: tuple[int, ...], bursts: tuple[int, int]) -> None:
    assert generation.prompt_lengths(context, generation.Lengths()) == lengths
    assert generation.bursts_for(context, 80) == bursts


def test_lengths_that_are_asked_for() -> None:
    """The headline's prompt comes last, the others stay beside it; the output is cut to whole bursts."""
    asked = generation.Lengths(prompt=512, output=32)
    assert generation.prompt_lengths(2048, asked) == (32, 128, 512)
    assert generation.source_lengths(1024, generation.Lengths(prompt=1024)) == (32, 128, 512, 1024)
    assert generation.bursts_for(2048, asked.output) == (6, 5)


def test_a_first_token_is_compared_after_as_many_tokens() -> None:
    """A student whose encoder reads 96 tokens, beside a decoder with room for more, and for less."""
    student = {"decoder_prefix_ids": [0], "source_context": 96, "context": 64}
    for context, shared in ((2048, 96), (64, 64 - 6 * 5)):
        assert generation.shared_prompt([student, {"context": context}], generation.Lengths()) == shared
    assert generation.shared_prompt([{"context": 2048}], generation.Lengths(prompt=512)) == 512


@pytest.mark.parametrize("repeats", [1, 30])
def test_cuts_differ_and_are_as_long_as_asked(repeats: int) -> None:
    ids = list(range(50)) * repeats
    cuts = [tuple(generation.cut_ids(ids, number, 5, 40)) for number in range(5)]
    assert {len(cut) for cut in cuts} == {40}
    assert len(set(cuts)) == 5


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
    _, turn = open_speed(bundle, text * 40)
    turn({"prompts": 0, "of": 1})
    assert [len(turn({"tokens": 5})["token_ms"]) for _ in range(12)] == [4] * 12  # the context holds them all


def test_memory_is_the_peak_of_the_process() -> None:
    """60 MB that were there for a moment are in the peak of a fresh process, and stay in it when they are gone."""
    code = (
        "import numpy as np; from edgepipe.measuring.memory import peak_memory_bytes as peak\n"
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
    here = memory.peak_memory_bytes()

    def absent(self: Path, encoding: str | None = None) -> str:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(Path, "read_text", absent)
    there = memory.peak_memory_bytes()
    if sys.platform == "linux":
        assert there == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 0.5 < there / here < 2


def test_the_process_without_the_model_is_smaller(tiny_bundle: Path, tmp_path: Path) -> None:
    """Packages and tokenizer count, weights don't: a bundle of any size gives the same."""
    file = tmp_path / "text.txt"
    file.write_text("text", encoding="utf-8")
    found = answer_of("memory", tiny_bundle, file, 1)["memory_bytes"]
    with Child("it", ["speed", str(tiny_bundle), str(file), "1", "128", "80"]) as child:
        loaded = child.ready["memory_after_load_bytes"]
    assert 30e6 < found < loaded


def test_the_index_times_fixed_work(tiny_bundle: Path) -> None:
    """Of a burst the fastest piece counts, the first left out."""
    ready, turn = index.open_index(tiny_bundle, 1)
    assert ready["read_bytes"] == 1 << 20
    assert min(turn({})["index_ms"] for _ in range(5)) > 0.01
    assert turn({"sustained": True})["index_ms"] > 0.01


def test_a_piece_of_the_index_reads_the_whole_buffer(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large bundle's piece takes as long as its token would; the index stays the time of one unit of it."""
    from edgepipe.runtime import onnxruntime

    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"]["weights.bin"]["bytes"] = 40 << 20
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    runs: list[int] = []

    def bound(graph: bytes, pairs: list[Any], *_: object) -> list[Any]:
        return [lambda number=number: runs.append(number) for number in range(len(pairs))]

    monkeypatch.setattr(onnxruntime, "bind_products", bound)
    ready, turn = index.open_index(bundle, 1)
    assert ready["read_bytes"] == 40 << 20
    runs.clear()
    turn({})
    assert len(runs) == 4 * 5 * 9  # four pieces of five units: a product, and eight of the forty slices
    assert set(runs) == set(range(41))
    runs.clear()
    turn({"sustained": True})
    assert len(runs) == 12 * 5 * 9


@pytest.mark.parametrize(
    ("weights", "buffer"), [(0, 1 << 20), (5 << 20, 5 << 20), (100_000_000, 95 << 20), (1 << 40, 256 << 20)]
)
def test_the_index_reads_as_much_as_the_weights(weights: int, buffer: int) -> None:
    assert index.buffer_bytes(weights) == buffer


def test_a_worker_prints_a_line_of_json_for_every_question(
    tiny_bundle: Path,
    tiny_text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(tiny_text, encoding="utf-8")
    worker.main(["perplexity", str(tiny_bundle), str(file), "0", "50"])
    assert json.loads(capsys.readouterr().out)["tokens"] == 49
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompts": 0, "of": 1}\n{"tokens": 3}\n'))
    worker.main(["speed", str(tiny_bundle), str(file), "1", "128", "80"])
    ready, prompts, tokens = map(json.loads, capsys.readouterr().out.splitlines())
    assert "load_ms" in ready and "ttft" in prompts and len(tokens["token_ms"]) == 2
