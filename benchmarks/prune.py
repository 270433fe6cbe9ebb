"""Compare pruned models with what they were cut from: parameters, bytes, speed and quality, before and after recovery.

    python benchmarks/prune.py --data DIR               run what isn't stored yet, rewrite docs/prune.md's tables
    python benchmarks/prune.py --data DIR --row minilm  only rows whose name begins so
    python benchmarks/prune.py --page-only              rewrite the tables from what is stored

DIR (default: what EDGEPIPE_DATA names) holds stsb-train.tsv, stsb-dev.tsv and wikitext2-valid.txt. MiniLM learns from
STS-B train's sentences and is scored on STS-B dev; SmolLM2 learns from the first four fifths of WikiText-2's passages
and is scored on the last fifth. Two tables:

    cut       25 % and 50 % of channels and groups removed, before and after recovery. Float32 bundles, so that the
              multiply-adds of both sides are the same kind of work; speed is `edgepipe measure` beside the dense
              bundle, in turn. A trained model has the shapes of an untaught one, so only that is timed.
    masks     2:4 zeros and 4 bits on MiniLM: with the whole recovery beside 4 bits alone, and both orders of the two
              with a short one, three seeds each: the seed draws the batches.

A row is stored as soon as it is there, with all the settings that led to it, and is run again only when these changed;
a speed as soon as it is taken. Training goes on from its checkpoint, so a run that was stopped loses minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
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

NAME, CUT, MASKS = "prune", "prune", "prune masks"  # of the result, and of the page's two tables
PAGE = ROOT / "docs" / "prune.md"
THREADS, TOKENS = 1, 128
SHORT = 100  # steps of the recovery that both orders have
CUT_HEADER = (
    *("model", "removed", "recovery", "million parameters", "bundle, MB", "quality", "against dense"),
    *("speed-up", "by multiply-adds", "measured ÷ predicted"),
)
MASKS_HEADER = ("MiniLM, weights", "recovery", "seeds", "bundle, MB", "Spearman × 100", "against 4 bits alone")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Name a model, how it is scored, what it learns with, and where its speed stands in a measurement."""

    model: str
    metric: str
    scored: str  # file
    speed: str  # key of the measurement's ratios
    steps: int  # of the whole recovery
    teaching: dict[str, object]
    context: int = 0  # tokens; 0: what the model's source says


MINILM = Case(
    model="minilm-l6-v2",
    metric="spearman",
    scored="stsb-dev.tsv",
    speed="8x128",
    steps=400,
    teaching={"batch": 32, "learning_rate": 1e-4, "max_source": TOKENS, "cut": True},
)
SMOLLM2 = Case(
    model="smollm2-135m",
    metric="perplexity",
    scored="wikitext-last.txt",
    speed="ttft_ms",
    steps=200,
    teaching={"batch": 8, "learning_rate": 1e-4, "max_source": 64, "max_target": 64, "cut": True},
    context=512,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """Name what is done to a model: the stages before export, and their options."""

    name: str
    stages: tuple[str, ...] = ()
    prune: dict[str, object] = field(default_factory=dict)


DENSE = Arm(name="dense")
QUARTER = Arm(name="0.25", stages=("prune",), prune={"ratio": 0.25})
HALF = Arm(name="0.5", stages=("prune",), prune={"ratio": 0.5})
_MASKED: dict[str, object] = {"ratio": 0.0, "pattern": "2:4"}
FOUR_BITS = Arm(name="4 bits", stages=("quantize",))
PRUNED_FIRST = Arm(name="2:4, then 4 bits", stages=("prune", "quantize"), prune=_MASKED)
QUANTIZED_FIRST = Arm(name="4 bits, then 2:4", stages=("quantize", "prune"), prune=_MASKED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Name one row: a case, what is done to it, steps of recovery, and the seed of these."""

    case: Case
    arm: Arm
    steps: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        """Return what its folder and its stored row are called."""
        return f"{self.case.model} {self.arm.name} {self.steps} {self.seed}"

    @property
    def ratio(self) -> float:
        """Return the share that is removed."""
        return float(str(self.arm.prune.get("ratio", 0.0)))

    def settings(self, texts: Mapping[str, Path]) -> list[tuple[str, str, object]]:
        """Return the options of its stages."""
        found = [("prune", name, value) for name, value in self.arm.prune.items()]
        if self.steps:
            taught = {**self.case.teaching, "recover_steps": self.steps, "data": str(texts[self.case.model])}
            found += [("prune", name, value) for name, value in taught.items()]
        return found

    def described(self) -> Json:
        """Return all that decides a row but the files."""
        case = dataclasses.asdict(self.case)
        return {"case": case, "arm": dataclasses.asdict(self.arm), "steps": self.steps, "seed": self.seed}


def rows_of() -> list[Row]:
    """Return all rows: of each model the dense one first, and what a claim rests on before further seeds."""

    def cut(case: Case) -> list[Row]:
        arms = (QUARTER, HALF)
        return [
            Row(case=case, arm=DENSE),
            *(Row(case=case, arm=arm, steps=steps) for arm in arms for steps in (0, case.steps)),
        ]

    masked = [Row(case=MINILM, arm=FOUR_BITS), Row(case=MINILM, arm=PRUNED_FIRST)]
    masked += [Row(case=MINILM, arm=PRUNED_FIRST, steps=MINILM.steps)]
    orders = [
        Row(case=MINILM, arm=arm, steps=SHORT, seed=seed)
        for seed in range(3)
        for arm in (PRUNED_FIRST, QUANTIZED_FIRST)
    ]
    return [*cut(MINILM), *masked, *orders, *cut(SMOLLM2)]


def main(arguments: list[str]) -> None:
    """Run, store and show, as the arguments say."""
    parser = argparse.ArgumentParser(description="Compare pruned models with what they were cut from.")
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("EDGEPIPE_DATA", ".")), help="the data's folder"
    )
    parser.add_argument("--row", action="append", help="only rows whose name begins so; may be given several times")
    parser.add_argument("--page-only", action="store_true", help="rewrite the tables from what is stored")
    options = parser.parse_args(arguments)
    if not options.page_only:
        take([row for row in rows_of() if wanted(row, options.row)], write_texts(options.data))
    result = read_result(NAME)
    for name, text in page_sections(result).items():
        replace_section(PAGE, name, text)
    print(json.dumps({row["name"]: row["quality"]["value"] for row in result["rows"]}))


def wanted(row: Row, chosen: Sequence[str] | None) -> bool:
    """Say whether a row is asked for."""
    return chosen is None or any(row.name.startswith(one) for one in chosen)


def take(rows: Sequence[Row], texts: Mapping[str, Path]) -> None:
    """Make, score and time every row that isn't stored yet with these settings."""
    place = RESULTS / f"{NAME}.json"
    result: Json = read_result(NAME) if place.is_file() else {"rows": []}
    for row in rows:
        stored = next((one for one in result["rows"] if one["name"] == row.name), None)
        if stored is None or stored["settings"] != _as_json(row.described()):
            print(row.name, file=sys.stderr, flush=True)
            started = time.perf_counter()
            fresh = {"name": row.name, "provenance": provenance(), "settings": row.described(), **score(row, texts)}
            fresh["seconds"] = round(time.perf_counter() - started, 1)
            result["rows"] = [*(one for one in result["rows"] if one is not stored), fresh]
            write_result(NAME, result)
            stored = fresh
        if row.ratio and not row.steps and "speed" not in stored:  # a trained model of the same shapes is as fast
            dense = Row(case=row.case, arm=DENSE)
            stored["speed"] = speed(bundle_of(row, texts)[1], bundle_of(dense, texts)[1], row.case)
            write_result(NAME, result)


def _as_json(value: Json) -> Json:
    """Return a value as a file gives it back."""
    found: Json = json.loads(json.dumps(value))
    return found


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


def bundle_of(row: Row, texts: Mapping[str, Path]) -> tuple[TorchModel, Path]:
    """Return a row's model and its bundle, float32 where nothing quantized it; finished ones stay in runs/prune."""
    folder = ROOT / "runs" / NAME / "".join(c if c.isalnum() or c in ".-" else "-" for c in row.name)
    folder.mkdir(parents=True, exist_ok=True)
    model = open_model(row.case.model)
    if row.arm.stages:
        recipe = resolve(target="cpu", settings=row.settings(texts), stages=list(row.arm.stages), seed=row.seed)
        changed = run_stages(model, recipe, runs=folder, fresh=False, listener=Progress())
        assert isinstance(changed, TorchModel)
        model = changed
    if "quantize" not in row.arm.stages:
        model = dataclasses.replace(model, weights=model.weights.as_float32())
    file = folder / "recipe.toml"
    file.write_text('stages = ["export", "compile"]\n', encoding="utf-8")
    recipe = resolve(target="cpu", file=file, settings=[("export", "context", row.case.context)])
    made = run(model, recipe, out=None, runs=folder / "bundle", fresh=False, listener=Progress())
    assert isinstance(made, CompiledModel)
    return model, made.path


def score(row: Row, texts: Mapping[str, Path]) -> Json:
    """Return a row's counts and quality."""
    model, bundle = bundle_of(row, texts)
    how = Evaluation(metric=row.case.metric, threads=THREADS)
    found = evaluate(bundle, str(texts[row.case.scored]), how, listener=Progress())
    return {
        "model": row.case.model,
        "arm": row.arm.name,
        "ratio": row.ratio,
        "steps": row.steps,
        "seed": row.seed,
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


def page_sections(result: Json) -> dict[str, str]:
    """Return the page's two tables and the sentences below them, from what is stored alone."""
    rows = sorted(result["rows"], key=lambda row: (row["model"], row["ratio"], row["steps"], row["seed"]))
    parts = {CUT: (is_cut, cut_table), MASKS: (is_masked, masks_table)}
    found = {name: [row for row in rows if belongs(row)] for name, (belongs, _) in parts.items()}
    return {
        name: f"{parts[name][1](own)}\n\n{taken(own)}" if own else "Not measured yet." for name, own in found.items()
    }


def is_cut(row: Json) -> bool:
    """Say whether a row belongs to the first table."""
    return row["arm"] in {arm.name for arm in (DENSE, QUARTER, HALF)}


def is_masked(row: Json) -> bool:
    """Say whether a row belongs to the second table."""
    return not is_cut(row)


def taken(rows: Sequence[Json]) -> str:
    """Say how, on what and when rows were taken."""
    dates = sorted({(row["provenance"]["date"], row["provenance"]["commit"][:12]) for row in rows})
    loads = [row["provenance"]["load_average_1min"] for row in rows]
    names = {row["metric"] for row in rows}
    how = {
        "spearman": f"Spearman on `stsb-dev.tsv` (MiniLM; timed: 8 texts of {TOKENS} tokens)",
        "perplexity": f"perplexity on the last fifth of `wikitext2-valid.txt` (SmolLM2; timed: TTFT after {TOKENS})",
    }
    return (
        f"Quality: {', '.join(text for name, text in how.items() if name in names)}, {THREADS} thread. "
        f"{rows[0]['machine']['cpu']}, load average {min(loads):.1f} to {max(loads):.1f}; "
        f"{', '.join(f'{date} at `{commit}`' for date, commit in dates)}."
    )


def cut_table(rows: Sequence[Json]) -> str:
    """Lay out what was cut beside what it was cut from."""
    dense = {row["model"]: row for row in rows if not row["ratio"]}
    times = {(row["model"], row["ratio"]): row["speed"]["ratio"] for row in rows if "speed" in row}
    cells = []
    for row in rows:
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
    said = (
        "Float32 bundles; quality with 95 % intervals by bootstrap. Speed-up: dense ÷ pruned, in turn; a model that "
        "was taught is as fast as one that wasn't."
    )
    return f"{markdown_table(CUT_HEADER, cells)}\n\n{said}"


def masks_table(rows: Sequence[Json]) -> str:
    """Lay out zeros and 4 bits beside 4 bits alone, seeds together."""
    plain = next((row["quality"]["value"] for row in rows if row["arm"] == FOUR_BITS.name), None)
    groups: dict[tuple[str, int], list[Json]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["steps"]), []).append(row)
    names = [arm.name for arm in (FOUR_BITS, PRUNED_FIRST, QUANTIZED_FIRST)]
    cells = []
    for arm, steps in sorted(groups, key=lambda key: (key[1], names.index(key[0]))):
        own = groups[arm, steps]
        values = [100 * row["quality"]["value"] for row in own]
        apart = "" if plain is None or arm == FOUR_BITS.name else f"{statistics.mean(values) - 100 * plain:+.2f} points"
        size = statistics.mean(row["bundle_bytes"] for row in own) / 1e6
        cells.append(
            [arm, f"{steps} steps" if steps else "", str(len(own)), f"{size:.1f}", spread(values, digits=2), apart]
        )
    return markdown_table(MASKS_HEADER, cells)


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
