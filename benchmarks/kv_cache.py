"""Time attention over caches of float32, float16 and int8: the operator as the lowering writes it, alone.

    python benchmarks/kv_cache.py               run, store results/kv_cache.json, rewrite docs/quantize.md's table
    python benchmarks/kv_cache.py --page-only   rewrite the table from the stored run

One layer with the heads of SmolLM2-135M, one thread, whose processor time is taken: what else the machine does counts
little, and the three caches take turns. A prompt runs in pieces of 128, as the runtime runs it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from benchmarks.stored import ROOT, markdown_table, provenance, read_result, replace_section, write_result
from edgepipe.engines.onnxruntime import CACHE_DTYPES
from edgepipe.engines.onnxruntime.fuse_attention import fuse_attention
from edgepipe.graph.dialect import GraphBuilder
from edgepipe.machine.facts import cpu_name

NAME = "kv_cache"
PAGE = ROOT / "docs" / "quantize.md"
HEADS, KV_HEADS, WIDTH, CONTEXT = 9, 3, 64, 2048
PIECE = 128
TOKENS = (128, 1024, 2047)  # in the cache before a step; a prompt of as many
STEPS, PROMPTS = 60, 5  # turns
KINDS = ("key", "value")
HEADER = ("tokens", "KV cache", "bytes a token and layer", "a step, µs", "a prompt, ms")

Run = Callable[[int, int], float]  # (tokens in the cache, new ones) → seconds of the processor


def main(arguments: list[str]) -> None:
    """Run, store and show, as the arguments say."""
    parser = argparse.ArgumentParser(description="Time attention over caches of other types.")
    parser.add_argument("--page-only", action="store_true", help="rewrite the table from the stored run")
    if not parser.parse_args(arguments).page_only:
        write_result(NAME, measure())
    result = read_result(NAME)
    replace_section(PAGE, NAME, page_section(result))
    print(json.dumps({f"{row['dtype']}, {row['tokens']}": row["step_us"] for row in result["rows"]}))


def measure() -> dict[str, Any]:
    """Time a step and a prompt with every cache."""
    came_from = provenance()
    runs = {dtype: opened(dtype) for dtype in CACHE_DTYPES}
    rows = []
    for tokens in TOKENS:
        steps: dict[str, list[float]] = {dtype: [] for dtype in runs}
        prompts: dict[str, list[float]] = {dtype: [] for dtype in runs}
        for _, (dtype, run) in itertools.product(range(PROMPTS), runs.items()):
            pieces = [(start, min(PIECE, tokens - start)) for start in range(0, tokens, PIECE)]
            prompts[dtype].append(1e3 * sum(run(start, new) for start, new in pieces))
        for _, (dtype, run) in itertools.product(range(STEPS), runs.items()):
            steps[dtype].append(1e6 * run(tokens, 1))
        rows += [
            {
                "tokens": tokens,
                "dtype": dtype,
                "token_bytes": int(2 * KV_HEADS * WIDTH * CACHE_DTYPES[dtype].itemsize),
                "step_us": statistics.median(steps[dtype]),
                "prompt_ms": statistics.median(prompts[dtype]),
                "samples": {"step_us": steps[dtype], "prompt_ms": prompts[dtype]},
            }
            for dtype in runs
        ]
    heads = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": WIDTH}
    return {**came_from, **heads, "threads": 1, "cpu": cpu_name(), "rows": rows}


def opened(dtype: str) -> Run:
    """Lower one Attention over a cache of this type and return what runs it."""
    g, kind = GraphBuilder("attention"), ir.DataType.FLOAT
    sizes = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    given = [g.input(name, kind, ["batch", "n", heads * WIDTH]) for name, heads in sizes.items()]
    past = [g.input(f"past_{name}.0", kind, ["batch", KV_HEADS, "past", WIDTH]) for name in KINDS]
    attributes = {"q_num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": WIDTH**-0.5, "is_causal": 1}
    y, *present = g.op_multi("Attention", [*given, None, *past], attributes, 3)
    g.output("y", g.op("Identity", [y]), kind, ["batch", "n", HEADS * WIDTH])
    for name, value in zip(KINDS, present, strict=True):
        g.output(f"present_{name}.0", value, kind, ["batch", KV_HEADS, "total", WIDTH])
    model = ir.from_proto(onnx.load_model_from_string(g.finish()))
    scales = {f"{name}.0": np.full((KV_HEADS, 1, WIDTH), 4 / 127, np.float32) for name in KINDS}
    spec = {"kv_heads": KV_HEADS, "context": CONTEXT, "head_dim": WIDTH}
    fuse_attention(model.graph, spec, CACHE_DTYPES[dtype], scales)
    model.graph.opset_imports["com.microsoft"] = 1
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding, rng = session.io_binding(), np.random.default_rng(0)
    new = {name: rng.standard_normal((1, PIECE, heads * WIDTH)).astype(np.float32) for name, heads in sizes.items()}
    held = [np.zeros((1, KV_HEADS, CONTEXT, WIDTH), dtype) for _ in KINDS]
    for name, array in zip(KINDS, held, strict=True):
        value = ort.OrtValue.ortvalue_from_numpy(array)
        binding.bind_ortvalue_input(f"past_{name}.0", value)
        binding.bind_ortvalue_output(f"present_{name}.0", value)

    def run(before: int, count: int, _alive: object = held) -> float:
        for name, array in new.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array[:, :count]))
        binding.bind_cpu_input("seqlens_k", np.array([before + count - 1], np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array([before + count], np.int32))
        binding.bind_output("y", "cpu")
        started = time.thread_time()
        session.run_with_iobinding(binding)
        return time.thread_time() - started

    return run


def page_section(result: dict[str, Any]) -> str:
    """Return the page's table and the sentence below it, from a stored run alone."""
    cells = [
        [
            f"{row['tokens']:,}",
            row["dtype"],
            str(row["token_bytes"]),
            f"{row['step_us']:.0f}",
            f"{row['prompt_ms']:.1f}",
        ]
        for row in result["rows"]
    ]
    return "\n\n".join(
        [
            markdown_table(HEADER, cells),
            f"The operator alone: {result['heads']} heads, {result['kv_heads']} key heads of {result['head_dim']}, "
            f"{result['threads']} thread, prompts in pieces of {PIECE}; processor time, medians of turns. "
            f"{result['cpu']}, load average {result['load_average_1min']:.1f}, onnxruntime "
            f"{result['versions']['onnxruntime']}, commit `{result['commit'][:12]}`, {result['date']}.",
        ]
    )


if __name__ == "__main__":
    main(sys.argv[1:])
