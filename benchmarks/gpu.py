"""Run bundles for NVIDIA's GPUs: outputs beside onnxruntime's, times in turns with torch; the tables of docs/gpu.md.

    python benchmarks/gpu.py --build DIR [--target cuda]   where edgepipe[compress,tvm,cuda] is; no GPU is needed
    python benchmarks/gpu.py --run DIR                     where the GPU is: results/gpu.json, the page's tables
    python benchmarks/gpu.py --page-only                   rewrite the tables from the stored run

Both may be one machine. DIR gets the bundles, and what bundles of onnxruntime with the same codes give in float32 on a
shipped text. The second command needs the base install, TVM's runtime and torch with transformers; torch runs models of
the same shapes with random weights, in float16, as it comes and recorded as a CUDA graph. A turn is a few calls of each
side; ratios are taken within turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stored import ROOT, markdown_table, provenance, read_result, replace_section, write_result
from edgepipe.artifacts import Json
from edgepipe.calibration import open_text
from edgepipe.measuring.run import describe_machine
from edgepipe.runtime import open_graphs, read_bundle
from edgepipe.runtime.tokenizer import Tokenizer

NAME, PAGE = "gpu", ROOT / "docs" / "gpu.md"
TEXT = "prose-eval"
PROMPT, STEPS = 32, 16  # tokens whose outputs are compared: read at once, and one by one
CONTEXT = 512
TURNS, CALLS, WARM = 10, 10, 5
SHAPES = ((1, 16), (1, 128), (8, 128))  # of an encoder's calls
FIRST, PLACE = 128, 256  # tokens of a prompt; cached tokens of a step, to which each of torch's adds one
_MADE = "made.json"  # where the bundles came from
SAME = ("model", "form", "outputs", "largest error", "same token", "library, MB", "weights, MB")
TIMES = ("model", "form", "of", "edgepipe, ms", "torch, ms", "torch recorded, ms", "÷ torch", "÷ torch recorded")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Name one model in one form."""

    name: str
    model: str
    form: str
    options: tuple[tuple[str, str, object], ...] = ()


def _bits(layers: int, embedding: int) -> tuple[tuple[str, str, object], ...]:
    return (("quantize", "import", False), ("quantize", "bits", layers), ("quantize", "embedding_bits", embedding))


CASES = (
    Case(name="minilm-float32", model="minilm-l6-v2", form="float32"),
    Case(name="minilm-8", model="minilm-l6-v2", form="8 bits", options=_bits(8, 8)),
    Case(name="smollm2-8", model="smollm2-135m", form="8 bits", options=_bits(8, 8)),
    Case(name="smollm2-4", model="smollm2-135m", form="4 bits", options=_bits(4, 4)),
)


def main(arguments: list[str]) -> None:
    """Build, or run, store and show, as the arguments say."""
    parser = argparse.ArgumentParser(description="Run bundles on one of NVIDIA's GPUs.")
    parser.add_argument("--build", type=Path, metavar="DIR", help="write the bundles there")
    parser.add_argument("--target", default="cuda", help="a target with a GPU (default: cuda)")
    parser.add_argument("--run", type=Path, metavar="DIR", help="run the bundles there on this machine's GPU")
    parser.add_argument("--page-only", action="store_true", help="rewrite the tables from the stored run")
    options = parser.parse_args(arguments)
    if options.build is not None:
        made = provenance()
        for case in CASES:
            build(case, options.build / case.name, options.target)
        (options.build / _MADE).write_text(json.dumps(made), encoding="utf-8")
    if options.run is not None:
        import torch

        torch.set_grad_enabled(False)
        rows = []
        for case in CASES:
            rows.append({"case": case.name, **taken(case, options.run / case.name)})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        made = json.loads((options.run / _MADE).read_text(encoding="utf-8"))
        result = {"provenance": made, "machine": describe_machine(1, ["tvm"]), **gpu(), "rows": rows}
        write_result(NAME, result)
    if options.run is not None or options.page_only:
        replace_section(PAGE, NAME, page_section(read_result(NAME)))


def build(case: Case, folder: Path, target: str) -> None:
    """Build a bundle for the GPU and write what onnxruntime's of the same codes gives into `folder`."""
    from edgepipe.pipeline import run
    from edgepipe.recipe import resolve
    from edgepipe.report.progress import Progress
    from edgepipe.sources import open_model

    folder.mkdir(parents=True, exist_ok=True)
    recipe_file = folder / "recipe.toml"
    stages = [*(["quantize"] if case.options else []), "export", "compile"]
    recipe_file.write_text(f"stages = {json.dumps(stages)}\n", encoding="utf-8")
    context = [("export", "context", CONTEXT)] if case.model.startswith("smollm2") else []
    exact = [
        ("compile", "engine", "onnxruntime"),
        ("compile", "accuracy_level", 0),
        ("compile", "cache_dtype", "float32"),
    ]
    for name, where, more in (("onnxruntime", "cpu", exact), ("bundle", target, [])):
        recipe = resolve(target=where, file=recipe_file, settings=[*case.options, *context, *more])
        model = open_model(case.model)
        run(model, recipe, out=folder / name, runs=folder / "runs", fresh=False, listener=Progress())
    np.savez(folder / "expected.npz", **outputs(folder / "onnxruntime"))


def opened(bundle: Path) -> tuple[Any, list[int], bool]:
    """Return a bundle's graphs, the ids of the text, and whether it generates."""
    found = read_bundle(bundle)
    assert found.tokenizer is not None
    ids = Tokenizer(found.tokenizer).encode(open_text(TEXT, purpose="evaluation"), add_special_tokens=False)
    return open_graphs(found, 1), ids, "decoder" in found.manifest["graphs"]


def outputs(bundle: Path) -> dict[str, np.ndarray]:
    """Return the logits [tokens, vocabulary] after each token of the text, or the embeddings of its pieces by shape."""
    graph, ids, generates = opened(bundle)
    if not generates:
        return {f"{rows}x{tokens}": graph.run(feeds(bundle, ids, rows, tokens))["embedding"] for rows, tokens in SHAPES}
    cache, found = graph.new_cache(1), []
    array = np.array([ids[: PROMPT + STEPS]], np.int64)
    for start, end in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, PROMPT + STEPS))]:
        places = np.arange(end - start, dtype=np.int64)[None]
        logits = graph.run(cache, array[:, start:end], np.array([start]), np.array([end - start]), places)
        found.append(logits[0].copy())
    return {"logits": np.concatenate(found)}


def feeds(bundle: Path, ids: Sequence[int], rows: int, tokens: int) -> dict[str, np.ndarray]:
    """Return an encoder's inputs: pieces of a text."""
    wanted = read_bundle(bundle).manifest["ends"]["model"]["inputs"]
    given = {
        "input_ids": np.array([ids[row * tokens : (row + 1) * tokens] for row in range(rows)], np.int64),
        "attention_mask": np.ones((rows, tokens), np.int64),
        "token_type_ids": np.zeros((rows, tokens), np.int64),
    }
    return {name: given[name] for name in wanted}


def taken(case: Case, folder: Path) -> Json:
    """Compare a bundle's outputs with what is expected, and time it in turns with torch."""
    bundle = folder / "bundle"
    expected, found = np.load(folder / "expected.npz"), outputs(bundle)
    errors = [float(np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max()) for name in found]
    same = None
    if "logits" in found:
        same = float((found["logits"].argmax(axis=1) == expected["logits"].argmax(axis=1)).mean())
    manifest = read_bundle(bundle).manifest
    return {
        "outputs": f"{len(found['logits'])} tokens" if same is not None else f"{sum(n for n, _ in SHAPES)} embeddings",
        "largest_error": max(errors),
        "same_token": same,
        "library_bytes": manifest["files"][manifest["library"]["file"]]["bytes"],
        "weight_bytes": manifest["weights"]["bytes"],
        "times": (generating if same is not None else encoding)(bundle),
    }


def encoding(bundle: Path) -> Json:
    """Return the times of calls of each shape."""
    import torch
    from transformers import BertConfig, BertModel

    graph, ids, _ = opened(bundle)
    sizes = {"vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
    config = BertConfig(**sizes, intermediate_size=1536)
    theirs = BertModel(config, add_pooling_layer=False).eval().to("cuda", torch.float16)
    found = {}
    for rows, tokens in SHAPES:
        given = feeds(bundle, ids, rows, tokens)
        tensors = {name: torch.tensor(given[name], device="cuda") for name in ("input_ids", "attention_mask")}

        def ours(given: Any = given) -> None:
            graph.run(given)

        def their(tensors: Any = tensors) -> Any:
            return theirs(**tensors).last_hidden_state

        found[f"{rows}×{tokens}"] = in_turns(ours, their, recorded(their))
    return found


def generating(bundle: Path) -> Json:
    """Return the times of a prompt and of a step behind cached tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    graph, ids, _ = opened(bundle)
    cache = graph.new_cache(1)

    def run(tokens: Sequence[int], past: int) -> None:
        count = len(tokens)
        graph.run(cache, np.array([tokens], np.int64), np.array([past]), np.array([count]), np.array([[count - 1]]))

    sizes = {"vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9}
    config = LlamaConfig(**sizes, num_key_value_heads=3, head_dim=64, intermediate_size=1536, tie_word_embeddings=True)
    theirs = LlamaForCausalLM(config).eval().to("cuda", torch.float16)
    prompt = torch.tensor([ids[:FIRST]], device="cuda")
    filled = StaticCache(config=config, max_cache_len=CONTEXT)
    theirs(torch.tensor([ids[:PLACE]], device="cuda"), past_key_values=filled, logits_to_keep=1)
    one, place = prompt[:, :1].clone(), torch.full((1, 1), PLACE, device="cuda")

    def step() -> Any:
        return theirs(one, position_ids=place, past_key_values=filled).logits

    run(ids[:PLACE], 0)
    steps = in_turns(lambda: run(ids[:1], PLACE), step, recorded(step))
    first = in_turns(lambda: run(ids[:FIRST], 0), lambda: theirs(prompt, logits_to_keep=1).logits, None)
    return {f"first token after {FIRST}": first, f"token after {PLACE}": steps}


def recorded(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return what launches the kernels of a call of torch's at once."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Callable[[], Any] = graph.replay
    return replay


def in_turns(*sides: Callable[[], Any] | None) -> Json:
    """Return the median ms of each side, and what the first takes of each other's time, within turns."""
    import torch

    def once(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    there = [side for side in sides if side is not None]
    for side in there:
        for _ in range(WARM):
            once(side)
    turns = [[statistics.median(once(side) for _ in range(CALLS)) for side in there] for _ in range(TURNS)]
    ratios = [sorted(turn[0] / turn[other] for turn in turns) for other in range(1, len(there))]
    return {
        "ms": [statistics.median(column) for column in zip(*turns, strict=True)],
        "ratios": [{"value": statistics.median(one), "least": one[0], "most": one[-1]} for one in ratios],
    }


def gpu() -> Json:
    """Return what the figures were taken on."""
    import torch
    import transformers

    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def page_section(result: Json) -> str:
    """Return the page's tables and the sentence below them, from what is stored alone."""
    cases = {case.name: case for case in CASES}
    same, times = [], []
    for row in result["rows"]:
        case = cases[row["case"]]
        token = "" if row["same_token"] is None else f"{row['same_token']:.0%}"
        sizes = [f"{row[name] / 1e6:.1f}" for name in ("library_bytes", "weight_bytes")]
        same.append([case.model, case.form, row["outputs"], f"{row['largest_error']:.0e}", token, *sizes])
        for of, found in row["times"].items():
            ms = [f"{value:.2f}" for value in found["ms"]]
            ratios = [f"{r['value']:.2f} ({r['least']:.2f} to {r['most']:.2f})" for r in found["ratios"]]
            times.append(
                [case.model, case.form, of, *(ms + [""] * (3 - len(ms))), *(ratios + [""] * (2 - len(ratios)))]
            )
    made = result["provenance"]
    versions = result["machine"]["versions"]
    return (
        f"{markdown_table(SAME, same)}\n\n{markdown_table(TIMES, times)}\n\n"
        f"Outputs on `{TEXT}` beside onnxruntime's in float32, of the same codes; errors are a share of the largest "
        f"value. {result['gpu']} (sm_{''.join(map(str, result['capability']))}), TVM {versions['apache-tvm']}; torch "
        f"{result['torch']} with transformers {result['transformers']} in float16, random weights. Medians, and ratios "
        f"within {TURNS} turns with the least and the most; bundles of {made['date']} at `{made['commit'][:12]}`."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
