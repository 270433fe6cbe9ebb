"""Recovery: the pruned model is taught by the model it was cut from, through the trainer and losses that students have.

    decoder            training/course.py, its objective and data; layers are compared with those they were
    encoder-decoder    the same objective; the teacher is a student's module too
    encoder            L = 1 − cos(embedding, teacher's) + Σ(state − teacher's)² / Σ teacher's²     the last states
                       narrower: L = mean over pairs of texts of (cos − teacher's cos)²
    classes            L = KL(teacher ‖ pruned)

A run that is stopped goes on from its last checkpoint, and masks survive (training/zeros.py).
Source: Minitron, arXiv:2407.14679, which recovers by distillation from the unpruned model alone.
"""
# ruff: noqa: TID253  recovery trains torch modules: this file is imported only where that is done

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgepipe.artifacts import Context, Json, TorchModel
from edgepipe.errors import ConfigError
from edgepipe.graph.framework import fill_module
from edgepipe.graph.modules import one_graph
from edgepipe.graph.shape import read_shape
from edgepipe.numerics.losses import divergence
from edgepipe.pruning.importance import Kept
from edgepipe.quantizers.modules import module_of
from edgepipe.quantizers.texts import longest_of, padding_of
from edgepipe.store import cache_key
from edgepipe.students.config import is_student
from edgepipe.students.files import read_bare
from edgepipe.students.from_teacher import config_of
from edgepipe.students.models import Decoder, Encoder, EncoderDecoder
from edgepipe.training.batches import Batch
from edgepipe.training.course import (
    SPLIT_SEED,
    change,
    describe_data,
    distil_options,
    given_data,
    kept_folder,
    loop_options,
    pair_reading,
    run_key,
    teach_generator,
)
from edgepipe.training.data import TrainingData, hold_out, read_data
from edgepipe.training.distil import LayerMap, Projected, distillation, drawing, likelihood, stack_widths
from edgepipe.training.encoder_data import Reading, read_texts
from edgepipe.training.loop import LoopData, Objective, Place, Step, train
from edgepipe.training.zeros import keep_zeros
from edgepipe.weights import WeightStore, held_weight

if TYPE_CHECKING:
    from edgepipe.stages.distill import Distill

_KINDS = {  # task → the kind of student whose training it gets
    "text-generation": "decoder",
    "text2text-generation": "encoder-decoder",
    "feature-extraction": "encoder",
    "text-classification": "encoder",
}


def kind_of(model: TorchModel) -> str:
    """Return the kind of student whose training a pruned model gets; ConfigError for a task without."""
    if model.info.task not in _KINDS:
        raise ConfigError(
            f"prune.recover_steps: a model for {model.info.task} can be pruned but not taught again; recovery is there "
            f"for {', '.join(_KINDS)}: leave it out"
        )
    return _KINDS[model.info.task]


def check_recovery(model: TorchModel, options: Distill) -> None:
    """Refuse, before any work, data that can't be read or that this model doesn't learn from."""
    if options.student == "encoder":
        if not options.data:
            raise ConfigError(f"prune.data: {model.info.name} writes no texts of its own: give a file of texts")
        _encoder_texts(_data(options), model, options, lambda _note: None)
        return
    if options.student == "decoder":
        window = min((w for w in read_shape(model.info.config, None).windows if w), default=0)
        if window and window < options.max_source + options.max_target:
            raise ConfigError(
                f"prune.recover_steps: {model.info.name} sees {window} tokens back, and the trainer all of them: keep "
                "prune.max_source + prune.max_target within that"
            )
    elif not options.data:
        raise ConfigError(f"prune.data: {model.info.name} answers sources: give a file of sources and targets")
    if options.data:
        data = given_data(options)
        pair_reading(model, options, data).examples(data, lambda _note: None)


def recover(
    model: TorchModel, pruned: TorchModel, kept: Sequence[Kept], options: Distill, ctx: Context, *, masked: bool
) -> WeightStore:
    """Return the pruned model's weights after training it to do what `model` does, float32; `masked`: zeros stay."""
    module = module_to_train(pruned)
    keep_zeros(module, pruned.weights, on_grids=masked)
    if isinstance(module, Decoder):
        taught = teach_generator(model, options, ctx, made=module)
        values = {name: taught.weights.float32(name) for name in taught.weights}
    elif isinstance(module, EncoderDecoder):
        _teach_pair(model, module, kept, options, ctx)
        values = values_of(module)
    else:
        _teach_encoder(model, pruned, module, options, ctx)
        values = values_of(module)
    return WeightStore({name: held_weight(name, values[name]) for name in pruned.weights}, pruned.weights.aliases)


def module_to_train(model: TorchModel) -> nn.Module:
    """Return the module that the trainer takes: a student's, for a Llama too; transformers' for BERT and its kin."""
    if is_student(model.info.config) or model.info.task == "text-generation":
        config = model.info.config if is_student(model.info.config) else config_of(model)
        module: nn.Module = read_bare(config)
        fill_module(module, model.weights)
        return module
    module = module_of(model)
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0  # a few hundred steps forget nothing that dropout would guard against
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    return module


def values_of(module: nn.Module) -> dict[str, np.ndarray]:
    """Return a module's tensors by name."""
    return {name: value.detach().cpu().float().numpy() for name, value in module.state_dict().items()}


def _teach_pair(
    model: TorchModel, module: EncoderDecoder, kept: Sequence[Kept], options: Distill, ctx: Context
) -> None:
    """Teach an encoder-decoder what the whole one says."""
    data = given_data(options)
    reading = pair_reading(model, options, data)
    train_part, held_part = hold_out(data, options.held_out, SPLIT_SEED)
    examples, held_out = (reading.examples(part, ctx.note) for part in (train_part, held_part))
    how = distil_options(options, ctx.seed)
    teacher: EncoderDecoder = module_of(model)
    layers = LayerMap(encoder=kept[0].layers, decoder=kept[1].layers) if how.match_hidden else LayerMap()
    objective = distillation(how, teacher, layers=layers)
    trained: nn.Module = module
    if how.match_hidden and stack_widths(module) != stack_widths(teacher):
        trained = Projected(module, stack_widths(teacher)[0], seed=ctx.seed)
    sets = LoopData(train=examples, held_out=held_out, judge=likelihood, prepare=drawing(how))
    _train(trained, objective, sets, options, run_key(model, options, data), ctx)
    ctx.figures({"data": describe_data(data, train_part, held_part)})


def _teach_encoder(model: TorchModel, pruned: TorchModel, module: nn.Module, options: Distill, ctx: Context) -> None:
    """Teach an encoder the embeddings, or the classes' probabilities, that the whole one gives."""
    data = _data(options)
    train_part, held_part = hold_out(data, options.held_out, SPLIT_SEED)
    examples, held_out = (_encoder_texts(part, model, options, ctx.note) for part in (train_part, held_part))
    ours, theirs = _answering(pruned, module), _answering(model, module_of(model))
    classes = model.info.task == "text-classification"
    sets = LoopData(train=examples, held_out=held_out)
    objective = _class_recovery(ours, theirs) if classes else _embedding_recovery(ours, theirs)
    _train(module, objective, sets, options, run_key(model, options, data), ctx)
    ctx.figures({"data": describe_data(data, train_part, held_part)})


def _train(module: nn.Module, objective: Objective, sets: LoopData, options: Distill, key: str, ctx: Context) -> None:
    shapes = {name: list(value.shape) for name, value in module.named_parameters()}
    place = Place(folder=kept_folder(ctx) / "recovered", key=cache_key(key, shapes), progress=ctx.progress)
    record: Json = train(module, objective, sets, loop_options(options, ctx.seed), place)
    ctx.note(f"the pruned model was taught by the whole one: {change(record)}")
    ctx.figures({"training": {"recovered": record}})


def _data(options: Distill) -> TrainingData:
    return read_data(options.data, columns=options.columns, option="prune.columns")


def _encoder_texts(data: TrainingData, model: TorchModel, options: Distill, note: Any) -> Any:
    """Return all texts of the data as ids."""
    limit = min(options.max_source, longest_of(model.info) or options.max_source)
    reading = Reading(files=model.info.tokenizer, limit=limit, cut=options.cut, pad=padding_of(model.info), note=note)
    return read_texts(data, reading)


class _Answering:
    """Run an encoder over a batch: its answer [B, H] or [B, classes], and its last states [B, N, H] of an embedder."""

    def __init__(self, module: nn.Module, run: Any) -> None:
        self.module, self._run = module, run

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return answer and states."""
        answer, states = self._run(batch["ids"], batch["mask"])
        return answer, states


def _answering(model: TorchModel, module: nn.Module) -> _Answering:
    """Return how an encoder answers: a student's own way, or through the outputs that export gives."""
    embeds = model.info.task == "feature-extraction"
    if isinstance(module, Encoder):

        def run_student(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
            states, _ = module.hidden(ids, mask)
            pooled = module.pool(states, mask)
            return (pooled, states) if embeds else (module.classifier(pooled), None)

        return _Answering(module, run_student)
    pooling = (model.info.sentence or {}).get("pooling", "mean")
    graph = one_graph(module, ["last_hidden_state"], pooling) if embeds else one_graph(module, ["logits"])

    def run_graph(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        found = graph(input_ids=ids, attention_mask=mask)
        return (found["embedding"], found["last_hidden_state"]) if embeds else (found["logits"], None)

    return _Answering(module, run_graph)


def _embedding_recovery(ours: _Answering, theirs: _Answering) -> Objective:
    """Return the loss of an embedder: a mean over texts, so that a batch may be divided."""

    def objective(_module: nn.Module, batch: Batch, _step: int) -> Step:
        answer, states = ours(batch)
        with torch.no_grad():
            theirs.module.to(batch["ids"].device)
            wanted, wanted_states = theirs(batch)
        assert states is not None
        assert wanted_states is not None
        if answer.shape != wanted.shape:
            loss = (_cosines(answer) - _cosines(wanted)).square().mean()
            return Step(loss, len(answer), {"relation": loss})
        turned = (1 - functional.cosine_similarity(answer.float(), wanted.float(), dim=-1)).mean()
        counts = batch["mask"][..., None].float()
        missed = ((states.float() - wanted_states.float()).square() * counts).sum((1, 2))
        whole = (wanted_states.float().square() * counts).sum((1, 2)).clamp_min(1e-9)
        moved = (missed / whole).mean()
        return Step(turned + moved, len(answer), {"embedding": turned, "states": moved})

    return objective


def _cosines(x: Tensor) -> Tensor:
    """Return the cosines between all rows [B, B]."""
    length_one = functional.normalize(x.float(), dim=-1)
    return length_one @ length_one.T


def _class_recovery(ours: _Answering, theirs: _Answering) -> Objective:
    """Return the loss of a classifier, and how often both choose the same class."""

    def objective(_module: nn.Module, batch: Batch, _step: int) -> Step:
        answer, _ = ours(batch)
        with torch.no_grad():
            theirs.module.to(batch["ids"].device)
            wanted, _ = theirs(batch)
        same = (answer.argmax(-1) == wanted.argmax(-1)).float().mean()
        return Step(divergence(answer, wanted).mean(), len(answer), {"same": same})

    return objective
