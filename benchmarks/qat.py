"""Train layers on their grid: 4-bit activations on MiniLM and students, ternary encoders beside their float twins.

    python benchmarks/qat.py --data DIR [--seeds 3] [--row NAME]   run what isn't stored yet, rewrite the tables
    python benchmarks/qat.py --page-only                           rewrite docs/quantize.md's tables from what is stored

DIR (default: what EDGEPIPE_DATA names) holds stsb-train.tsv, stsb-dev.tsv, sst2-train.tsv, sst2-dev.tsv,
wikitext2-valid.txt and e2e-dev.csv. Models are MiniLM and students of SmolLM2 with a trimmed vocabulary, made by the
stage distill; every row is a bundle's quality on a dev set that nothing was trained on. Losses are cross-entropies
through the bundle: of SST-2's labels (encoder), of WikiText-2's tokens (decoder; the last fifth of the file). A row is
kept in results/qat.json as soon as it is scored, those that a claim rests on first, and is run again only when its
settings changed; training in runs/qat goes on after a stop, unless edgepipe's code has changed since. Sources of the
claims: arXiv:2301.12017 (4 bits), 2411.05882 (ternary).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.e2e import split
from benchmarks.embedding import training_files, trimmed
from benchmarks.stored import (
    RESULTS,
    ROOT,
    markdown_table,
    provenance,
    read_result,
    replace_section,
    spread,
    without_folders,
    write_result,
)
from edgepipe.artifacts import CompiledModel, Json, TorchModel
from edgepipe.evaluate import evaluate
from edgepipe.measuring.metrics import Evaluation
from edgepipe.measuring.run import describe_machine
from edgepipe.pipeline import run, run_stages
from edgepipe.recipe import resolve
from edgepipe.report.progress import Progress
from edgepipe.runtime import load
from edgepipe.runtime.encoder import Encoder
from edgepipe.sources import open_model
from edgepipe.store import read_json, write_json
from edgepipe.students.result import save

NAME = "qat"
PAGE = ROOT / "docs" / "quantize.md"
MINILM = "minilm-l6-v2"
THREADS = 1
CONTEXT = 512
TOKENS = 48  # of a text to train with
STEPS = 400  # of all that is trained on its grid
TAUGHT = 400  # of students in floats
NARROW, WIDE = {"hidden": 192, "ffn": 512, "kv_heads": 1}, {"hidden": 384, "ffn": 1024, "kv_heads": 2}
Options = dict[str, object]

_LAYERS: Options = {"encoder_from": [0, 1, 2, 3, 4, 5]}
_LABELS: Options = {"student": "encoder", "data": "labels", "batch": 32, "max_source": TOKENS, "cut": True}
_SCRATCH: Options = {**_LABELS, **_LAYERS, "scratch": True, "learning_rate": 5e-4, "steps": TAUGHT, "held_out": 0.005}
MODELS: dict[str, Options] = {  # options of the stage distill
    "encoder": {**_LABELS, **_LAYERS, "learning_rate": 2e-4, "steps": TAUGHT, "held_out": 0.005},
    "decoder": {
        **{"student": "decoder", "decoder_from": [0, 1, 2, 3, 4, 5], "data": "passages", "max_source": TOKENS},
        **{
            "cut": True,
            "learning_rate": 3e-4,
            "steps": TAUGHT,
            "held_out": 0.02,
            "alpha": 0.5,
            "max_target": TOKENS,
        },
    },
    "narrow": {**_SCRATCH, **NARROW},
    "wide": {**_SCRATCH, **WIDE},
    "blank narrow": {**_LABELS, **_LAYERS, **NARROW, "scratch": True, "untaught": True},
    "blank wide": {**_LABELS, **_LAYERS, **WIDE, "scratch": True, "untaught": True},
    "pair": {
        **{"student": "encoder-decoder", "encoder_layers": 4, "decoder_layers": 2, "data": "e2e", "steps": TAUGHT},
        **{"alpha": 0.5, "learning_rate": 5e-4, "max_source": 96, "max_target": 96, "cut": True, "held_out": 0.03},
    },
}
W4A4: Options = {"bits": 4, "activations": "dynamic", "activation_bits": 4}
W4A8: Options = {"bits": 4, "activations": "dynamic"}
_TRAINS: Options = {"steps": STEPS, "held_out": 0.005, "tokens": TOKENS, "learning_rate": 2e-4}
# From random weights the float model has nothing to say: only labels count, as for the float twin.
_BLANK: Options = {**_TRAINS, "targets": 1.0, "logits": 0.0, "hidden": 0.0, "attention": 0.0, "learning_rate": 1e-3}
_BLANK |= {"strength_steps": STEPS // 4}
_WARM: Options = {**_TRAINS, "targets": 1.0, "strength_steps": STEPS // 4}
TERNARY: Options = {"bits": 1.58}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Name one bundle: of which model, made with which options of quantize, and how it is scored."""

    name: str
    model: str
    metric: str  # spearman, accuracy, loss, bleu
    options: Options | None = None  # None: float32
    data: str = ""  # what it is trained with
    seeds: int = 1
    claimed: bool = False  # a claim rests on it: it is run before the others


def _four_bits(model: str, metric: str, data: str) -> tuple[Row, ...]:
    """Return a model in floats, rounded to W4A4, and trained on it."""
    trains = {**W4A4, **_TRAINS}
    return (
        Row(name=f"{model}, float32", model=model, metric=metric, claimed=True),
        Row(name=f"{model}, W4A4 rounded", model=model, metric=metric, options=W4A4, claimed=True),
        Row(name=f"{model}, W4A4 trained", model=model, metric=metric, options=trains, data=data, claimed=True),
    )


_SYMMETRIC: Options = {"activation_symmetric": True}
ROWS = (
    *_four_bits(MINILM, "spearman", "sentences"),
    Row(name="W4A4 trained, symmetric", model=MINILM, metric="spearman", data="sentences",
        options={**W4A4, **_TRAINS, **_SYMMETRIC}),
    Row(name="W4A8 rounded", model=MINILM, metric="spearman", options=W4A8),
    Row(name="W4A8 trained", model=MINILM, metric="spearman", options={**W4A8, **_TRAINS}, data="sentences"),
    *_four_bits("encoder", "loss", "labels"),
    *_four_bits("decoder", "loss", "passages"),
    Row(name="float twin", model="narrow", metric="accuracy", seeds=3, claimed=True),
    Row(name="float, twice as wide", model="wide", metric="accuracy", seeds=3),
    Row(name="ternary, as wide", model="blank narrow", metric="accuracy", data="labels", seeds=3,
        options={**TERNARY, **_BLANK, "scratch": True}),
    Row(name="ternary, twice as wide", model="blank wide", metric="accuracy", data="labels", seeds=3, claimed=True,
        options={**TERNARY, **_BLANK, "scratch": True}),
    Row(name="ternary, twice as wide, mean", model="blank wide", metric="accuracy", data="labels", seeds=3,
        options={**TERNARY, **_BLANK, "scratch": True, "ternary": "mean"}),
    Row(name="ternary, twice as wide, warm", model="wide", metric="accuracy", data="labels", seeds=3,
        options={**TERNARY, **_WARM}),
    Row(name="ternary, twice as wide, warm, no norms", model="wide", metric="accuracy", data="labels", seeds=3,
        options={**TERNARY, **_WARM, "normalize": False}),
    Row(name="pair, float32", model="pair", metric="bleu", claimed=True),
    Row(name="pair, W4A4 trained", model="pair", metric="bleu", options={**W4A4, **_TRAINS, "tokens": 96}, data="e2e"),
    Row(name="pair, ternary", model="pair", metric="bleu", options={**TERNARY, **_WARM, "tokens": 96}, data="e2e",
        claimed=True),
)  # fmt: skip
_DEV = {"spearman": "stsb-dev.tsv", "accuracy": "sst2-dev.tsv"}
HEADER = ("model", "metric", "value", "beside float", "bits/weight of trained layers", "bundle, MB", "seeds")


def main(arguments: list[str]) -> None:
    """Run, store and show, as the arguments say."""
    parser = argparse.ArgumentParser(description="Train layers on their grid, and score their bundles.")
    folder = Path(os.environ.get("EDGEPIPE_DATA", "."))
    parser.add_argument("--data", type=Path, default=folder, help="folder of the data")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of a row, at most (default: 3)")
    parser.add_argument("--row", action="append", help="a row to run (default: all)")
    parser.add_argument("--page-only", action="store_true", help="rewrite the tables from what is stored")
    options = parser.parse_args(arguments)
    names = [row.name for row in ROWS]
    if unknown := [name for name in options.row or () if name not in names]:
        parser.error(f"--row {unknown[0]}: expected one of {'; '.join(names)}")
    if not options.page_only:
        take(options.data, options.seeds, options.row or names)
    result = read_result(NAME)
    replace_section(PAGE, NAME, page_section(result))
    print(json.dumps({name: [round(x, 4) for x in values(result, name)] for name in names}))


def take(data: Path, seeds: int, names: Sequence[str]) -> None:
    """Run every named row and seed that isn't stored as it is now, and store each as soon as it is scored."""
    folder = ROOT / "runs" / NAME
    folder.mkdir(parents=True, exist_ok=True)
    files = data_files(data, folder)
    result: Json = read_result(NAME) if (RESULTS / f"{NAME}.json").is_file() else {"rows": []}
    result["machine"] = describe_machine(THREADS)
    for row, seed in in_turn([one for one in ROWS if one.name in names], seeds):
        settings = settings_of(row)
        kept = [one for one in result["rows"] if (one["row"], one["seed"]) != (row.name, seed)]
        if any(one not in kept and one["settings"] == settings for one in result["rows"]):
            continue
        print(f"{row.name}, seed {seed}", file=sys.stderr, flush=True)
        came_from = provenance()
        bundle = build(row, seed, files, folder)
        found: Json = {"row": row.name, "seed": seed, "settings": settings, "provenance": came_from}
        result["rows"] = [*kept, {**found, **facts(bundle), "score": score(bundle.path, row, files)}]
        write_result(NAME, result)


def in_turn(rows: Sequence[Row], seeds: int) -> list[tuple[Row, int]]:
    """Return rows and seeds in the order they are run: what is claimed first, one seed of everything, then the next."""
    return [
        (row, seed)
        for claimed in (True, False)
        for seed in range(seeds)
        for row in rows
        if row.claimed == claimed and seed < row.seeds
    ]


def settings_of(row: Row) -> Json:
    """Return all that decides a row, as JSON keeps it."""
    found: Json = json.loads(
        json.dumps({"distill": MODELS.get(row.model, {}), "quantize": row.options, "data": row.data})
    )
    return found


def data_files(data: Path, folder: Path) -> dict[str, Path]:
    """Return the files to train with and to score on; what must be made lies in `folder`."""
    files, _ = training_files(data, folder)
    lines = (data / "wikitext2-valid.txt").read_text(encoding="utf-8").splitlines()
    passages = [line.strip() for line in lines if len(line) > TOKENS and not line.strip().startswith("=")]
    cut = 4 * len(passages) // 5
    files["passages"], files["unseen"] = folder / "passages.jsonl", folder / "unseen.txt"
    made = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in passages[:cut]]
    files["passages"].write_text("".join(made), encoding="utf-8")
    files["unseen"].write_text("\n\n".join(passages[cut:]), encoding="utf-8")
    files["e2e"], files["e2e test"], _ = split(data / "e2e-dev.csv", folder)
    files["teacher"] = trimmed(files["trim"], folder)
    return files | {metric: data / name for metric, name in _DEV.items()}


def source_of(row: Row, seed: int, files: dict[str, Path], folder: Path) -> TorchModel:
    """Return the float model of a row; a student that was finished with the same settings is taken as it is."""
    if row.model not in MODELS:
        return open_model(row.model)
    options = MODELS[row.model]
    place = folder / f"{row.model.replace(' ', '-')}-{seed}"
    student, said = place / "student", place / "made.json"
    if not (said.is_file() and read_json(said) == json.loads(json.dumps(options))):
        chosen = {**options, "data": str(files[str(options["data"])])}
        settings: list[tuple[str, str, object]] = [("distill", key, value) for key, value in chosen.items()]
        recipe = resolve(target="cpu", settings=settings, seed=seed, stages=["distill"])
        made = run_stages(open_model(str(files["teacher"])), recipe, runs=place, fresh=False, listener=Progress())
        assert isinstance(made, TorchModel)
        save(made, student)
        write_json(said, options)
    return open_model(str(student))


def build(row: Row, seed: int, files: dict[str, Path], folder: Path) -> CompiledModel:
    """Send a row's model down the river; finished stages stay in runs/qat."""
    model = source_of(row, seed, files, folder)
    place = folder / "rows" / f"{row.name.replace(', ', '-').replace(' ', '-')}-{seed}"
    place.mkdir(parents=True, exist_ok=True)
    stages = ["export", "compile"] if row.options is None else ["quantize", "export", "compile"]
    recipe_file = place / "recipe.toml"
    recipe_file.write_text(f"stages = {json.dumps(stages)}\n", encoding="utf-8")
    options = dict(row.options or {})
    if row.data:
        options["data"] = str(files[row.data])
    settings: list[tuple[str, str, object]] = [("quantize", key, value) for key, value in options.items()]
    settings.append(("export", "context", CONTEXT))
    if row.options is None:
        model = dataclasses.replace(model, weights=model.weights.as_float32())
    recipe = resolve(target="cpu", file=recipe_file, settings=settings, seed=seed)
    made = run(model, recipe, out=None, runs=place, fresh=False, listener=Progress())
    assert isinstance(made, CompiledModel)
    return made


def facts(bundle: CompiledModel) -> Json:
    """Return what is counted from a bundle's files, and what its stages said."""
    records = [record for record in bundle.history if record.stage == "quantize"]
    parts = bundle.manifest["weights"]["parts"]
    low = [part for part in parts if part["storage"].startswith(("q2 ", "q4 "))] if records else parts
    return {
        "bundle_bytes": sum(file.stat().st_size for file in bundle.path.iterdir()),
        "layers": {"parameters": sum(p["parameters"] for p in low), "bytes": sum(p["bytes"] for p in low)},
        "notes": [without_folders(note) for record in records for note in record.notes],
        "figures": [record.figures for record in records],
    }


def score(bundle: Path, row: Row, files: dict[str, Path]) -> Json:
    """Score a bundle by its row's metric."""
    if row.metric == "loss" and row.model == "encoder":
        return labels_loss(bundle, files["accuracy"])
    if row.metric == "loss":
        how = Evaluation(metric="perplexity", threads=THREADS)
        found = evaluate(bundle, str(files["unseen"]), how, listener=Progress())
        return {"value": math.log(found["value"]), "count": found["count"]}
    data = files["e2e test"] if row.metric == "bleu" else files[row.metric]
    found = evaluate(bundle, str(data), Evaluation(metric=row.metric, threads=THREADS), listener=Progress())
    return {key: found[key] for key in ("value", "interval", "count")}


def labels_loss(bundle: Path, data: Path) -> Json:
    """Return the mean cross-entropy of a table's labels, and the share that is right."""
    rows = [line.split("\t") for line in data.read_text(encoding="utf-8").splitlines()[1:]]
    model = load(bundle, threads=THREADS)
    assert isinstance(model, Encoder)
    logits = model.classify([row[0] for row in rows]).astype(np.float64)
    wanted = np.array([model.labels.index(row[1]) for row in rows])
    top = logits.max(1, keepdims=True)
    losses = (np.log(np.exp(logits - top).sum(1)) + top[:, 0]) - logits[np.arange(len(rows)), wanted]
    return {
        "value": float(losses.mean()),
        "count": len(rows),
        "accuracy": float((logits.argmax(1) == wanted).mean()),
    }


def rows_of(result: Json, name: str) -> list[Json]:
    """Return the stored rows of a name, by seed."""
    return sorted((row for row in result["rows"] if row["row"] == name), key=lambda row: int(row["seed"]))


def values(result: Json, name: str) -> list[float]:
    """Return a row's scores over its seeds."""
    return [row["score"]["value"] for row in rows_of(result, name)]


_FLOATS = {"narrow": "float twin", "wide": "float twin", "blank narrow": "float twin", "blank wide": "float twin"}


def page_section(result: Json) -> str:
    """Return the table and the sentences below it, from what is stored alone."""
    cells = []
    for row in ROWS:
        found, scores = rows_of(result, row.name), values(result, row.name)
        if not found:
            continue
        reference = values(result, _FLOATS.get(row.model, f"{row.model}, float32"))
        mean, layers = statistics.mean(scores), found[0]["layers"]
        beside = ""
        if reference and scores != reference:
            float_mean = statistics.mean(reference)
            points = f"{mean - float_mean:+.2f}" if row.metric == "bleu" else f"{100 * (mean - float_mean):+.2f} points"
            beside = f"{100 * (mean / float_mean - 1):+.1f} %" if row.metric == "loss" else points
        cells.append(
            [
                row.name,
                row.metric,
                spread(scores, 4),
                beside,
                f"{8 * layers['bytes'] / max(1, layers['parameters']):.2f}",
                f"{found[0]['bundle_bytes'] / 1e6:.1f}",
                str(len(found)),
            ]
        )
    made = sorted({(row["provenance"]["date"], row["provenance"]["commit"][:12]) for row in result["rows"]})
    where = ", ".join(f"{date} at `{commit}`" for date, commit in made)
    said = (
        f"Through the bundles; {STEPS} steps on the grid, {TAUGHT} before in floats, batches of 32. MiniLM learns from "
        "sentences of STS-B train and is scored on STS-B dev; the encoder and what is ternary on SST-2; the decoder "
        f"on WikiText-2; the pair on E2E. Least and most over seeds. {result['machine']['cpu']}; {where}."
    )
    return f"{markdown_table(HEADER, cells)}\n\n{said}"


if __name__ == "__main__":
    main(sys.argv[1:])
