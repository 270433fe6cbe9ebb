"""What do tokens lose that leave a decoder early?  Perplexity, layers and time by threshold, beside leaving at random.

    python benchmarks/decoder_exits.py --data DIR [--no-times]   run what isn't stored
    python benchmarks/decoder_exits.py --page-only               rewrite docs/prune.md from it

DIR (default: what EDGEPIPE_DATA names) holds wikitext2-valid.txt. SmolLM2 gets exits from texts of its first half;
windows of its last quarter are scored through the bundle, token by token, as if they had been generated. Leaving at
random gives each token an exit by lot, in the shares in which the gates of that threshold let them leave. Operators are
counted by onnxruntime's profiler over the first tokens. Times are of the same tokens, thresholds in turn, by the clock
and by the processor; `--no-times` leaves them for a quiet machine.

Building took 12 minutes on a busy machine, 10 of them for the states of the texts. Windows are stored one by one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.profiled import profiled
from benchmarks.stored import RESULTS, ROOT, markdown_table, provenance, read_result, replace_section, write_result
from edgepipe.artifacts import CompiledModel, Json
from edgepipe.measuring.run import describe_machine
from edgepipe.pipeline import run
from edgepipe.recipe import resolve
from edgepipe.report.progress import Progress
from edgepipe.runtime import Model, load, open_graphs, read_bundle
from edgepipe.runtime.leaving import Leaves, LeavingDecoder, Parts, above, taking
from edgepipe.runtime.onnxruntime import open_decoder, open_leaving
from edgepipe.runtime.sampling import log_softmax
from edgepipe.sources import open_model
from edgepipe.store import file_sha256

NAME, MODEL = "decoder-exits", "smollm2-135m"
PAGE = ROOT / "docs" / "prune.md"
BUNDLE = ROOT / "runs" / NAME / f"{MODEL}-cpu" / "bundle"
TEXT = "wikitext2-valid.txt"
OPTIONS: dict[str, object] = {"layers": [24], "samples": 64, "tokens": 256, "steps": 200}  # of the stage
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # the last one: all layers, by the graph of all layers
WINDOW, WINDOWS, COUNTED, TURNS, THREADS = 256, 4, 48, 5, 1
HEADER = (
    "threshold",
    "mean layers",
    "perplexity",
    "leaving at random",
    "likeliest token as all layers', %",
    "at random, %",
    "operators a token",
    "ms a token",
    "of the processor",
)


def main(arguments: list[str]) -> None:
    """Run, store and show, as the arguments say."""
    parser = argparse.ArgumentParser(description="Compare leaving a decoder by its gates with leaving at random.")
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("EDGEPIPE_DATA", ".")), help="the data's folder"
    )
    parser.add_argument("--no-times", action="store_true", help="leave times for a run on a quiet machine")
    parser.add_argument("--page-only", action="store_true", help="rewrite the table from what is stored")
    options = parser.parse_args(arguments)
    if not options.page_only:
        result = built(options.data / TEXT)
        text = (options.data / TEXT).read_text(encoding="utf-8")
        take(result, text[-len(text) // 4 :], times=not options.no_times)
    result = read_result(NAME)
    replace_section(PAGE, NAME, page_section(result))
    print(json.dumps({row["threshold"]: row["perplexity"] for row in rows_of(result)}))


def built(file: Path) -> Json:
    """Return what is stored of the bundle that lies in its folder; of a new one where there is none."""
    stored = read_result(NAME) if (RESULTS / f"{NAME}.json").is_file() else None
    there = BUNDLE / "manifest.json"
    if stored and stored["options"] == OPTIONS and there.is_file() and file_sha256(there) == stored["bundle"]:
        return stored
    folder = ROOT / "runs" / NAME
    folder.mkdir(parents=True, exist_ok=True)
    text = file.read_text(encoding="utf-8")
    seen = folder / "first-half.txt"
    seen.write_text(text[: len(text) // 2], encoding="utf-8")
    recipe_file = folder / "recipe.toml"
    recipe_file.write_text('stages = ["exits", "export", "compile"]\n', encoding="utf-8")
    settings = [("exits", name, value) for name, value in {**OPTIONS, "calibration": str(seen)}.items()]
    recipe = resolve(target="cpu", file=recipe_file, settings=settings)
    made = run(open_model(MODEL), recipe, out=None, runs=folder, fresh=False, listener=Progress())
    assert isinstance(made, CompiledModel)
    assert made.path == BUNDLE
    exits = next(record for record in made.history if record.stage == "exits").figures["exits"]
    result = {"bundle": file_sha256(there), "options": OPTIONS, "exits": exits, "windows": [], "operators": {}}
    write_result(NAME, result)
    return result


def take(result: Json, held: str, *, times: bool) -> None:
    """Score and time what isn't stored of this bundle."""
    manifest, ids = read_bundle(BUNDLE).manifest, tokenized(held)
    if not result["windows"]:
        result |= {"provenance": provenance(), "window_tokens": WINDOW}
    for threshold in THRESHOLDS:
        if str(threshold) not in result["operators"]:
            result["operators"][str(threshold)] = executed(BUNDLE, threshold, ids[:COUNTED])[0].total() / COUNTED
            write_result(NAME, result)
    whole, parts = open_decoder(BUNDLE, manifest, THREADS), open_leaving(BUNDLE, manifest, THREADS)
    for number in range(len(result["windows"]), WINDOWS):
        window = ids[number * WINDOW : (number + 1) * WINDOW]
        full = run_steps(whole, window)
        found = {"1.0": judged(full, full, window) | {"left": {str(manifest["model"]["layers"]): len(window)}}}
        for threshold in THRESHOLDS[:-1]:
            by_gates = run_steps(leaving(parts, manifest, above(threshold)), window)
            order = np.random.default_rng([number, round(100 * threshold)]).permutation(by_gates.depths[1:])
            lots = [parts.depths.index(depth) for depth in (by_gates.depths[0], *order.tolist())]  # the first stays
            by_lot = run_steps(leaving(parts, manifest, taking(lots)), window)
            found[str(threshold)] = judged(by_gates, full, window)
            found[f"{threshold} at random"] = judged(by_lot, full, window)
        result["windows"].append(found)
        write_result(NAME, result)
    if times and "times" not in result:
        found = {"provenance": provenance(), "machine": describe_machine(THREADS), "tokens": COUNTED}
        seconds: dict[str, list[list[float]]] = {str(threshold): [] for threshold in THRESHOLDS}
        for turn in range(TURNS + 1):
            for threshold in THRESHOLDS:
                decoder = whole if threshold == 1 else leaving(parts, manifest, above(threshold))
                steps = run_steps(decoder, ids[:COUNTED])
                if turn:  # the first one warms up
                    seconds[str(threshold)].append([steps.seconds, steps.processor])
        result["times"] = {**found, "seconds": seconds}
        write_result(NAME, result)


def tokenized(text: str) -> list[int]:
    """Return the ids of the windows that are scored."""
    model = load(BUNDLE, threads=THREADS)
    assert isinstance(model, Model)
    return model.encode(text)[: WINDOW * WINDOWS]


def leaving(parts: Parts, manifest: Json, leaves: Leaves) -> LeavingDecoder:
    """Return a decoder with a rule of its own over the opened parts."""
    return LeavingDecoder(parts, manifest["model"], manifest["cache"]["dtype"], leaves)


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Hold what a run of tokens one by one gave."""

    log_p: np.ndarray  # [n, vocab] after each token
    seconds: float  # of the runs alone, by the clock
    processor: float  # and by the processor
    depths: list[int]  # layers that each token went through; empty where all did


def run_steps(decoder: Any, ids: Sequence[int]) -> Steps:
    """Run tokens one by one, as if they had been generated."""
    cache, rows, depths = decoder.new_cache(1), [], []
    seconds = processor = 0.0
    one, first = np.array([1]), np.array([[0]])
    before = getattr(decoder, "tokens_by_depth", {})
    for place, token in enumerate(ids):
        given, past = np.array([[token]]), np.array([place])
        started, worked = time.perf_counter(), time.process_time()
        logits = decoder.run(cache, given, past, one, first)
        seconds += time.perf_counter() - started
        processor += time.process_time() - worked
        rows.append(log_softmax(logits[0, 0]))
        if before:
            after = decoder.tokens_by_depth
            depths.append(next(depth for depth in after if after[depth] > before[depth]))
            before = after
    return Steps(log_p=np.stack(rows), seconds=seconds, processor=processor, depths=depths)


def judged(steps: Steps, full: Steps, ids: Sequence[int]) -> Json:
    """Return what one window says of a way of leaving: the last token's answer has nothing to compare with."""
    scored = np.arange(len(ids) - 1)
    return {
        "nll": -float(steps.log_p[scored, ids[1:]].sum()),
        "scored": len(scored),
        "agrees": int((steps.log_p.argmax(1) == full.log_p.argmax(1)).sum()),
        "tokens": len(ids),
        "left": {str(depth): count for depth, count in sorted(Counter(steps.depths).items())},
    }


def executed(bundle: Path, threshold: float, ids: Sequence[int]) -> tuple[Counter[str], int]:
    """Run tokens one by one, profiled; return operators that ran, by name, and the layers they went through."""
    depths: list[int] = []
    operators, _ = profiled(
        lambda: open_graphs(read_bundle(bundle), THREADS, threshold),
        lambda decoder: depths.extend(run_steps(decoder, ids).depths),
    )
    layers = int(read_bundle(bundle).manifest["model"]["layers"])
    return operators, sum(depths) if depths else layers * len(ids)


def rows_of(result: Json) -> list[Json]:
    """Return a row for each threshold, all windows together."""
    rows = []
    for threshold in THRESHOLDS:
        row: Json = {"threshold": threshold, "operators": result["operators"][str(threshold)]}
        for name, suffix in (("", ""), (" at random", "_at_random")):
            found = [window.get(f"{threshold}{name}") for window in result["windows"]]
            if None in found:
                continue
            total = {key: sum(one[key] for one in found) for key in ("nll", "scored", "agrees", "tokens")}
            layers = sum(int(depth) * count for one in found for depth, count in one["left"].items())
            row |= {
                f"perplexity{suffix}": math.exp(total["nll"] / total["scored"]),
                f"agrees{suffix}": total["agrees"] / total["tokens"],
                f"mean_layers{suffix}": layers / total["tokens"],
            }
        rows.append(row)
    return rows


def page_section(result: Json) -> str:
    """Return the table and the sentences below it, from what is stored alone."""
    rows, times = rows_of(result), result.get("times")

    def took(threshold: float) -> list[str]:
        if times is None:
            return []
        found = np.median(times["seconds"][str(float(threshold))], axis=0)
        return [f"{1000 * one / times['tokens']:.2f}" for one in found.tolist()]

    cells = [
        [
            f"{row['threshold']:g}",
            f"{row['mean_layers']:.1f}",
            f"{row['perplexity']:.1f}",
            f"{row['perplexity_at_random']:.1f}" if "perplexity_at_random" in row else "",
            f"{100 * row['agrees']:.1f}",
            f"{100 * row['agrees_at_random']:.1f}" if "agrees_at_random" in row else "",
            f"{row['operators']:.0f}",
            *took(row["threshold"]),
        ]
        for row in rows
    ]
    exits, came = result["exits"], result["provenance"]
    each = ", ".join(f"{100 * one['agrees']:.0f} % after {one['layers']} layers" for one in exits["exits"])
    tokens = sum(window["1.0"]["tokens"] for window in result["windows"])
    said = (
        f"SmolLM2 as it came (4 bits, a float16 cache), {tokens:,} tokens of the last quarter of WikiText-2's "
        f"validation text in windows of {result['window_tokens']}, one by one. Exits from {exits['train_tokens']:,} "
        f"tokens of its first half, gates from {exits['gate_tokens']:,} others of it, where the exit's likeliest token "
        f"is that of all layers in {each}. Leaving at random: the same depths, other tokens. Operators that "
        f"onnxruntime ran: the mean of {COUNTED} tokens. {came['date']} at `{came['commit'][:12]}`."
    )
    if times is not None:
        said += (
            f" Times of {times['tokens']} tokens: the median of {TURNS} turns, {THREADS} thread, "
            f"{times['machine']['cpu']}, load average {times['provenance']['load_average_1min']:.1f}, "
            f"{times['provenance']['date']}."
        )
    return f"{markdown_table(HEADER if times else HEADER[:-2], cells)}\n\n{said}"


if __name__ == "__main__":
    main(sys.argv[1:])
