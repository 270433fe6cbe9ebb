import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import peer_setup, peers
from benchmarks.peer_blocks.block import END_IDS, log_softmax_at
from benchmarks.peer_models import CONVERSIONS, OURS, ROWS, Row, without_pins
from benchmarks.peer_summary import SPEED_HEADER, process_rows, speed_rows, summarise
from benchmarks.stored import ROOT, section

# An engine whose next id is a fixed function of the last one, and which prints where the answer will stand.
BLOCK = """
import numpy as np
from benchmarks.peer_blocks.block import VOCABULARY, Engine, Peer, by_steps, log_softmax_at, main

def logits(last):
    row = np.zeros(VOCABULARY, np.float32)
    row[[2, (last * 7 + 1) % VOCABULARY]] = 9, 5
    return row

def open_engine(path, threads, settings):
    print("loading", path)
    return Engine(generate=by_steps(lambda prompt: logits(prompt[-1]), logits), facts={"version": str(threads)})

def score(path, threads, settings):
    return lambda ids: log_softmax_at(np.stack([logits(i) for i in ids[:-1]]), ids[1:])

main(Peer(open=open_engine, score=score))
"""


def _child(code: str, job: dict[str, Any] | None = None, timeout_s: float = 60) -> dict[str, Any]:
    return peers.run_child([sys.executable, "-c", code], job or {}, timeout_s)


def _speed_job(seed: int) -> dict[str, Any]:
    job = {"kind": "speed", "path": "x", "threads": 2, "settings": {}, "seed": seed, "prompts": 2}
    return job | {"shapes": [[16, 4], [3, 5]]}


# ---------------------------------------------------------------------------------------------------------------------
# One block


def test_a_block_counts_what_it_was_asked_for() -> None:
    """As many prompts and tokens as the job says, times between all of them, and noise on stdout in nobody's way."""
    found = _child(BLOCK, _speed_job(seed=4))
    assert [(s["prompt_tokens"], s["new_tokens"]) for s in found["shapes"]] == [(16, 4), (3, 5)]
    for shape in found["shapes"]:
        assert len(shape["ttft_ms"]) == len(shape["token_ms"]) == len(shape["tokens"]) == 2
        assert all(len(times) == shape["new_tokens"] - 1 for times in shape["token_ms"])
        assert all(len(ids) == shape["new_tokens"] for ids in shape["tokens"])
    assert found["cold_start_ms"] > found["load_ms"] >= 0  # the interpreter's start is in the one, not in the other
    assert 0 < found["memory_after_load_bytes"] <= found["memory_peak_bytes"]
    assert found["facts"] == {"version": "2"}


def test_blocks_of_a_round_get_the_same_prompts_and_no_prompt_twice() -> None:
    """The ids follow from the last id of the prompt: equal for a seed, different from prompt to prompt."""
    first, again, other = (_child(BLOCK, _speed_job(seed)) for seed in (1, 1, 2))
    tokens = [[ids for shape in found["shapes"] for ids in shape["tokens"]] for found in (first, again, other)]
    assert tokens[0] == tokens[1] != tokens[2]
    assert len({tuple(ids) for ids in tokens[0]}) == len(tokens[0])


def test_the_end_of_text_is_suppressed() -> None:
    """The engine above likes the end id best, and never gets to say it."""
    found = _child(BLOCK, _speed_job(seed=0))
    assert not {token for shape in found["shapes"] for ids in shape["tokens"] for token in ids} & set(END_IDS)


def test_a_block_scores_text() -> None:
    """Each window's tokens but the first count; the mean is that of a softmax written out."""
    windows = [[5, 36, 253], [7, 9]]
    job = {"kind": "quality", "path": "x", "threads": 1, "settings": {}, "windows": windows}
    total = np.exp(9) + np.exp(5) + 49150
    expected = -(2 * np.log(np.exp(5) / total) + np.log(1 / total)) / 3
    assert _child(BLOCK, job) == {"nll": pytest.approx(expected), "tokens": 3}


def test_log_softmax_is_exact_for_large_logits() -> None:
    """Nothing overflows, and the probabilities of a row sum to one."""
    logits = np.array([[1e4, 1e4 - 1, 0.0], [-3.0, 2.0, 0.5]], np.float32)
    rows = np.array([log_softmax_at(logits, [token, token]) for token in range(3)])
    assert np.exp(rows).sum(axis=0) == pytest.approx([1, 1])


# ---------------------------------------------------------------------------------------------------------------------
# What doesn't work gets a row


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "was ended by SIGILL"),
        ("import os; os.abort()", "was ended by SIGABRT"),
        ("raise ImportError('no such engine')", "ended with exit code 1: ImportError: no such engine"),
        ("raise SystemExit(7)", "ended with exit code 7: no message"),
        ("import time; time.sleep(60)", "took longer than 2 s and was stopped"),
        ("print('ready')", "ended without an answer: ready"),
        ("pass", "ended without an answer: nothing"),
    ],
)
def test_how_a_process_ended_is_told(code: str, error: str) -> None:
    """A signal, an exit code, a time limit or no answer: what the row will say."""
    assert _child(code, timeout_s=2 if "sleep" in code else 60) == {"error": error}


def test_an_interpreter_that_is_not_there() -> None:
    """The environment is gone: the row says so."""
    assert peers.run_child(["no-such-python"], {}) == {"error": "couldn't be started: No such file or directory"}


def test_a_row_that_failed_is_not_tried_again(tmp_path: Path) -> None:
    """It has one block, with the error, in its first round; the round is kept all the same."""
    row = Row(name="lost", peer="nowhere", model="x", precision="none")
    options = argparse.Namespace(rounds=3, threads=[1], seed=0, shapes=[[4, 2]])
    kept = peers.Progress(tmp_path / "progress.jsonl", {}, fresh=False)
    rounds = peers.take_rounds([row], options, kept)
    assert [[block["row"] for block in blocks] for blocks in rounds] == [["lost"], [], []]
    assert rounds[0][0]["error"] == "couldn't be started: No such file or directory"
    assert len(rounds[0][0]["machine_index_ms"]) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Order and resume


def test_the_order_of_a_round_is_drawn_and_can_be_drawn_again() -> None:
    """Every row at every number of threads once; the same for the same round, another for the next."""
    rows = list(ROWS)
    orders = [list(peers.round_order(rows, [1, 2], 3, number)) for number in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert sorted((threads, row.name) for threads, row in order) == sorted(
            (t, r.name) for t in (1, 2) for r in rows
        )
        counts = [threads for threads, _ in order]  # rows that are compared stand close together
        assert counts == sorted(counts) or counts == sorted(counts, reverse=True)


def test_a_stopped_run_goes_on_after_its_whole_rounds(tmp_path: Path) -> None:
    """Rounds and scores of the same plan are there again; the half line of a killed run is dropped."""
    path = tmp_path / "progress.jsonl"
    plan = {"seed": 1, "workload": {"shapes": [(4, 2)]}}
    kept = peers.Progress(path, plan, fresh=False)
    kept.keep_quality("a", {"nll": 3.0})
    kept.keep_quality("b", {"error": "no"})
    kept.keep_round([{"row": "a"}])
    path.write_text(path.read_text(encoding="utf-8") + '{"round": [{"ro', encoding="utf-8")
    for _ in range(2):  # the second reading finds what the first put right
        again = peers.Progress(path, plan, fresh=False)
        assert (again.quality, again.rounds) == ({"a": {"nll": 3.0}, "b": {"error": "no"}}, [[{"row": "a"}]])
    again.keep_round([{"row": "b"}])
    assert peers.Progress(path, plan, fresh=False).rounds == [[{"row": "a"}], [{"row": "b"}]]


@pytest.mark.parametrize(("plan", "fresh"), [({"seed": 2}, False), ({"seed": 1}, True)])
def test_another_plan_starts_anew(tmp_path: Path, plan: dict[str, int], fresh: bool) -> None:
    """Rounds with another model, seed or block aren't mixed in, nor those that --fresh leaves behind."""
    path = tmp_path / "progress.jsonl"
    peers.Progress(path, {"seed": 1}, fresh=False).keep_round([{"row": "a"}])
    assert peers.Progress(path, plan, fresh=fresh).rounds == []
    assert peers.Progress(path, plan, fresh=False).rounds == []


# ---------------------------------------------------------------------------------------------------------------------
# Summary


def _block(row: str, token_ms: float, ttft_ms: float, index: float = 50.0) -> dict[str, Any]:
    shape = {"prompt_tokens": 8, "new_tokens": 3, "tokens": []}
    shape |= {"ttft_ms": [ttft_ms] * 3, "token_ms": [[token_ms, token_ms]] * 3}
    block = {"row": row, "threads": 2, "machine_index_ms": [50.0, index], "shapes": [shape], "facts": {}}
    return block | {"cold_start_ms": 9, "load_ms": 5, "memory_after_load_bytes": 1e6, "memory_peak_bytes": 2e6}


def _result() -> dict[str, Any]:
    names = ("edgepipe", "steady", "equal", "lost", "broken")
    build = {"shipped_bytes": 5_000_000}
    builds = {name: {"row": {"beside": "edgepipe", "precision": "float32"}, **build} for name in names}
    builds["broken"] = {"row": builds["broken"]["row"], "error": "couldn't be installed: no | network"}
    rounds = []
    for number in range(5):
        speed = 1 + 0.2 * number  # the machine slows down: ratios within a round don't
        blocks = [_block("edgepipe", 10 * speed, 100 * speed), _block("steady", 20 * speed, 50 * speed)]
        blocks.append(_block("equal", 10 * speed * (1 + 0.01 * (-1) ** number), 100 * speed, index=50.0 + 5 * number))
        if number == 0:
            blocks.append({"row": "lost", "threads": 2, "machine_index_ms": [50, 50], "error": "was ended by SIGILL"})
        rounds.append(blocks)
    quality = {"edgepipe": {"nll": np.log(20.0), "tokens": 9}, "steady": {"error": "was ended by SIGSEGV"}}
    result: dict[str, Any] = {"builds": builds, "rounds": rounds, "quality": quality, "seed": 0}
    result["workload"] = {"threads": [2], "shapes": [[8, 3]]}
    return result | {"summary": summarise(result)}


def test_ratios_are_taken_within_rounds() -> None:
    """A machine that slows down from round to round changes no ratio; equal engines tie."""
    found = _result()["summary"]["threads"]["2"]
    steady, equal = found["steady"]["shapes"]["8x3"], found["equal"]["shapes"]["8x3"]
    assert steady["decode_ratio"]["value"] == pytest.approx(2) and steady["decode_ratio"]["verdict"] == "better"
    assert steady["ttft_ratio"]["value"] == pytest.approx(2) and steady["ttft_ratio"]["verdict"] == "worse"
    assert equal["decode_ratio"]["verdict"] == "tie"
    assert "decode_ratio" not in found["edgepipe"]["shapes"]["8x3"]


def test_rounds_in_which_the_machine_moved_are_flagged() -> None:
    """More than 15 % between the quickest and the slowest of a round's indices."""
    assert _result()["summary"]["flagged_rounds"] == [2, 3, 4]


def test_rows_that_failed_say_why() -> None:
    """In every table, with no other figure, and with nothing that would break a Markdown table."""
    result = _result()
    for rows in (speed_rows(result, "8x3"), process_rows(result)):
        by_name = {row[1]: row for row in rows}
        assert by_name["lost"][2] == "not available: was ended by SIGILL"
        assert by_name["broken"][2] == "not available: couldn't be installed: no / network"
        assert set(by_name["lost"][3:]) == set(by_name["broken"][3:]) == {"–"}
        assert {len(row) for row in rows} == {len(SPEED_HEADER)}


def test_quality_stands_beside_speed() -> None:
    """A perplexity in the same row, or why there is none."""
    rows = {row[1]: row for row in speed_rows(_result(), "8x3")}
    column = SPEED_HEADER.index("perplexity")
    assert rows["edgepipe"][column] == "20.00"
    assert rows["steady"][column] == "not available: was ended by SIGSEGV"
    assert rows["equal"][column] == "not available: not taken"


# ---------------------------------------------------------------------------------------------------------------------
# Rows, environments, command line


def test_every_row_can_be_run() -> None:
    """It has a block, a way to its model, a row of ours to stand beside, and an environment with exact pins."""
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    for row in ROWS:
        assert (ROOT / "benchmarks" / "peer_blocks" / f"{row.peer}.py").is_file()
        assert row.model in {*OURS, *CONVERSIONS, "float32", "llamacpp-q4_1"}
        assert next(r for r in ROWS if r.name == row.beside).peer == "edgepipe"
        if row.peer not in ("edgepipe", "torch"):
            text = (peer_setup.REQUIREMENTS / f"{row.peer}.txt").read_text(encoding="utf-8")
            pins = without_pins({"pins": text})["packages"]
            assert pins and all("==" in pin for pin in pins)


def test_llama_cpp_is_compiled_for_what_the_processor_has() -> None:
    """Switches follow the flags of /proc/cpuinfo; AMX is never among them, nor is the compiler left to guess."""
    old = peer_setup.cmake_arguments({"avx2", "fma", "f16c", "bmi2", "amx_tile", "amx_int8"}).split()
    assert "-DGGML_NATIVE=OFF" in old and "-DGGML_AVX2=ON" in old and "-DGGML_AVX512=OFF" in old
    new = peer_setup.cmake_arguments({"avx2", "avx512f", "avx512_vnni"}).split()
    assert "-DGGML_AVX512=ON" in new and "-DGGML_AVX512_VNNI=ON" in new and "-DGGML_AVX512_BF16=OFF" in new
    assert not any("AMX" in switch for switch in old + new)


@pytest.mark.slow
def test_an_environment_that_fails_is_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pip's own error is kept, and the next call tries again; what is ready stays as it is."""
    monkeypatch.setattr(peer_setup, "ROOT", tmp_path)
    monkeypatch.setattr(peer_setup, "REQUIREMENTS", tmp_path)
    monkeypatch.setattr(peer_setup, "ENVIRONMENTS", tmp_path / ".venv-peers")
    assert peer_setup.read_state("some") == {"error": "wasn't set up: `make bench` does it"}
    pins = tmp_path / "some.txt"
    pins.write_text("./no-such-folder\n", encoding="utf-8")
    peer_setup.main([])
    assert "no-such-folder" in peer_setup.read_state("some")["error"]
    pins.write_text("# nothing\n", encoding="utf-8")
    peer_setup.main(["some"])
    state = peer_setup.read_state("some")
    assert "error" not in state and state["command"][-1] == "benchmarks/peer_environments/some.txt"
    assert peer_setup.set_up("some") == state


def test_an_unknown_environment_is_named() -> None:
    """The message lists those there are."""
    with pytest.raises(SystemExit, match="no environment is called nothing: there are convert, ctranslate2"):
        peer_setup.main(["nothing"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--peers edgepipe,tvm", "--peers knows edgepipe, torch"),
        ("--peers torch", "--peers needs edgepipe"),
        ("--shapes 128", "--shapes is like 128x128,16x64"),
        ("--shapes 128x1", "2 new tokens at least"),
        ("--threads two", "--threads like 1,2"),
        ("--rounds 0", "--rounds 1 or more"),
    ],
)
def test_bad_options_are_refused(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and a sentence, before anything is built."""
    with pytest.raises(SystemExit) as ended:
        peers.parse(arguments.split())
    assert ended.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


# ---------------------------------------------------------------------------------------------------------------------
# Stored runs


def test_the_page_shows_the_stored_runs() -> None:
    """No figure in benchmarks/README.md is typed by hand."""
    assert section(peers.PAGE, peers.NAME) == peers.page_section(peers.stored_files()).strip()


@pytest.mark.parametrize("file", peers.stored_files(), ids=lambda file: file.stem)
def test_figures_follow_from_the_raw_samples(file: Path) -> None:
    """What a result says in summary comes out again from its samples and seed."""
    result = json.loads(file.read_text(encoding="utf-8"))
    assert json.loads(json.dumps(summarise(result))) == result["summary"]


@pytest.mark.parametrize("file", peers.stored_files(), ids=lambda file: file.stem)
def test_a_stored_run_is_worth_its_table(file: Path) -> None:
    """Seven rounds, at least four peers that ran, and a perplexity for every row with a speed."""
    result = json.loads(file.read_text(encoding="utf-8"))
    assert len(result["rounds"]) >= 7
    for rows in result["summary"]["threads"].values():
        ran = {name for name, figures in rows.items() if "error" not in figures}
        assert len({result["builds"][name]["row"]["peer"] for name in ran} - {"edgepipe"}) >= 4
        assert all("nll" in result["quality"][name] for name in ran)


def test_the_command_has_help() -> None:
    """The script starts and names its options."""
    command = [sys.executable, "-m", "benchmarks.peers", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(option in done.stdout for option in ("--rounds", "--peers", "--shapes", "--threads", "--fresh"))
