"""Run edgepipe beside its peers on the same model, interleaved. Linux only; `make bench` runs it.

    python benchmarks/peers.py [--rounds 7] [--seed 0] [--peers NAME,…] [--shapes 128x128,16x64] [--threads 1,2]
    python benchmarks/peers.py --table                  print the tables of the stored runs

A round gives every row one fresh process per number of threads, in an order drawn anew. Around each process a fixed
piece of work is timed (`machine_index_ms`), so a reader sees what the machine did meanwhile. Stopped with Ctrl-C, the
same command goes on after the last whole round. A peer that can't be had, built or run gets rows that say why.
benchmarks/README.md says how to read the result.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.genai import machine_index_ms, say, slug
from benchmarks.peer_models import ROWS, Row, how_it_ended, prepare, python_of
from benchmarks.peer_summary import page_part, summarise, tables
from benchmarks.stored import RESULTS, ROOT, provenance, replace_section, write_result
from edgepipe.calibration import open_text
from edgepipe.measuring.run import describe_machine
from edgepipe.report.terminal import table
from edgepipe.runtime.bundle import read_bundle
from edgepipe.runtime.tokenizer import Tokenizer
from edgepipe.store import file_sha256

NAME = "peers"
PAGE = ROOT / "benchmarks" / "README.md"
WORK = ROOT / "runs" / NAME
TEXT = "prose-eval"
WINDOW_TOKENS = 512
PROMPTS = 3  # counted, of each shape in each process
PEERS = tuple(dict.fromkeys(row.peer for row in ROWS))
_BLOCK_TIMEOUT_S = 900
_TITLES = {
    "genai": "onnxruntime-genai",
    "llamacpp": "llama-cpp-python",
    "ctranslate2": "CTranslate2",
    "openvino": "OpenVINO GenAI",
}
Json = dict[str, Any]


def main(arguments: list[str]) -> None:
    """Run, store and show, as the arguments say."""
    options = parse(arguments)
    if options.table:
        show(stored_files())
        return
    try:
        result = run(options)
    except KeyboardInterrupt:
        say(f"stopped: whole rounds are kept in {WORK.relative_to(ROOT)}, and the same command goes on after them")
        raise SystemExit(130) from None
    stored = write_result(f"{NAME}-{slug(result['machine']['cpu'])}", result)
    replace_section(PAGE, NAME, page_section(stored_files()))
    show([stored])


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Run edgepipe beside its peers.")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of all rows (default: 7)")
    parser.add_argument("--seed", type=int, default=0, help="seed of order, prompts and bootstrap (default: 0)")
    parser.add_argument("--peers", default=",".join(PEERS), help="which, in any order (default: all)")
    parser.add_argument("--shapes", default="128x128,16x64", help="prompt x new tokens (default: 128x128,16x64)")
    parser.add_argument("--threads", default="1,2", help="numbers of threads (default: 1,2)")
    parser.add_argument("--fresh", action="store_true", help="don't go on with a stopped run")
    parser.add_argument("--table", action="store_true", help="print the tables of the stored runs")
    options = parser.parse_args(arguments)
    options.peers = options.peers.split(",")
    if unknown := sorted(set(options.peers) - set(PEERS)):
        parser.error(f"--peers knows {', '.join(PEERS)}, not {', '.join(unknown)}")
    if "edgepipe" not in options.peers:
        parser.error("--peers needs edgepipe: the others are compared with it")
    try:
        options.shapes = [[int(n) for n in shape.split("x", 1)] for shape in options.shapes.split(",")]
        options.threads = [int(n) for n in options.threads.split(",")]
        smallest = min(options.rounds, *options.threads, *(prompt for prompt, _ in options.shapes))
        if smallest < 1 or options.seed < 0 or min(new for _, new in options.shapes) < 2:
            raise ValueError
    except ValueError:
        parser.error(
            "--shapes is like 128x128,16x64 with 2 new tokens at least, --threads like 1,2, --rounds 1 or more"
        )
    return options


def run(options: argparse.Namespace) -> Json:
    """Build all sides, measure them in turns, and return everything a reader needs to check the figures."""
    came_from = provenance()
    rows = [row for row in ROWS if row.peer in options.peers]
    builds = prepare(rows, WORK, say)
    workload = {
        "shapes": options.shapes,
        "threads": options.threads,
        "prompts": PROMPTS,
        "text": TEXT,
        "window_tokens": WINDOW_TOKENS,
    }
    plan = {"builds": builds, "workload": workload, "seed": options.seed, "blocks_sha256": block_hashes()}
    kept = Progress(WORK / "progress.jsonl", plan, fresh=options.fresh)
    runnable = [row for row in rows if "error" not in builds[row.name]]
    quality = take_quality(runnable, max(options.threads), kept)
    rounds = take_rounds(runnable, options, kept)
    result = {
        **came_from,
        "command": ["python", "benchmarks/peers.py", *sys.argv[1:]],
        "machine": describe_machine(0),
        "workload": workload,
        "seed": options.seed,
        "builds": builds,
        "quality": quality,
        "peer_versions": peer_versions(runnable, rounds),
        "rounds": rounds,
    }
    return result | {"summary": summarise(result)}


class Progress:
    """Keep finished rounds in a file, a line each, so that a stopped run of the same plan goes on after them."""

    def __init__(self, path: Path, plan: Json, *, fresh: bool) -> None:
        """Read what an earlier run of this very plan left; anything else is dropped."""
        self._path = path
        self.quality: Json = {}
        self.rounds: list[list[Json]] = []
        if fresh or not self._read(plan):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"plan": plan}) + "\n", encoding="utf-8")

    def keep_quality(self, row: str, found: Json) -> None:
        """Keep one row's score."""
        self.quality[row] = found
        self._add({"quality": {row: found}})

    def keep_round(self, blocks: list[Json]) -> None:
        """Keep one whole round."""
        self.rounds.append(blocks)
        self._add({"round": blocks})

    def _add(self, line: Json) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _read(self, plan: Json) -> bool:
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        except FileNotFoundError:
            return False
        whole = [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may leave half a line
        if not whole or whole[0] != json.loads(json.dumps({"plan": plan})):
            return False
        for line in whole[1:]:
            self.quality |= line.get("quality", {})
            self.rounds += [line["round"]] if "round" in line else []
        if len(whole) != len(lines):
            self._path.write_text("".join(lines[:-1]), encoding="utf-8")
        return True


def take_quality(rows: list[Row], threads: int, kept: Progress) -> Json:
    """Score the same windows of one text with every row's model, and return mean negative log-likelihoods."""
    job = {"kind": "quality", "windows": text_windows()}
    for row in rows:
        if row.name not in kept.quality:
            say(f"perplexity: {row.name}")
            kept.keep_quality(row.name, run_block(row, threads, job))
    return kept.quality


def text_windows() -> list[list[int]]:
    """Return the token ids of the text that no compression step has seen, in windows; each is scored from nothing."""
    ids = Tokenizer(read_bundle(WORK / "edgepipe-kept-int8").tokenizer).encode(open_text(TEXT))
    windows = [ids[i : i + WINDOW_TOKENS] for i in range(0, len(ids), WINDOW_TOKENS)]
    return [window for window in windows if len(window) > 1]


def take_rounds(rows: list[Row], options: argparse.Namespace, kept: Progress) -> list[list[Json]]:
    """Measure every row at every number of threads once a round; a row that failed isn't tried again."""
    total = options.rounds * len(rows) * len(options.threads)
    done, begun = 0, time.monotonic()
    skipped = len(kept.rounds[: options.rounds]) * len(rows) * len(options.threads)
    failed = {(b["row"], b["threads"]) for blocks in kept.rounds for b in blocks if "error" in b}
    for number in range(len(kept.rounds), options.rounds):
        blocks = []
        for threads, row in round_order(rows, options.threads, options.seed, number):
            left = (time.monotonic() - begun) / done * (total - skipped - done) if done else None
            say(f"round {number + 1} of {options.rounds}: {row.name}, threads: {threads}{about(left)}")
            done += 1
            if (row.name, threads) in failed:
                continue
            job = {"kind": "speed", "prompts": PROMPTS, "shapes": options.shapes, "seed": options.seed + number}
            before = machine_index_ms()
            block = run_block(row, threads, job)
            index = [round(before, 2), round(machine_index_ms(), 2)]
            blocks.append({"row": row.name, "threads": threads, "machine_index_ms": index, **block})
            if "error" in block:
                failed.add((row.name, threads))
        kept.keep_round(blocks)
    return kept.rounds[: options.rounds]


def round_order(rows: list[Row], threads: list[int], seed: int, number: int) -> Iterator[tuple[int, Row]]:
    """Draw a round's order: numbers of threads, and the rows at each. A round has the same one whenever it is run."""
    order = random.Random(f"{seed}/{number}")
    for count in order.sample(threads, len(threads)):
        for row in order.sample(rows, len(rows)):
            yield count, row


def run_block(row: Row, threads: int, job: Json) -> Json:
    """Run one process and return its answer, or an "error" that says how it ended."""
    module = f"benchmarks.peer_blocks.{row.peer}"
    return run_child([str(python_of(row.peer)), "-P", "-m", module], job | row_job(row, threads))


def row_job(row: Row, threads: int) -> Json:
    """Return the part of a job that tells which model to open, and how."""
    return {"path": str(WORK / row.model), "threads": threads, "settings": row.settings}


def run_child(command: list[str], job: Json, timeout_s: float = _BLOCK_TIMEOUT_S) -> Json:
    """Give a process its job on stdin and return the JSON on its last line, or an "error" that says how it ended."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    text = json.dumps(job | {"started": time.monotonic()})
    try:
        done = subprocess.run(
            command, input=text, env=environment, capture_output=True, text=True, timeout=timeout_s, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {timeout_s:g} s and was stopped"}
    except OSError as error:
        return {"error": f"couldn't be started: {error.strerror}"}
    if done.returncode != 0:
        return {"error": how_it_ended(done.returncode, done.stderr)}
    last = (done.stdout.strip().splitlines() or ["nothing"])[-1]
    try:
        answer: Json = json.loads(last)
    except ValueError:
        return {"error": f"ended without an answer: {last[:200]}"}
    return answer


def peer_versions(rows: list[Row], rounds: list[list[Json]]) -> dict[str, str]:
    """Return the versions that the engines gave of themselves."""
    peers = {row.name: _TITLES.get(row.peer, row.peer) for row in rows}
    blocks = [block for blocks in rounds for block in blocks if "version" in block.get("facts", {})]
    return {peers[block["row"]]: block["facts"]["version"] for block in blocks}


def block_hashes() -> dict[str, str]:
    """Return the hashes of the files that measure: a changed one starts a new run."""
    folder = Path(__file__).with_name("peer_blocks")
    return {file.name: file_sha256(file) for file in sorted(folder.glob("*.py"))}


def stored_files() -> list[Path]:
    """Return the stored runs."""
    return sorted(RESULTS.glob(f"{NAME}-*.json"))


def page_section(files: list[Path]) -> str:
    """Return the page's tables of all stored runs."""
    if not files:
        return "No run is stored yet."
    return "\n\n".join(page_part(json.loads(file.read_text(encoding="utf-8"))) for file in files)


def show(files: list[Path]) -> None:
    """Print the tables of stored runs to stderr and their ratios as JSON to stdout."""
    if not files:
        raise SystemExit("no run is stored yet: run `make bench` first")
    ratios: Json = {}
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        for title, header, lines in tables(result):
            say(f"\n{title}\n{table(header, lines)}")
        for threads, rows in result["summary"]["threads"].items():
            for name, figures in rows.items():
                for shape, one in figures.get("shapes", {}).items():
                    if "decode_ratio" in one:
                        key = f"{name}, threads: {threads}, {shape}"
                        ratios.setdefault(file.stem, {})[key] = [one["decode_ratio"], one["ttft_ratio"]]
    print(json.dumps(ratios))


def about(seconds: float | None) -> str:
    """Say how long is left, once that can be guessed."""
    return "" if seconds is None else f", about {max(1, round(seconds / 60))} min left"


if __name__ == "__main__":
    main(sys.argv[1:])
