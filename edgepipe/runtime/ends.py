"""Check what a manifest says of the inputs and outputs of its graphs against what its task needs (docs/bundle.md).

The runtime feeds and reads the names below, so a manifest that lists others is refused when it is read. That the graphs
are what the manifest says is checked when the engine opens them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgepipe.errors import ConfigError
from edgepipe.runtime.exits import PART
from edgepipe.runtime.leaving import FILL, HEAD

ROLES = {"text-generation": ("decoder",), "text2text-generation": ("encoder", "decoder")}  # graphs; else: model
DTYPES = ("float32", "float16", "int64", "int32", "bool")

_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_MOST_LAYERS = 4096  # as in bundle.py
_FREE = "*"  # an axis of any length: a name in the manifest

End = tuple[str, tuple[int | str, ...]]
Ends = dict[str, End]


def check_ends(manifest: Mapping[str, Any]) -> None:
    """Raise ConfigError unless `ends`, whose types have been checked, has the graphs, names and shapes of the task."""
    task, ends, model = manifest["task"], manifest["ends"], manifest["model"]
    roles = ROLES.get(task, ("model",))
    if not ends and task in ROLES:  # a preallocated cache: the ends of such graphs follow from the sizes
        if "exits" in model:
            _check_parts(manifest, behind=FILL, others=(HEAD,))
            if manifest["engine"] != "onnxruntime" or manifest["cache"]["dtype"] == "int8":
                raise ConfigError(
                    "manifest.json: a decoder with model.exits is for onnxruntime, with a cache of floats: build it "
                    "again"
                )
        return
    if set(ends) != set(roles):
        named = ", ".join(ends) or "none"
        raise ConfigError(f"manifest.json: ends must describe {' and '.join(roles)} for {task}, but describe {named}")
    if task in ROLES:
        for role, (inputs, outputs) in _generation(model, has_source="encoder" in roles).items():
            _compare(ends[role]["inputs"], inputs, f"ends.{role}.inputs")
            _compare(ends[role]["outputs"], outputs, f"ends.{role}.outputs")
    else:
        fixed = manifest["engine"] == "qnn"  # an NPU's graph takes one text, of the length of its context
        _check_model(task, ends["model"], model, (1, model["context"]) if fixed else (_FREE, _FREE))
        if "exits" in model:
            _check_exits(manifest)


def _generation(model: Mapping[str, Any], *, has_source: bool) -> dict[str, tuple[Ends, Ends]]:
    """Return inputs and outputs of the graphs of a model whose cache grows."""
    layers = [f"{kind}.{layer}" for layer in range(model["layers"]) for kind in ("key", "value")]
    cache: End = ("float32", (_FREE, model["kv_heads"], _FREE, model["head_dim"]))
    ids: End = ("int64", (_FREE, _FREE))
    inputs: Ends = {"input_ids": ids, **{f"past_{layer}": cache for layer in layers}}
    outputs: Ends = {"logits": ("float32", (_FREE, _FREE, model["vocab_size"]))}
    outputs |= {f"present_{layer}": cache for layer in layers}
    if not has_source:
        return {"decoder": (inputs, outputs)}
    cross = {f"cross_{layer}": cache for layer in layers}
    return {
        "encoder": ({"input_ids": ids, "attention_mask": ids}, {**cross}),
        "decoder": ({**inputs, **cross, "encoder_attention_mask": ids}, outputs),
    }


def _check_model(
    task: str, ends: Mapping[str, Any], model: Mapping[str, Any], shape: tuple[int | str, int | str]
) -> None:
    """Check the graph of a model without a cache: how texts, [rows, tokens] of `shape`, go in, and what the runtime's
    methods read.
    """
    if model["context"] is not None:
        unknown = sorted(set(ends["inputs"]) - set(_TEXT_INPUTS))
        if unknown or "input_ids" not in ends["inputs"]:
            found = ", ".join(ends["inputs"]) or "none"
            raise ConfigError(
                f"manifest.json: ends.model.inputs of a model that reads texts are among {', '.join(_TEXT_INPUTS)}, "
                f"but are {found}"
            )
        texts: Ends = dict.fromkeys(ends["inputs"], ("int64", shape))
        _compare(ends["inputs"], texts, "ends.model.inputs")
    if not ends["inputs"] or not ends["outputs"]:
        raise ConfigError("manifest.json: ends.model must have inputs and outputs, but has none")
    if ("embedding" in ends["outputs"]) != (model["pooling"] is not None):
        raise ConfigError(
            "manifest.json: ends.model.outputs must have an embedding where model.pooling is set, only there"
        )
    if task == "text-classification":
        if model["context"] is None or not model["labels"]:
            raise ConfigError("manifest.json: a model for text-classification must have model.context and model.labels")
        logits: Ends = {"logits": ("float32", (shape[0], len(model["labels"])))}
        _compare(ends["outputs"], logits, "ends.model.outputs")


def _check_exits(manifest: Mapping[str, Any]) -> None:
    """Raise ConfigError unless an encoder's exits have their graphs, and rows can leave."""
    ends = manifest["ends"]
    _check_parts(manifest)
    texts: Ends = dict.fromkeys(_TEXT_INPUTS[:2], ("int64", (_FREE, _FREE)))
    _compare(ends["model"]["inputs"], texts, "ends.model.inputs")
    for name, facts in ends["model"]["outputs"].items():
        if not facts["shape"] or not isinstance(facts["shape"][0], str):
            raise ConfigError(f"manifest.json: ends.model.outputs.{name[:80]} must have a row for each text")


def _check_parts(manifest: Mapping[str, Any], *, behind: str = "", others: Sequence[str] = ()) -> None:
    """Raise ConfigError unless a model's exits stand between its layers, and each has its graphs.

    `behind` begins the names of a graph for each part but the first, beside the part itself; `others` are further ones.
    """
    model = manifest["model"]
    exits, layers = model["exits"], model.get("layers")
    numbers = [*exits, layers] if isinstance(exits, list) and exits else [None]
    whole = [number for number in numbers if type(number) is int and 1 <= number <= _MOST_LAYERS]
    if sorted(set(whole)) != numbers:
        raise ConfigError("manifest.json: model.exits must be growing numbers from 1 to below model.layers")
    hidden = model.get("hidden_size")
    if type(hidden) is not int or hidden < 1:
        raise ConfigError("manifest.json: model.hidden_size must be a whole number of at least 1 where there are exits")
    wanted = [f"{PART}{number}" for number in range(len(numbers))]
    wanted += [f"{behind}{number}" for number in range(1, len(numbers)) if behind]
    for name in (*wanted, *others):
        if name not in manifest["graphs"]:
            raise ConfigError(f"manifest.json: graphs must name {name} for model.exits, but does not")


def _compare(described: Mapping[str, Any], expected: Ends, where: str) -> None:
    """Raise ConfigError unless just the expected ends are described."""
    if differing := sorted(set(described) ^ set(expected)):
        there = "one too many" if differing[0] in described else "missing"
        raise ConfigError(f"manifest.json: {where}: {differing[0][:80]!r} is {there}")
    for name, (dtype, shape) in expected.items():
        found = described[name]
        fits = found["dtype"] == dtype and len(found["shape"]) == len(shape)
        for size, wanted in zip(found["shape"], shape, strict=False):
            fits = fits and (isinstance(size, str) if wanted == _FREE else size == wanted)
        if not fits:
            raise ConfigError(
                f"manifest.json: {where}.{name} should be {dtype} [{', '.join(map(str, shape))}], "
                f"but is {found['dtype']} [{', '.join(map(str, found['shape']))[:200]}]"
            )
