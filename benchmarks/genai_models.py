"""Make the two sides of the comparison: our bundle, and onnxruntime-genai's model of the very same weights.

edgepipe writes a symmetric 4-bit grid of groups of 32. Its values, decoded to float32, become a Hugging Face directory,
and onnxruntime-genai's own builder rounds that to its symmetric grid of blocks of 32. Both take scale = extreme / −8,
and every group of ours holds the code 0 (the value −8 · scale), so the builder finds our codes again; `compare_codes`
counts those it doesn't.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import save_file

from edgepipe.artifacts import QuantizedTensor
from edgepipe.store import load_weights, read_json
from edgepipe.weights import WeightStore

BUNDLE = "bundle"
COMPRESS = (
    *("compress", "smollm2-135m", "--recipe", "recipe.toml", "--out", BUNDLE),
    *("--bits", "4", "--set", "quantize.import=false", "--embedding-bits", "4"),
    *("--set", "compile.cache_dtype=float32", "--set", "compile.accuracy_level=4"),  # as genai's builder has them
)
_RECIPE = 'stages = ["quantize", "export", "compile"]\n'
# Each build's options beside the defaults. "tuned" is the best of the builder's documented options on a CPU: logits of
# the last position only, gate and up projections in one product. Fused q, k and v, the quantized embedding shared
# with the head, and accuracy level 4 (int8 activations) are defaults, written out for the record.
BUILDS = {
    "genai tuned": (
        *("accuracy_level=4", "block_size=32", "is_symmetric=true", "fuse_qkv=true", "shared_embeddings=true"),
        *("prune_lm_head=true", "fuse_mlp_gate_up=true"),
    ),
    "genai default": (),
}
# Parts of a node's name in genai's graph → our weights below model.layers.N, in the order of its rows.
_ROWS = {
    "attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.q_proj": ("self_attn.q_proj",),
    "attn.k_proj": ("self_attn.k_proj",),
    "attn.v_proj": ("self_attn.v_proj",),
    "attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.gate_proj": ("mlp.gate_proj",),
    "mlp.up_proj": ("mlp.up_proj",),
    "mlp.down_proj": ("mlp.down_proj",),
}
_FLOAT32_BYTES = 4


def build_ours(folder: Path) -> Path:
    """Compress the model in `folder` and return its bundle; finished stages of an earlier run are used again."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(_RECIPE, encoding="utf-8")
    bundle = folder / BUNDLE
    if bundle.exists():
        shutil.rmtree(bundle)
    subprocess.run([sys.executable, "-m", "edgepipe", *COMPRESS], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return bundle


def quantized_folder(folder: Path) -> Path:
    """Return where the run in `folder` keeps the quantized weights."""
    (found,) = folder.glob("runs/*/01-quantize")
    return found


def write_huggingface(quantized: Path, directory: Path) -> None:
    """Write the values of a quantized store as a Hugging Face directory in float32, tokenizer included."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = load_weights(quantized)
    info = read_json(quantized / "info.json")
    save_file({name: weights.float32(name) for name in weights}, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(info["config"] | {"dtype": "float32"}), encoding="utf-8")
    for name in info["tokenizer"]:
        shutil.copyfile(quantized / "tokenizer" / name, directory / name)


def build_theirs(source: Path, directory: Path, options: tuple[str, ...]) -> list[str]:
    """Run onnxruntime-genai's builder on a Hugging Face directory and return the arguments it was given."""
    if directory.exists():
        shutil.rmtree(directory)
    arguments = ["-i", source.name, "-o", directory.name, "-p", "int4", "-e", "cpu", "-c", "builder-cache"]
    arguments += ["--extra_options", "hf_token=false", *options]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *arguments]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=directory.parent, env=offline, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(f"onnxruntime-genai's builder ended with exit code {done.returncode}: {last}")
    return ["python", *command[1:]]


def compare_codes(quantized: Path, graph: Path) -> dict[str, int]:
    """Count the codes and the decoded values in which genai's 4-bit weights differ from ours; the head counts too."""
    weights = load_weights(quantized)
    model = onnx.load(graph)
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    counts = {"matrices": 0, "codes": 0, "codes_that_differ": 0, "values_that_differ": 0}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        ours = [_quantized(weights, name) for name in our_names(node.input[1])]
        codes = np.concatenate([np.asarray(part.codes) for part in ours])
        scale = np.concatenate([np.asarray(part.scale, np.float32) for part in ours])
        their_codes = numpy_helper.to_array(values[node.input[1]]).reshape(codes.shape)
        their_scale = numpy_helper.to_array(values[node.input[2]]).reshape(scale.shape)
        counts["matrices"] += 1
        counts["codes"] += 2 * codes.size
        for shift in (0, 4):  # a byte holds two codes
            mine, other = codes >> shift & 15, their_codes >> shift & 15
            counts["codes_that_differ"] += int(np.count_nonzero(mine != other))
            counts["values_that_differ"] += int(np.count_nonzero(_decode(mine, scale) != _decode(other, their_scale)))
    return counts


def our_names(initializer: str) -> tuple[str, ...]:
    """Name our weights behind one of genai's; KeyError when the graph has one this table doesn't know."""
    plain = initializer.removesuffix(".MatMul.weight_Q4")
    if plain == "lm_head":
        return ("lm_head.weight",)
    _, _, layer, part = plain.split(".", 3)
    return tuple(f"model.layers.{layer}.{name}.weight" for name in _ROWS[part])


def bytes_per_token(graph: Path) -> int:
    """Return the bytes of weights that a graph's products read for one token: packed codes and float32 scales.

    The same for a bundle whose file holds float16 scales: onnxruntime widens them once, when it loads the graph.
    """
    total = 0
    for node in onnx.load(graph, load_external_data=False).graph.node:
        if node.op_type == "MatMulNBits":
            fact: Callable[[str], int] = {a.name: a.i for a in node.attribute}.__getitem__
            groups = -(-fact("K") // fact("block_size"))
            total += fact("N") * groups * (fact("block_size") * fact("bits") // 8 + _FLOAT32_BYTES)
    return total


def describe(directory: Path, graph: str) -> dict[str, Any]:
    """Return what a side ships and reads: bytes of all its files, bytes of weights per token, nodes of its graph."""
    nodes = onnx.load(directory / graph, load_external_data=False).graph.node
    return {
        "disk_bytes": sum(file.stat().st_size for file in directory.iterdir()),
        "weight_bytes_per_token": bytes_per_token(directory / graph),
        "nodes": sum(node.op_type not in ("Constant", "Cast") for node in nodes),  # those are folded at load
    }


def _quantized(weights: WeightStore, name: str) -> QuantizedTensor:
    value = weights.load(name)
    assert isinstance(value, QuantizedTensor)
    return value


def _decode(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Decode one nibble of each byte [rows, bytes] with scale [rows, groups] float32."""
    per_group = codes.shape[1] // scale.shape[1]
    return (codes.astype(np.float32) - 8) * np.repeat(scale, per_group, axis=1)
