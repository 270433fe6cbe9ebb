"""Quantization-aware training: layers learn on their grid what the same model computes in floats.

The model is its own teacher (arXiv:2301.12017: logits, hidden states and attention maps; qat_losses.py), its layers
compute as the bundle will (fake.py), and the one loop trains them (training/loop.py, with its checkpoints: a run that
was killed goes on). What comes back are float weights; `quantize` then puts them on the very grid they were trained on.

    sources and targets   what an encoder-decoder learns from
    labels                what a classifier learns from where the data's own labels count (`targets`)
    texts                 everything else; both of a pair
"""
# ruff: noqa: TID253  this trains a torch module: this file is imported only where that is done

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgepipe.artifacts import Context, Json, ModelInfo, TorchModel
from edgepipe.errors import ConfigError
from edgepipe.graph.framework import build_module
from edgepipe.graph.tasks import GENERATION
from edgepipe.quantizers.fake import Faked, fake_layers
from edgepipe.quantizers.modules import module_of
from edgepipe.quantizers.qat_losses import LossWeights, Watched, counting, taught
from edgepipe.quantizers.row_options import TERNARY, token_grid
from edgepipe.quantizers.texts import padding_of
from edgepipe.store import cache_key
from edgepipe.students.config import is_student, read_student
from edgepipe.students.files import read_bare
from edgepipe.students.models import initialize
from edgepipe.training.batches import Examples, Limits, Special, seq2seq
from edgepipe.training.course import SPLIT_SEED, change, describe_data, kept_folder
from edgepipe.training.data import TrainingData, hold_out, read_data
from edgepipe.training.encoder_data import Reading, read_labels, read_texts
from edgepipe.training.loop import LoopData, LoopOptions, Place, train
from edgepipe.training.processes import is_alone
from edgepipe.training.zeros import keep_zeros
from edgepipe.weights import held_weight

if TYPE_CHECKING:
    from edgepipe.stages.quantize import Quantize

TRAINERS = ("accelerate",)  # whose versions decide a result, beside those that decide all
_EMBEDS = "feature-extraction"
_CLASSIFIES = "text-classification"
_TASKS = (*GENERATION, _EMBEDS, _CLASSIFIES, "token-classification", "fill-mask")
_DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "dropout_rate", "layerdrop")


def read_training(options: Quantize) -> TrainingData:
    """Read what a stage's options train with; ConfigError for what can't be read, and steps that can't be taken."""
    loop_options(options, 0)
    if not is_alone():
        raise ConfigError(
            "quantize.steps: layers are trained on their grid by one process: start it without a launcher"
        )
    return read_data(options.data, columns=options.columns, option="quantize.columns")


def check_data(model: TorchModel, options: Quantize) -> None:
    """Refuse, before any work, a model or data that can't be trained with, and steps that can't be taken."""
    data, info = read_training(options), model.info
    if info.task not in _TASKS or "tokenizer.json" not in info.tokenizer:
        raise ConfigError(
            f"quantize.steps: expected a model of texts with a tokenizer, for {', '.join(_TASKS)}, but {info.name} is "
            f"for {info.task}: leave steps out"
        )
    hold_out(data, options.held_out, SPLIT_SEED)
    if info.task == "text2text-generation" and data.form != "source-target":
        raise ConfigError(
            f"{data.name}: expected sources and targets, which {info.name} learns from, but it holds {data.form}"
        )
    if options.targets and info.task not in (*GENERATION, _CLASSIFIES):
        raise ConfigError(
            f"quantize.targets: the data hold no targets for {info.task}, which {info.name} is for: leave it out"
        )
    if options.targets and info.task == _CLASSIFIES:
        if data.form != "labels":
            raise ConfigError(
                f"{data.name}: expected texts with labels, but it holds {data.form}: or leave targets out"
            )
        read_labels(data, _labels(info), _reading(model, options, lambda _note: None))


def train_on_grid(model: TorchModel, layers: Sequence[str], options: Quantize, ctx: Context) -> TorchModel:
    """Return the model with float weights that were trained while the matrices called `layers` were on their grid."""
    data = read_training(options)
    train_part, held_part = hold_out(data, options.held_out, SPLIT_SEED)
    examples, held_out = (_examples(model, part, options, ctx.note) for part in (train_part, held_part))
    weights = LossWeights(
        logits=options.logits, hidden=options.hidden, attention=options.attention, targets=options.targets
    )
    module = _trainable(model, ctx.seed, scratch=options.scratch)
    keep_zeros(module, model.weights, on_grids=False)
    dial = fake_layers(module, layers, faked(options))
    pooling = (model.info.sentence or {}).get("pooling", "mean")
    how = {"states": options.hidden > 0, "maps": options.attention > 0, "pooling": pooling}
    student = Watched(module, **how)
    teacher = Watched(module_of(model), **how) if weights.asks else None
    embeds = model.info.task == _EMBEDS
    objective = taught(student, teacher, weights, dial, strength_steps=options.strength_steps, embeds=embeds)
    sets = LoopData(
        train=examples, held_out=held_out, prepare=counting(per_token=model.info.task not in (_EMBEDS, _CLASSIFIES))
    )
    key = cache_key(
        model.info.fingerprint, [record.key for record in model.history], repr(options), data.sha256, list(layers)
    )
    place = Place(folder=kept_folder(ctx) / "grid", key=key, progress=ctx.progress)
    record = train(module, objective, sets, loop_options(options, ctx.seed), place)
    ctx.note(f"{len(layers)} matrices were trained on their grid: {change(record)}")
    ctx.figures({"training": {"quantize": record}, "data": describe_data(data, train_part, held_part)})
    changed = {}
    for alias, value in module.state_dict().items():
        if alias in model.weights:  # a tied one has several names there, and one of them here
            name = model.weights[alias].name
            changed[name] = held_weight(name, np.array(value.detach().cpu().numpy()))
    return TorchModel(info=model.info, weights=model.weights.replace(changed), history=model.history)


def faked(options: Quantize) -> Faked:
    """Return how layers compute while they are trained: as they will in the bundle."""
    ternary = options.bits == TERNARY
    return Faked(
        bits=2 if ternary else int(options.bits),
        ternary=options.ternary if ternary else "",
        tokens=token_grid(options),
        normalizes=ternary and options.normalize,
    )


def loop_options(options: Quantize, seed: int) -> LoopOptions:
    """Return how long and how fast layers are trained; ConfigError names the option that is out of range."""
    try:
        return LoopOptions(
            steps=options.steps,
            batch=options.batch,
            learning_rate=options.learning_rate,
            warmup=options.warmup,
            precision=options.precision,
            seed=seed,
        )
    except ConfigError as error:
        raise ConfigError(f"quantize.{error}") from None


def _trainable(model: TorchModel, seed: int, *, scratch: bool) -> Any:
    """Return the module that is trained: the model's, or the same with random weights; without dropout.

    What the teacher is compared with, place by place, must not be noise.
    """
    if not scratch:
        module = module_of(model)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student = is_student(model.info.config)
            module = read_bare(model.info.config) if student else build_module(model.info)
            if student:
                initialize(module, seed)
        if hasattr(module, "config") and hasattr(module.config, "use_cache"):
            module.config.use_cache = False
    for child in module.modules():
        if isinstance(child, torch.nn.Dropout):
            child.p = 0.0
        for name in _DROPOUTS:
            if isinstance(getattr(child, name, None), float):
                setattr(child, name, 0.0)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    return module


def _reading(model: TorchModel, options: Quantize, note: Callable[[str], None]) -> Reading:
    """Return how texts become ids: as calibration has them, cut at `tokens`."""
    return Reading(files=model.info.tokenizer, limit=options.tokens, cut=True, pad=padding_of(model.info), note=note)


def _examples(model: TorchModel, data: TrainingData, options: Quantize, note: Callable[[str], None]) -> Examples:
    info = model.info
    if info.task == "text2text-generation":
        special = Special(
            start=_start(info), eos=min(info.eos_token_ids, default=padding_of(info)), pad=padding_of(info)
        )
        limits = Limits(source=options.tokens, target=options.tokens, cut=True)
        return seq2seq(data, info.tokenizer, limits, special, note)
    reading = _reading(model, options, note)
    if options.targets and info.task == _CLASSIFIES:
        return read_labels(data, _labels(info), reading)
    return read_texts(data, reading)


def _start(info: ModelInfo) -> int:
    start = info.config.get("decoder_start_token_id")
    if type(start) is not int:
        raise ConfigError("config.json has no decoder_start_token_id, which every answer begins with")
    return start


def _labels(info: ModelInfo) -> tuple[str, ...]:
    """Return the labels of a classifier in the order of its logits."""
    if is_student(info.config):
        return read_student(info.config).labels
    names: Json = info.config.get("id2label") or {}
    return tuple(str(names[key]) for key in sorted(names, key=int))
