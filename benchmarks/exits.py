"""Do gates know which texts want fewer layers?  Accuracy and time by threshold, beside leaving at random.

    python benchmarks/exits.py --data DIR [--steps 800]   train, score and time what isn't stored, rewrite docs/prune.md
    python benchmarks/exits.py --page-only                rewrite the table from what is stored

DIR (default: what EDGEPIPE_DATA names) holds sst2-train.tsv and sst2-dev.tsv. An encoder of SmolLM2 with exits learns
the classes of SST-2, its vocabulary trimmed to them; its float bundle answers the dev set at each threshold. Leaving at
random is what the same shares of texts at the same exits give on average, whichever texts they are: the mean of the
exits' accuracies by these shares. Times are of all texts in batches, thresholds in turn; training goes on after a stop.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.stored import RESULTS, ROOT, markdown_table, provenance, read_result, replace_section, write_result
from edgepipe.artifacts import CompiledModel, Json
from edgepipe.measuring.examples import Labelled, read_labelled
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
HEADER = ("threshold", "mean layers", "accuracy, %", "leaving at random, %", "time, of all layers'")


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
        "ffn": 768,
        "exits": [2, 4],
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
    parser.add_argument("--page-only", action="store_true", help="rewrite the table from what is stored")
    options = parser.parse_args(arguments)
    if not options.page_only:
        take(SMOLLM2, options.data / "sst2-train.tsv", options.data / "sst2-dev.tsv", options.steps)
    result = read_result(NAME)
    replace_section(PAGE, NAME, page_section(result))
    print(json.dumps({row["threshold"]: row["accuracy"] for row in result["rows"]}))


def take(setting: Setting, train: Path, dev: Path, steps: int) -> None:
    """Train, score and time, unless it is stored with these settings."""
    files = {path.name: file_sha256(path) for path in (train, dev)}
    distill = {**setting.options, "steps": steps}
    settings = json.loads(json.dumps({"teacher": setting.teacher, "distill": distill, "files": files}))
    place = RESULTS / f"{NAME}.json"
    if place.is_file() and read_result(NAME)["settings"] == settings:
        return
    bundle, gates = bundle_of(setting, train, distill)
    examples = read_labelled(open_data(str(dev)), Evaluation(metric="accuracy").places(dev.suffix))
    machine = describe_machine(THREADS)
    result = {"settings": settings, "provenance": provenance(), "machine": machine, "gates": gates}
    write_result(NAME, {**result, "texts": len(examples), **scored(bundle, examples)})


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


def scored(bundle: Path, examples: Sequence[Labelled]) -> Json:
    """Return accuracy, layers and seconds by threshold, and the accuracy of each exit when all texts leave there."""
    texts = [one.text for one in examples]
    models = {threshold: opened(bundle, threshold) for threshold in THRESHOLDS}
    names = list(models[1.0].labels)
    wanted = np.array([names.index(one.label) for one in examples])
    at_exits = accuracies(bundle, models[1.0], texts, wanted)
    rows: list[Json] = []
    for threshold, model in models.items():
        right = model.classify(texts, batch_size=BATCH).argmax(1) == wanted
        left = model.texts_by_depth
        mean = sum(depth * count for depth, count in left.items()) / len(texts)
        chance = sum(at_exits[depth] * count for depth, count in left.items()) / len(texts)
        row = {"threshold": threshold, "mean_layers": mean, "accuracy": float(right.mean()), "by_chance": chance}
        rows.append({**row, "texts_by_layers": {str(depth): count for depth, count in left.items()}})
    seconds: dict[float, list[float]] = {threshold: [] for threshold in models}
    for _ in range(TURNS):
        for threshold, model in models.items():
            started = time.perf_counter()
            model.classify(texts, batch_size=BATCH)
            seconds[threshold].append(time.perf_counter() - started)
    for row in rows:
        row["seconds"] = seconds[row["threshold"]]
    return {"rows": rows, "at_exits": {str(depth): value for depth, value in at_exits.items()}}


def opened(bundle: Path, threshold: float) -> Encoder:
    """Load the bundle with a threshold."""
    model = load(bundle, threads=THREADS, exit_threshold=threshold)
    assert isinstance(model, Encoder)
    return model


def accuracies(bundle: Path, model: Encoder, texts: Sequence[str], wanted: np.ndarray) -> dict[int, float]:
    """Return the accuracy after each exit and after all layers, of all texts."""
    manifest = read_bundle(bundle).manifest
    parts = open_parts(bundle, manifest, THREADS)
    depths = (*manifest["model"]["exits"], manifest["model"]["layers"])
    right = dict.fromkeys(depths, 0)
    for start in range(0, len(texts), BATCH):
        feeds = model.feeds(texts[start : start + BATCH])
        mask = feeds["attention_mask"]
        for depth, part in zip(depths, parts, strict=True):
            found = part.run(feeds)
            right[depth] += int((found["logits"].argmax(1) == wanted[start : start + BATCH]).sum())
            feeds = {"states": found.get("next_states", mask), "attention_mask": mask}
    return {depth: count / len(texts) for depth, count in right.items()}


def page_section(result: Json) -> str:
    """Return the table and the sentences below it, from what is stored alone."""
    whole = statistics.median(next(row for row in result["rows"] if row["threshold"] == 1)["seconds"])
    cells = [
        [
            f"{row['threshold']:g}",
            f"{row['mean_layers']:.2f}",
            f"{100 * row['accuracy']:.1f}",
            f"{100 * row['by_chance']:.1f}" if row["threshold"] < 1 else "",
            f"{statistics.median(row['seconds']) / whole:.2f}",
        ]
        for row in sorted(result["rows"], key=lambda row: row["threshold"])
    ]
    each = ", ".join(
        f"{100 * value:.1f} after {depth}"
        for depth, value in sorted(result["at_exits"].items(), key=lambda x: int(x[0]))
    )
    came, distill = result["provenance"], result["settings"]["distill"]
    said = (
        f"{result['texts']:,} texts of SST-2's dev set, {distill['steps']} steps of training; all texts at one exit: "
        f"{each} layers. Batches of {BATCH}, {THREADS} thread, the median of {TURNS} turns. "
        f"{result['machine']['cpu']}, load average {came['load_average_1min']:.1f}; "
        f"{came['date']} at `{came['commit'][:12]}`."
    )
    return f"{markdown_table(HEADER, cells)}\n\n{said}"


if __name__ == "__main__":
    main(sys.argv[1:])
