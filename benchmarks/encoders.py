"""Compare grids of a sentence encoder by STS-B, bytes and speed, through real bundles: the table of docs/tasks.md.

    python benchmarks/encoders.py --data FILE [--repeats 5]   run, store results/encoders.json, rewrite the page's table
    python benchmarks/encoders.py --page-only                 rewrite the table from the stored run

FILE holds pairs of sentences with a score that people gave, such as the dev set of STS-B. Speed is that of embedding
all its sentences in batches of 32; the bundles take turns, so that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.stored import ROOT, markdown_table, provenance, read_result, replace_section, write_result
from edgepipe.artifacts import CompiledModel
from edgepipe.evaluate import evaluate
from edgepipe.measuring.examples import read_pairs
from edgepipe.measuring.metrics import Evaluation
from edgepipe.pipeline import run
from edgepipe.recipe import resolve
from edgepipe.report.progress import Progress
from edgepipe.rows import open_data
from edgepipe.runtime import Encoder, load
from edgepipe.sources import open_model

NAME = "encoders"
PAGE = ROOT / "docs" / "tasks.md"
MODEL = "minilm-l6-v2"
HEADER = ("layers", "embedding", "bits/weight", "bundle, MB", "of float32", "Spearman", "sentences/s", "range")
BATCH = 32
THREADS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Name one way to store the model, and the bits of layers and embedding; None: not compressed."""

    layers: str
    embedding: str
    bits: tuple[int, int] | None


VARIANTS = (
    Variant(layers="float32", embedding="float32", bits=None),
    Variant(layers="16-bit", embedding="16-bit", bits=(16, 16)),
    Variant(layers="8-bit", embedding="8-bit", bits=(8, 8)),
    Variant(layers="4-bit", embedding="8-bit", bits=(4, 8)),
    Variant(layers="4-bit", embedding="4-bit", bits=(4, 4)),
)


def main(arguments: list[str]) -> None:
    """Run, store and show, as the arguments say."""
    parser = argparse.ArgumentParser(description="Compare grids of a sentence encoder.")
    parser.add_argument("--data", type=Path, help="pairs of sentences with a score, .tsv")
    parser.add_argument("--repeats", type=int, default=5, help="times that all sentences are embedded (default: 5)")
    parser.add_argument("--page-only", action="store_true", help="rewrite the table from the stored run")
    options = parser.parse_args(arguments)
    if not options.page_only:
        if options.data is None or options.repeats < 2:
            parser.error("--data FILE is needed, and --repeats must be at least 2")
        write_result(NAME, measure(options.data, options.repeats))
    result = read_result(NAME)
    replace_section(PAGE, NAME, page_section(result))
    print(json.dumps({f"{row['layers']}, {row['embedding']}": row["spearman"]["value"] for row in result["rows"]}))


def measure(data: Path, repeats: int) -> dict[str, Any]:
    """Build every variant, score it, then time all of them in turn."""
    came_from = provenance()
    made = [build(variant) for variant in VARIANTS]
    rows = []
    for variant, bundle in zip(VARIANTS, made, strict=True):
        found = evaluate(bundle.path, str(data), Evaluation(metric="spearman", threads=THREADS), listener=Progress())
        weights = bundle.manifest["weights"]
        rows.append(
            {
                "layers": variant.layers,
                "embedding": variant.embedding,
                "bits": variant.bits,
                "spearman": {key: found[key] for key in ("value", "interval", "count")},
                "bundle_bytes": sum(file.stat().st_size for file in bundle.path.iterdir()),
                "weight_bytes": weights["bytes"],
                "bits_per_weight": weights["bits_per_weight"],
            }
        )
    sentences = read_sentences(data)
    for row, seconds in zip(rows, embed_in_turn([bundle.path for bundle in made], sentences, repeats), strict=True):
        row["seconds"] = seconds
    return {
        **came_from,
        "model": MODEL,
        "data": {**found["data"], "name": data.name},
        "machine": found["machine"],
        "sentences": len(sentences),
        "batch": BATCH,
        "threads": THREADS,
        "rows": rows,
    }


def build(variant: Variant) -> CompiledModel:
    """Send the model down the river of one variant; finished bundles stay in runs/encoders."""
    folder = ROOT / "runs" / NAME / f"{variant.layers}-{variant.embedding}"
    folder.mkdir(parents=True, exist_ok=True)
    stages = ["export", "compile"] if variant.bits is None else ["quantize", "export", "compile"]
    recipe_file = folder / "recipe.toml"
    recipe_file.write_text(f"stages = {json.dumps(stages)}\n", encoding="utf-8")
    bits = variant.bits or ()
    settings: list[tuple[str, str, object]] = [
        ("quantize", option, value) for option, value in zip(("bits", "embedding_bits"), bits, strict=False)
    ]
    model = open_model(MODEL)
    if variant.bits is None:
        model = dataclasses.replace(model, weights=model.weights.as_float32())
    recipe = resolve(target="cpu", file=recipe_file, settings=settings)
    made = run(model, recipe, out=None, runs=folder, fresh=False, listener=Progress())
    assert isinstance(made, CompiledModel)
    return made


def read_sentences(data: Path) -> list[str]:
    """Return both sentences of every pair."""
    opened = open_data(str(data))
    pairs = read_pairs(opened, Evaluation(metric="spearman").places(opened.suffix))
    return [text for pair in pairs for text in (pair.first, pair.second)]


def embed_in_turn(bundles: list[Path], sentences: list[str], repeats: int) -> list[list[float]]:
    """Return the seconds that each bundle took to embed all sentences, once per turn after a turn that warms up."""
    seconds: list[list[float]] = [[] for _ in bundles]
    models = [load(bundle, threads=THREADS) for bundle in bundles]
    for turn in range(repeats + 1):
        for number, model in enumerate(models):
            assert isinstance(model, Encoder)
            started = time.perf_counter()
            model.embed(sentences if turn else sentences[:BATCH], batch_size=BATCH)
            if turn:
                seconds[number].append(time.perf_counter() - started)
                print(f"turn {turn}, {bundles[number].parent.name}: {seconds[number][-1]:.1f} s", file=sys.stderr)
    return seconds


def page_section(result: dict[str, Any]) -> str:
    """Return the page's table and the sentence below it, from a stored run alone."""
    rows, machine = result["rows"], result["machine"]
    largest = rows[0]["bundle_bytes"]
    cells = []
    for row in rows:
        rates = [result["sentences"] / seconds for seconds in row["seconds"]]
        low, high = row["spearman"]["interval"]
        cells.append(
            [
                row["layers"],
                row["embedding"],
                f"{row['bits_per_weight']:.2f}",
                f"{row['bundle_bytes'] / 1e6:.1f}",
                f"{row['bundle_bytes'] / largest:.2f}",
                f"{row['spearman']['value']:.4f} ({low:.4f} to {high:.4f})",
                f"{statistics.median(rates):.0f}",
                f"{min(rates):.0f} to {max(rates):.0f}",
            ]
        )
    said = (
        f"{result['model']} on {rows[0]['spearman']['count']} pairs of `{result['data']['name']}`, 95 % intervals by "
        f"bootstrap; sentences in batches of {result['batch']}, {result['threads']} thread, median of "
        f"{len(rows[0]['seconds'])} turns in which all bundles took part. {machine['cpu']}, onnxruntime "
        f"{result['versions']['onnxruntime']}, commit `{result['commit'][:12]}`, {result['date']}."
    )
    return f"{markdown_table(HEADER, cells)}\n\n{said}"


if __name__ == "__main__":
    main(sys.argv[1:])
