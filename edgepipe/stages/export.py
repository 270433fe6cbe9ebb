"""Export: write the model as a graph of the portable dialect, and check it against the framework's own model.

The check runs both on the same seeded token ids: transformers' module, weights streamed in, against the graph run by
onnx's reference operators. What is exported is therefore what transformers would compute, to float32 rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgepipe.artifacts import Context, OnnxModel, TorchModel
from edgepipe.errors import ConfigError, ContractError

if TYPE_CHECKING:
    from edgepipe.graph.llama import Shape


_DEFAULT_CONTEXT = 2048
_LEAST_CONTEXT = 8  # a prompt and an answer of a few tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Options of the stage `export`."""

    context: int = 0  # tokens the KV cache holds, prompt and output together; 0: 2048, or the model's if that is less
    check_tokens: int = 16  # tokens of the numeric check against torch; 0 leaves it out
    tolerance: float = 1e-3  # largest difference of a logit from torch's, relative to the largest logit

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.context != 0 and self.context < _LEAST_CONTEXT:
            raise ConfigError(f"export.context: expected at least {_LEAST_CONTEXT} tokens, got {self.context}")
        if self.check_tokens < 0 or self.tolerance <= 0:
            raise ConfigError("export.check_tokens must not be negative and export.tolerance must be positive")

    def check(self, model: TorchModel) -> Shape:
        """Return the facts the graph is built from; ConfigError for a model that can't be exported."""
        from edgepipe.graph.llama import check_weights, read_shape

        shape = read_shape(model.info.config, self.context or None, _DEFAULT_CONTEXT)
        check_weights(model.weights, shape)
        return shape

    def __call__(self, model: TorchModel, ctx: Context) -> OnnxModel:
        """Return the model as the graph `decoder` over the same weight store."""
        from edgepipe.graph.llama import build_decoder

        shape = self.check(model)
        graph = build_decoder(shape, model.info.config)
        spec = {
            "layers": shape.layers,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "hidden_size": shape.hidden,
            "vocab_size": shape.vocab,
            "context": shape.context,
            "bos_token_id": model.info.bos_token_id,
            "eos_token_ids": list(model.info.eos_token_ids),
        }
        exported = OnnxModel(
            info=model.info, graphs={"decoder": graph}, weights=model.weights, spec=spec, history=model.history
        )
        if self.check_tokens:
            self._check(model, exported, ctx)
        return exported

    def _check(self, model: TorchModel, exported: OnnxModel, ctx: Context) -> None:
        """Compare the portable graph with torch on seeded ids; ContractError when they differ."""
        from edgepipe.graph.evaluate import prompt_logits
        from edgepipe.graph.reference import torch_logits

        count = min(self.check_tokens, exported.spec["context"])
        ids = np.random.default_rng(ctx.seed).integers(0, exported.spec["vocab_size"], (1, count), dtype=np.int64)
        ctx.progress("torch's logits", 0, 2)
        expected = torch_logits(model, ids)
        ctx.progress("the graph's logits", 1, 2)
        got = prompt_logits(exported, ids)
        error = float(np.abs(got - expected).max() / np.abs(expected).max())
        if not error <= self.tolerance:
            raise ContractError(
                f"the exported graph differs from torch by {error:.1e} of the largest logit; "
                f"allowed {self.tolerance:.0e}"
            )
        ctx.note(f"agrees with torch on {count} tokens to {error:.1e} of the largest logit")
