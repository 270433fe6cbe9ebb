"""Prune: cut out FFN channels, attention heads, width and layers that matter least; the model really shrinks.

What is cut is cut from every tensor it runs through (pruning/families.py), chosen by activations over calibration texts
or by weights (pruning/importance.py); a short distillation wins back what was lost (pruning/recover.py). Sources:
Minitron, arXiv:2407.14679; layers: ShortGPT, arXiv:2403.03853 (docs/prune.md).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepipe.artifacts import Context, Json, TorchModel
from edgepipe.errors import ConfigError

if TYPE_CHECKING:
    from edgepipe.pruning.families import Anatomy
    from edgepipe.pruning.importance import Kept, Seen
    from edgepipe.pruning.sizes import Sizes, Wanted
    from edgepipe.quantizers.texts import Batch, Calibration
    from edgepipe.stages.distill import Distill
    from edgepipe.weights import WeightStore

_RECOVERY = (  # options that mean something to recovery alone
    *("data", "columns", "held_out", "own_texts", "alpha", "match_hidden", "learning_rate", "warmup", "batch", "rows"),
    *("precision", "max_source", "max_target", "cut"),
)
_GENERATORS = ("own_texts", "alpha", "match_hidden", "max_target")  # of these, what encoders have no use for
_TRAINERS = ("accelerate",)  # whose version decides a trained model's bytes, beside those that decide all results'
_IMPORTANCE = ("activations", "magnitude", "nested")
_QUARTER = 0.25
_LAYERS_BY = ("contribution", "spread")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prune:
    """Options of the stage `prune`."""

    ratio: float = -1.0  # share of FFN channels and key/value groups removed; -1: 0.25, or 0 beside other sizes, zeros
    ffn: int = 0  # FFN channels kept in each layer; 0: as ratio says
    ffn_widths: tuple[int, ...] = ()  # the same layer by layer, an encoder's layers first; students alone
    kv_heads: int = 0  # key/value groups kept in each layer; 0: as ratio says
    hidden: int = 0  # width of the residual stream; 0: the model's
    layers: int = 0  # layers kept, of an encoder-decoder the encoder's; 0: all
    decoder_layers: int = 0  # of an encoder-decoder; 0: all
    importance: str = "activations"  # of channels and heads: activations (over texts), magnitude, nested (first ones)
    layers_by: str = "contribution"  # which layers stay: contribution (they change the stream most), spread (evenly)
    sparsity: float = 0.0  # share of the weights of what is left that become zero, from 0 to below 1; shapes stay
    pattern: str = ""  # zeros in a pattern instead, N of M neighbours kept: 2:4, 4:8
    mask: str = "wanda"  # which weights become zero: magnitude, wanda, sparsegpt (the others make up for them)
    calibration: str = ""  # texts it looks at: a set's name, a file, self (a decoder writes them); empty: everyday
    samples: int = 128  # rows of ids it looks at, at most
    tokens: int = 128  # ids of a row, at most
    # --- recovery: distillation from the model as it was, through the trainer of distill
    recover_steps: int = 0  # optimizer steps; 0: none
    data: str = ""  # what it learns from, as in distill; empty: a decoder writes its own texts
    columns: str = ""  # where parts stand that the file names otherwise: source=mr,target=ref
    held_out: float = 0.05  # share of the data that is kept aside to judge by
    own_texts: int = 2000  # texts that a decoder writes when there are no data
    alpha: float = 0.9  # weight of the whole model's distribution beside the targets, in [0, 1]
    match_hidden: float = 0.0  # weight of the distance to the whole model's hidden states
    learning_rate: float = 1e-4  # highest one, after the warm-up
    warmup: int = 20  # steps until the learning rate is at its highest
    batch: int = 32  # examples of a step
    rows: int = 0  # examples that run at once, what memory holds; 0: the batch
    precision: str = "auto"  # auto, bf16, no; auto: bf16 where the machine gains by it
    max_source: int = 128  # tokens of a source or text
    max_target: int = 128  # tokens of a target
    cut: bool = False  # cut what is longer; else it is refused, by file and line

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.ratio == -1:
            object.__setattr__(self, "ratio", 0.0 if self._other_cuts else _QUARTER)
        if not 0 <= self.ratio <= 1:  # 1 is refused with the nearest possible, once the model is known
            raise ConfigError(f"prune.ratio: expected a share from 0 to below 1, got {self.ratio:g}")
        for name in ("ffn", "kv_heads", "hidden", "layers", "decoder_layers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"prune.{name}: expected at least 1, or 0 for the default, got {getattr(self, name)}")
        for name, known in (("importance", _IMPORTANCE), ("layers_by", _LAYERS_BY)):
            if getattr(self, name) not in known:
                raise ConfigError(f"prune.{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name, least in (("samples", 1), ("tokens", 8)):
            if getattr(self, name) < least:
                raise ConfigError(f"prune.{name}: expected at least {least}, got {getattr(self, name)}")
        self._check_mask()
        if self.calibration and not self._looks:
            raise ConfigError(f"prune.calibration: importance by {self.importance} looks at no texts: leave it out")
        if self.ffn and self.ffn_widths:
            raise ConfigError("prune.ffn and prune.ffn_widths: give one of them")
        self._check_recovery_options()

    @property
    def _other_cuts(self) -> bool:
        """Say whether something else than the ratio says what is cut, or set to zero."""
        sizes = self.ffn or self.ffn_widths or self.kv_heads or self.hidden or self.layers or self.decoder_layers
        return bool(sizes or self.sparsity or self.pattern or self.importance == "nested")

    def _check_mask(self) -> None:
        """Refuse masks that can't be, and a choice of weights without one."""
        from edgepipe.numerics.sparsity import parse_pattern
        from edgepipe.pruning.masks import MASKS

        if self.mask not in MASKS:
            raise ConfigError(f"prune.mask: expected one of {', '.join(MASKS)}, got {self.mask!r}")
        if parse_pattern(self.sparsity, self.pattern) is None and self.mask != "wanda":
            raise ConfigError("prune.mask is for zeros: set prune.sparsity or prune.pattern, or leave it out")

    def _check_recovery_options(self) -> None:
        """Refuse options of recovery that are out of range, or belong to none."""
        if self.recover_steps < 0:
            raise ConfigError(f"prune.recover_steps: expected at least 0, got {self.recover_steps}")
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        given = [name for name in _RECOVERY if getattr(self, name) != usual[name]]
        if given and not self.recover_steps:
            raise ConfigError(f"prune.{given[0]} is for recovery: set prune.recover_steps, or leave it out")
        if self.recover_steps:
            try:
                self._teaching("encoder-decoder", ())
            except ConfigError as error:
                raise ConfigError(str(error).replace("distill.", "prune.")) from None

    @property
    def _looks(self) -> bool:
        """Say whether texts are looked at."""
        return self._looks_before or (bool(self.sparsity or self.pattern) and self.mask != "magnitude")

    @property
    def _looks_before(self) -> bool:
        """Say whether texts go through the model as it comes: something is cut, and they choose what."""
        layers = self.layers > 0 or self.decoder_layers > 0
        cuts = layers or bool(self.ratio or self.ffn or self.ffn_widths or self.kv_heads or self.hidden)
        return cuts and (self.importance == "activations" or (layers and self.layers_by == "contribution"))

    def reads(self) -> Json:
        """Return the contents this stage depends on besides the model: its key changes with them."""
        read: Json = {}
        if self._looks:
            from edgepipe.quantizers.texts import fingerprint

            read |= fingerprint(self._texts())
        if self.recover_steps:
            from edgepipe.store import versions

            read["versions"] = versions(_TRAINERS)
        if self.data:
            from edgepipe.training.data import read_data

            read["data"] = read_data(self.data, columns=self.columns, option="prune.columns").sha256
        return read

    def check_exits(self, name: str) -> None:
        """Refuse a model with exits, an encoder's before it is trained too."""
        raise ConfigError(
            f"prune: {name} has exits, whose gates are fitted to its layers as they are: make it smaller before "
            "(distill.ffn, kv_heads, hidden, encoder_layers)"
        )

    def check(self, model: TorchModel) -> None:
        """Refuse a model without a table, sizes that can't be, and texts that can't be had."""
        from edgepipe.students.config import has_exits

        if has_exits(model.info.config):
            self.check_exits(model.info.name)
        self._sizes(model)
        if model.activations is not None:
            raise ConfigError(
                "prune comes before quantize where activations are rounded: their plan is for the widths quantize saw"
            )
        if self._looks:
            from edgepipe.quantizers.texts import check_calibration

            check_calibration(model.info, self._texts())
        if self.recover_steps:
            self._check_recovery(model)

    def _check_recovery(self, model: TorchModel) -> None:
        """Refuse what can't be taught again, or from these data."""
        from edgepipe.pruning.recover import check_recovery, kind_of
        from edgepipe.training.course import check_options
        from edgepipe.training.processes import several

        if several():
            raise ConfigError("prune.recover_steps trains in one process: start edgepipe without a launcher")
        kind = kind_of(model)
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        for name in _GENERATORS:
            if kind == "encoder" and getattr(self, name) != usual[name]:
                raise ConfigError(
                    f"prune.{name} means nothing to an encoder, and {model.info.name} is one: leave it out"
                )
        options = self._teaching(kind, ())
        try:
            check_options(options)
            check_recovery(model, options)
        except ConfigError as error:
            raise ConfigError(str(error).replace("distill.", "prune.")) from None

    def __call__(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Return the smaller model; weights are cut when they are read, or those that recovery left."""
        self.check(model)
        smaller, kept = self._cut(model, ctx)
        smaller = self._masked(smaller, ctx)
        if not self.recover_steps:
            return smaller
        return dataclasses.replace(smaller, weights=self._recovered(model, smaller, kept, ctx))

    def _masked(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Return the model with zeros in its matrices, as far as they are asked for."""
        from edgepipe.numerics.sparsity import parse_pattern
        from edgepipe.pruning.cut import on_grids_again
        from edgepipe.pruning.families import anatomy_of
        from edgepipe.pruning.masks import mask_weights, say

        pattern = parse_pattern(self.sparsity, self.pattern)
        if pattern is None:
            return model
        module: Any = None
        found: list[Batch] = []
        if self.mask != "magnitude":
            module, found = self._texts_for(model, ctx)
        masked = mask_weights(model, anatomy_of(model), pattern, self.mask, found, module, ctx.progress)
        say(masked, pattern, self.mask, ctx)
        weights = on_grids_again(masked.weights, model.weights) if _after_quantize(model) else masked.weights
        return dataclasses.replace(model, weights=weights)

    def _recovered(self, model: TorchModel, smaller: TorchModel, kept: tuple[Kept, ...], ctx: Context) -> WeightStore:
        """Return the smaller model's weights after distillation, on the grids they were on behind quantize."""
        from edgepipe.pruning.cut import on_grids_again
        from edgepipe.pruning.recover import kind_of, recover

        options = self._teaching(kind_of(model), kept[-1].layers)
        weights = recover(model, smaller, kept, options, ctx, masked=bool(self.sparsity or self.pattern))
        return on_grids_again(weights, smaller.weights) if _after_quantize(model) else weights

    def _teaching(self, kind: str, layers: tuple[int, ...]) -> Distill:
        """Return the same as options of distill, whose trainer does the work; `layers` are those a decoder kept."""
        from edgepipe.stages.distill import Distill

        given = {name: getattr(self, name) for name in _RECOVERY if kind != "encoder" or name not in _GENERATORS}
        if kind == "decoder":
            given["decoder_from"] = layers
        return Distill(student=kind, steps=self.recover_steps, **given)

    def _cut(self, model: TorchModel, ctx: Context) -> tuple[TorchModel, tuple[Kept, ...]]:
        """Return the smaller model, and what its stacks kept."""
        from edgepipe.pruning.cut import cut_weights
        from edgepipe.pruning.importance import by_activations, by_magnitude, by_place, choose, choose_layers
        from edgepipe.pruning.sizes import pruned_config

        anatomy, sizes = self._sizes(model)
        seen = self._seen(model, anatomy, ctx) if self._looks_before else None
        changes = seen.changes if seen is not None and self.layers_by == "contribution" else None
        layers = choose_layers(anatomy, sizes, changes)
        if seen is not None and self.importance == "activations":
            scores = by_activations(model.weights, anatomy, layers, seen)
        else:
            scores = by_magnitude(model.weights, anatomy, layers)
            scores = by_place(scores) if self.importance == "nested" else scores
        kept, hidden = choose(anatomy, sizes, scores, layers)
        rounds = _after_quantize(model)
        cut = cut_weights(model, anatomy, kept, hidden, rounds=rounds)
        if cut.decoded:
            how = "rounded again on it" if rounds else "decoded"
            ctx.note(f"{cut.decoded} tensors whose columns were cut between groups of their grid were {how}")
        self._say(model, cut.weights.parameters, (anatomy, sizes, kept), ctx)
        info = dataclasses.replace(model.info, config=pruned_config(model.info.config, anatomy, sizes, layers))
        return dataclasses.replace(model, info=info, weights=cut.weights), kept

    def _seen(self, model: TorchModel, anatomy: Anatomy, ctx: Context) -> Seen:
        from edgepipe.pruning.importance import observe

        module, found = self._texts_for(model, ctx)
        return observe(model, anatomy, module, found, ctx.progress)

    def _texts_for(self, model: TorchModel, ctx: Context) -> tuple[Any, list[Batch]]:
        """Return a model's module and the calibration texts as batches."""
        from edgepipe.quantizers.modules import module_of
        from edgepipe.quantizers.texts import batches

        module: Any = module_of(model)
        return module, batches(model, self._texts(), seed=ctx.seed, module=module, progress=ctx.progress)

    def _say(
        self,
        model: TorchModel,
        parameters: int,
        shape: tuple[Anatomy, tuple[Sizes, ...], tuple[Kept, ...]],
        ctx: Context,
    ) -> None:
        """Note what is left of what there was."""
        before = model.weights.parameters
        figures: Json = {"parameters": parameters, "parameters_before": before}
        for stack, size, kept in zip(*(shape[0].stacks, shape[1], shape[2]), strict=True):
            parts = [
                f"{now} of {had} {what}"
                for now, had, what in (
                    (", ".join(map(str, dict.fromkeys(size.ffns))), stack.ffn, "FFN channels"),
                    (size.kv_heads, stack.kv_heads, "key/value groups"),
                    (size.hidden, stack.hidden, "residual channels"),
                    (size.layers, stack.layers, "layers"),
                )
                if str(now) != str(had)
            ]
            if size.layers != stack.layers:
                parts[-1] += f" ({', '.join(map(str, kept.layers))})"
            if parts:
                ctx.note(f"{f'the {stack.name} ' if stack.name else ''}kept {', '.join(parts)}")
        ctx.note(
            f"{parameters / 1e6:.1f} of {before / 1e6:.1f} million parameters are left ({parameters / before:.0%})"
        )
        ctx.figures(figures)

    def _sizes(self, model: TorchModel) -> tuple[Anatomy, tuple[Sizes, ...]]:
        from edgepipe.numerics.sparsity import parse_pattern
        from edgepipe.pruning.families import anatomy_of
        from edgepipe.pruning.importance import choose_layers
        from edgepipe.pruning.masks import check_pattern
        from edgepipe.pruning.sizes import check_outside, pruned_config, sizes_of

        anatomy = anatomy_of(model)
        sizes = sizes_of(anatomy, self._wanted(), model.info.name, model.info.config)
        check_outside(anatomy, sizes, list(model.weights))
        pruned_config(model.info.config, anatomy, sizes, choose_layers(anatomy, sizes, None))  # refuses what can't be
        check_pattern(anatomy, sizes, parse_pattern(self.sparsity, self.pattern))
        return anatomy, sizes

    def _wanted(self) -> Wanted:
        from edgepipe.pruning.sizes import Wanted

        names = [field.name for field in dataclasses.fields(Wanted)]
        return Wanted(**{name: getattr(self, name) for name in names})

    def _texts(self) -> Calibration:
        from edgepipe.quantizers.texts import Calibration

        return Calibration(source=self.calibration, samples=self.samples, tokens=self.tokens)


def _after_quantize(model: TorchModel) -> bool:
    """Say whether quantize came before: then what leaves its grid is rounded on it again."""
    return any(record.stage == "quantize" for record in model.history)
