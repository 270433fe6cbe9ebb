"""From a teacher and data to a trained encoder-decoder or decoder: every step of it, in order.

    data → (the teacher writes texts or targets) → part held out → (the teacher is adapted) → student made of it →
    (the teacher's scores kept on disk) → training → artifact

Everything that takes long lies in the stage's own folder and is found again after a stop: adapters, scores, texts,
checkpoints. The encoder's course is encoder_course.py.
"""
# ruff: noqa: TID253  a course is of torch modules: this file is imported only where a model is trained

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers
import torch
from torch import nn

from edgepipe.artifacts import Context, Json, TorchModel
from edgepipe.errors import ConfigError
from edgepipe.graph.shape import read_shape
from edgepipe.store import cache_key
from edgepipe.students.config import nested_widths
from edgepipe.students.files import load_student, make_student, student_config, student_fingerprint
from edgepipe.students.from_teacher import StudentPlan, chosen_layers, config_of, plan_student, student_values
from edgepipe.students.models import Decoder, EncoderDecoder, Student
from edgepipe.students.result import as_model, teacher_tokens
from edgepipe.students.tokenizer import with_end_token
from edgepipe.training.adapt import Adapters, adapt_teacher
from edgepipe.training.batches import Limits, Seq2Seq, Special, seq2seq
from edgepipe.training.data import TrainingData, check_vocabularies, hold_out, read_data
from edgepipe.training.distil import (
    DistilOptions,
    LayerMap,
    Projected,
    distillation,
    drawing,
    likelihood,
    stack_widths,
)
from edgepipe.training.loop import LoopData, LoopOptions, Objective, Place, train
from edgepipe.training.nested import nested
from edgepipe.training.scores import ScoreOptions, Scores, keep_scores
from edgepipe.training.teacher import Teacher, open_teacher
from edgepipe.training.texts import WriteOptions, Writing, write_targets, write_texts

if TYPE_CHECKING:
    from edgepipe.stages.distill import Distill

SPLIT_SEED = 0  # the same part is held out whatever the seed: runs of several seeds are judged alike
_CROSS = r"\.cross_att"  # the parameters that cross-attention adds: projections and norm


def student_plan(options: Distill) -> StudentPlan:
    """Return what the stage's options say of the student itself."""
    return StudentPlan(
        kind=options.student,
        encoder_layers=options.encoder_layers,
        decoder_layers=options.decoder_layers,
        encoder_from=options.encoder_from,
        decoder_from=options.decoder_from,
        hidden=options.hidden,
        ffn=options.ffn,
        nested=options.nested,
        exits=options.exits,
        kv_heads=options.kv_heads,
        causal_encoder=options.causal_encoder,
        centred_positions=options.centred_positions,
        cross=options.cross,
        scratch=options.scratch,
        pooling=options.pooling,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _PairReading:
    """Say how texts become ids for this student."""

    plain: Mapping[str, bytes]  # the teacher's tokenizer
    files: Mapping[str, bytes]  # the student's: sources end with the end token
    special: Special
    limits: Limits
    ends_texts: bool  # the first half of a text is a source like any other, with the end token behind it

    def examples(self, data: TrainingData, note: Callable[[str], None]) -> Seq2Seq:
        """Return sources and targets as ids."""
        if data.form != "text":
            return seq2seq(data, self.files, self.limits, self.special, note)
        room = dataclasses.replace(self.limits, source=self.limits.source - self.ends_texts)
        halves = seq2seq(data, self.plain, room, self.special, note)
        if not self.ends_texts:
            return halves
        sources = [np.append(source, self.special.eos).astype(np.int32) for source in halves.sources]
        return dataclasses.replace(halves, sources=sources)


def teach_generator(
    model: TorchModel, options: Distill, ctx: Context, made: Decoder | EncoderDecoder | None = None
) -> TorchModel:
    """Return an encoder-decoder or decoder student of `model`, trained as the options say; `made`: this one."""
    if options.untaught:
        files = model.info.tokenizer
        if options.student == "encoder-decoder":
            files = with_end_token(files, teacher_tokens(model.info)["pad_token_id"])
        return _result(model, new_student(model, options, ctx), options, files)
    folder = kept_folder(ctx)
    teacher = Lazy(model)
    tokens = min(2 * options.max_source, 2 * options.max_target)
    data = given_data(options) if options.data else own_texts(teacher, options, ctx, folder, tokens)
    reading = pair_reading(model, options, data)
    train_part, held_part = hold_out(data, options.held_out, SPLIT_SEED)
    reads = reading if options.data else _cutting(reading)
    examples, held_out = (reads.examples(part, ctx.note) for part in (train_part, held_part))
    records: Json = {}
    if options.adapt_steps:
        loop = dataclasses.replace(
            loop_options(options, ctx.seed, options.adapt_steps), learning_rate=options.adapt_rate
        )
        place = Place(folder=folder / "teacher", key=run_key(model, options, data), progress=ctx.progress)
        sets = LoopData(train=examples, held_out=held_out)
        model, adapted, records["teacher"] = adapt_teacher(model, sets, Adapters(), loop, place)
        teacher = Lazy(model, adapted)
        ctx.note(f"the teacher was adapted: {change(records['teacher'])}")
    if options.targets == "teacher":
        written = _teacher_targets(train_part, examples, reading, teacher, folder, ctx)
        ctx.note(f"the teacher wrote {len(written.records)} targets")
        examples = _cutting(reading).examples(written, ctx.note)
    student = new_student(model, options, ctx) if made is None else made
    assert isinstance(student, Decoder | EncoderDecoder)
    how = distil_options(options, ctx.seed)
    objective, module = _objective(student, teacher, examples, (options, how), folder, ctx)
    loop = loop_options(options, ctx.seed)
    if options.cross_steps and isinstance(student, EncoderDecoder):
        loop = dataclasses.replace(loop, alone=_CROSS, alone_steps=options.cross_steps)
    judge: Objective = likelihood
    if widths := nested_widths(student_config(student)):
        objective = nested(objective, widths, every=options.nested_every, seed=ctx.seed)
        judge = nested(judge, widths, every=True, seed=ctx.seed)
    sets = LoopData(train=examples, held_out=held_out, judge=judge, prepare=drawing(how))
    place = Place(folder=folder / "student", key=run_key(model, options, data), progress=ctx.progress)
    student.dropout.rate = options.dropout
    records["student"] = train(module, objective, sets, loop, place)
    student.dropout.rate = 0.0
    ctx.note(f"the student was trained: {change(records['student'])}")
    ctx.figures({"training": records, "data": describe_data(data, train_part, held_part)})
    return _result(model, student, options, reading.files)


def _result(model: TorchModel, student: Student, options: Distill, files: Mapping[str, bytes]) -> TorchModel:
    return as_model(student.eval(), model.info, name=f"{model.info.name}-{options.student}", tokenizer=files)


class Lazy:
    """Hold the teacher, and its module once somebody asks for it."""

    def __init__(self, model: TorchModel, module: Teacher | None = None) -> None:
        self.model = model
        self._module = module

    def module(self) -> Teacher:
        """Return the teacher as a module, all its weights in memory."""
        if self._module is None:
            self._module = open_teacher(self.model)
        return self._module


def kept_folder(ctx: Context) -> Path:
    """Return the folder that is found again after a stop; the stage's private one where there is no such."""
    folder = ctx.keep_dir if ctx.keep_dir is not None else ctx.work_dir / "kept"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def loop_options(options: Distill, seed: int, steps: int = 0) -> LoopOptions:
    """Return the loop's options for `steps`, or for the time the stage has."""
    given = (steps, 0.0) if steps else options.time
    return LoopOptions(
        steps=given[0],
        minutes=given[1],
        batch=options.batch,
        rows=options.rows,
        learning_rate=options.learning_rate,
        warmup=options.warmup,
        patience=options.patience,
        precision=options.precision,
        seed=seed,
    )


def distil_options(options: Distill, seed: int) -> DistilOptions:
    """Return what a student is taught with."""
    return DistilOptions(
        alpha=options.alpha,
        reverse=options.reverse,
        temperature=options.temperature,
        on_policy=options.on_policy,
        match_hidden=options.match_hidden,
        match_cosine=options.match_cosine,
        sample_temperature=options.sample_temperature,
        sample_top_k=options.sample_top_k,
        seed=seed,
    )


def check_options(options: Distill) -> None:
    """Refuse what training or losses would refuse, by the options' names, before any work."""
    try:
        loop_options(options, 0)
        distil_options(options, 0)
    except ConfigError as error:
        raise ConfigError(f"distill.{error}") from None


def check_made_already(options: Distill, name: str) -> None:
    """Refuse options that would make another student of one that is there."""
    usual, given = StudentPlan(kind=options.student), student_plan(options)
    for field in dataclasses.fields(StudentPlan):
        if getattr(given, field.name) != getattr(usual, field.name):
            raise ConfigError(
                f"distill.{field.name}: {name} is a student already and keeps what it is made of: leave it out"
            )


def run_key(model: TorchModel, options: Distill, data: TrainingData) -> str:
    """Return what a training's checkpoints belong to: the model, all options, the contents of the files they name."""
    decides = {k: v for k, v in dataclasses.asdict(options).items() if k not in ("data", "scores", "start")}
    start = student_fingerprint(Path(options.start)) if options.start else ""
    return cache_key(model.info.fingerprint, decides, data.sha256, start)


def new_student(model: TorchModel, options: Distill, ctx: Context, labels: tuple[str, ...] = ()) -> Student:
    """Make the student of a teacher, its weights the teacher's where they come from there, and say so."""
    if options.start:
        return _earlier_student(model, options, ctx)
    plan = dataclasses.replace(student_plan(options), labels=labels)
    config = plan_student(config_of(model), plan)
    student = make_student(config, seed=ctx.seed)
    shape = read_shape(config_of(model), None)
    encoder_from, decoder_from = chosen_layers(shape, plan)
    if not plan.scratch:
        ctx.progress("the teacher's weights", 0, 1)
        values = {name: torch.from_numpy(np.array(v)) for name, v in student_values(model, plan, config).items()}
        _, extra = student.load_state_dict(values, strict=False)
        assert not extra, "the plan's names are the student's"
    count = sum(p.numel() for p in student.parameters())
    made = {
        "encoder": f"encoder of layers {_listed(encoder_from)}",
        "decoder": f"decoder of layers {_listed(decoder_from)}",
        "encoder-decoder": f"encoder of layers {_listed(encoder_from)}, decoder of layers {_listed(decoder_from)}",
    }[plan.kind]
    start = "random weights, shaped as an " + made if plan.scratch else made
    share = count / model.weights.parameters
    ctx.note(f"student: {count / 1e6:.1f} million parameters, {share:.0%} of the teacher's; {start}")
    if any(shape.windows):
        ctx.note("the teacher's sliding windows are gone: a student attends to everything")
    return student


def _earlier_student(model: TorchModel, options: Distill, ctx: Context) -> Student:
    """Open the student that training goes on with."""
    student, files = _open_earlier(options)
    check_vocabularies(model.info.tokenizer, files, (model.info.name, options.start))
    ctx.note(f"student: goes on from {Path(options.start).name}")
    return student


def _open_earlier(options: Distill) -> tuple[Student, dict[str, bytes]]:
    """Return the student at `start` and its tokenizer; ConfigError when it is another kind's."""
    directory = Path(options.start)
    student = load_student(directory)
    kinds = {"decoder": Decoder, "encoder-decoder": EncoderDecoder}
    if not isinstance(student, kinds[options.student]):
        raise ConfigError(f"distill.start: {directory} holds another kind of student than {options.student}")
    return student, {"tokenizer.json": (directory / "tokenizer.json").read_bytes()}


def check_start(model: TorchModel, options: Distill) -> None:
    """Refuse an earlier student that can't go on, and options that it can't follow.

    One with fewer tokens than the model, all of them the model's, may belong to what a stage before makes of that.
    """
    check_made_already(options, options.start)
    if options.match_hidden:
        raise ConfigError(
            f"distill.match_hidden: {options.start} doesn't say which of the teacher's layers its own came from: "
            "leave it out"
        )
    _, files = _open_earlier(options)
    own, all_tokens = (
        tokenizers.Tokenizer.from_buffer(held["tokenizer.json"]).get_vocab(with_added_tokens=True).keys()
        for held in (files, model.info.tokenizer)
    )
    if not own < all_tokens:
        check_vocabularies(model.info.tokenizer, files, (model.info.name, options.start))


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(str(layer) for layer in layers)


def own_texts(teacher: Lazy, options: Distill, ctx: Context, folder: Path, tokens: int) -> TrainingData:
    """Let the teacher write texts of at most so many tokens, where no data were given."""
    info = teacher.model.info
    writing = Writing(
        teacher=teacher.module(),
        files=info.tokenizer,
        eos=info.eos_token_ids,
        folder=folder / "texts",
        progress=ctx.progress,
    )
    how = WriteOptions(tokens=tokens, temperature=1.0, seed=ctx.seed)
    start = min(info.eos_token_ids) if info.bos_token_id is None else info.bos_token_id
    data = write_texts(options.own_texts, start, writing, how)
    ctx.note(f"no data were given: the teacher wrote {len(data.records)} texts")
    return data


def given_data(options: Distill) -> TrainingData:
    """Read the data that were given; ConfigError when a generator can't learn from them."""
    data = read_data(options.data, columns=options.columns, option="distill.columns")
    if data.form not in ("source-target", "text"):
        raise ConfigError(
            f"{options.data} holds {data.form}, which an encoder learns from: give sources and targets, or texts, "
            "or take --student encoder"
        )
    return data


def check_data(model: TorchModel, options: Distill) -> None:
    """Refuse data with a text that is too long, or that a generator can't learn from, before anything is made of it."""
    data = given_data(options)
    pair_reading(model, options, data).examples(data, lambda _note: None)


def pair_reading(model: TorchModel, options: Distill, data: TrainingData) -> _PairReading:
    """Return how texts become ids: sources end with the end token, but a text that a decoder continues has no end."""
    tokens = teacher_tokens(model.info)
    special = Special(start=tokens["decoder_start_token_id"], eos=tokens["pad_token_id"], pad=tokens["pad_token_id"])
    plain = model.info.tokenizer
    continues = options.student == "decoder" and data.form == "text"
    return _PairReading(
        plain=plain,
        files=plain if continues else with_end_token(plain, special.eos),
        special=special,
        limits=Limits(source=options.max_source, target=options.max_target, cut=options.cut),
        ends_texts=not continues,
    )


def _teacher_targets(
    data: TrainingData, examples: Seq2Seq, reading: _PairReading, teacher: Lazy, folder: Path, ctx: Context
) -> TrainingData:
    """Return the data with the teacher's own targets."""
    writing = Writing(
        teacher=teacher.module(),
        files=reading.files,
        eos=teacher.model.info.eos_token_ids,
        folder=folder / "targets",
        progress=ctx.progress,
    )
    return write_targets(data, examples.sources, writing, WriteOptions(tokens=reading.limits.target - 1, seed=ctx.seed))


def _cutting(reading: _PairReading) -> _PairReading:
    """Return a reading of what a teacher wrote: its text may have more tokens when it is read again."""
    return dataclasses.replace(reading, limits=dataclasses.replace(reading.limits, cut=True))


def change(record: Json) -> str:
    """Say how a training went: from which held-out loss to which, in how many steps."""
    first = record["held_out"][0]["loss"] if record["held_out"] else record["train"][0]["loss"]
    best = record["best"]["loss"] if record["best"] else record["train"][-1]["loss"]
    kind = "held-out loss" if record["held_out"] else "loss"
    end = ", stopped early" if record["stopped"] == "early" else ""
    end += "; the held-out data gave nothing to judge by: the last weights are kept" if record["unjudged"] else ""
    return f"{kind} {first:.3f} → {best:.3f} in {record['steps']} steps of {record['tokens']:,} tokens{end}"


def describe_data(data: TrainingData, train_part: TrainingData, held_part: TrainingData | None) -> Json:
    """Return what a report says of the data."""
    return {
        "name": Path(data.name).name,
        "form": data.form,
        "sha256": data.sha256,
        "train": len(train_part.records),
        "held_out": 0 if held_part is None else len(held_part.records),
    }


def _objective(
    student: Decoder | EncoderDecoder,
    teacher: Lazy,
    examples: Seq2Seq,
    given: tuple[Distill, DistilOptions],
    folder: Path,
    ctx: Context,
) -> tuple[Objective, nn.Module]:
    """Return what the student is trained for, and the module that is trained: the student, or it and projections."""
    options, how = given
    shape = read_shape(config_of(teacher.model), None)
    vocab = min(shape.vocab, _vocabulary(student))
    scores: Scores | None = None
    if how.alpha and how.on_policy < 1 and not how.match_hidden:
        kept = ScoreOptions(k=options.top_k, temperature=how.temperature, vocab=vocab, precision=options.precision)
        place = Path(options.scores) if options.scores else folder / "scores"
        scores = keep_scores(teacher.module(), examples, kept, place, ctx.progress)
    asks = how.match_hidden > 0 or (how.alpha > 0 and (how.on_policy > 0 or scores is None))
    layers = LayerMap()
    if how.match_hidden:
        encoder, decoder = chosen_layers(shape, student_plan(options))
        layers = LayerMap(encoder=encoder if isinstance(student, EncoderDecoder) else (), decoder=decoder)
    objective = distillation(how, teacher.module() if asks else None, scores, layers, vocab)
    if how.match_hidden and any(own != shape.hidden for own in stack_widths(student)):
        return objective, Projected(student, shape.hidden, seed=ctx.seed)
    return objective, student


def _vocabulary(student: Decoder | EncoderDecoder) -> int:
    return student.shape.vocab if isinstance(student, Decoder) else student.decoder_shape.vocab
