"""Does distilling pay in quality?  Students of SmolLM2 on the E2E data, by BLEU and ROUGE-L through their bundles.

    python benchmarks/e2e.py --data e2e-dev.csv [--steps 200] [--adapt-steps 300] [--seeds 3]   run what is left
    python benchmarks/e2e.py --page-only                      rewrite the table of docs/distill.md

A part of the meanings is kept for the test, with all their human texts as references. The teacher's vocabulary is
trimmed to what the data use, then the teacher is adapted to the task (LoRA) once; its top-k scores are computed once.
Every arm and seed trains for the same steps on the same examples, and is kept in results/e2e.json as soon as it is
scored: what is there is not run again. An arm's hours of training lie in runs/e2e and go on after a stop.
Source of the claims: arXiv:2501.16273 (KD), 2504.06225 (adapted against scratch, bidirectional against causal).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.stored import (
    RESULTS,
    ROOT,
    markdown_table,
    provenance,
    read_result,
    replace_section,
    spread,
    write_result,
)
from edgepipe.artifacts import Context, Json, TorchModel
from edgepipe.evaluate import evaluate
from edgepipe.measuring.metrics import Evaluation
from edgepipe.measuring.run import describe_machine
from edgepipe.pipeline import run, run_stages
from edgepipe.recipe import resolve
from edgepipe.report.progress import Progress
from edgepipe.sources import open_model
from edgepipe.stages.trim import Trim
from edgepipe.store import file_sha256, read_json, write_json
from edgepipe.students.result import save, teacher_tokens
from edgepipe.students.tokenizer import with_end_token
from edgepipe.target import load_target
from edgepipe.training.adapt import Adapters, adapt_teacher
from edgepipe.training.batches import Limits, Special, seq2seq
from edgepipe.training.data import hold_out, read_data
from edgepipe.training.loop import LoopData, LoopOptions, Place

NAME = "e2e"
PAGE = ROOT / "docs" / "distill.md"
TEACHER = "smollm2-135m"
TEST_SHARE = 0.2  # of the meanings
SPLIT_SEED = 1
MAX_SOURCE, MAX_TARGET = 96, 96
ADAPT_RATE = 5e-4  # learning rate of the adapters
METRICS = ("bleu", "rouge")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """Name one way to make a student."""

    name: str
    settings: dict[str, object] = field(default_factory=dict)  # of the stage distill, beside the common ones
    seeds: int = 3  # at most
    share: float = 1.0  # of the steps


# The teacher's first layers read; its first two and its last one write. Cross-attention starts at random.
_LAYERS: dict[str, object] = {"encoder_from": [0, 1, 2, 3, 4, 5], "decoder_from": [0, 1, 29], "cross": "random"}
ARMS = (
    Arm(name="adapted, KD", settings=_LAYERS),
    Arm(name="adapted, CE alone", settings={**_LAYERS, "alpha": 0.0}),
    Arm(name="adapted, KD, targets by the teacher", settings={**_LAYERS, "targets": "teacher"}),
    Arm(name="scratch, KD", settings={"scratch": True}),
    Arm(name="adapted, KD, causal encoder", settings={**_LAYERS, "causal_encoder": True}),
    Arm(name="adapted, KD, half the steps", settings=_LAYERS, seeds=1, share=0.5),
    Arm(name="adapted, CE alone, half the steps", settings={**_LAYERS, "alpha": 0.0}, seeds=1, share=0.5),
    Arm(name="adapted, KD, layers evenly spaced, cross-attention copied", seeds=1),
    Arm(name="scratch, KD, twice the learning rate", settings={"scratch": True, "learning_rate": 1e-3}, seeds=1),
)
COMMON: dict[str, object] = {
    "student": "encoder-decoder",
    "encoder_layers": 6,
    "decoder_layers": 3,
    "alpha": 0.5,
    "batch": 32,
    "learning_rate": 5e-4,
    "warmup": 20,
    "max_source": MAX_SOURCE,
    "max_target": MAX_TARGET,
    "held_out": 0.03,
}


def main(arguments: list[str]) -> None:
    """Run, store and show, as the arguments say."""
    parser = argparse.ArgumentParser(description="Compare students of SmolLM2 on the E2E data.")
    parser.add_argument("--data", type=Path, help="E2E's table of mr and ref, .csv")
    parser.add_argument("--steps", type=int, default=200, help="steps of every student (default: 200)")
    parser.add_argument("--adapt-steps", type=int, default=300, help="steps of the teacher's adapters (default: 300)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every arm (default: 3)")
    parser.add_argument("--page-only", action="store_true", help="rewrite the table from what is stored")
    options = parser.parse_args(arguments)
    if not options.page_only:
        if options.data is None:
            parser.error("--data FILE is needed")
        take(options.data, options.steps, options.adapt_steps, options.seeds)
    result = read_result(NAME)
    replace_section(PAGE, NAME, page_section(result))
    print(json.dumps({arm: [round(x, 2) for x in found["bleu"]] for arm, found in by_arm(result).items()}))


def take(data: Path, steps: int, adapt_steps: int, seeds: int) -> None:
    """Run every arm and seed that isn't stored as it is now, and store each as soon as it is scored."""
    folder = ROOT / "runs" / NAME
    folder.mkdir(parents=True, exist_ok=True)
    train_file, test_file, counts = split(data, folder)
    teacher = make_teacher(train_file, folder, adapt_steps)
    taught = {"adapt_steps": adapt_steps, "adapt_rate": ADAPT_RATE, "data": counts}
    result = read_result(NAME) if (RESULTS / f"{NAME}.json").is_file() else {"rows": [], "teacher": {}}
    result["machine"] = describe_machine(0)
    if result["teacher"].get("settings") != taught:
        parameters = open_model(str(teacher)).weights.parameters
        scored = {"parameters": parameters, **score(teacher, test_file, folder)}
        result["teacher"] = {"settings": taught, "provenance": provenance(), **scored}
        write_result(NAME, result)
    every = [(arm, seed) for seed in range(seeds) for arm in ARMS if seed < arm.seeds]
    for arm, seed in sorted(every, key=lambda one: one[0].seeds == 1):  # arms of one seed last
        settings = settings_of(arm, steps, taught)
        kept = [row for row in result["rows"] if (row["arm"], row["seed"]) != (arm.name, seed)]
        if any(row not in kept and row["settings"] == settings for row in result["rows"]):
            continue
        print(f"{arm.name}, seed {seed}", file=sys.stderr, flush=True)
        row = {"arm": arm.name, "seed": seed, "settings": settings, "provenance": provenance()}
        row |= one_run(arm, seed, steps, teacher, train_file, test_file, folder)
        result["rows"] = [*kept, row]
        write_result(NAME, result)


def settings_of(arm: Arm, steps: int, taught: Json) -> Json:
    """Return all that decides an arm's students, as JSON keeps it."""
    found: Json = json.loads(
        json.dumps({**COMMON, **arm.settings, "steps": round(steps * arm.share), "teacher": taught})
    )
    return found


def split(data: Path, folder: Path) -> tuple[Path, Path, Json]:
    """Write the table's meanings as two tables, no meaning in both; return them and their sizes."""
    with data.open(encoding="utf-8", newline="") as file:
        pairs = [(row["mr"], row["ref"]) for row in csv.DictReader(file)]
    meanings = sorted({mr for mr, _ in pairs})
    random.Random(SPLIT_SEED).shuffle(meanings)
    chosen = set(meanings[: round(TEST_SHARE * len(meanings))])
    files = []
    for name, is_test in (("train", False), ("test", True)):
        path = folder / f"{name}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["mr", "ref"])
            writer.writerows(pair for pair in pairs if (pair[0] in chosen) == is_test)
        files.append(path)
    counts = {
        "sha256": file_sha256(data),
        "pairs": len(pairs),
        "meanings": len(meanings),
        "test_meanings": len(chosen),
        "test_references": sum(mr in chosen for mr, _ in pairs),
    }
    return files[0], files[1], counts


def make_teacher(data: Path, folder: Path, steps: int) -> Path:
    """Trim and adapt the teacher, unless that was done with the same data; return its directory."""
    out, said = folder / f"teacher-{steps}", folder / f"teacher-{steps}.json"
    made_of = {"data": file_sha256(data), "learning_rate": ADAPT_RATE}
    if said.is_file() and made_of.items() <= read_json(said).items():
        return out
    work = folder / "teacher-work"
    work.mkdir(exist_ok=True)
    listener = Progress()
    listener.begin("teacher", 1, 1)
    begun = time.perf_counter()
    context = Context(target=load_target("cpu"), work_dir=work, progress=listener.progress)
    model = Trim(data=str(data))(open_model(TEACHER), context)
    tokens = teacher_tokens(model.info)
    special = Special(start=tokens["decoder_start_token_id"], eos=tokens["pad_token_id"], pad=tokens["pad_token_id"])
    files = with_end_token(model.info.tokenizer, special.eos)
    parts = hold_out(read_data(str(data)), 0.05, 0)
    limits = Limits(source=MAX_SOURCE, target=MAX_TARGET)
    train, held_out = (seq2seq(part, files, limits, special, lambda _note: None) for part in parts)
    loop = LoopOptions(steps=steps, batch=32, rows=16, learning_rate=ADAPT_RATE, warmup=20)
    place = Place(folder=work / "adapters", key=model.info.fingerprint, progress=listener.progress)
    adapted, _, record = adapt_teacher(model, LoopData(train=train, held_out=held_out), Adapters(), loop, place)
    save(_named(adapted, out.name, files), out)
    kept = {key: record[key] for key in ("steps", "tokens", "seconds", "best", "held_out")}
    write_json(said, {**made_of, **kept})
    listener.end("teacher", time.perf_counter() - begun, reused=False, notes=())
    return out


def _named(model: TorchModel, name: str, files: dict[str, bytes]) -> TorchModel:
    config = {**model.info.config, "tie_word_embeddings": "lm_head.weight" in model.weights.aliases}
    info = dataclasses.replace(model.info, name=name, tokenizer=files, chat_template=None, config=config)
    return dataclasses.replace(model, info=info)


def one_run(arm: Arm, seed: int, steps: int, teacher: Path, train: Path, test: Path, folder: Path) -> Json:
    """Train one student and score it."""
    settings: list[tuple[str, str, object]] = [
        ("distill", key, value)
        for key, value in {
            **COMMON,
            **arm.settings,
            "steps": round(steps * arm.share),
            "data": str(train),
            "scores": str(folder / f"scores-{teacher.name}{'-written' if 'targets' in arm.settings else ''}"),
        }.items()
    ]
    recipe = resolve(target="cpu", settings=settings, seed=seed, stages=["distill"])
    place = folder / f"{arm.name.replace(', ', '-').replace(' ', '-')}-{seed}"
    student = run_stages(open_model(str(teacher)), recipe, runs=place, fresh=False, listener=Progress())
    assert isinstance(student, TorchModel)
    save(student, place / "student")
    record = student.history[-1].figures["training"]["student"]
    return {
        "arm": arm.name,
        "seed": seed,
        "parameters": student.weights.parameters,
        "seconds": record["seconds"],
        "tokens": record["tokens"],
        "precision": record["precision"],
        "best": record["best"],
        "held_out": record["held_out"],
        **score(place / "student", test, place),
    }


def score(model: Path, test: Path, folder: Path) -> Json:
    """Build the float32 bundle of a model and score it on the test's meanings."""
    recipe_file = folder / "recipe.toml"
    recipe_file.write_text('stages = ["export", "compile"]\n', encoding="utf-8")
    settings: list[tuple[str, str, object]] = [
        ("export", "context", MAX_SOURCE + MAX_TARGET),
        ("compile", "cache_dtype", "float32"),
    ]
    recipe = resolve(target="cpu", file=recipe_file, settings=settings)
    bundle = folder / f"{model.name}-bundle"
    run(open_model(str(model)), recipe, out=bundle, runs=folder / "build", fresh=False, listener=Progress())
    found: Json = {}
    for metric in METRICS:
        one = evaluate(bundle, str(test), Evaluation(metric=metric, max_new_tokens=MAX_TARGET - 1), listener=Progress())
        found[metric] = {key: one[key] for key in ("value", "interval", "count")}
        if metric == "rouge":
            found["rougeL"] = one["details"]["rougeL"]
        else:
            found["signature"] = one["details"]["signature"]
            found["answers"] = one["details"]["answers"][:3]
    return found


def by_arm(result: Json) -> dict[str, dict[str, list[float]]]:
    """Return the scores of every arm over its seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    order = [arm.name for arm in ARMS]
    for row in sorted(result["rows"], key=lambda row: (order.index(row["arm"]), row["seed"])):
        scores = found.setdefault(row["arm"], {"bleu": [], "rougeL": [], "loss": []})
        scores["bleu"].append(row["bleu"]["value"])
        scores["rougeL"].append(row["rougeL"]["value"])
        scores["loss"].append(row["best"]["loss"])
    return found


def page_section(result: Json) -> str:
    """Return the table of the page."""
    teacher = result["teacher"]
    cells = [
        [
            "teacher, adapted",
            f"{teacher['parameters'] / 1e6:.1f}",
            "",
            f"{teacher['bleu']['value']:.1f}",
            f"{teacher['rougeL']['value']:.3f}",
            "",
        ]
    ]
    counts = {row["arm"]: row["parameters"] for row in result["rows"]}
    for arm, scores in by_arm(result).items():
        cells.append(
            [
                arm,
                f"{counts[arm] / 1e6:.1f}",
                str(len(scores["bleu"])),
                spread(scores["bleu"], 1),
                spread(scores["rougeL"], 3),
                spread(scores["loss"], 3),
            ]
        )
    header = ("student", "million parameters", "seeds", "BLEU", "ROUGE-L", "held-out loss")
    machine, settings = result["machine"], result["rows"][0]["settings"]
    data = settings["teacher"]["data"]
    made = sorted({(row["provenance"]["date"], row["provenance"]["commit"][:12]) for row in result["rows"]})
    load = [row["provenance"]["load_average_1min"] for row in result["rows"]]
    return (
        f"{markdown_table(header, cells)}\n\n"
        f"{data['test_meanings']} meanings with {data['test_references']} human texts kept for the test, of "
        f"{data['meanings']} with {data['pairs']}; each student's float32 bundle answers them. {settings['steps']} "
        f"steps of {settings['batch']} examples for every student, {settings['teacher']['adapt_steps']} for the "
        f"teacher's adapters; mean over seeds, least and most. {machine['cpu']}, {machine['cores']} cores seen, load "
        f"average {min(load):.1f} to {max(load):.1f}; "
        + ", ".join(f"{date} at `{commit}`" for date, commit in made)
        + "."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
