"""Compare bundles of TVM with onnxruntime's: outputs, times in turns at 1 and 2 threads, bytes, the limit's share.

    python benchmarks/engines.py [--blocks 3] [--only ARM]   run what isn't stored yet, rewrite docs/tvm.md's tables
    python benchmarks/engines.py --page-only                 rewrite the tables from what is stored

Both bundles of an arm come from one export, with the same codes and the same arithmetic asked for. Outputs are compared
on a shipped text that no calibration reads: of an encoder its embeddings, of a model that generates the distributions
after each token, the first half read as a prompt and the rest token by token. Times are taken as `edgepipe measure`
takes them. Every row is stored as soon as it is taken, so a run that was stopped goes on; a row is taken again when its
options changed. A quiet machine: some minutes per row and number of threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import students
from benchmarks.stored import RESULTS, ROOT, markdown_table, provenance, read_result, replace_section, write_result
from edgepipe.artifacts import CompiledModel, Json
from edgepipe.calibration import open_text
from edgepipe.measuring.run import Plan, measure_bundles
from edgepipe.pipeline import run_stages
from edgepipe.recipe import resolve
from edgepipe.report.progress import Progress
from edgepipe.runtime import open_graphs, read_bundle
from edgepipe.runtime.encoder import Encoder
from edgepipe.runtime.tokenizer import Tokenizer
from edgepipe.sources import open_model

NAME = "engines"
PAGE = ROOT / "docs" / "tvm.md"
THREADS = (1, 2)
ENGINES = ("onnxruntime", "tvm")
TEXT = "prose-eval"
TOKENS = 128  # whose outputs are compared: of every text, of a prompt with its continuation, of a source
TEXTS = 8
PERPLEXITY_TOKENS = 2048
# Where activations are rounded: the arm in float arithmetic that both engines are set beside, of the same codes but for
# MiniLM's
_FLOAT = {"minilm-int8": "minilm-float32", "smollm2-8-int8": "smollm2-8", "smollm2-4-int8": "smollm2-4"}
STUDENT_VOCABULARY = min(students.VOCABULARIES)

Setting = tuple[str, str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """Name one model in one form: what `edgepipe compress` is told of it."""

    name: str
    model: str
    form: str  # as the page calls it
    options: tuple[Setting, ...] = ()  # none: float32, not quantized


def _bits(layers: int, embedding: int, *more: Setting) -> tuple[Setting, ...]:
    own: tuple[Setting, ...] = (("quantize", "import", False), ("quantize", "bits", layers))
    return (*own, ("quantize", "embedding_bits", embedding), *more)


_DYNAMIC: Setting = ("quantize", "activations", "dynamic")
_LEVEL: Setting = ("compile", "accuracy_level", 4)
MINILM, SMOLLM2, STUDENT = "minilm-l6-v2", "smollm2-135m", "encoder-decoder student"
ARMS = (
    Arm(name="minilm-float32", model=MINILM, form="float32"),
    Arm(name="minilm-int8", model=MINILM, form="8 bits, activations too", options=_bits(8, 8, _DYNAMIC)),
    Arm(name="smollm2-8", model=SMOLLM2, form="8 bits", options=_bits(8, 8)),
    Arm(name="smollm2-8-int8", model=SMOLLM2, form="8 bits, activations too", options=_bits(8, 8, _LEVEL)),
    Arm(name="smollm2-4", model=SMOLLM2, form="4 bits", options=_bits(4, 4)),
    Arm(name="smollm2-4-int8", model=SMOLLM2, form="4 bits, activations of 8", options=_bits(4, 4, _LEVEL)),
    Arm(name="student-float32", model=STUDENT, form="float32"),
    Arm(name="student-4", model=STUDENT, form="4 bits", options=_bits(4, 4)),
)
SAME = ("model", "form", "outputs", "largest error", "KL, mean", "KL, most", "same token", "parted at most")
FLOAT = ("model", "form", "engine", "outputs", "least cosine", "KL, mean", "KL, most", "same token", "parted at most")
BYTES = ("model", "form", "code, MB", "weights, MB", "bits/weight", "onnxruntime's, MB", "compiling, s")
TIMES = ("model", "form", "threads", "of", "onnxruntime, ms", "tvm, ms", "tvm ÷ onnxruntime", "limit's share, both")


def main(arguments: list[str]) -> None:
    """Run, store and show, as the arguments say."""
    parser = argparse.ArgumentParser(description="Compare bundles of TVM with onnxruntime's.")
    parser.add_argument("--blocks", type=int, default=3, help="fresh processes per bundle (default: 3)")
    parser.add_argument("--turns", type=int, default=4, help="turns per process (default: 4)")
    parser.add_argument("--only", choices=[arm.name for arm in ARMS], help="one arm alone")
    parser.add_argument("--trial", type=Path, metavar="FILE", help="store there, and leave the page as it is")
    parser.add_argument("--page-only", action="store_true", help="rewrite the tables from what is stored")
    options = parser.parse_args(arguments)
    arms = [arm for arm in ARMS if options.only in (None, arm.name)]
    if not options.page_only:
        take(arms, options.blocks, options.turns, options.trial)
    result = stored(options.trial)
    if options.trial is None:
        replace_section(PAGE, NAME, page_section(result))
    else:
        print(page_section(result), file=sys.stderr)
    print(json.dumps({row["arm"]: row["parity"] for row in result["rows"]}))


def stored(trial: Path | None = None) -> Json:
    """Return what is stored; no rows where nothing is."""
    if trial is not None:
        found: Json = json.loads(trial.read_text(encoding="utf-8")) if trial.is_file() else {"rows": []}
        return found
    return read_result(NAME) if (RESULTS / f"{NAME}.json").is_file() else {"rows": []}


def take(arms: Sequence[Arm], blocks: int, turns: int, trial: Path | None) -> None:
    """Take the row of every arm that isn't stored as it is now."""
    result = stored(trial)
    for arm in arms:
        asked = {"options": [list(one) for one in arm.options], "blocks": blocks, "turns": turns}
        if any(row["arm"] == arm.name and row["asked"] == asked for row in result["rows"]):
            continue
        print(arm.name, file=sys.stderr, flush=True)
        row = {"arm": arm.name, "asked": asked, "provenance": provenance(), **taken(arm, blocks, turns)}
        rows = [*(other for other in result["rows"] if other["arm"] != arm.name), row]
        result = {"rows": sorted(rows, key=lambda one: [a.name for a in ARMS].index(one["arm"]))}
        if trial is None:
            write_result(NAME, result)
        else:
            trial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def taken(arm: Arm, blocks: int, turns: int) -> Json:
    """Build both bundles, compare their outputs, and let them take turns."""
    made = {engine: build(arm, engine) for engine in ENGINES}
    sides = {"baseline": made["onnxruntime"].path, "bundle": made["tvm"].path}
    text = open_text(TEXT, purpose="evaluation")
    times = {}
    for threads in THREADS:
        plan = Plan(threads=threads, blocks=blocks, turns=turns, tokens=PERPLEXITY_TOKENS)
        times[str(threads)] = measure_bundles(sides, text, plan, progress=Progress().progress)
    compiled = made["tvm"].history[-1].figures
    sides_of_float = beside_float(arm, sides, text)
    return {
        "parity": parity([sides["baseline"], sides["bundle"]], text),
        **({} if sides_of_float is None else {"beside_float": sides_of_float}),
        "bytes": {**compiled, "onnxruntime_weight_bytes": made["onnxruntime"].manifest["weights"]["bytes"]},
        "bits_per_weight": made["tvm"].manifest["weights"]["bits_per_weight"],
        "level": made["tvm"].manifest["library"]["level"],
        "times": times,
    }


def build(arm: Arm, engine: str) -> CompiledModel:
    """Send the model down the river with one engine; finished stages stay in runs/engines."""
    folder = ROOT / "runs" / NAME / arm.name
    folder.mkdir(parents=True, exist_ok=True)
    stages = [*(["quantize"] if arm.options else []), "export", "compile"]
    recipe_file = folder / "recipe.toml"
    recipe_file.write_text(f"stages = {json.dumps(stages)}\n", encoding="utf-8")
    recipe = resolve(target="cpu", file=recipe_file, settings=[*arm.options, ("compile", "engine", engine)])
    name = str(students.make_models(STUDENT_VOCABULARY, folder)["encoder-decoder"][0]) if arm.model == STUDENT else ""
    model = open_model(name or arm.model)
    if not arm.options:
        model = dataclasses.replace(model, weights=model.weights.as_float32())
    made = run_stages(model, recipe, runs=folder / "runs", fresh=False, listener=Progress())
    assert isinstance(made, CompiledModel)
    return made


def parity(bundles: Sequence[Path], text: str) -> Json:
    """Compare the outputs of two bundles on one text, each in one thread."""
    if read_bundle(bundles[0]).manifest["task"] == "feature-extraction":
        theirs, ours = (embeddings(bundle, text) for bundle in bundles)
        lengths = np.linalg.norm(theirs, axis=1) * np.linalg.norm(ours, axis=1)
        return {
            "of": f"{len(ours)} embeddings",
            "largest_error": float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
            "least_cosine": float(((theirs * ours).sum(axis=1) / lengths).min()),
        }
    theirs, ours = (next_tokens(bundle, text) for bundle in bundles)
    p, q = log_softmax(theirs), log_softmax(ours)
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    top = np.sort(p, axis=1)
    margins = (top[:, -1] - top[:, -2])[p.argmax(axis=1) != q.argmax(axis=1)]
    return {
        "of": f"{len(p)} tokens",
        "largest_error": float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
        "kl_mean": float(kl.mean()),
        "kl_most": float(kl.max()),
        "same_token": 1 - len(margins) / len(p),
        "parted_margin": float(margins.max(initial=0.0)),  # nats between the two best, of onnxruntime
    }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities of logits [tokens, vocabulary] in float64."""
    centred = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    found: np.ndarray = centred - np.log(np.exp(centred).sum(axis=1, keepdims=True))
    return found


def beside_float(arm: Arm, sides: Mapping[str, Path], text: str) -> Json | None:
    """Compare both engines with float arithmetic, where they round activations; else None."""
    if arm.name not in _FLOAT:
        return None
    plain = build(next(one for one in ARMS if one.name == _FLOAT[arm.name]), "onnxruntime").path
    return {engine: parity([plain, sides[side]], text) for side, engine in zip(sides, ENGINES, strict=True)}


def embeddings(bundle: Path, text: str) -> np.ndarray:
    """Return the embeddings [texts, width] of pieces of a text, all of them in one call."""
    opened = read_bundle(bundle)
    model = Encoder(opened, open_graphs(opened, 1))
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    texts = [model.tokenizer.decode(ids[n * TOKENS : (n + 1) * TOKENS]) for n in range(TEXTS)]
    return model.embed(texts)


def next_tokens(bundle: Path, text: str) -> np.ndarray:
    """Return the logits [TOKENS, vocabulary] after each token of a text; behind an encoder it is source and answer."""
    opened = read_bundle(bundle)
    assert opened.tokenizer is not None
    ids = Tokenizer(opened.tokenizer).encode(text)
    decoder = open_graphs(opened, 1)
    cache, source = decoder.new_cache(1), [*opened.manifest["model"].get("decoder_prefix_ids", [])]
    if source:
        decoder.read_source(cache, 0, np.array([ids[TOKENS : 2 * TOKENS]], np.int64))
    array = np.array([[*source, *ids][:TOKENS]], np.int64)
    found = []
    half = TOKENS // 2
    for start, end in [(0, half), *((i, i + 1) for i in range(half, TOKENS))]:
        places = np.arange(end - start, dtype=np.int64)[None]
        new = decoder.run(cache, array[:, start:end], np.array([start]), np.array([end - start]), places)
        found.append(new[0].copy())
    return np.concatenate(found)


def page_section(result: Json) -> str:
    """Return the page's tables and the sentences below them, from what is stored alone."""
    if not result["rows"]:
        return "Not taken yet: `python benchmarks/engines.py` does it."
    arms = {arm.name: arm for arm in ARMS}
    rows = [(arms[row["arm"]], row) for row in result["rows"]]
    first = result["rows"][0]
    machine = first["times"][str(THREADS[0])]["machine"]
    load = max(row["provenance"]["load_average_1min"] for row in result["rows"])
    commits = sorted({(row["provenance"]["date"], row["provenance"]["commit"][:12]) for row in result["rows"]})
    said = (
        f"Outputs on pieces of {TOKENS} tokens of `{TEXT}`, beside onnxruntime's bundle of the same codes: the largest "
        "error is a share of the largest value, KL is in nats a token, and where the most likely tokens differ, "
        "onnxruntime's two best lay at most so many nats apart. Where activations are rounded, each engine in its own "
        "way, the second table sets both beside float arithmetic over the same codes (MiniLM: the float32 model) and "
        "gives its margins. Times are medians, ratios are taken within turns, with "
        f"their 95 % intervals; {first['asked']['blocks']} processes of each bundle, {first['asked']['turns']} turns "
        "each. The limit is the larger of bytes over measured bandwidth and multiply-adds over the measured peak "
        f"(measure.md). The student isn't trained. {machine['cpu']}, library for {first['level']}, load average at "
        f"most {load:.1f}, onnxruntime {machine['versions']['onnxruntime']}, TVM {machine['versions']['apache-tvm']}; "
        + ", ".join(f"{date} at `{commit}`" for date, commit in commits)
        + "."
    )
    tables = (
        markdown_table(SAME, [_same(arm, row) for arm, row in rows]),
        markdown_table(FLOAT, [cells for arm, row in rows for cells in _beside(arm, row)]),
        markdown_table(BYTES, [_bytes(arm, row) for arm, row in rows]),
        markdown_table(TIMES, [cells for arm, row in rows for cells in _times(arm, row)]),
    )
    return "\n\n".join((*tables, said))


def _same(arm: Arm, row: Json) -> list[str]:
    found = row["parity"]
    cells = [arm.model, arm.form, found["of"], f"{found['largest_error']:.1e}"]
    if "kl_mean" not in found:
        return [*cells, "", "", "", ""]
    parted = f"{found['parted_margin']:.3f}" if found["same_token"] < 1 else ""
    return [*cells, f"{found['kl_mean']:.1e}", f"{found['kl_most']:.1e}", f"{found['same_token']:.1%}", parted]


def _beside(arm: Arm, row: Json) -> list[list[str]]:
    found = []
    for engine, one in row.get("beside_float", {}).items():
        if "kl_mean" not in one:
            found.append([arm.model, arm.form, engine, one["of"], f"{one['least_cosine']:.4f}", "", "", "", ""])
            continue
        kl = [f"{one[name]:.1e}" for name in ("kl_mean", "kl_most")]
        same = [f"{one['same_token']:.1%}", f"{one['parted_margin']:.3f}"]
        found.append([arm.model, arm.form, engine, one["of"], "", *kl, *same])
    return found


def _bytes(arm: Arm, row: Json) -> list[str]:
    found = row["bytes"]
    return [
        *(arm.model, arm.form, f"{found['code_bytes'] / 1e6:.2f}", f"{found['weight_bytes'] / 1e6:.1f}"),
        f"{row['bits_per_weight']:.2f}",
        f"{found['onnxruntime_weight_bytes'] / 1e6:.1f}",
        f"{found['compile_s']:.0f}",
    ]


def _times(arm: Arm, row: Json) -> list[list[str]]:
    found = []
    for threads, figures in row["times"].items():
        ours, theirs = figures["bundle"], figures["baseline"]
        for title, name, ms in _figures(ours, theirs):
            ratio = figures["ratios"][name]
            shares = [_share(side, name) for side in (theirs, ours)]
            found.append(
                [
                    *(arm.model, arm.form, threads, title, f"{ms[1]:,.2f}", f"{ms[0]:,.2f}"),
                    f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
                    "" if None in shares else " and ".join(f"{share:.0%}" for share in shares),
                ]
            )
    return found


def _figures(ours: Json, theirs: Json) -> list[tuple[str, str, tuple[float, float]]]:
    """Return what is compared: its title, the name of its ratio, ms of both sides."""
    if "calls" not in ours:
        prompt = f"first token after {ours['prompt_tokens']}"
        named = ((prompt, "ttft_ms"), ("output token", "token_ms"))
        return [(title, name, (ours[name], theirs[name])) for title, name in named]
    pairs = zip(ours["calls"], theirs["calls"], strict=True)
    return [(f"{a['batch']}×{a['tokens']}", f"{a['batch']}x{a['tokens']}", (a["ms"], b["ms"])) for a, b in pairs]


def _share(side: Mapping[str, Json], name: str) -> float | None:
    limits = side.get("limits") or {}
    found = limits.get({"ttft_ms": "prefill", "token_ms": "token"}.get(name, "")) or limits.get("calls", {}).get(name)
    return None if found is None else float(found["share"])


if __name__ == "__main__":
    main(sys.argv[1:])
