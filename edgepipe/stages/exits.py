"""Exits: let a decoder's tokens leave between its layers; the model itself stays as it is (docs/prune.md).

Sources: DYNAMAX (arXiv:2504.20922), CALM (arXiv:2207.07061), Tuned Lens (arXiv:2303.08112); the graphs are in
graph/exits.py, the training in training/decoder_exits.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepipe.artifacts import Context, Json, TorchModel
from edgepipe.errors import ConfigError, TargetError

if TYPE_CHECKING:
    from edgepipe.quantizers.texts import Calibration
    from edgepipe.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Exits:
    """Options of the stage `exits`."""

    layers: tuple[int, ...] = ()  # of a decoder: layers after which tokens may leave, growing, below all of them
    calibration: str = ""  # texts it learns from: a set, a file, or "self" (the model writes them); empty: everyday
    samples: int = 128  # rows of these texts at most
    tokens: int = 256  # tokens of a row
    steps: int = 300  # of training what stands in for the layers behind an exit
    batch: int = 256  # tokens of a step
    learning_rate: float = 1e-3  # highest one, after the warm-up
    gate_data: float = 0.3  # share of the rows that gates alone learn from, above 0 and below 1

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name, least in (("samples", 2), ("tokens", 8), ("steps", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"exits.{name}: expected at least {least}, got {getattr(self, name)}")
        if not 0 < self.learning_rate <= 1:
            raise ConfigError(f"exits.learning_rate: expected above 0 and up to 1, got {self.learning_rate}")
        if not 0 < self.gate_data < 1:
            raise ConfigError(f"exits.gate_data: expected a share above 0 and below 1, got {self.gate_data}")

    @property
    def exits(self) -> tuple[int, ...]:
        """Return the layers, as later stages ask for them."""
        return self.layers

    def check_beside(self, stages: Mapping[str, Any], target: Target) -> None:
        """Refuse an engine and a cache that don't go with exits, before any work."""
        compiled = stages.get("compile")
        if compiled is not None:
            check_engine(compiled.engine or target.engines[0], compiled.cache_dtype)

    def check(self, model: TorchModel) -> None:
        """Refuse a model that can't have exits, and texts that can't be had."""
        from edgepipe.graph.llama import builds
        from edgepipe.graph.shape import VARIANTS, check_exits, read_shape
        from edgepipe.quantizers.texts import check_calibration

        if not builds(model.info):
            raise ConfigError(
                f"exits: expected a decoder of the Llama family ({', '.join(VARIANTS)}), but {model.info.name} is "
                "none; an encoder gets them from distill.exits"
            )
        if not self.layers:
            raise ConfigError("exits.layers: expected layers after which tokens may leave, got none")
        if model.info.config.get("exits"):
            raise ConfigError(f"exits: {model.info.name} has exits already: leave the stage out")
        if model.activations is not None:
            raise ConfigError("exits come before quantize where activations are rounded: put the stage in front of it")
        check_exits(self.layers, read_shape(model.info.config, None).layers)
        check_calibration(model.info, self._texts())

    def reads(self) -> Json:
        """Return the contents this stage depends on besides the model: its key changes with them."""
        from edgepipe.quantizers.texts import fingerprint

        return fingerprint(self._texts())

    def __call__(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Return the model with exits: other parameters beside its own, which stay as they are."""
        self.check(model)
        from edgepipe.training.decoder_exits import Teaching, train_exits

        teaching = Teaching(
            exits=self.layers,
            steps=self.steps,
            batch=self.batch,
            learning_rate=self.learning_rate,
            gate_data=self.gate_data,
        )
        weights, record = train_exits(model, self._texts(), teaching, ctx)
        ctx.figures({"exits": record})
        for one in record["exits"]:
            ctx.note(
                f"after {one['layers']} layers the likeliest token is that of all in {one['agrees']:.1%} of "
                f"{record['gate_tokens']:,} places, and the gate, fitted to them, says so rightly in {one['told']:.1%}"
            )
        info = dataclasses.replace(model.info, config={**model.info.config, "exits": list(self.layers)})
        return dataclasses.replace(model, info=info, weights=model.weights.replace(weights))

    def _texts(self) -> Calibration:
        from edgepipe.quantizers.texts import Calibration

        return Calibration(source=self.calibration, samples=self.samples, tokens=self.tokens)


def check_engine(engine: str, cache_dtype: str) -> None:
    """Raise TargetError where a decoder with exits can't be compiled."""
    if engine != "onnxruntime":
        raise TargetError(
            f"a decoder with exits runs on onnxruntime, and the recipe asks for {engine}: take that engine, or leave "
            "exits out"
        )
    if cache_dtype == "int8":
        raise TargetError(
            "compile.cache_dtype=int8: a decoder with exits fills in keys and values as floats: take float16 or float32"
        )
