"""Compare pruned models with what they were cut from: parameters, bytes, speed and quality, before and after recovery.

    python benchmarks/prune.py --data DIR [--steps N]   run what isn't stored yet, rewrite docs/prune.md's table
    python benchmarks/prune.py --page-only              rewrite the table from what is stored

DIR (default: what EDGEPIPE_DATA names) holds stsb-train.tsv, stsb-dev.tsv and wikitext2-valid.txt. MiniLM learns from
STS-B train's sentences and is scored on STS-B dev; SmolLM2 learns from the first four fifths of WikiText-2's passages
and is scored on the last fifth. Every bundle is float32, so that the multiply-adds of both sides are the same kind of
work. Speed is `edgepipe measure` beside the dense bundle, in turn. A row is stored as soon as it is there, a speed as
soon as it is taken, and training goes on from its checkpoint, so a run that was stopped loses minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.stored import RESULTS, ROOT, markdown_table, provenance, read_result, replace_section, write_result
from edgepipe.artifacts import CompiledModel, Json, TorchModel
from edgepipe.calibration import passages
from edgepipe.evaluate import evaluate
from edgepipe.measure import measure
from edgepipe.measuring.metrics import Evaluation
from edgepipe.pipeline import run, run_stages
from edgepipe.pruning.families import anatomy_of
from edgepipe.recipe import resolve
from edgepipe.report.progress import Progress
from edgepipe.rows import open_data, read_text
from edgepipe.sources import open_model
from edgepipe.stages.measure import Measure

NAME = "prune"
PAGE = ROOT / "docs" / "prune.md"
THREADS, TOKENS = 1, 128
STEPS = 400
HEADER = (
    *("model", "removed", "recovery", "million parameters", "bundle, MB", "quality", "against dense"),
    *("speed-up", "by multiply-adds", "measured ÷ predicted"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Name a model, how it is scored, what it learns with, and where its speed stands in a measurement."""

    model: str
    metric: str
    scored: str  # file
    speed: str  # key of the measurement's ratios
    teaching: dict[str, object]
    context: int = 0  # tokens; 0: what the model's source says


CASES = (
    Case(
        model="minilm-l6-v2",
        metric="spearman",
        scored="stsb-dev.tsv",
        speed="8x128",
        teaching={"batch": 32, "learning_rate": 1e-4, "max_source": TOKENS, "cut": True},
    ),
    Case(
        model="smollm2-135m",
        metric="perplexity",
        scored="wikitext-last.txt",
        speed="ttft_ms",
        teaching={"batch": 8, "learning_rate": 1e-4, "max_source": TOKENS, "max_target": TOKENS, "cut": True},
        context=512,
    ),
)
RATIOS = (0.0, 0.25, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Name one row: a case, the share that is removed, and steps of recovery."""

    case: Case
    ratio: float
    steps: int

    @property
    def name(self) -> str:
        """Return what its folder and its stored row are called."""
        return f"{self.case.model} {self.ratio:g} {self.steps}"


def rows_of(steps: int) -> list[Row]:
    """Return all rows, of each model the dense one first."""
    return [
        Row(case=case, ratio=ratio, steps=taught)
        for case in CASES
        for ratio in RATIOS
        for taught in ((0, steps) if ratio else (0,))
    ]


def main(arguments: list[str]) -> None:
    """Run, store and show, as the arguments say."""
    parser = argparse.ArgumentParser(description="Compare pruned models with what they were cut from.")
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("EDGEPIPE_DATA", ".")), help="the data's folder"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of recovery (default: {STEPS})")
    parser.add_argument("--row", action="append", help="only rows whose name begins so; may be given several times")
    parser.add_argument("--page-only", action="store_true", help="rewrite the table from what is stored")
    options = parser.parse_args(arguments)
    if not options.page_only:
        take(options.data, [row for row in rows_of(options.steps) if wanted(row, options.row)])
    result = read_result(NAME)
    replace_section(PAGE, NAME, page_section(result))
    print(json.dumps({row["name"]: row["quality"]["value"] for row in result["rows"]}))


def wanted(row: Row, chosen: list[str] | None) -> bool:
    """Say whether a row is asked for."""
    return chosen is None or any(row.name.startswith(one) for one in chosen)


def take(data: Path, rows: list[Row]) -> None:
    """Make, score and time every row that isn't stored yet."""
    place = RESULTS / f"{NAME}.json"
    result: Json = read_result(NAME) if place.is_file() else {"rows": []}
    texts = write_texts(data)
    for row in rows:
        stored = next((one for one in result["rows"] if one["name"] == row.name), None)
        if stored is None:
            print(row.name, file=sys.stderr, flush=True)
            stored = {"name": row.name, "provenance": provenance(), **score(row, texts)}
            result["rows"] = [*result["rows"], stored]
            write_result(NAME, result)
        if row.ratio and not row.steps and "speed" not in stored:  # a trained model of the same shapes is as fast
            dense = Row(case=row.case, ratio=0.0, steps=0)
            stored["speed"] = speed(bundle_of(row, texts)[1], bundle_of(dense, texts)[1], row.case)
            write_result(NAME, result)


def write_texts(data: Path) -> dict[str, Path]:
    """Write what models learn from and are scored on; return the files by name."""
    folder = ROOT / "runs" / NAME / "texts"
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [line.split("\t") for line in read_text(open_data(str(data / "stsb-train.tsv"))).splitlines()]
    sentences = dict.fromkeys(text for pair in pairs for text in pair[5:7])
    found = passages(read_text(open_data(str(data / "wikitext2-valid.txt"))))
    first = len(found) * 4 // 5
    files = {
        "minilm-l6-v2": (folder / "stsb-train.txt", "\n\n".join(sentences)),
        "smollm2-135m": (folder / "wikitext-first.txt", "\n\n".join(found[:first])),
        "wikitext-last.txt": (folder / "wikitext-last.txt", "\n\n".join(found[first:])),
    }
    for path, text in files.values():
        path.write_text(text + "\n", encoding="utf-8")
    return {**{name: path for name, (path, _) in files.items()}, "stsb-dev.tsv": data / "stsb-dev.tsv"}


def bundle_of(row: Row, texts: dict[str, Path]) -> tuple[TorchModel, Path]:
    """Return a row's model and its float32 bundle; finished ones stay in runs/prune."""
    folder = ROOT / "runs" / NAME / row.name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    model = open_model(row.case.model)
    if row.ratio:
        settings: list[tuple[str, str, object]] = [("prune", "ratio", row.ratio)]
        if row.steps:
            taught = {**row.case.teaching, "recover_steps": row.steps, "data": str(texts[row.case.model])}
            settings += [("prune", name, value) for name, value in taught.items()]
        recipe = resolve(target="cpu", settings=settings, stages=["prune"])
        smaller = run_stages(model, recipe, runs=folder, fresh=False, listener=Progress())
        assert isinstance(smaller, TorchModel)
        model = smaller
    floats = dataclasses.replace(model, weights=model.weights.as_float32())
    file = folder / "recipe.toml"
    file.write_text('stages = ["export", "compile"]\n', encoding="utf-8")
    recipe = resolve(target="cpu", file=file, settings=[("export", "context", row.case.context)])
    made = run(floats, recipe, out=None, runs=folder / "bundle", fresh=False, listener=Progress())
    assert isinstance(made, CompiledModel)
    return model, made.path


def score(row: Row, texts: dict[str, Path]) -> Json:
    """Return a row's counts and quality."""
    model, bundle = bundle_of(row, texts)
    how = Evaluation(metric=row.case.metric, threads=THREADS)
    found = evaluate(bundle, str(texts[row.case.scored]), how, listener=Progress())
    return {
        "model": row.case.model,
        "ratio": row.ratio,
        "steps": row.steps,
        "metric": row.case.metric,
        "parameters": model.weights.parameters,
        "bundle_bytes": sum(file.stat().st_size for file in bundle.iterdir()),
        "multiply_adds": multiply_adds(model, TOKENS),
        "quality": {key: found[key] for key in ("value", "interval", "count")},
        "data": {**found["data"], "name": row.case.scored},
        "machine": found["machine"],
    }


def multiply_adds(model: TorchModel, tokens: int) -> int:
    """Return the multiply-adds of one text of so many tokens: matrices of the blocks, attention, a decoder's last head.

    Attention of a decoder is counted whole, as its kernel computes it for a prompt.
    """
    total = 0
    for stack in anatomy_of(model).stacks:
        inside = [w for name, w in model.weights.items() if name.startswith(stack.prefix) and len(w.shape) == 2]
        total += tokens * sum(weight.size for weight in inside)
        total += 2 * stack.layers * tokens * tokens * stack.heads * stack.head_dim
        if model.info.task == "text-generation":
            total += model.info.config["vocab_size"] * stack.hidden
    return total


def speed(bundle: Path, dense: Path, case: Case) -> Json:
    """Return the ratio of times, pruned ÷ dense, taken in turn."""
    options = Measure(threads=THREADS, tokens=64, prompt_tokens=TOKENS, output_tokens=32)
    figures = measure(bundle, options, listener=Progress(), against=dense)
    return {"ratio": figures["ratios"][case.speed], "load_average_1min": os.getloadavg()[0]}


def page_section(result: Json) -> str:
    """Return the page's table and the sentences below it, from what is stored alone."""
    dense = {row["model"]: row for row in result["rows"] if not row["ratio"]}
    times = {(row["model"], row["ratio"]): row["speed"]["ratio"] for row in result["rows"] if "speed" in row}
    cells = []
    for row in result["rows"]:
        whole = dense.get(row["model"])
        low, high = row["quality"]["interval"]
        cells.append(
            [
                row["model"],
                f"{row['ratio']:.0%}",
                f"{row['steps']} steps" if row["steps"] else "",
                f"{row['parameters'] / 1e6:.1f}",
                f"{row['bundle_bytes'] / 1e6:.1f}",
                f"{row['quality']['value']:.4g} ({low:.4g} to {high:.4g})",
                "" if whole is None or whole is row else against(row, whole),
                *(["", "", ""] if whole is None or not row["ratio"] else speeds(row, whole, times)),
            ]
        )
    first = result["rows"][0]
    dates = sorted({(row["provenance"]["date"], row["provenance"]["commit"][:12]) for row in result["rows"]})
    loads = [row["provenance"]["load_average_1min"] for row in result["rows"]]
    said = (
        f"Float32 bundles, {THREADS} thread. Quality: Spearman on `stsb-dev.tsv` (MiniLM; timed: 8 texts of {TOKENS} "
        f"tokens), perplexity on the last fifth of `wikitext2-valid.txt` (SmolLM2; timed: first token after {TOKENS}), "
        f"95 % intervals by bootstrap. Speed-up: dense ÷ pruned, in turn. {first['machine']['cpu']}, load average "
        f"{min(loads):.1f} to {max(loads):.1f}; {', '.join(f'{date} at `{commit}`' for date, commit in dates)}."
    )
    return f"{markdown_table(HEADER, cells)}\n\n{said}"


def against(row: Json, whole: Json) -> str:
    """Write a quality beside the dense model's: points of Spearman, or the ratio of perplexities."""
    value, dense = row["quality"]["value"], whole["quality"]["value"]
    return f"{100 * (value - dense):+.2f} points" if row["metric"] == "spearman" else f"× {value / dense:.2f}"


def speeds(row: Json, whole: Json, times: dict[tuple[str, float], Json]) -> list[str]:
    """Return the measured speed-up with its interval, the predicted one, and the first by the second."""
    predicted = whole["multiply_adds"] / row["multiply_adds"]
    ratio = times.get((row["model"], row["ratio"]))
    if ratio is None:
        return ["", f"{predicted:.2f}", ""]
    value = 1 / ratio["value"]
    measured = f"{value:.2f} [{1 / ratio['high']:.2f}, {1 / ratio['low']:.2f}]"
    return [measured, f"{predicted:.2f}", f"{value / predicted:.2f}"]


if __name__ == "__main__":
    main(sys.argv[1:])
