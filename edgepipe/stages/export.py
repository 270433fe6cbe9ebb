"""Export: write the model as graphs of the portable dialect, and check them against the framework's own model.

The Llama family has a builder (graph/llama.py), and so have students (graph/students.py); every other family goes
through the framework's exporter and passes into the dialect (graph/framework.py). The check runs both on the same
seeded inputs: torch's module, transformers' or the student's, against the graph run by onnx's reference operators. What
is exported is therefore what torch would compute, to float32 rounding; a decoder with a cache is run in pieces, against
torch's run without one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepipe.artifacts import Context, Json, OnnxModel, TorchModel
from edgepipe.errors import ConfigError, ContractError

if TYPE_CHECKING:
    from edgepipe.graph.framework import Part
    from edgepipe.graph.shape import Shape
    from edgepipe.students.config import StudentConfig

_DEFAULT_CONTEXT = 2048
_LEAST_CONTEXT = 8  # a prompt and an answer of a few tokens
_POOLINGS = ("auto", "mean", "cls", "last", "max")
_EXPORTERS = ("auto", "framework", "optimum")
_CHOICES = {"auto": None, "yes": True, "no": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Options of the stage `export`."""

    context: int = 0  # tokens the KV cache holds, or an encoder reads; 0: 2048, or the model's if that is less
    pooling: str = "auto"  # of a sentence encoder: mean, cls, last, max; auto: as the model's files say, else mean
    normalize: str = "auto"  # whether its embeddings have length 1: yes, no; auto: as the model's files say, else yes
    exporter: str = "auto"  # who writes the graph: auto, framework (transformers'), optimum (docs/optimum.md)
    check_tokens: int = 16  # tokens of the numeric check against torch; 0 leaves it out
    tolerance: float = 1e-3  # largest difference of an output from torch's, relative to the largest output

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.context != 0 and self.context < _LEAST_CONTEXT:
            raise ConfigError(f"export.context: expected at least {_LEAST_CONTEXT} tokens, got {self.context}")
        if self.check_tokens < 0 or self.tolerance <= 0:
            raise ConfigError("export.check_tokens must not be negative and export.tolerance must be positive")
        if self.pooling not in _POOLINGS:
            raise ConfigError(f"export.pooling: expected one of {', '.join(_POOLINGS)}, got {self.pooling!r}")
        if self.exporter not in _EXPORTERS:
            raise ConfigError(f"export.exporter: expected one of {', '.join(_EXPORTERS)}, got {self.exporter!r}")
        if self.normalize not in _CHOICES:
            raise ConfigError(f"export.normalize: expected one of {', '.join(_CHOICES)}, got {self.normalize!r}")

    def check(self, model: TorchModel) -> None:
        """Refuse a model that can't be exported, as far as that can be seen before any work."""
        from edgepipe.graph.framework import check_model
        from edgepipe.students.config import is_student

        if is_student(model.info.config):
            self._student(model)
        elif self._builds(model):
            self._shape(model)
        else:
            check_model(model.info)
        if self.exporter == "optimum":
            from edgepipe.graph.optimum import check_optimum

            check_optimum(model.info)
        embeds = model.info.task == "feature-extraction" and model.info.tokenizer
        for name, value in (("pooling", self.pooling), ("normalize", self.normalize)):
            if value != "auto" and not embeds:
                what = f"the task is {model.info.task}" if model.info.tokenizer else "this model reads no text"
                raise ConfigError(f"export.{name} is for encoders of texts, but {what}: leave it out")

    def __call__(self, model: TorchModel, ctx: Context) -> OnnxModel:
        """Return the model as graphs over the same weight store."""
        from edgepipe.students.config import is_student

        self.check(model)
        if is_student(model.info.config):
            exported = self._build_student(model, ctx)
        else:
            exported = self._build(model, ctx) if self._builds(model) else self._trace(model, ctx)
        plan = model.activations
        if plan is not None and plan.normalizes:
            from edgepipe.graph.bitlinear import normalize_inputs

            layers = {model.weights[name].name for name in plan.layers}
            layers |= {alias for alias, name in model.weights.aliases.items() if name in layers}
            graphs = {name: normalize_inputs(graph, layers) for name, graph in exported.graphs.items()}
            exported = replace(exported, graphs=graphs)
        return replace(exported, activations=plan)

    def _builds(self, model: TorchModel) -> bool:
        """Say whether edgepipe's own builder writes the graph."""
        from edgepipe.graph.llama import builds

        return self.exporter == "auto" and builds(model.info)

    def _shape(self, model: TorchModel) -> Shape:
        """Return the facts a Llama's graph is built from."""
        from edgepipe.graph.exits import exit_weights, read_exits
        from edgepipe.graph.llama import check_weights
        from edgepipe.graph.shape import read_shape

        shape = read_shape(model.info.config, self.context or None, _DEFAULT_CONTEXT)
        check_weights(model.weights, shape, exit_weights(shape, read_exits(model.info.config)))
        return shape

    def _build(self, model: TorchModel, ctx: Context) -> OnnxModel:
        """Return a model of the Llama family as the graph `decoder`, and where it has exits its parts."""
        from edgepipe.graph.exits import build_exits, read_exits
        from edgepipe.graph.llama import build_decoder

        shape, exits = self._shape(model), read_exits(model.info.config)
        graphs = {"decoder": build_decoder(shape, model.info.config)}
        graphs |= build_exits(shape, model.info.config, exits) if exits else {}
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
            **({"exits": list(exits)} if exits else {}),
        }
        exported = OnnxModel(info=model.info, graphs=graphs, weights=model.weights, spec=spec, history=model.history)
        if self.check_tokens:
            self._check_built(model, exported, ctx)
        return exported

    def _check_built(self, model: TorchModel, exported: OnnxModel, ctx: Context) -> None:
        """Compare the portable graph with torch on seeded ids; ContractError when they differ."""
        from edgepipe.graph.evaluate import prompt_logits
        from edgepipe.graph.reference import torch_logits

        count = min(self.check_tokens, exported.spec["context"])
        ids = np.random.default_rng(ctx.seed).integers(0, exported.spec["vocab_size"], (1, count), dtype=np.int64)
        ctx.progress("torch's logits", 0, 2)
        expected = torch_logits(model, ids)
        ctx.progress("the graph's logits", 1, 2)
        error = self._error("", prompt_logits(exported, ids), expected, "logit")
        ctx.note(f"agrees with torch on {count} tokens to {error:.1e} of the largest logit")

    def _student(self, model: TorchModel) -> StudentConfig:
        """Return what a student's graphs are built from, with the pooling that was asked for."""
        from edgepipe.graph.students import check_weights, student_spec
        from edgepipe.students.config import read_student

        if self.exporter != "auto":
            raise ConfigError(f"export.exporter={self.exporter}: students have a builder of their own; leave it out")
        config = read_student(model.info.config)
        if self.pooling != "auto":
            config = replace(config, pooling=self.pooling)
        if self.normalize != "auto":
            config = replace(config, normalize=self.normalize == "yes")
        check_weights(model.weights, config)
        student_spec(config, model.info, self.context or None)
        return config

    def _build_student(self, model: TorchModel, ctx: Context) -> OnnxModel:
        """Return a student as its graphs: encoder, decoder and scorer, or an encoder's `model`."""
        from edgepipe.graph.parts import ends_of
        from edgepipe.graph.students import build_student, student_spec
        from edgepipe.students.agreement import disagreements

        config, context = self._student(model), self.context or None
        graphs = build_student(config, context)
        spec = student_spec(config, model.info, context)
        if config.decoder is None:
            spec["ends"] = {name: ends_of(graph) for name, graph in graphs.items()}
        exported = OnnxModel(info=model.info, graphs=graphs, weights=model.weights, spec=spec, history=model.history)
        if self.check_tokens:
            ctx.progress("the student's outputs, in torch and by its graphs", 0, 1)
            found = disagreements(config, exported, min(self.check_tokens, spec["context"]), ctx.seed)
            errors = [self._error(f" {what},", got, expected, "output") for what, got, expected in found]
            how = ", with a cache and without" if "decoder" in graphs else ""
            ctx.note(f"agrees with torch to {max(errors):.1e} of the largest output{how}")
        return exported

    def _trace(self, model: TorchModel, ctx: Context) -> OnnxModel:
        """Return a model of any other family as the graphs its task needs."""
        from edgepipe.graph.framework import build_module, fill_module
        from edgepipe.graph.parts import ends_of, plan_parts, used_weights

        ctx.progress("the framework's model", 0, 1)
        module = build_module(model.info)
        fill_module(module, model.weights)
        plan = plan_parts(
            model.info,
            module,
            context=self.context,
            pooling="" if self.pooling == "auto" else self.pooling,
            normalize=_CHOICES[self.normalize],
        )
        graphs = {}
        for number, part in enumerate(plan.parts):
            ctx.progress(f"tracing the graph {part.name}", number, 2 * len(plan.parts))
            graphs[part.name] = self._traced(part, module, model, plan.spec, ctx)
        ends = {name: ends_of(graph) for name, graph in graphs.items()}
        exported = OnnxModel(
            info=model.info,
            graphs=graphs,
            weights=model.weights,
            spec={**plan.spec, "ends": ends},
            history=model.history,
        )
        unused = set(model.weights) - {model.weights[name].name for name in used_weights(graphs)}
        if unused:
            ctx.note(f"{len(unused)} weights that no graph of this task reads are left out, such as {min(unused)}")
        if self.check_tokens:
            self._check_traced(plan.parts, module, exported, ctx)
        return exported

    def _traced(self, part: Part, module: Any, model: TorchModel, spec: Json, ctx: Context) -> bytes:
        """Return one part as a graph of the dialect, by the exporter that was asked for."""
        from edgepipe.graph.framework import trace

        if self.exporter != "optimum":
            return trace(part, module, model.weights)
        from edgepipe.graph.optimum import trace_with_optimum

        graph, note = trace_with_optimum(part, module, model.info, model.weights, ctx.work_dir, spec)
        ctx.note(note)
        return graph

    def _check_traced(self, parts: tuple[Part, ...], module: Any, exported: OnnxModel, ctx: Context) -> None:
        """Compare every graph with torch on seeded inputs, and decoding in pieces with torch's run without a cache."""
        from edgepipe.graph.evaluate import evaluate
        from edgepipe.graph.framework import run_part
        from edgepipe.graph.parts import seeded_feeds

        vocab = exported.spec["vocab_size"]
        errors = []
        for number, part in enumerate(parts):
            ctx.progress(f"checking the graph {part.name}", len(parts) + number, 2 * len(parts))
            feeds = seeded_feeds(exported.spec["ends"][part.name]["inputs"], vocab, ctx.seed)
            try:
                got = evaluate(exported.graphs[part.name], exported.weights, feeds)
            except (ValueError, IndexError, RuntimeError) as failure:
                reason = " ".join(str(failure).split())[:200]
                raise ContractError(
                    f"the graph {part.name} can't be computed at other sizes than those it was traced with: {reason}"
                ) from failure
            for name, expected in run_part(part, feeds).items():
                errors.append(self._error(f" {part.name}, {name},", got[name], expected, "output"))
        ctx.note(f"agrees with torch to {max(errors):.1e} of the largest output")
        if "decoder" in exported.graphs:
            self._check_cache(module, exported, ctx)

    def _check_cache(self, module: Any, exported: OnnxModel, ctx: Context) -> None:
        """Compare decoding token by token over a cache with torch's run of the whole without one."""
        from edgepipe.graph.evaluate import logits_in_pieces
        from edgepipe.graph.framework import whole_logits
        from edgepipe.graph.parts import seeded_feeds

        vocab = exported.spec["vocab_size"]
        count = min(self.check_tokens, exported.spec["context"])
        ids = np.random.default_rng(ctx.seed).integers(0, vocab, (2, count))
        # Some families give padding no position, and can't know of it any more when it is in the cache
        pad = getattr(module.config, "pad_token_id", None)
        ids = ids if pad is None else np.where(ids == pad, (pad + 1) % vocab, ids)
        source = None
        if "encoder" in exported.graphs:
            source = seeded_feeds(exported.spec["ends"]["encoder"]["inputs"], vocab, ctx.seed)
            source = {name: value[:2] for name, value in source.items()}
        steps = min(4, count - 1)
        logits = logits_in_pieces(exported, ids, [count - steps, *[1] * steps], source)
        error = self._error(" decoder with a cache", logits, whole_logits(module, ids, source), "logit")
        ctx.note(f"decoding token by token agrees with torch without a cache to {error:.1e} of the largest logit")

    def _error(self, what: str, got: np.ndarray, expected: np.ndarray, unit: str) -> float:
        """Return the largest difference relative to the largest value; ContractError when it is too large."""
        error = float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30))
        if not error <= self.tolerance:
            raise ContractError(
                f"the exported graph{what} differs from torch by {error:.1e} of the largest {unit}; "
                f"allowed {self.tolerance:.0e}"
            )
        return error
