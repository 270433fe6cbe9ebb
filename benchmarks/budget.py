"""Does --max-drop keep its promise on data it never saw? Three budgets of two models: a table of docs/quantize.md.

    python benchmarks/budget.py --data FOLDER    run what isn't stored yet, store results/budget.json, show it
                                --arm NAME       … of this row alone, "minilm-l6-v2 1%"; may be given several times
                                --examples N     … with N examples or 16·N tokens to search on (default 2000)
    python benchmarks/budget.py --page-only      rewrite the table from what is stored

FOLDER holds stsb-train.tsv, stsb-dev.tsv and wikitext2-valid.txt. MiniLM's budget is searched on pairs drawn from the
train set of STS-B and judged on its dev set; SmolLM2's on the first half of WikiText-2's validation text and judged
on a quarter behind it.

Each row is stored as soon as it is judged; what a search measured stays in runs/budget, so that the next budget of the
model begins with it, and one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.stored import RESULTS, ROOT, markdown_table, provenance, read_result, replace_section, write_result
from edgepipe.artifacts import Json
from edgepipe.compress import compress
from edgepipe.errors import BudgetError
from edgepipe.evaluate import evaluate
from edgepipe.measuring.metrics import Evaluation
from edgepipe.recipe import resolve
from edgepipe.report.progress import Progress
from edgepipe.search.asked import Asked
from edgepipe.search.promise import parse_budget

NAME = "budget"
PAGE = ROOT / "docs" / "quantize.md"
FOLDER = ROOT / "runs" / NAME
MINILM, SMOLLM2 = "minilm-l6-v2", "smollm2-135m"
TOKENS_AN_EXAMPLE = 16
THREADS = 1
HEADER = (
    "model",
    "budget",
    "bundle, MB",
    "bits/weight",
    "drop, searched",
    "at most",
    "drop, never seen",
    "kept",
    "minutes",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """Name one budget of one model."""

    model: str
    max_drop: str

    @property
    def name(self) -> str:
        """Return what a row is called."""
        return f"{self.model} {self.max_drop}"


ARMS = (
    *(Arm(model=MINILM, max_drop=drop) for drop in ("0.5%", "1%", "3%")),
    *(Arm(model=SMOLLM2, max_drop=drop) for drop in ("1%", "3%", "10%")),
)


def main(arguments: list[str]) -> None:
    """Run, store and show, as the arguments say."""
    parser = argparse.ArgumentParser(description="Judge budgets on data that no search saw.")
    parser.add_argument("--data", type=Path, help="the folder of the three files")
    parser.add_argument("--arm", action="append", help="a row to run (default: all)")
    parser.add_argument("--examples", type=int, default=2000, help="examples to search on, or sixteenths of tokens")
    parser.add_argument("--page-only", action="store_true", help="rewrite the table from what is stored")
    options = parser.parse_args(arguments)
    if not options.page_only:
        if options.data is None:
            parser.error("--data FOLDER is needed")
        names = [arm.name for arm in ARMS]
        if unknown := [name for name in options.arm or () if name not in names]:
            parser.error(f"--arm {unknown[0]}: expected one of {', '.join(names)}")
        take(options.data, options.arm or names, options.examples)
    result = read_result(NAME)
    replace_section(PAGE, NAME, page_section(result))
    print(json.dumps({row["arm"]: row["kept"] for row in result["rows"]}))


def take(data: Path, names: list[str], examples: int) -> None:
    """Run every named arm that isn't stored as it is now, and store each as soon as it is judged."""
    result: Json = read_result(NAME) if (RESULTS / f"{NAME}.json").is_file() else {"rows": []}
    order = [arm.name for arm in ARMS]
    for arm in (next(arm for arm in ARMS if arm.name == name) for name in names):
        settings = {"model": arm.model, "max_drop": arm.max_drop, "examples": examples}
        if any(row["arm"] == arm.name and row["settings"] == settings for row in result["rows"]):
            continue
        print(arm.name, file=sys.stderr, flush=True)
        row = {"arm": arm.name, "settings": settings, "provenance": provenance(), **taken(arm, data, examples)}
        rows = [*(one for one in result["rows"] if one["arm"] != arm.name), row]
        result = {"rows": sorted(rows, key=lambda one: order.index(one["arm"]))}
        write_result(NAME, result)


def taken(arm: Arm, data: Path, examples: int) -> Json:
    """Search, then judge the bundle beside the float model on the other data; no bundle is an answer too."""
    searched, unseen, options = sources(arm, data, examples)
    folder = FOLDER / arm.model
    folder.mkdir(parents=True, exist_ok=True)
    recipe_file = folder / "recipe.toml"
    recipe_file.write_text('stages = ["quantize", "export", "compile"]\n', encoding="utf-8")
    recipe = resolve(target="cpu", file=recipe_file)
    asked = Asked(max_drop=arm.max_drop, data=str(searched), options=options)
    started = time.perf_counter()
    try:
        found = compress(arm.model, recipe, listener=Progress(), runs=folder, asked=asked)
    except BudgetError as error:
        said = str(error).replace(f"{searched.parent}/", "").replace(f"{ROOT}/", "")
        return {"kept": True, "refused": said, "minutes": (time.perf_counter() - started) / 60}
    minutes = (time.perf_counter() - started) / 60
    bundle = Path(found["bundle"])
    metric = Evaluation(metric=found["search"]["metric"], threads=THREADS)
    baseline = bundle.parent / "baseline" / "02-compile" / "bundle"
    judged = evaluate(bundle, str(unseen), metric, listener=Progress(), against=baseline)
    change = judged["value"] / judged["against"]["value"] - 1
    drop = change if judged["better"] == "lower" else -change
    return {
        "kept": drop <= parse_budget(arm.max_drop).amount,
        "refused": None,
        "search": {**found["search"], "data": {**found["search"]["data"], "name": searched.name}},
        "drop_unseen": drop,
        "unseen": {**judged["data"], "name": unseen.name, "count": judged["count"]},
        "value_unseen": judged["value"],
        "float_unseen": judged["against"]["value"],
        "bundle_bytes": found["bundle_bytes"],
        "bits_per_weight": found["bits_per_weight"],
        "machine": judged["machine"],
        "minutes": minutes,
    }


def sources(arm: Arm, data: Path, examples: int) -> tuple[Path, Path, tuple[str, ...]]:
    """Return what a model's budget is searched on, what it is judged on, and the options of the search's metric."""
    common = (f"threads={THREADS}",)
    if arm.model == MINILM:
        return data / "stsb-train.tsv", data / "stsb-dev.tsv", (*common, f"limit={examples}")
    text = (data / "wikitext2-valid.txt").read_text(encoding="utf-8")
    middle = text.index("\n", len(text) // 2)
    halves = []
    for name, part in (("first", text[:middle]), ("second", text[middle:][: len(text) // 4])):
        halves.append(FOLDER / f"wikitext2-valid-{name}.txt")
        FOLDER.mkdir(parents=True, exist_ok=True)
        halves[-1].write_text(part, encoding="utf-8")
    return halves[0], halves[1], (*common, f"tokens={TOKENS_AN_EXAMPLE * examples}", "window=256")


def page_section(result: dict[str, Any]) -> str:
    """Return the page's table and the sentence below it, from what is stored alone."""
    cells = []
    for row in result["rows"]:
        settings = row["settings"]
        head = [settings["model"], settings["max_drop"]]
        if row["refused"] is not None:
            cells.append([*head, "none: exit code 3", "", "", "", "", "yes", f"{row['minutes']:.0f}"])
            continue
        found = row["search"]
        cells.append(
            [
                *head,
                f"{row['bundle_bytes'] / 1e6:.1f}",
                f"{row['bits_per_weight']:.2f}",
                f"{100 * found['drop']:+.2f} %",
                f"{100 * found['limit']:+.2f} %",
                f"{100 * row['drop_unseen']:+.2f} %",
                "yes" if row["kept"] else "NO",
                f"{row['minutes']:.0f}",
            ]
        )
    said = []
    for model in dict.fromkeys(row["settings"]["model"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["settings"]["model"] == model and row["refused"] is None]
        if rows:
            found, unseen = rows[0]["search"], rows[0]["unseen"]
            said.append(
                f"{model}: {found['metric']}, searched on {found['data']['examples']:,} examples of "
                f"`{found['data']['name']}`, judged on {unseen['count']:,} of `{unseen['name']}`"
            )
    commits = sorted({row["provenance"]["commit"][:12] for row in result["rows"]})
    dates = sorted({row["provenance"]["date"] for row in result["rows"]})
    where = f"Commit {', '.join(f'`{one}`' for one in commits)}, {dates[-1]}; minutes on a busy machine, a bound."
    return f"{markdown_table(HEADER, cells)}\n\n{'; '.join(said)}. {where}"


if __name__ == "__main__":
    main(sys.argv[1:])
