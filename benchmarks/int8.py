"""Compare 8-bit activations of a sentence encoder with its float form, onnxruntime's own recipe and OpenVINO's.

    python benchmarks/int8.py --data FILE [--turns 40]   run what isn't stored yet, rewrite docs/quantize.md's table
    python benchmarks/int8.py --page-only                rewrite the table from what is stored

FILE holds pairs of sentences with a score that people gave: the dev set of STS-B. Every row is stored as soon as it is
scored, so a run that was stopped goes on. The peer is `onnxruntime.quantization.quantize_dynamic` at its defaults on
torch's export of the same module (opset 17: on opset 23 it writes an Attention that onnxruntime refuses to load). Speed
is that of texts of 128 tokens, 8 at a time; the sessions take turns, so that a busy machine slows all of them, the
peer's with onnxruntime's default options. OpenVINO's row (int8_openvino.py) is run where its packages are installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from benchmarks import int8_openvino
from benchmarks.stored import RESULTS, ROOT, markdown_table, provenance, read_result, replace_section, write_result
from edgepipe.artifacts import CompiledModel, Json
from edgepipe.evaluate import evaluate
from edgepipe.graph.framework import build_module, fill_module
from edgepipe.graph.modules import one_graph
from edgepipe.measuring.examples import read_pairs
from edgepipe.measuring.intervals import ratio_over_rounds
from edgepipe.measuring.metrics import Evaluation
from edgepipe.measuring.run import describe_machine
from edgepipe.measuring.scores import bootstrap, spearman
from edgepipe.measuring.tasks import similarity_rows
from edgepipe.pipeline import run
from edgepipe.quantizers.texts import Calibration, batches
from edgepipe.recipe import resolve
from edgepipe.report.progress import Progress
from edgepipe.rows import open_data
from edgepipe.runtime.bundle import read_bundle
from edgepipe.runtime.encoder import Encoder
from edgepipe.runtime.onnxruntime import open_session
from edgepipe.sources import open_model
from edgepipe.store import file_sha256, read_json, write_json

NAME = "int8"
PAGE = ROOT / "docs" / "quantize.md"
MODEL = "minilm-l6-v2"
ROWS, TOKENS, THREADS = 8, 128, 1
SCORED = Evaluation(metric="spearman", threads=THREADS)
OPSET = 17  # of the graph that the peer quantizes
PEER, OPENVINO = "peer", "openvino"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
HEADER = ("layers", "activations", "bundle, MB", "Spearman", "points beside float", "tokens/s", "beside the peer")
# What multiplies a weight, as the optimized graph has it; products of two activations (attention) are not counted.
INTEGER = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """Name one form of the model, and the options of quantize that make it; None: not compressed."""

    name: str
    layers: str
    activations: str
    options: dict[str, object] | None = field(default_factory=dict)


def _arm(name: str, shown: str, kind: str, more: dict[str, object] | None = None) -> Arm:
    options = {"bits": 8, "activations": kind, **(more or {})}
    return Arm(name=name, layers="8-bit, a scale a row", activations=shown, options=options)


ARMS = (
    Arm(name="float32", layers="float32", activations="float32", options=None),
    Arm(name="weights", layers="8-bit, groups of 32", activations="float32", options={"bits": 8}),
    _arm("dynamic", "8-bit dynamic", "dynamic"),
    _arm("static", "8-bit static, min-max", "static"),
    _arm("percentile", "8-bit static, percentile", "static", {"ranges": "percentile"}),
    _arm("entropy", "8-bit static, entropy", "static", {"ranges": "entropy"}),
    _arm("smooth-0.5", "8-bit static, SmoothQuant 0.5", "static", {"smooth": 0.5}),
    _arm("smooth-0.7", "8-bit static, SmoothQuant 0.7", "static", {"smooth": 0.7}),
    _arm("smooth-0.9", "8-bit static, SmoothQuant 0.9", "static", {"smooth": 0.9}),
    Arm(name=PEER, layers="8-bit, one scale", activations="8-bit dynamic, by onnxruntime's quantize_dynamic"),
    Arm(name=OPENVINO, layers="8-bit, a scale a row", activations="8-bit static, by NNCF, in OpenVINO's runtime"),
)
TIMED = ("float32", "weights", "dynamic", "static", "smooth-0.9", PEER, OPENVINO)


def main(arguments: list[str]) -> None:
    """Run, store and show, as the arguments say."""
    parser = argparse.ArgumentParser(description="Compare 8-bit activations of a sentence encoder.")
    default = Path(os.environ.get("EDGEPIPE_DATA", ".")) / "stsb-dev.tsv"
    parser.add_argument("--data", type=Path, default=default, help="pairs of sentences with a score, .tsv")
    parser.add_argument("--turns", type=int, default=40, help="turns of the timing (default: 40)")
    parser.add_argument("--page-only", action="store_true", help="rewrite the table from what is stored")
    options = parser.parse_args(arguments)
    if not options.page_only:
        take(options.data, options.turns)
    result = read_result(NAME)
    replace_section(PAGE, NAME, page_section(result))
    print(json.dumps({row["arm"]: round(row["spearman"]["value"], 4) for row in result["rows"]}))


def take(data: Path, turns: int) -> None:
    """Score every arm that isn't stored as it is now, then time them all if anything is new."""
    place = RESULTS / f"{NAME}.json"
    result: Json = read_result(NAME) if place.is_file() else {"rows": [], "model": MODEL}
    for arm in ARMS:
        stored = next((row for row in result["rows"] if row["arm"] == arm.name), None)
        if stored is not None and stored["options"] == arm.options:
            continue
        if arm.name == OPENVINO and (absent := int8_openvino.missing()):
            print(f"{arm.name}: left out, the package {absent} is missing", file=sys.stderr, flush=True)
            continue
        print(arm.name, file=sys.stderr, flush=True)
        came_from = provenance()
        found = openvino_row(data) if arm.name == OPENVINO else scored(arm, data)
        row = {"arm": arm.name, "options": arm.options, "provenance": came_from, **found}
        result["rows"] = [*(other for other in result["rows"] if other["arm"] != arm.name), row]
        result["data"] = {"name": data.name, "sha256": file_sha256(data)}
        result.pop("timing", None)
        write_result(NAME, result)
    if "timing" not in result:
        result["timing"] = timing([arm for arm in ARMS if arm.name in TIMED and row_of(result, arm.name)], turns)
        write_result(NAME, result)


def row_of(result: Json, name: str) -> Json | None:
    """Return what is stored of an arm."""
    return next((row for row in result["rows"] if row["arm"] == name), None)


def scored(arm: Arm, data: Path) -> Json:
    """Score a bundle, and count what it is made of."""
    bundle = bundle_of(arm)
    found = evaluate(bundle, str(data), SCORED, listener=Progress())
    return {
        "spearman": {key: found[key] for key in ("value", "interval", "count")},
        "bundle_bytes": sum(file.stat().st_size for file in bundle.iterdir()),
        **facts(bundle),
    }


def openvino_graph() -> Path:
    """Return OpenVINO's quantized graph; a finished one stays in runs/int8."""
    folder = ROOT / "runs" / NAME / OPENVINO
    made = folder / f"{int8_openvino.NAME}.xml"
    if made.is_file():
        return made
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    feeds = [
        dict(zip(INPUTS, (one.input_ids, one.attention_mask, np.zeros_like(one.input_ids)), strict=True))
        for one in batches(open_model(MODEL), Calibration())
    ]
    return int8_openvino.quantize(exported(folder), feeds, folder)


def openvino_row(data: Path) -> Json:
    """Score OpenVINO's graph with our tokenizer, pairs and metric."""
    xml = openvino_graph()
    graph = int8_openvino.Opened(xml, THREADS)
    model = Encoder(read_bundle(bundle_of(ARMS[0])), graph)
    opened = open_data(str(data))
    pairs = read_pairs(opened, SCORED.places(opened.suffix))
    rows = similarity_rows(model, pairs, SCORED.batch, lambda _done, _total: None)
    interval = bootstrap(spearman, rows, seed=0)
    assert interval is not None
    return {
        "spearman": {"value": spearman(rows), "interval": [interval.low, interval.high], "count": len(rows)},
        "bundle_bytes": sum(xml.with_suffix(end).stat().st_size for end in (".xml", ".bin")),
        "integer_products": graph.integer_products(),
        "packages": int8_openvino.versions(),
    }


def bundle_of(arm: Arm) -> Path:
    """Return the bundle of an arm; finished ones stay in runs/int8."""
    folder = ROOT / "runs" / NAME / arm.name
    if arm.name == PEER:
        return peer_bundle(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stages = ["export", "compile"] if arm.options is None else ["quantize", "export", "compile"]
    recipe_file = folder / "recipe.toml"
    recipe_file.write_text(f"stages = {json.dumps(stages)}\n", encoding="utf-8")
    settings: list[tuple[str, str, object]] = [("quantize", key, value) for key, value in (arm.options or {}).items()]
    model = open_model(MODEL)
    if arm.options is None:
        model = dataclasses.replace(model, weights=model.weights.as_float32())
    recipe = resolve(target="cpu", file=recipe_file, settings=settings)
    made = run(model, recipe, out=None, runs=folder, fresh=False, listener=Progress())
    assert isinstance(made, CompiledModel)
    return made.path


def peer_bundle(folder: Path) -> Path:
    """Return the float bundle with the peer's graph in place of ours, so that both are scored by one runtime."""
    bundle = folder / "bundle"
    if (bundle / "manifest.json").is_file():
        return bundle
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    quantized = peer_graph(folder)
    shutil.copytree(bundle_of(ARMS[0]), bundle)
    shutil.move(quantized, bundle / "model.onnx")
    (bundle / "weights.bin").write_bytes(b"")  # the peer's weights are in its graph
    manifest = read_json(bundle / "manifest.json")
    for name in ("model.onnx", "weights.bin"):
        manifest["files"][name] = {"bytes": (bundle / name).stat().st_size, "sha256": file_sha256(bundle / name)}
    manifest["weights"]["bytes"] = 0
    write_json(bundle / "manifest.json", manifest)
    return bundle


def peer_graph(folder: Path) -> Path:
    """Quantize torch's export by onnxruntime's recipe, at the defaults of both."""
    from onnxruntime.quantization import quantize_dynamic

    graph = exported(folder)
    logging.disable(logging.WARNING)  # it advises a step for images
    quantize_dynamic(graph, folder / "quantized.onnx")
    logging.disable(logging.NOTSET)
    graph.unlink()
    return folder / "quantized.onnx"


def exported(folder: Path) -> Path:
    """Export the module by torch as usual, which both peers begin with."""
    import torch

    model = open_model(MODEL)
    module = build_module(model.info)
    fill_module(module, model.weights)
    module.set_attn_implementation("eager")
    whole = one_graph(module, ("last_hidden_state",), "mean", normalize=True).eval()
    ids = torch.arange(18).reshape(2, 9)
    example = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    axes = {name: {0: "batch", 1: "sequence"} for name in (*INPUTS, "last_hidden_state")}
    torch.onnx.export(
        whole,
        example,
        str(folder / "float.onnx"),
        input_names=list(INPUTS),
        output_names=["embedding", "last_hidden_state"],
        dynamic_axes={**axes, "embedding": {0: "batch"}},
        opset_version=OPSET,
        dynamo=False,
    )
    return folder / "float.onnx"


def facts(bundle: Path) -> Json:
    """Return what no busy machine can move: the operators of the optimized graph, and its integer products' weights."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        ort.InferenceSession(str(bundle / "model.onnx"), options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node
    operators = Counter(node.op_type for node in nodes)
    return {"operators": dict(operators), "integer_products": sum(operators[name] for name in INTEGER)}


def timing(arms: Sequence[Arm], turns: int) -> Json:
    """Return the seconds of every session's runs of one batch, turn after turn, each starting with another one."""
    sessions = {arm.name: _opened(arm) for arm in arms}
    ids = np.random.default_rng(0).integers(1000, 30000, (ROWS, TOKENS), dtype=np.int64)
    feeds = dict(zip(INPUTS, (ids, np.ones_like(ids), np.zeros_like(ids)), strict=True))
    names = list(sessions)
    came_from = provenance()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns + 2):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = time.perf_counter()
            sessions[name](feeds)
            if turn > 1:  # two turns warm up
                seconds[name].append(time.perf_counter() - started)
    seed = int(hashlib.sha256(NAME.encode()).hexdigest()[:8], 16)
    ratios = {name: ratio_over_rounds(seconds[PEER], seconds[name], seed=seed) for name in names if name != PEER}
    return {
        "provenance": came_from,
        "machine": describe_machine(THREADS),
        "seconds": seconds,
        "beside_peer": {name: ratio.to_json(bigger_is_better=True) for name, ratio in ratios.items()},
    }


def _opened(arm: Arm) -> Callable[[Mapping[str, np.ndarray]], object]:
    """Open a graph as the runtime does, and the peers' as everybody does."""
    if arm.name == OPENVINO:
        return int8_openvino.Opened(openvino_graph(), THREADS).run
    graph = bundle_of(arm) / "model.onnx"
    if arm.name == PEER:
        options = ort.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.log_severity_level = 3
        session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    else:
        session = open_session(graph, THREADS)
    return lambda feeds: session.run(["embedding"], feeds)


def page_section(result: Json) -> str:
    """Return the page's table and the sentences below it, from what is stored alone."""
    rows = {row["arm"]: row for row in result["rows"]}
    timed, cells = result["timing"], []
    arms = [arm for arm in ARMS if arm.name in rows]  # a run that was stopped shows what it has
    reference = rows["float32"]["spearman"]["value"]
    for arm in arms:
        row = rows[arm.name]
        value, (low, high) = row["spearman"]["value"], row["spearman"]["interval"]
        seconds = timed["seconds"].get(arm.name)
        beside: dict[str, Any] | None = timed["beside_peer"].get(arm.name)
        cells.append(
            [
                arm.layers,
                arm.activations,
                f"{row['bundle_bytes'] / 1e6:.1f}",
                f"{value:.4f} ({low:.4f} to {high:.4f})",
                "" if arm.name == "float32" else f"{100 * (value - reference):+.2f}",
                "" if seconds is None else f"{ROWS * TOKENS / statistics.median(seconds):,.0f}",
                "" if beside is None else f"{beside['value']:.2f} ({beside['low']:.2f} to {beside['high']:.2f})",
            ]
        )
    products = [rows[name]["integer_products"] for name in ("dynamic", PEER, OPENVINO) if name in rows]
    packages = "".join(f", {name} {one}" for name, one in rows.get(OPENVINO, {}).get("packages", {}).items())
    commits = sorted({(row["provenance"]["date"], row["provenance"]["commit"][:12]) for row in result["rows"]})
    load = timed["provenance"]["load_average_1min"]
    said = (
        f"{result['model']} on {rows['float32']['spearman']['count']} pairs of `{result['data']['name']}`, 95 % "
        f"intervals by bootstrap; points are hundredths of Spearman. Speed: {ROWS} texts of {TOKENS} tokens at once, "
        f"{THREADS} thread, median of {len(timed['seconds'][PEER])} turns in which all took part, and the median over "
        f"turns of the peer's time by ours, with its 95 % interval. Integer products in the optimized graph: "
        f"{', '.join(map(str, products))} (ours, onnxruntime's recipe, OpenVINO's if it was run). "
        f"{timed['machine']['cpu']}, load average {load:.1f}, onnxruntime "
        f"{timed['provenance']['versions']['onnxruntime']}{packages}; "
        + ", ".join(f"{date} at `{commit}`" for date, commit in commits)
        + "."
    )
    return f"{markdown_table(HEADER, cells)}\n\n{said}"


if __name__ == "__main__":
    main(sys.argv[1:])
