"""Run the framework's own model over a lazy weight store, one module's weights in memory at a time.

The module tree is built without storage; a hook gives each leaf its weights just before it runs and takes them away
after. This is transformers' implementation, untouched: what the exporter's graph must agree with.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgepipe.artifacts import Json, TorchModel
from edgepipe.errors import ConfigError, ContractError
from edgepipe.weights import WeightStore


def framework_config(config: Json) -> Any:
    """Return transformers' config object, its defaults filled in; ConfigError when transformers refuses the config."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    if not isinstance(config.get("model_type"), str):
        raise ConfigError(f"config.json says model_type is {config.get('model_type')!r}; expected the name of a family")
    gone = config.get("pruned_heads") or {}
    if not (isinstance(gone, dict) and all(n.isdecimal() and isinstance(heads, list) for n, heads in gone.items())):
        raise ConfigError(
            f"config.json says pruned_heads is {gone!r}; expected lists of heads by the number of a layer"
        )
    # heads that were pruned are ours to take out (framework.py): transformers has dropped that
    fields = {k: v for k, v in config.items() if k not in ("model_type", "transformers_version", "pruned_heads")}
    try:
        return transformers.AutoConfig.for_model(config["model_type"], **fields)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"config.json was refused by transformers: {reason}") from error


def torch_logits(model: TorchModel, input_ids: np.ndarray) -> np.ndarray:
    """Return float32 logits [batch, sequence, vocab] of transformers' model for input_ids [batch, sequence]."""
    import torch

    module = empty_module(model.info.config, "eager")
    for name, leaf in module.named_modules():
        if dict(leaf.named_parameters(recurse=False)):
            _stream_weights(leaf, name, model.weights)
    with torch.inference_mode():
        logits = module(input_ids=torch.from_numpy(input_ids), use_cache=False).logits
    result: np.ndarray = logits.float().numpy()
    return result


def empty_module(config: Json, attention: str) -> Any:
    """Return transformers' decoder without storage for its parameters; `attention` names an implementation."""
    import torch
    import transformers

    ready = framework_config(config)
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            ready, dtype=torch.float32, attn_implementation=attention
        )
    module.eval()
    _rebuild_buffers(module, ready)
    return module


def _rebuild_buffers(module: Any, config: Any) -> None:
    """Make again, with storage, the submodules whose buffers are computed from the config (rotary tables)."""
    import torch

    for name, child in list(module.named_modules()):
        if any(b.is_meta for b in child.buffers(recurse=False)):
            if not type(child).__name__.endswith("RotaryEmbedding"):
                embed_scale = getattr(child, "scalar_embed_scale", None)
                if embed_scale is None:
                    raise ContractError(f"module {name} has a buffer that the reference run cannot rebuild")
                child.embed_scale = torch.tensor(embed_scale)
                continue
            parent = module.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], type(child)(config=config))


def _stream_weights(leaf: Any, prefix: str, weights: WeightStore) -> None:
    import torch

    empty = dict(leaf.named_parameters(recurse=False))

    def fill(_module: Any, _inputs: Any) -> None:
        for name in empty:
            value = np.require(weights.float32(f"{prefix}.{name}"), requirements=["C", "W"])
            leaf._parameters[name] = torch.nn.Parameter(torch.from_numpy(value), requires_grad=False)

    def drop(_module: Any, _inputs: Any, _output: Any) -> None:
        leaf._parameters.update(empty)

    leaf.register_forward_pre_hook(fill)
    leaf.register_forward_hook(drop)
