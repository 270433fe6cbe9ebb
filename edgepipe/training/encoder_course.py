"""From a teacher and data to a trained encoder: masked prediction, contrast, pairs or labels, whichever are asked for.

    texts    (masked next-token prediction) → contrast of each text with itself          arXiv:2404.05961
    pairs    (masked …) → (contrast of each text …) → pairs: in-batch contrast, or ranking by scores
    labels   (masked …) → cross-entropy of the classes

A classifier gives no embedding to contrast: teach an encoder with texts, then give it as MODEL with labels.
The steps in brackets run when `mask_steps` and `contrast_steps` say so; `steps` or `minutes` are those of the last one,
which `untaught` leaves out. MODEL may itself be an encoder student: it is taught further, with other data.
"""
# ruff: noqa: TID253  a course is of torch modules: this file is imported only where a model is trained

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers
import torch

from edgepipe.artifacts import Context, Json, TorchModel
from edgepipe.errors import ConfigError
from edgepipe.students.config import has_exits, is_student, nested_widths, read_student
from edgepipe.students.files import make_student
from edgepipe.students.models import Encoder
from edgepipe.students.result import as_model, teacher_tokens
from edgepipe.training.course import (
    SPLIT_SEED,
    Lazy,
    change,
    check_made_already,
    describe_data,
    kept_folder,
    loop_options,
    new_student,
    own_texts,
    run_key,
)
from edgepipe.training.data import TrainingData, hold_out, read_data
from edgepipe.training.encoder_data import (
    Reading,
    classified,
    label_names,
    masked,
    read_labels,
    read_pairs,
    read_texts,
    supervised,
    unsupervised,
)
from edgepipe.training.exits import at_exits, fit_gates
from edgepipe.training.loop import LoopData, LoopOptions, Objective, Place, train
from edgepipe.training.nested import nested

if TYPE_CHECKING:
    from edgepipe.stages.distill import Distill

_OWN_TOKENS = 128  # of a text that the teacher writes: a passage
_MASKS = ("<mask>", "[MASK]", "<|mask|>")  # what vocabularies call a mask; "_" where there is none (LLM2Vec)


def teach_encoder(model: TorchModel, options: Distill, ctx: Context) -> TorchModel:
    """Return an encoder student of `model`, trained as options and data say."""
    if options.data:
        data = read_data(options.data, columns=options.columns, option="distill.columns")
    elif _teaches(options):
        tokens = min(options.max_source, _OWN_TOKENS)
        data = own_texts(Lazy(model), options, ctx, kept_folder(ctx), tokens)
    else:
        return _result(model, _new_encoder(model, options, ctx, ()))
    course = _Course(model, data, options, ctx)
    if options.mask_steps:
        course.phase("masked", options.mask_steps, masked(mask_id=_mask_id(model), vocab=course.vocab))
    if data.form == "text" and not options.untaught:
        course.contrast("contrast", 0)
    elif options.contrast_steps:
        course.contrast("contrast", options.contrast_steps)
    if data.form != "text" and not options.untaught:
        course.teach(classified if data.form == "labels" else supervised)
    gates = course.fit_gates()
    ctx.figures({"training": course.records, **gates, "data": describe_data(data, course.train_part, course.held_part)})
    return _result(model, course.student)


def check_taught_further(model: TorchModel, options: Distill) -> None:
    """Refuse a student that isn't an encoder, and options that would make another one of it."""
    if read_student(model.info.config).kind != "encoder":
        raise ConfigError(f"an encoder can be taught further, but {model.info.name} is for {model.info.task}")
    check_made_already(options, model.info.name)
    if has_exits(model.info.config) and not options.data:
        raise ConfigError(f"distill.data: {model.info.name} has exits, whose gates are fitted to texts: give a file")
    if _teaches(options) and not options.data:
        raise ConfigError(
            f"distill.data: {model.info.name} writes no texts of its own: give a file of texts, pairs or labels"
        )


def check_mask(model: TorchModel, options: Distill) -> None:
    """Refuse masked prediction over a vocabulary in which nothing can stand for a mask."""
    if options.mask_steps:
        _mask_id(model)


def _teaches(options: Distill) -> bool:
    """Say whether an encoder is taught anything."""
    return bool(options.mask_steps or options.contrast_steps or not options.untaught)


def check_texts(model: TorchModel, options: Distill) -> None:
    """Refuse data that no encoder learns from, or with a text that is too long, and steps that can't be taken."""
    data = read_data(options.data, columns=options.columns, option="distill.columns")
    scores = {record.value for record in data.records}
    if data.form == "pairs" and len(data.records) > 1 and len(scores) == 1 and "" not in scores:
        raise ConfigError(f"{data.name}: every pair has the score {scores.pop()}, which ranks none: leave scores out")
    read_texts(data, _reading(model, options, lambda _note: None))
    if data.form == "labels":
        label_names(data)
        if options.contrast_steps:
            raise ConfigError(
                "distill.contrast_steps: a classifier gives no embedding to contrast: teach an encoder with texts, and "
                "give it as MODEL with the labels"
            )


def _mask_id(model: TorchModel) -> int:
    """Return the token that stands for a masked one."""
    tokenizer = tokenizers.Tokenizer.from_buffer(model.info.tokenizer["tokenizer.json"])
    known = (tokenizer.token_to_id(name) for name in (*_MASKS, "_", "\u2581_"))
    found = next((number for number in known if number is not None), None)
    if found is None:
        raise ConfigError("distill.mask_steps: the vocabulary has no mask token, and no underscore to stand for one")
    return int(found)


def _reading(model: TorchModel, options: Distill, note: Callable[[str], None]) -> Reading:
    """Return how texts become ids."""
    return Reading(
        files=model.info.tokenizer,
        limit=options.max_source,
        cut=options.cut or not options.data,  # what a teacher wrote may have more tokens when it is read again
        pad=teacher_tokens(model.info)["pad_token_id"],
        note=note,
    )


def _new_encoder(model: TorchModel, options: Distill, ctx: Context, labels: tuple[str, ...]) -> Encoder:
    """Make the student of a teacher, or open the student that is to be taught further."""
    if not is_student(model.info.config):
        student = new_student(model, options, ctx, labels)
    else:
        had = read_student(model.info.config)
        student = make_student(dataclasses.replace(had, labels=labels), seed=ctx.seed)
        heads = ("classifier.", "gates.")
        names = [n for n in student.state_dict() if not n.startswith(heads) or had.labels == labels]
        values = {name: torch.from_numpy(np.array(model.weights.float32(name))) for name in names}
        student.load_state_dict(values, strict=False)
        ctx.note(f"{model.info.name} is taught further: {model.weights.parameters / 1e6:.1f} million parameters")
    assert isinstance(student, Encoder)
    return student


def _result(model: TorchModel, student: Encoder) -> TorchModel:
    name = model.info.name if is_student(model.info.config) else f"{model.info.name}-encoder"
    return as_model(student.eval(), model.info, name=name, tokenizer=dict(model.info.tokenizer))


class _Course:
    """Hold the student and what it learns from, while one phase follows another."""

    def __init__(self, model: TorchModel, data: TrainingData, options: Distill, ctx: Context) -> None:
        self._options, self._ctx = options, ctx
        self._folder: Path = kept_folder(ctx)
        self._key = run_key(model, options, data)
        self.labels = label_names(data) if data.form == "labels" else ()
        self.train_part, self.held_part = hold_out(data, options.held_out, SPLIT_SEED)
        self.student = student = _new_encoder(model, options, ctx, self.labels)
        if student.config.exits:  # gates that saw what the student learnt would find it right everywhere
            self.train_part, self._gate_part = hold_out(self.train_part, options.gate_data, SPLIT_SEED + 1)
        self.vocab = student.shape.vocab
        self._widths = nested_widths(student.config.encoder)
        self.records: Json = {}
        self._reading = _reading(model, options, ctx.note)

    def phase(self, name: str, steps: int, objective: Objective) -> None:
        """Train on all texts, judged by the held-out ones."""
        sets = LoopData(
            train=read_texts(self.train_part, self._reading), held_out=read_texts(self.held_part, self._reading)
        )
        self._train(name, objective, sets, loop_options(self._options, self._ctx.seed, steps))

    def contrast(self, name: str, steps: int) -> None:
        """Contrast each text with itself under other dropout; nothing judges it: without dropout both are the same."""
        sets = LoopData(train=read_texts(self.train_part, self._reading))
        loop = loop_options(self._options, self._ctx.seed, steps)
        self._train(name, unsupervised, sets, loop, self._options.contrast_dropout)

    def teach(self, objective: Objective) -> None:
        """Train on the data's pairs or labels."""
        parts = (self.train_part, self.held_part)
        if self.labels:
            examples, held_out = (read_labels(part, self.labels, self._reading) for part in parts)
            sets = LoopData(train=examples, held_out=held_out)
        else:
            pairs, held_pairs = (read_pairs(part, self._reading) for part in parts)
            sets = LoopData(train=pairs, held_out=held_pairs)
        self._train("student", objective, sets, loop_options(self._options, self._ctx.seed), self._options.dropout)

    def fit_gates(self) -> Json:
        """Fit the gates of a student with exits; return their record, none for one without."""
        if not self.student.config.exits:
            return {}
        read = read_labels(self._gate_part, self.labels, self._reading) if self.labels else None
        examples = read_texts(self._gate_part, self._reading) if read is None else read
        found = fit_gates(self.student, examples, self._options.gate_beta, self._options.rows or self._options.batch)
        for one in found["exits"]:
            self._ctx.note(
                f"the exit after {one['layers']} layers is right for {one['right']:.0%} of {found['examples']} texts; "
                f"its gate tells that for {one['told']:.0%} of these, which it was fitted to"
            )
        return {"gates": found}

    def _train(self, name: str, objective: Objective, sets: LoopData, loop: LoopOptions, dropout: float = 0.0) -> None:
        if self._widths:
            judge = nested(objective, self._widths, every=True, seed=loop.seed)
            objective = nested(objective, self._widths, every=self._options.nested_every, seed=loop.seed)
            sets = dataclasses.replace(sets, judge=judge)
        if self.student.config.exits:
            objective = at_exits(objective, self.student.config.depths)
        place = Place(folder=self._folder / name, key=self._key, progress=self._ctx.progress)
        loop = dataclasses.replace(loop, seed=phase_seed(loop.seed, len(self.records)))
        self.student.dropout.rate = dropout
        try:
            self.records[name] = train(self.student, objective, sets, loop, place)
        finally:
            self.student.dropout.rate = 0.0
        self._ctx.note(f"{name}: {change(self.records[name])}")


def phase_seed(seed: int, phase: int) -> int:
    """Return the seed of a phase: the same one would choose the same examples again; the first phase has the run's."""
    return int(np.random.SeedSequence([seed, phase]).generate_state(1)[0]) if phase else seed
