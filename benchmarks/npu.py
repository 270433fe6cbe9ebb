"""Compile models for an NPU and hold what its emulator gives against float32: the tables of docs/npu.md.

    python benchmarks/npu.py [--data FILE]   run what isn't stored yet, store results/npu.json, rewrite the tables
    python benchmarks/npu.py --page-only     rewrite the tables from the stored run

FILE is STS-B dev (default: stsb-dev.tsv in the folder that EDGEPIPE_DATA names). Pairs are drawn with a seed; both of
their sentences go through the float32 bundle for the CPU and through the NPU's in the emulator, seconds each. A row is
kept as soon as it is there, and run again only when `--fresh` asks. Finished bundles stay in runs/npu. A student is
taught before: the folder must hold the files of benchmarks/embedding.py. A decoder reads the first tokens of a shipped
text, each after the real ones before it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.embedding import LAYERS, TEACHER, TOKENS, Arm, taught, training_files, trimmed
from benchmarks.stored import (
    RESULTS,
    ROOT,
    markdown_table,
    provenance,
    read_result,
    replace_section,
    write_result,
)
from edgepipe.artifacts import CompiledModel, Json
from edgepipe.measuring.run import describe_machine
from edgepipe.measuring.scores import spearman
from edgepipe.pipeline import run
from edgepipe.recipe import resolve
from edgepipe.report.progress import Progress
from edgepipe.runtime import Encoder, Model, load, open_graphs, read_bundle
from edgepipe.runtime.sampling import log_softmax
from edgepipe.sources import open_model
from edgepipe.store import file_sha256

NAME = "npu"
PAGE = ROOT / "docs" / "npu.md"
SEED = 0
TEXT = "prose-eval"  # that decoders are scored on
STUDENT = Arm(
    name="student",
    label="mask removed, ranking of scored pairs",
    data="pairs",
    settings={
        **{"encoder_from": LAYERS, "batch": 32, "steps": 150, "learning_rate": 2e-4},
        **{"max_source": TOKENS, "cut": True, "held_out": 0.05, "dropout": 0.1},
    },
)
HEADER = (
    *("model", "target", "nodes on the NPU", "bundle, MB", "float32, MB", "sentences"),
    *("cosine to float32, mean", "worst", "pairs", "Spearman", "of float32"),
)
_SCORE, _FIRST, _SECOND = 4, 5, 6  # columns of STS-B


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Name a model and a target, and how many pairs of sentences are emulated."""

    model: str  # a packaged model, or "student"
    target: str
    pairs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Name a decoder and a target, the places of its cache, and how many tokens of a text are emulated."""

    model: str
    target: str
    context: int
    tokens: int


STEPS = (Step(model=TEACHER, target="snapdragon-8gen3-htp", context=128, tokens=64),)
CASES = (
    Case(model="minilm-l6-v2", target="snapdragon-8gen3-htp", pairs=25),
    Case(model="student", target="snapdragon-8gen3-htp", pairs=100),
    Case(model="minilm-l6-v2", target="snapdragon-x-elite-htp", pairs=10),
)


def main(arguments: list[str]) -> None:
    """Run, store and show, as the arguments say."""
    parser = argparse.ArgumentParser(description="Hold models on an emulated NPU against float32.")
    folder = Path(os.environ.get("EDGEPIPE_DATA", "."))
    parser.add_argument("--data", type=Path, default=folder / "stsb-dev.tsv", help="the dev set of STS-B")
    parser.add_argument("--page-only", action="store_true", help="rewrite the tables from the stored run")
    parser.add_argument("--encoders", action="store_true", help="leave decoders out")
    parser.add_argument("--fresh", action="store_true", help="run what is stored again")
    options = parser.parse_args(arguments)
    stored: Json = read_result(NAME) if (RESULTS / f"{NAME}.json").is_file() and not options.fresh else {"rows": []}
    for case in () if options.page_only else CASES:
        if any((row["model"], row["target"]) == (case.model, case.target) for row in stored["rows"]):
            continue
        row = measure(case, options.data)
        print(json.dumps({key: value for key, value in row.items() if key != "cosines"}), file=sys.stderr, flush=True)
        stored["rows"].append(row)
        stored["machine"] = describe_machine(0)
        stored["data"] = {"name": options.data.name, "sha256": file_sha256(options.data)}
        write_result(NAME, stored)
    for step in () if options.page_only or options.encoders else STEPS:
        if any((row["model"], row["target"]) == (step.model, step.target) for row in stored.get("steps", ())):
            continue
        stored.setdefault("steps", []).append(measure_step(step))
        write_result(NAME, stored)
    replace_section(PAGE, NAME, page_section(stored))
    print(json.dumps({f"{row['model']} {row['target']}": min(row["cosines"]) for row in stored["rows"]}))


def measure(case: Case, data: Path) -> Json:
    """Build both bundles of a case and run the pairs through them."""
    came_from = provenance()
    source = student(data.parent) if case.model == "student" else case.model
    plain, npu = (build(case.model, source, target) for target in ("cpu", case.target))
    rows = [line.split("\t") for line in data.read_text(encoding="utf-8").splitlines()]
    drawn = [rows[i] for i in sorted(np.random.default_rng(SEED).permutation(len(rows))[: case.pairs])]
    texts = [row[column] for row in drawn for column in (_FIRST, _SECOND)]
    float32, started = embedded(plain, texts), time.perf_counter()
    emulated = embedded(npu, texts)
    seconds = time.perf_counter() - started
    scores = np.array([float(row[_SCORE]) for row in drawn])
    return {
        "provenance": came_from,
        "model": case.model,
        "target": case.target,
        "npu": {key: npu.manifest["npu"][key] for key in ("nodes", "on_npu", "share", "tokens", "leftovers")},
        "bundle_bytes": {"float32": bytes_of(plain), "npu": bytes_of(npu)},
        "parameters": npu.manifest["weights"]["parameters"],
        "pairs": len(drawn),
        "cosines": [float(value) for value in cosines(emulated, float32)],
        "spearman": {
            "float32": spearman(np.stack([cosines(float32[::2], float32[1::2]), scores], 1)),
            "npu": spearman(np.stack([cosines(emulated[::2], emulated[1::2]), scores], 1)),
        },
        "emulated_s": round(seconds / len(texts), 2),
    }


def measure_step(step: Step) -> Json:
    """Build both bundles of a decoder and run the tokens of a text through them, each after those before it."""
    came_from = provenance()
    settings: list[tuple[str, str, object]] = [("export", "context", step.context)]
    plain = build(step.model, step.model, "cpu", [*settings, ("compile", "cache_dtype", "float32")])
    npu = build(step.model, step.model, step.target, [*settings, ("compile", "tokens", step.context)])
    text = (ROOT / "calibration" / f"{TEXT}.txt").read_text(encoding="utf-8")
    model = load(plain.path)
    assert isinstance(model, Model)
    ids = model.encode(text)[: step.tokens]
    expected = step_logits(plain.path, ids)
    started = time.perf_counter()
    found = step_logits(npu.path, ids)
    seconds = time.perf_counter() - started
    before, after = (log_softmax(logits.astype(np.float64)) for logits in (expected, found))
    told = np.arange(len(ids) - 1), np.array(ids[1:])
    return {
        "provenance": came_from,
        "model": step.model,
        "target": step.target,
        "text": TEXT,
        "context": step.context,
        "tokens": len(ids),
        "npu": {key: npu.manifest["npu"][key] for key in ("nodes", "on_npu", "share", "tokens", "leftovers")},
        "cache_bytes": npu.manifest["cache"]["bytes"],
        "bundle_bytes": {"float32": bytes_of(plain), "npu": bytes_of(npu)},
        "divergence": [float(value) for value in np.sum(np.exp(before) * (before - after), 1)],
        "same_token": [bool(value) for value in before.argmax(1) == after.argmax(1)],
        "loss": {"float32": float(-before[told].mean()), "npu": float(-after[told].mean())},
        "emulated_s": round(seconds / len(ids), 2),
    }


def step_logits(bundle: Path, ids: list[int]) -> np.ndarray:
    """Return the logits [n, vocab] after each of n ids."""
    decoder = open_graphs(read_bundle(bundle), None)
    count = len(ids)
    rows = np.array([ids], np.int64), np.zeros(1, np.int64), np.array([count]), np.arange(count)[None]
    logits: np.ndarray = decoder.run(decoder.new_cache(1), *rows)[0]
    return logits.copy()


def student(data: Path) -> str:
    """Return the directory of an encoder of sentences: first layers of a decoder, taught with the pairs of STS-B train.

    `data` is the folder of STS-B, SST-2 and WikiText; the vocabulary is trimmed to the sentences.
    """
    folder = ROOT / "runs" / NAME
    folder.mkdir(parents=True, exist_ok=True)
    files, _ = training_files(data, folder)
    place, _ = taught(STUDENT, SEED, trimmed(files["sentences"], folder), files, folder)
    return str(place)


def build(name: str, source: str, target: str, settings: list[tuple[str, str, object]] | None = None) -> CompiledModel:
    """Send a model down the river without a stage that rounds."""
    folder = ROOT / "runs" / NAME / f"{name}-{target}"
    folder.mkdir(parents=True, exist_ok=True)
    recipe_file = folder / "recipe.toml"
    recipe_file.write_text('stages = ["export", "compile"]\n', encoding="utf-8")
    made = run(
        open_model(source),
        resolve(target=target, file=recipe_file, settings=settings or []),
        out=folder / "bundle",
        runs=folder,
        fresh=False,
        listener=Progress(),
    )
    assert isinstance(made, CompiledModel)
    return made


def embedded(bundle: CompiledModel, texts: list[str]) -> np.ndarray:
    """Return the embeddings [n, width] of texts."""
    encoder = load(bundle.path)
    assert isinstance(encoder, Encoder)
    return encoder.embed(texts)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of each row of a with that of b."""
    return np.sum(a * b, 1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def bytes_of(bundle: CompiledModel) -> int:
    """Return the bytes of a bundle's directory."""
    return sum(file.stat().st_size for file in bundle.path.iterdir())


def page_section(result: Json) -> str:
    """Return the page's tables, each with a sentence below it, from a stored run alone."""
    return encoders_section(result) + (f"\n\n{steps_section(result)}" if result.get("steps") else "")


def encoders_section(result: Json) -> str:
    """Return the table of encoders and the sentence below it."""
    cells = [
        [
            "taught student" if row["model"] == "student" else row["model"],
            row["target"],
            f"{row['npu']['on_npu']} of {row['npu']['nodes']} ({row['npu']['on_npu'] / row['npu']['nodes']:.1%})",
            f"{row['bundle_bytes']['npu'] / 1e6:.1f}",
            f"{row['bundle_bytes']['float32'] / 1e6:.1f}",
            str(len(row["cosines"])),
            f"{np.mean(row['cosines']):.4f}",
            f"{min(row['cosines']):.4f}",
            str(row["pairs"]),
            f"{row['spearman']['npu']:.4f}",
            f"{row['spearman']['float32']:.4f}",
        ]
        for row in result["rows"]
    ]
    made = sorted({(row["provenance"]["date"], row["provenance"]["commit"][:12]) for row in result["rows"]})
    versions = result["rows"][0]["provenance"]["versions"]
    first, said = result["rows"][0], ""
    if any(row["model"] == "student" for row in result["rows"]):
        steps, batch = STUDENT.settings["steps"], STUDENT.settings["batch"]
        said = (
            f"The student is the first {len(LAYERS)} layers of {TEACHER} without its mask, taught {steps} steps of "
            f"{batch} scored pairs of STS-B train, its vocabulary trimmed to their sentences. "
        )
    return (
        f"{markdown_table(HEADER, cells)}\n\n"
        f"Pairs of `{result['data']['name']}` drawn with seed {SEED}, all texts {first['npu']['tokens']} tokens. {said}"
        f"Emulated by onnxruntime-qnn {versions['onnxruntime-qnn']} on {result['machine']['cpu']}; "
        + ", ".join(f"{date} at `{commit}`" for date, commit in made)
        + "."
    )


def steps_section(result: Json) -> str:
    """Return the table of decoders and the sentence below it."""
    header = (
        *("model", "target", "nodes on the NPU", "bundle, MB", "beside, MB", "context", "cache, MB", "tokens"),
        *("KL to float32, nats", "same likeliest token", "perplexity", "of float32"),
    )
    cells = [
        [
            *(row["model"], row["target"]),
            f"{row['npu']['on_npu']} of {row['npu']['nodes']} ({row['npu']['on_npu'] / row['npu']['nodes']:.1%})",
            f"{row['bundle_bytes']['npu'] / 1e6:.1f}",
            f"{row['bundle_bytes']['float32'] / 1e6:.1f}",
            str(row["context"]),
            f"{row['cache_bytes'] / 1e6:.1f}",
            str(row["tokens"]),
            f"{np.mean(row['divergence']):.3f}",
            f"{sum(row['same_token'])} of {row['tokens']}",
            f"{np.exp(row['loss']['npu']):.2f}",
            f"{np.exp(row['loss']['float32']):.2f}",
        ]
        for row in result["steps"]
    ]
    made = sorted({(row["provenance"]["date"], row["provenance"]["commit"][:12]) for row in result["steps"]})
    first = result["steps"][0]
    return (
        f"{markdown_table(header, cells)}\n\n"
        f"The first {first['tokens']} tokens of `{first['text']}`, one a call, each after the real ones before it; "
        f"{first['emulated_s']:.0f} s each in the emulator on a busy machine. Perplexity over so few is rough, "
        "the divergence is not. The bundle beside it has float32 arithmetic and cache, and the weights as the package "
        "stores them, in 4 to 8 bits; for the NPU those were rounded once more, to 8. "
        f"Emulated on {result['machine']['cpu']}; " + ", ".join(f"{date} at `{commit}`" for date, commit in made) + "."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
