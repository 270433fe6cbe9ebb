"""From a causal decoder to an encoder of sentences, step by step: STS-B and SST-2 of SmolLM2's students.

    python benchmarks/embedding.py --data DIR [--seeds 3]   run what isn't stored yet, rewrite the tables of the page
    python benchmarks/embedding.py --page-only              rewrite the tables of docs/distill.md from what is stored

DIR (default: what EDGEPIPE_DATA names) holds stsb-train.tsv, stsb-dev.tsv, sst2-train.tsv, sst2-dev.tsv and
wikitext2-valid.txt. The teacher's vocabulary is trimmed to the texts to train with. An arm makes a student of the
teacher, or teaches the student of another arm further, by the stage distill alone; its float32 bundle is scored on the
dev set, which nothing is trained on. A row is kept in results/embedding.json as soon as it is scored, with all the
settings that led to it, and is run again only when these changed; training in runs/embedding goes on after a stop.
Source of the steps: LLM2Vec, arXiv:2404.05961.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
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
from edgepipe.rows import open_data, read_text
from edgepipe.sources import open_model
from edgepipe.stages.trim import Trim
from edgepipe.store import read_json, write_json
from edgepipe.students.result import save
from edgepipe.target import load_target

NAME = "embedding"
PAGE = ROOT / "docs" / "distill.md"
TEACHER = "smollm2-135m"
LAYERS = [0, 1, 2, 3, 4, 5]  # of the teacher: its first ones embed better than its last ones do, and cost a fifth
TOKENS = 48  # of a text to train with; longer ones are cut
CONTEXT = 512  # of the bundles: no text of a dev set is cut
THREADS = 1
HEADER = (
    *("student", "made of", "million parameters", "seeds", "steps", "minutes"),
    *("Spearman, STS-B dev", "beside the first"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """Name one student: what it is made of, and what it is taught with."""

    name: str
    label: str  # what the page calls it
    data: str = ""  # "texts", "sentences", "pairs" or "labels": a file; empty: none
    settings: dict[str, object] = field(default_factory=dict)  # of the stage distill
    after: str = ""  # the arm whose student is taught further; empty: a new one of the teacher
    metric: str = "spearman"
    seeds: int = 3  # at most

    @property
    def trained(self) -> bool:
        """Say whether the seed matters."""
        return bool(self.data)


_ALL: dict[str, object] = {"encoder_layers": 30}
_FIRST: dict[str, object] = {"encoder_from": LAYERS}
_LOOP: dict[str, object] = {"batch": 32, "max_source": TOKENS, "cut": True}
_CONTRAST: dict[str, object] = {"learning_rate": 3e-4, "held_out": 0.001, "contrast_dropout": 0.1}


def _course(prefix: str, layers: dict[str, object], mask_steps: int, contrast_steps: int) -> tuple[Arm, ...]:
    """Return the four steps from a decoder's layers to an encoder of sentences."""
    masked = {"mask_steps": mask_steps, "untaught": True, "learning_rate": 3e-4, "held_out": 0.005}
    return (
        Arm(
            name=f"{prefix}causal",
            label="causal mask, mean pooling",
            settings={**layers, "untaught": True, "causal_encoder": True},
        ),
        Arm(name=f"{prefix}unmasked", label="mask removed", settings={**layers, "untaught": True}),
        Arm(
            name=f"{prefix}masked",
            label="+ masked next-token prediction",
            data="texts",
            settings={**layers, **_LOOP, **masked},
        ),
        Arm(
            name=f"{prefix}contrast",
            label="+ contrast of each sentence with itself",
            data="sentences",
            settings={**_LOOP, **_CONTRAST, "steps": contrast_steps},
            after=f"{prefix}masked",
        ),
    )


ARMS = (
    *_course("whole-", _ALL, mask_steps=40, contrast_steps=100),
    *_course("", _FIRST, mask_steps=60, contrast_steps=150),
    Arm(
        name="pairs",
        label="+ ranking of scored pairs",
        data="pairs",
        settings={**_LOOP, "batch": 64, "steps": 200, "learning_rate": 2e-4, "held_out": 0.05, "dropout": 0.15},
        after="contrast",
    ),
    Arm(
        name="classifier",
        label="classifier, after the contrast",
        data="labels",
        settings={**_LOOP, "steps": 200, "learning_rate": 2e-4, "held_out": 0.005, "dropout": 0.1},
        after="contrast",
        metric="accuracy",
    ),
    Arm(
        name="contrast-causal",
        label="causal mask kept, and the same contrast alone",
        data="sentences",
        settings={**_FIRST, "causal_encoder": True, **_LOOP, **_CONTRAST, "steps": 150},
        seeds=1,
    ),
)
_COLUMNS = {"pairs": "first=5,second=6,score=4"}
_DEV = {"spearman": "stsb-dev.tsv", "accuracy": "sst2-dev.tsv"}


def main(arguments: list[str]) -> None:
    """Run, store and show, as the arguments say."""
    parser = argparse.ArgumentParser(description="Take SmolLM2 from a causal decoder to an encoder, step by step.")
    folder = Path(os.environ.get("EDGEPIPE_DATA", "."))
    parser.add_argument("--data", type=Path, default=folder, help="folder of the STS-B, SST-2 and WikiText files")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of what is trained (default: 3)")
    parser.add_argument("--page-only", action="store_true", help="rewrite the tables from what is stored")
    options = parser.parse_args(arguments)
    if not options.page_only:
        take(options.data, options.seeds)
    result = read_result(NAME)
    replace_section(PAGE, NAME, page_section(result))
    print(json.dumps({arm.name: [round(x, 4) for x in values(result, arm.name)] for arm in ARMS}))


def take(data: Path, seeds: int) -> None:
    """Run every arm and seed that isn't stored as it is now, and store each as soon as it is scored."""
    folder = ROOT / "runs" / NAME
    folder.mkdir(parents=True, exist_ok=True)
    result = read_result(NAME) if (RESULTS / f"{NAME}.json").is_file() else {"rows": []}
    files, counts = training_files(data, folder)
    teacher = trimmed(files["trim"], folder)
    result |= {"machine": describe_machine(THREADS), "data": counts, "teacher": teacher.name}
    for seed in range(seeds):
        for arm in ARMS:
            if seed >= (arm.seeds if arm.trained else 1):
                continue
            chain = settings_of(arm)
            kept = [row for row in result["rows"] if (row["arm"], row["seed"]) != (arm.name, seed)]
            if any(row not in kept and row["settings"] == chain for row in result["rows"]):
                continue
            print(f"{arm.name}, seed {seed}", file=sys.stderr, flush=True)
            came_from = provenance()
            row = {"arm": arm.name, "seed": seed, "settings": chain, "provenance": came_from}
            student, record = taught(arm, seed, teacher, files, folder)
            row |= {**record, arm.metric: score(student, arm, data)}
            result["rows"] = [*kept, row]
            write_result(NAME, result)


def settings_of(arm: Arm) -> list[Json]:
    """Return all that decides an arm's student, those it is taught after among it, as JSON keeps it."""
    own: Json = json.loads(json.dumps({"data": arm.data, **arm.settings}))
    return [*(settings_of(named(arm.after)) if arm.after else []), own]


def named(name: str) -> Arm:
    """Return the arm of this name."""
    return next(arm for arm in ARMS if arm.name == name)


def training_files(data: Path, folder: Path) -> tuple[dict[str, Path], Json]:
    """Write what is trained with, none of it from a dev set; return the files and how many texts they hold."""
    pairs = [line.split("\t") for line in read_text(open_data(str(data / "stsb-train.tsv"))).splitlines()]
    sentences = sorted({text.strip() for row in pairs for text in row[5:7]})
    lines = read_text(open_data(str(data / "wikitext2-valid.txt"))).splitlines()
    wiki = [line.strip() for line in lines if len(line) > TOKENS and not line.strip().startswith("=")]
    phrases = [line.split("\t")[0] for line in read_text(open_data(str(data / "sst2-train.tsv"))).splitlines()[1:]]
    made = {"texts": [*sentences, *wiki], "sentences": sentences, "trim": [*sentences, *wiki, *phrases]}
    files = {"pairs": data / "stsb-train.tsv", "labels": data / "sst2-train.tsv"}
    for name, texts in made.items():
        files[name] = folder / f"{name}.jsonl"
        lines_of = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
        files[name].write_text("".join(lines_of), encoding="utf-8")
    counts = {"sentences": len(sentences), "passages": len(wiki), "pairs": len(pairs), "phrases": len(phrases)}
    return files, counts


def trimmed(texts: Path, folder: Path) -> Path:
    """Return the directory of the teacher whose vocabulary is trimmed to the texts to train with."""
    out = folder / f"{TEACHER}-trimmed"
    if (out / "config.json").is_file():
        return out
    context = Context(target=load_target("cpu"), work_dir=folder, progress=lambda *_: None)
    model = Trim(data=str(texts))(open_model(TEACHER), context)
    config = {**model.info.config, "tie_word_embeddings": "lm_head.weight" in model.weights.aliases}
    info = dataclasses.replace(model.info, name=out.name, chat_template=None, config=config)
    save(dataclasses.replace(model, info=info), out)
    return out


def taught(arm: Arm, seed: int, teacher: Path, files: dict[str, Path], folder: Path) -> tuple[Path, Json]:
    """Return an arm's student and how it was made; what was finished with the same settings is taken as it is."""
    place = folder / (f"{arm.name}-{seed}" if arm.trained else arm.name)
    student, said = place / "student", place / "made.json"
    chain = settings_of(arm)
    if said.is_file() and (found := read_json(said))["settings"] == chain:
        return student, found["record"]
    before = taught(named(arm.after), seed, teacher, files, folder)[0] if arm.after else teacher
    settings: list[tuple[str, str, object]] = [("distill", "student", "encoder")]
    settings += [("distill", name, value) for name, value in arm.settings.items()]
    if arm.data:
        settings += [("distill", "data", str(files[arm.data])), ("distill", "columns", _COLUMNS.get(arm.data, ""))]
    recipe = resolve(target="cpu", settings=settings, seed=seed, stages=["distill"])
    begun = time.perf_counter()
    made = run_stages(open_model(str(before)), recipe, runs=place, fresh=False, listener=Progress())
    assert isinstance(made, TorchModel)
    save(made, student)
    record: Json = {
        "parameters": made.weights.parameters,
        "seconds": round(time.perf_counter() - begun, 1),
        "training": made.history[-1].figures.get("training", {}),
    }
    write_json(said, {"settings": chain, "record": record})
    return student, record


def score(student: Path, arm: Arm, data: Path) -> Json:
    """Build the float32 bundle of a student and score it on the dev set."""
    settings: list[tuple[str, str, object]] = [("export", "context", CONTEXT)]
    recipe_file = student.parent / "recipe.toml"
    recipe_file.write_text('stages = ["export", "compile"]\n', encoding="utf-8")
    recipe = resolve(target="cpu", file=recipe_file, settings=settings)
    bundle = student.parent / "bundle"
    run(open_model(str(student)), recipe, out=bundle, runs=student.parent / "build", fresh=False, listener=Progress())
    how = Evaluation(metric=arm.metric, threads=THREADS, batch=32)
    found = evaluate(bundle, str(data / _DEV[arm.metric]), how, listener=Progress())
    shown = {key: found[key] for key in ("value", "interval", "count", "data")}
    if arm.metric == "accuracy":
        shown["majority"] = found["details"]["majority"]
    return {**shown, "data": {**found["data"], "name": Path(found["data"]["name"]).name}}


def rows_of(result: Json, arm: str) -> list[Json]:
    """Return the stored rows of an arm, by seed."""
    return sorted((row for row in result["rows"] if row["arm"] == arm), key=lambda row: int(row["seed"]))


def values(result: Json, arm: str) -> list[float]:
    """Return an arm's scores over its seeds."""
    return [row[named(arm).metric]["value"] for row in rows_of(result, arm)]


def page_section(result: Json) -> str:
    """Return the tables of the page and the sentences below them, from what is stored alone."""
    cells, classifiers = [], []
    for arm in ARMS:
        rows, found = rows_of(result, arm.name), values(result, arm.name)
        if not rows:
            continue
        phases = [phase for row in rows for phase in row["training"].values()]
        whole = "encoder_layers" in settings_of(arm)[0]
        layers = "all 30 layers" if whole else f"the first {len(LAYERS)}"
        cell = [
            arm.label,
            layers,
            f"{rows[0]['parameters'] / 1e6:.1f}",
            str(len(rows)) if arm.trained else "",
            str(sum(phase["steps"] for phase in rows[0]["training"].values())) if arm.trained else "",
            f"{sum(phase['seconds'] for phase in phases) / len(rows) / 60:.1f}" if arm.trained else "",
            spread(found, 3),
        ]
        if arm.metric == "accuracy":
            classifiers.append((rows, found, cell))
        else:
            first = values(result, "whole-causal" if whole else "causal")
            beside = f"{100 * (statistics.mean(found) - first[0]):+.1f}" if first and found != first else ""
            cells.append([*cell, beside])
    return "\n\n".join([markdown_table(HEADER, cells), *_classified(classifiers), _said(result)])


def _classified(found: Sequence[tuple[list[Json], list[float], list[str]]]) -> list[str]:
    """Say what classifiers reach."""
    lines = []
    for rows, scores, cell in found:
        one = rows[0]["accuracy"]
        lines.append(
            f"SST-2, {one['count']:,} phrases that are kept from the training set (parts of the same sentences may be "
            f"in both; not the official dev set): accuracy {spread(scores, 3)} of a classifier of the same layers, "
            "made "
            f"of the student after the contrast and taught {cell[4]} steps of 32 phrases ({cell[5]} minutes, "
            f"{cell[3]} seed{'s' if len(rows) > 1 else ''}); the commonest label alone gives {one['majority']:.3f}."
        )
    return lines


def _said(result: Json) -> str:
    """Say where the figures come from."""
    data, machine = result["data"], result["machine"]
    count = next(row["spearman"]["count"] for row in result["rows"] if "spearman" in row)
    made = sorted({(row["provenance"]["date"], row["provenance"]["commit"][:12]) for row in result["rows"]})
    load = [row["provenance"]["load_average_1min"] for row in result["rows"]]
    return (
        f"{TEACHER}, its vocabulary trimmed to the texts to train with; {count:,} pairs of STS-B dev, each student's "
        f"float32 bundle, points are hundredths of Spearman. Trained with {data['sentences']:,} sentences of STS-B "
        f"train, {data['passages']:,} passages of WikiText-2 (masked prediction), {data['pairs']:,} scored pairs, "
        f"{data['phrases']:,} phrases of SST-2; batches of 32 (scored pairs: 64), at most {TOKENS} "
        "tokens a text; mean over seeds, least "
        f"and most. {machine['cpu']}, {machine['cores']} cores seen, {THREADS} thread, load average {min(load):.1f} to "
        f"{max(load):.1f}; " + ", ".join(f"{date} at `{commit}`" for date, commit in made) + "."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
