"""Every way to quantize on four models: quality, bits and bytes from the files, speed; the large table of a page.

    python benchmarks/quantized.py --data DIR [--model NAME] [--row "NAME FORM"]   run what isn't stored yet, show it
                                   --no-speed       … without timing; a row's speed is taken when it's run again
                                   --students DIR   … with the students of benchmarks run elsewhere (default: runs)
                                   --stand-in       only time stored rows, on models of the same shape
    python benchmarks/quantized.py --page-only      rewrite docs/quantize.md's table from what is stored

DIR (default: what EDGEPIPE_DATA names) holds stsb-dev.tsv, sst2-dev.tsv, e2e-dev.csv and wikitext2-valid.txt, and
what W4A4, ternary and mixed rows learn from or search on: stsb-train.tsv, sst2-train.tsv; of the other two files the
part that is not scored. The models are MiniLM; the classifier that benchmarks/embedding.py and the encoder-decoder
that benchmarks/e2e.py train, whose rows are left out, and a sentence says so, where these haven't been run; and
SmolLM2. Quality is `edgepipe eval` of the bundle. Speed is `edgepipe measure`'s, the float32 bundle in turn with it.
A row is kept in results/quantized.json as soon as it is scored and again when it's timed, and is run again only when
its settings or its student changed; --stand-in times rows whose student or training is gone on a model of the same
shape, which learnt for a few steps and costs the same to run. hqq and autoround need the extra `quantize`, trained rows
the extra `train`, BESIDE's second engine the extra `tvm`. Rows of two bits say where methods differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.e2e import split
from benchmarks.embedding import training_files
from benchmarks.quantized_models import (
    BESIDE,
    DECODER_STEPS,
    FLOAT,
    FORMS,
    GROUP,
    MODELS,
    NOTES,
    ROWS,
    STEPS,
    THREADS,
    Form,
    Model,
    learns,
    row_name,
    settings_of,
)
from benchmarks.stored import (
    RESULTS,
    ROOT,
    markdown_table,
    provenance,
    read_result,
    replace_section,
    without_folders,
    write_result,
)
from edgepipe.artifacts import CompiledModel, Json, TorchModel
from edgepipe.errors import BudgetError, TargetError
from edgepipe.evaluate import evaluate
from edgepipe.measure import measure
from edgepipe.pipeline import run
from edgepipe.quantizers.choose import require
from edgepipe.recipe import resolve
from edgepipe.report.progress import Progress
from edgepipe.search.asked import Asked, wanted_of
from edgepipe.search.budget import search_plan
from edgepipe.sources import open_model
from edgepipe.stages.measure import Measure
from edgepipe.store import file_sha256, versions

NAME = "quantized"
PAGE = ROOT / "docs" / "quantize.md"
FOLDER = ROOT / "runs" / NAME
BATCH = "8x128"  # of an encoder's calls: 8 texts of 128 tokens
TIMING = Measure(blocks=2, turns=3, tokens=64, output_tokens=40, threads=THREADS)
PACKAGES = ("auto-round", "neural-compressor-pt", "onnxruntime", "torch", "transformers")
STAND_IN_STEPS = 4
SHORTEST = 48  # characters of a passage to learn from
ENGINE = "onnxruntime"
EMBEDDING = "embedding and head"  # the part of a bundle's weights that has a dial of its own


def main(arguments: list[str]) -> None:
    """Run, store and show, as the arguments say."""
    parser = argparse.ArgumentParser(description="Compare all ways to quantize on four models.")
    default = Path(os.environ.get("EDGEPIPE_DATA", "."))
    parser.add_argument("--data", type=Path, default=default, help="folder of the files that are scored on")
    parser.add_argument("--students", type=Path, default=ROOT / "runs", help="where students lie (default: runs)")
    parser.add_argument("--model", action="append", choices=[one.name for one in MODELS], help="a model's rows alone")
    parser.add_argument("--row", action="append", help='a row alone, such as "minilm gptq 4"')
    parser.add_argument("--no-speed", action="store_true", help="score, and leave timing for later")
    parser.add_argument("--stand-in", action="store_true", help="time stored rows on models of the same shape")
    parser.add_argument("--page-only", action="store_true", help="rewrite the table from what is stored")
    options = parser.parse_args(arguments)
    names = [row_name(model, form) for model, form in ROWS]
    if unknown := [name for name in options.row or () if name not in names]:
        parser.error(f"--row {unknown[0]}: expected one of {'; '.join(names)}")
    if not options.page_only:
        models = options.model or [model.name for model in MODELS]
        wanted = options.row or [row_name(model, form) for model, form in ROWS if model.name in models]
        row = time_stand_in if options.stand_in else partial(take_row, speed=not options.no_speed)
        take(options.data, options.students, wanted, row)
    result = read_result(NAME)
    replace_section(PAGE, NAME, page_section(result))
    print(json.dumps({f"{row['model']} {row['form']}": row["quality"]["value"] for row in result["rows"]}))


def take(data: Path, students: Path, names: Sequence[str], row: Callable[[Model, Form, Path, Path], None]) -> None:
    """Run every named row that isn't stored as it is now; what can't be run is said in one sentence and left out."""
    for model in MODELS:
        forms = [form for owner, form in ROWS if owner is model and row_name(model, form) in names]
        if not forms:
            continue
        if why := missing(model, data, students):
            _say(f"{model.name}: {why}; its rows are left out")
            continue
        for form in forms:
            if why := lacking(form) or lacking_data(model, form, data):
                _say(f"{row_name(model, form)}: {why}; this row is left out")
                continue
            try:
                row(model, form, data, students)
            except BudgetError as error:
                _say(f"{row_name(model, form)}: {error}")


def missing(model: Model, data: Path, students: Path) -> str:
    """Say what a model's rows lack; "" when all is there."""
    if not (data / model.data).is_file():
        return f"{model.data} is not in {data}: give its folder with --data"
    if model.made_by and not (students / model.source / "config.json").is_file():
        return (
            f"there is no student in {students / model.source}: run `python benchmarks/{model.made_by}.py` first, or "
            "name the folder of its runs with --students"
        )
    return ""


def lacking(form: Form) -> str:
    """Say which package a form lacks; "" when all is there."""
    try:
        require(str((form.options or {}).get("method", "rtn")))
    except TargetError as error:
        return str(error)
    if learns(form) and importlib.util.find_spec("accelerate") is None:
        return "training needs the package accelerate: pip install 'edgepipe[train]'"
    return ""


def lacking_data(model: Model, form: Form, data: Path) -> str:
    """Say which file that a form learns from, or is searched on, isn't there; "" when all is."""
    made_of = {
        "minilm": ("stsb-train.tsv", "wikitext2-valid.txt", "sst2-train.tsv"),  # of benchmarks/embedding.py's texts
        "encoder": ("sst2-train.tsv",),
    }
    absent = [name for name in made_of.get(model.name, ()) if not (data / name).is_file()]
    return (
        f"{absent[0]} is not in {data}: give its folder with --data"
        if absent and (learns(form) or form.max_drop or form.own_texts)
        else ""
    )


def seen(model: Model, data: Path, *, trains: bool) -> Path:
    """Return what a model's forms learn from, or are searched on: nothing of what they are scored on."""
    folder = FOLDER / model.name
    folder.mkdir(parents=True, exist_ok=True)
    if model.name == "minilm":
        return training_files(data, folder)[0]["sentences"] if trains else data / "stsb-train.tsv"
    if model.name == "encoder":
        return data / "sst2-train.tsv"
    if model.name == "pair":
        return split(data / model.data, folder)[0]
    lines = (data / model.data).read_text(encoding="utf-8").splitlines()
    behind = [line.strip() for line in lines[len(lines) // 2 :]]  # the half of which nothing is scored
    passages = [line for line in behind if len(line) > SHORTEST and not line.startswith("=")]
    file = folder / "passages.jsonl"
    file.write_text("".join(json.dumps({"text": one}, ensure_ascii=False) + "\n" for one in passages), encoding="utf-8")
    return file


def take_row(model: Model, form: Form, data: Path, students: Path, *, speed: bool = True) -> None:
    """Build, score and time one row, as far as that isn't stored, and store what was found after each."""
    source = open_source(model, students)
    fingerprint = source.info.fingerprint if model.made_by else ""
    row = stored_row(model, form)
    if row is not None and (row["settings"], row["student"]) != (settings_of(model, form), fingerprint):
        row = None
    if row is not None and (row["speed"] or not speed):
        return
    _say(row_name(model, form))
    came_from, started = provenance(), time.perf_counter()
    bundle = build(model, form, source, data)
    if row is None:
        row = {
            "model": model.name,
            "form": form.name,
            "settings": settings_of(model, form),
            "student": fingerprint,
            "provenance": came_from,
            "packages": versions(PACKAGES),
            "minutes": (time.perf_counter() - started) / 60,
            **facts(bundle),
            **score(model, bundle.path, data),
            "speed": None,
        }
        put(row)
    if speed:
        put({**row, "speed": speed_of(model, form, bundle, source, data)})


def time_stand_in(model: Model, form: Form, data: Path, students: Path) -> None:
    """Time a stored row that lacks its speed on a model of the same shape; forms that learn do so for a few steps.

    Values don't change what a kernel does; a searched row's bits would, and it is left out.
    """
    row = stored_row(model, form)
    if row is None or row["speed"] or form.max_drop:
        return
    _say(f"{row_name(model, form)}, timed on a stand-in")
    source = open_source(model, students)
    model = dataclasses.replace(model, learns={**model.learns, "steps": STAND_IN_STEPS})
    bundle = build(model, form, source, data)
    if (counted := facts(bundle)["layers"]) != row["layers"]:
        raise SystemExit(f"{students / model.source}: expected layers of {row['layers']}, got {counted}")
    put({**row, "speed": {**speed_of(model, form, bundle, source, data), "stand_in": source.info.fingerprint}})


def stored_row(model: Model, form: Form) -> Json | None:
    """Return what is stored of a row, whatever made it."""
    stored = read_result(NAME) if (RESULTS / f"{NAME}.json").is_file() else {"rows": []}
    return next((one for one in stored["rows"] if (one["model"], one["form"]) == (model.name, form.name)), None)


def speed_of(model: Model, form: Form, bundle: CompiledModel, source: TorchModel, data: Path) -> Json:
    """Time a bundle in turn with the float32 one, and with that of BESIDE where there is one."""
    floats = None if form is FLOAT else build(model, FLOAT, source, data).path
    found = timed(bundle.path, floats)
    if (name := BESIDE.get((model.name, form.name))) is not None:
        other = next(one for one in FORMS if one.name == name)
        found["beside"] = {"form": name, "token_ms": in_both_engines(model, (form, other), source, data)}
    return found


def put(row: Json) -> None:
    """Store one row in the place of an older one of its name."""
    result = read_result(NAME) if (RESULTS / f"{NAME}.json").is_file() else {"rows": []}
    order = [(model.name, form.name) for model, form in ROWS]
    key = (row["model"], row["form"])
    rows = [*(one for one in result["rows"] if (one["model"], one["form"]) != key), row]
    write_result(NAME, {"rows": sorted(rows, key=lambda one: order.index((one["model"], one["form"])))})


def open_source(model: Model, students: Path) -> TorchModel:
    """Open a package or a student."""
    return open_model(str(students / model.source) if model.made_by else model.source)


def build(model: Model, form: Form, source: TorchModel, data: Path, engine: str = ENGINE) -> CompiledModel:
    """Send a model down the river of one form; finished stages stay in runs/quantized."""
    folder = FOLDER / model.name / form.name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    stages = ["export", "compile"] if form.options is None else ["quantize", "export", "compile"]
    recipe_file = folder / "recipe.toml"
    recipe_file.write_text(f"stages = {json.dumps(stages)}\n", encoding="utf-8")
    settings: list[tuple[str, str, object]] = list(model.settings)
    if engine != ENGINE:  # the target's first
        settings.append(("compile", "engine", engine))
    settings += [("quantize", name, value) for name, value in settings_of(model, form).items()]
    if learns(form):
        settings.append(("quantize", "data", str(seen(model, data, trains=True))))
    if form.own_texts:
        settings.append(("quantize", "calibration", str(seen(model, data, trains=True))))
    if form.options is None:
        source = dataclasses.replace(source, weights=source.weights.as_float32())
    recipe = resolve(target="cpu", file=recipe_file, settings=settings)
    if form.max_drop:
        searched_on = None if model.search is None else str(seen(model, data, trains=False))
        how = (f"threads={THREADS}", *(model.search or ()))
        wanted = wanted_of(Asked(max_drop=form.max_drop, data=searched_on, options=how), source.info.task)
        recipe = search_plan(source, recipe, wanted, runs=folder, fresh=False, listener=Progress()).recipe
    made = run(source, recipe, out=None, runs=folder, fresh=False, listener=Progress())
    assert isinstance(made, CompiledModel)
    return made


def facts(bundle: CompiledModel) -> Json:
    """Return what is counted from a bundle's files, and what quantize said of it."""
    layers = [
        part
        for part in bundle.manifest["weights"]["parts"]
        if part["part"] != EMBEDDING and (part["storage"] != "float32" or not _quantized(bundle))
    ]
    return {
        "bundle_bytes": sum(file.stat().st_size for file in bundle.path.iterdir()),
        "layers": {key: sum(part[key] for part in layers) for key in ("parameters", "bytes")},
        "notes": [without_folders(n) for one in bundle.history if one.stage == "quantize" for n in one.notes],
    }


def _quantized(bundle: CompiledModel) -> bool:
    return any(record.stage == "quantize" for record in bundle.history)


def score(model: Model, bundle: Path, data: Path) -> Json:
    """Score a bundle; of E2E's table the meanings that no student was trained on."""
    file = split(data / model.data, FOLDER / model.name)[1] if model.name == "pair" else data / model.data
    found = evaluate(bundle, str(file), model.how, listener=Progress())
    return {
        "quality": {key: found[key] for key in ("value", "interval", "count")},
        "data": {"name": model.data, "sha256": file_sha256(data / model.data)},
        "machine": found["machine"],
    }


def timed(bundle: Path, beside: Path | None) -> Json:
    """Time a bundle, and the float32 one in turn with it, as `edgepipe measure` does; raw samples are kept."""
    came_from = provenance()
    figures = measure(bundle, TIMING, listener=Progress(), against=beside)
    sides = {"bundle": figures["bundle"], "float32": figures["baseline"]}
    ratios = figures["ratios"]
    return {
        "provenance": came_from,
        "machine": figures["machine"],
        "tokens_per_second": {name: _rate(side) for name, side in sides.items() if side},
        "time_beside_float32": ratios and ratios[BATCH if "calls" in figures["bundle"] else "token_ms"],
        "samples_ms": {name: _samples(side) for name, side in sides.items() if side},
    }


def in_both_engines(model: Model, forms: tuple[Form, Form], source: TorchModel, data: Path) -> Json:
    """Time one form's tokens in turn with another's → {engine: {threads: ratio}}; TVM's only where it is installed."""
    engines = [ENGINE]
    if importlib.util.find_spec("tvm") is None:
        _say("TVM is not installed, and not timed: pip install 'edgepipe[tvm]'")
    else:
        engines.append("tvm")
    return {engine: in_turn(*(build(model, form, source, data, engine).path for form in forms)) for engine in engines}


def in_turn(bundle: Path, beside: Path) -> Json:
    """Time a bundle's tokens in turn with another's → {threads: ratio of milliseconds with its interval}."""
    times = {}
    for threads in (1, 2):
        timing = dataclasses.replace(TIMING, threads=threads)
        times[str(threads)] = measure(bundle, timing, listener=Progress(), against=beside)["ratios"]["token_ms"]
    return times


def _rate(side: Json) -> float:
    """Return tokens a second: of calls of 8 texts of 128 tokens, or of decoding."""
    if "calls" not in side:
        return float(side["tokens_per_second"])
    return float(next(c["tokens_per_second"] for c in side["calls"] if f"{c['batch']}x{c['tokens']}" == BATCH))


def _samples(side: Json) -> list[list[list[float]]]:
    """Return [blocks][turns][…] ms: whole calls, or output tokens."""
    if "calls" not in side:
        return [[[round(ms, 3) for ms in turn] for turn in block["token_ms"]] for block in side["samples"]]
    parts = [block["calls"][BATCH] for block in side["samples"]]
    return [
        [
            [round(a + b, 3) for a, b in zip(*turn, strict=True)]
            for turn in zip(p["tokenize_ms"], p["run_ms"], strict=True)
        ]
        for p in parts
    ]


def page_section(result: Json) -> str:
    """Return a table of every model and the sentence below them, from what is stored alone."""
    lines = []
    for model in MODELS:
        rows = {row["form"]: row for row in result["rows"] if row["model"] == model.name}
        if not rows:
            continue
        first = next(iter(rows.values()))
        speed = "decode tokens/s" if model.how.metric in ("bleu", "perplexity") else "encode tokens/s"
        header = ["form", "bits/weight of the layers", "bundle, MB", model.quality, "beside float32"]
        header += [speed, "× float32", "minutes"]
        cells = [cells_of(model, form, rows) for form in FORMS if form.name in rows]
        over = f"{first['quality']['count']:,} {model.how.described.over} of `{first['data']['name']}`"
        lines.append(f"**{model.label}**, {over}{f', {model.part}' if model.part else ''}:")
        lines.append(markdown_table(header, cells))
        lines += [f"{sentence}." for form in FORMS if (sentence := decodes(form, rows))]
        lines += [note for (name, _), note in NOTES.items() if name == model.name]
    return "\n\n".join([*lines, said(result)])


def decodes(form: Form, rows: dict[str, Json]) -> str:
    """Say how fast a form decodes beside another one, which it was timed in turn with; "" where it wasn't."""
    speed = rows[form.name]["speed"] if form.name in rows else None
    if not speed or "beside" not in speed:
        return ""
    other = next(one for one in FORMS if one.name == speed["beside"]["form"])
    times = [
        f"{1 / ratio['value']:.2f} ({1 / ratio['high']:.2f} to {1 / ratio['low']:.2f}) on {threads} thread"
        f"{'s' if threads != '1' else ''} of {engine}"
        for engine, found in speed["beside"]["token_ms"].items()
        for threads, ratio in found.items()
    ]
    return f"Tokens a second, {form.label} ÷ {other.label}, in turn: {', '.join(times)}"


def cells_of(model: Model, form: Form, rows: dict[str, Json]) -> list[str]:
    """Return one line of a table."""
    row, whole = rows[form.name], rows.get(FLOAT.name)
    value, (low, high) = row["quality"]["value"], row["quality"]["interval"]
    shown = [f"{model.unit * one:.2f}" for one in (value, low, high)]
    beside = ""
    if whole is not None and form is not FLOAT:
        reference = whole["quality"]["value"]
        beside = f"{model.unit * (value - reference):+.2f}"
        if model.lower:
            beside = f"{100 * (value / reference - 1):+.1f} %"
    speed, rate, times = row["speed"], "", ""
    if speed:
        rate = f"{speed['tokens_per_second']['bundle']:,.0f}{'*' if 'stand_in' in speed else ''}"
        if ratio := speed["time_beside_float32"]:
            times = f"{1 / ratio['value']:.2f} ({1 / ratio['high']:.2f} to {1 / ratio['low']:.2f})"
    return [
        form.label,
        f"{bits_of(row):.2f}",
        f"{row['bundle_bytes'] / 1e6:.1f}",
        f"{shown[0]} ({shown[1]} to {shown[2]})",
        beside,
        rate,
        times,
        f"{row['minutes']:.1f}",
    ]


def bits_of(row: Json) -> float:
    """Return bits per weight of a row's layers, counted in the bundle's files."""
    return float(8 * row["layers"]["bytes"] / row["layers"]["parameters"])


def said(result: Json) -> str:
    """Say where the figures come from."""
    rows = result["rows"]
    sources = [one for row in rows for one in (row, row["speed"]) if one]
    made = sorted({(one["provenance"]["date"], one["provenance"]["commit"][:12]) for one in sources})
    load = [one["provenance"]["load_average_1min"] for one in sources]
    trained = ""
    if any("steps" in row["settings"] for row in rows):
        trained = f"Trained rows: {STEPS} steps (SmolLM2: {DECODER_STEPS}), the float model as teacher. "
    stands_in = ""
    if any("stand_in" in (row["speed"] or {}) for row in rows):
        stands_in = "An asterisk: timed on another model of that shape, which learnt for a few steps. "
    packages = sorted({f"{name} {version}" for row in rows for name, version in row["packages"].items()})
    return (
        f"Groups of {GROUP}, embedding at 8 bits, methods and ranges calibrated on `everyday`; 95 % intervals by "
        "bootstrap over examples. Bits are codes, scales and offsets of the layers' matrices in the file. "
        f"{trained}Speed: "
        f"{THREADS} thread, encoders 8 texts of 128 tokens a call, others the tokens behind a prompt, float32 in turn "
        "(rates are of that day's machine: compare the ratios); "
        f"where it is missing, it isn't taken yet. {stands_in}Minutes from source to bundle on a busy machine: a "
        "bound; of a row that was stopped, those since it went on. "
        f"{rows[0]['machine']['cpu']}, load average {min(load):.1f} to {max(load):.1f}, {', '.join(packages)}; "
        + ", ".join(f"{date} at `{commit}`" for date, commit in made)
        + "."
    )


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
