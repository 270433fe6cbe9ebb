"""Do gates know which texts want fewer layers?  Accuracy, layers and time by threshold, beside leaving at random.

    python benchmarks/exits.py --data DIR [--steps 800] [--exits 2 4] [--no-times]   run what isn't stored
    python benchmarks/exits.py --page-only                                           rewrite docs/prune.md from it

DIR (default: what EDGEPIPE_DATA names) holds sst2-train.tsv and sst2-dev.tsv. An encoder of SmolLM2 with exits learns
the classes of SST-2, its vocabulary trimmed to them; its float bundle answers the dev set at each threshold. Leaving at
random is what the same shares of texts at the same exits give on average, whichever texts they are: the mean of the
exits' accuracies by these shares. Operators are counted by onnxruntime's profiler, texts one by one. Times are of all
texts in batches, thresholds in turn; `--no-times` leaves them for a quiet machine.

800 steps took 7 minutes of one core's time on a busy machine, rows and times some more. Training goes on after a stop
from its last checkpoint, and rows are stored one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.profiled import profiled
from benchmarks.stored import RESULTS, ROOT, markdown_table, provenance, read_result, replace_section, write_result
from edgepipe.artifacts import CompiledModel, Json
from edgepipe.measuring.examples import read_labelled
from edgepipe.measuring.metrics import Evaluation
from edgepipe.measuring.run import describe_machine
from edgepipe.pipeline import run
from edgepipe.recipe import resolve
from edgepipe.report.progress import Progress
from edgepipe.rows import open_data
from edgepipe.runtime import Encoder, load, read_bundle
from edgepipe.runtime.onnxruntime import open_parts
from edgepipe.sources import open_model
from edgepipe.store import file_sha256

NAME = "exits"
PAGE = ROOT / "docs" / "prune.md"
THRESHOLDS = (0.3, 0.5, 0.7, 0.9, 1.0)  # the last one: all layers
TURNS, BATCH, THREADS = 3, 8, 1
COUNTED = 64  # texts whose operators are counted
HEADER = ("threshold", "mean layers", "accuracy, %", "leaving at random, %", "operators a text", "time, of all layers'")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Say what is trained."""

    teacher: str
    options: dict[str, object]  # of distill


SMOLLM2 = Setting(
    teacher="smollm2-135m",
    options={
        "student": "encoder",
        "encoder_layers": 6,
        "hidden": 192,
        "kv_heads": 1,  # with its three queries: heads of 64 that divide the width
        "ffn": 768,
        "batch": 32,
        "learning_rate": 5e-4,
        "max_source": 64,
        "cut": True,
    },
)


def main(arguments: list[str]) -> None:
    """Run, store and show, as the arguments say."""
    parser = argparse.ArgumentParser(description="Compare leaving an encoder by its gates with leaving at random.")
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("EDGEPIPE_DATA", ".")), help="the data's folder"
    )
    parser.add_argument("--steps", type=int, default=800, help="steps of the student (default: 800)")
    parser.add_argument(
        "--exits", type=int, nargs="+", default=[2, 4], help="layers of six with an exit (default: 2 4)"
    )
    parser.add_argument("--no-times", action="store_true", help="leave times for a run on a quiet machine")
    parser.add_argument("--page-only", action="store_true", help="rewrite the table from what is stored")
    options = parser.parse_args(arguments)
    if not options.page_only:
        train, dev = (options.data / f"sst2-{part}.tsv" for part in ("train", "dev"))
        setting = replace(SMOLLM2, options={**SMOLLM2.options, "exits": options.exits})
        take(setting, train, dev, options.steps, times=not options.no_times)
    result = read_result(NAME)
    replace_section(PAGE, NAME, page_section(result))
    print(json.dumps({row["threshold"]: row["accuracy"] for row in result["rows"]}))


def take(setting: Setting, train: Path, dev: Path, steps: int, *, times: bool) -> None:
    """Train, score and time what isn't stored with these settings."""
    files = {path.name: file_sha256(path) for path in (train, dev)}
    distill = {**setting.options, "steps": steps}
    settings = json.loads(json.dumps({"teacher": setting.teacher, "distill": distill, "files": files}))
    result = _stored(settings)
    if result is not None and _is_whole(result, times=times):
        return
    bundle, gates = bundle_of(setting, train, distill)
    made = file_sha256(bundle / "manifest.json")
    if result is None or result["bundle"] != made:  # rows of one bundle
        result = {"settings": settings, "provenance": provenance(), "bundle": made, "gates": gates, "rows": []}
    examples = read_labelled(open_data(str(dev)), Evaluation(metric="accuracy").places(dev.suffix))
    texts = [one.text for one in examples]
    names = list(opened(bundle, 1.0).labels)
    wanted = np.array([names.index(one.label) for one in examples])
    if "at_exits" not in result:
        result |= {"texts": len(texts), "at_exits": accuracies(bundle, texts, wanted)}
        write_result(NAME, result)
    for threshold in THRESHOLDS:
        if not any(row["threshold"] == threshold for row in result["rows"]):
            result["rows"].append(scored(bundle, threshold, texts, wanted, result["at_exits"]))
            write_result(NAME, result)
    if times and "times" not in result:
        result["times"] = {"provenance": provenance(), "machine": describe_machine(THREADS)}
        result["times"]["seconds"] = timed(bundle, texts)
        write_result(NAME, result)


def _stored(settings: Json) -> Json | None:
    """Return what is stored with these settings."""
    result = read_result(NAME) if (RESULTS / f"{NAME}.json").is_file() else None
    return result if result is not None and result["settings"] == settings else None


def _is_whole(result: Json, *, times: bool) -> bool:
    """Say whether nothing is left to run."""
    return len(result["rows"]) == len(THRESHOLDS) and ("times" in result or not times)


def bundle_of(setting: Setting, train: Path, distill: dict[str, object]) -> tuple[Path, Json]:
    """Return the float bundle of the student, and the record of its gates."""
    folder = ROOT / "runs" / NAME
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.toml"
    file.write_text('stages = ["trim", "distill", "export", "compile"]\n', encoding="utf-8")
    given = {**distill, "data": str(train)}
    settings = [("trim", "data", str(train)), *(("distill", key, value) for key, value in given.items())]
    recipe = resolve(target="cpu", file=file, settings=settings)
    made = run(open_model(setting.teacher), recipe, out=None, runs=folder, fresh=False, listener=Progress())
    assert isinstance(made, CompiledModel)
    record = next(record for record in made.history if record.stage == "distill")
    return made.path, record.figures["gates"]


def scored(
    bundle: Path, threshold: float, texts: Sequence[str], wanted: np.ndarray, at_exits: Mapping[str, float]
) -> Json:
    """Return the row of a threshold: accuracy by gates and at random, layers, operators."""
    model = opened(bundle, threshold)
    right = model.classify(texts, batch_size=BATCH).argmax(1) == wanted
    left = {str(depth): count for depth, count in model.texts_by_depth.items()}
    counted = texts[:COUNTED]
    return {
        "threshold": threshold,
        "mean_layers": sum(int(depth) * count for depth, count in left.items()) / len(texts),
        "accuracy": float(right.mean()),
        "by_chance": sum(at_exits[depth] * count for depth, count in left.items()) / len(texts),
        "texts_by_layers": left,
        "operators": executed(bundle, threshold, counted)[0].total() / len(counted),
    }


def executed(bundle: Path, threshold: float, texts: Sequence[str]) -> tuple[Counter[str], int]:
    """Run texts one by one, profiled; return operators that ran, by name, and the layers they went through."""

    def use(model: Any) -> None:
        for text in texts:
            model.run(model.feeds([text]))

    operators, model = profiled(lambda: opened(bundle, threshold), use)
    return operators, sum(depth * count for depth, count in model.texts_by_depth.items())


def timed(bundle: Path, texts: Sequence[str]) -> dict[str, list[float]]:
    """Return the seconds of all texts by threshold, a number a turn."""
    models = {threshold: opened(bundle, threshold) for threshold in THRESHOLDS}
    seconds: dict[str, list[float]] = {str(threshold): [] for threshold in THRESHOLDS}
    for _ in range(TURNS):
        for threshold, model in models.items():
            started = time.perf_counter()
            model.classify(texts, batch_size=BATCH)
            seconds[str(threshold)].append(time.perf_counter() - started)
    return seconds


def opened(bundle: Path, threshold: float) -> Encoder:
    """Load the bundle with a threshold."""
    model = load(bundle, threads=THREADS, exit_threshold=threshold)
    assert isinstance(model, Encoder)
    return model


def accuracies(bundle: Path, texts: Sequence[str], wanted: np.ndarray) -> dict[str, float]:
    """Return the accuracy after each exit and after all layers, of all texts."""
    manifest, model = read_bundle(bundle).manifest, opened(bundle, 1.0)
    parts = open_parts(bundle, manifest, THREADS)
    depths = (*manifest["model"]["exits"], manifest["model"]["layers"])
    right = dict.fromkeys(depths, 0)
    order = np.argsort([len(text) for text in texts], kind="stable")
    for start in range(0, len(texts), BATCH):
        chosen = order[start : start + BATCH]
        feeds = model.feeds([texts[i] for i in chosen])
        mask = feeds["attention_mask"]
        for depth, part in zip(depths, parts, strict=True):
            found = part.run(feeds)
            right[depth] += int((found["logits"].argmax(1) == wanted[chosen]).sum())
            feeds = {"states": found.get("next_states", mask), "attention_mask": mask}
    return {str(depth): count / len(texts) for depth, count in right.items()}


def page_section(result: Json) -> str:
    """Return the table and the sentences below it, from what is stored alone."""
    times = result.get("times")
    rows = sorted(result["rows"], key=lambda row: row["threshold"])

    def share(threshold: float) -> list[str]:
        if times is None:
            return []
        taken, whole = (statistics.median(times["seconds"][str(float(one))]) for one in (threshold, 1))
        return [f"{taken / whole:.2f}"]

    cells = [
        [
            f"{row['threshold']:g}",
            f"{row['mean_layers']:.2f}",
            f"{100 * row['accuracy']:.1f}",
            f"{100 * row['by_chance']:.1f}" if row["threshold"] < 1 else "",
            f"{row['operators']:.0f}",
            *share(row["threshold"]),
        ]
        for row in rows
    ]
    each = ", ".join(
        f"{100 * value:.1f} after {depth}"
        for depth, value in sorted(result["at_exits"].items(), key=lambda x: int(x[0]))
    )
    came, distill = result["provenance"], result["settings"]["distill"]
    said = (
        f"{result['texts']:,} phrases of SST-2, held out of {distill['steps']} steps of training on others, many of "
        f"the same sentences; all texts at one exit: {each} layers. Operators that onnxruntime ran for a text alone, "
        f"the mean of {min(COUNTED, result['texts'])}. "
        f"{came['date']} at `{came['commit'][:12]}`."
    )
    if times is not None:
        said += (
            f" Times: batches of {BATCH}, {THREADS} thread, the median of {TURNS} turns, {times['machine']['cpu']}, "
            f"load average {times['provenance']['load_average_1min']:.1f}, {times['provenance']['date']}."
        )
    return f"{markdown_table(HEADER if times else HEADER[:-1], cells)}\n\n{said}"


if __name__ == "__main__":
    main(sys.argv[1:])
