"""Distill: make a student of the teacher (layers, width, kind), and teach it.

The data decide what it learns: sources and targets or texts for a decoder or encoder-decoder; texts, pairs or labels
for an encoder. Sources: arXiv:2501.16273, 2504.06225, 2404.05961 (docs/distill.md); the parts are in students/ and
training/, put together in training/course.py and training/encoder_course.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from edgepipe.artifacts import Context, Json, TorchModel
from edgepipe.errors import ConfigError

_KINDS = ("encoder-decoder", "encoder", "decoder")
# Options that mean something to these kinds of student alone; to another one a value beside the default is a mistake.
_ONLY: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("encoder-decoder", "encoder"), ("encoder_layers", "encoder_from", "causal_encoder", "centred_positions")),
    (("encoder-decoder", "decoder"), ("decoder_layers", "decoder_from", "max_target")),
    (("encoder-decoder", "decoder"), ("adapt_steps", "adapt_rate", "targets", "alpha", "reverse", "temperature")),
    (("encoder-decoder", "decoder"), ("on_policy", "match_hidden", "top_k", "scores")),
    (("encoder-decoder", "decoder"), ("match_cosine", "sample_temperature", "sample_top_k")),
    (("encoder-decoder",), ("cross", "cross_steps")),
    (("encoder",), ("pooling", "mask_steps", "contrast_steps", "contrast_dropout", "exits", "gate_beta", "gate_data")),
)
_USUAL_MINUTES = 20.0
_TRAINERS = ("accelerate", "peft")  # whose versions decide a student's bytes, beside those that decide all results'


@dataclass(frozen=True, slots=True, kw_only=True)
class Distill:
    """Options of the stage `distill`."""

    makes_another: ClassVar[bool] = True  # model: what later stages can do with it shows when it is there

    student: str = "encoder-decoder"  # encoder-decoder, encoder, decoder
    data: str = ""  # .jsonl, .csv, .tsv, a text, or what `datasets` saved; empty: the teacher writes its own texts
    columns: str = ""  # where parts stand that the file names otherwise: source=mr,target=ref
    held_out: float = 0.05  # share of the data that is kept aside to judge by, by source
    own_texts: int = 2000  # texts that the teacher writes when there are no data
    # --- what the student is made of; 0 and empty take the default
    start: str = ""  # a student's directory to go on with; empty: a new student is made of the teacher
    encoder_layers: int = 0  # 0: two thirds of 0.4 of the teacher's, or all of these for an encoder alone
    decoder_layers: int = 0  # 0: one third of 0.4 of the teacher's, or all of these for a decoder alone
    encoder_from: tuple[int, ...] = ()  # the teacher's layers, counted from 0, that become the encoder's; evenly spaced
    decoder_from: tuple[int, ...] = ()  # the same of the decoder
    hidden: int = 0  # width of the residual stream; 0: the teacher's
    ffn: int = 0  # width of the MLPs; 0: the teacher's
    nested: tuple[int, ...] = ()  # narrower widths of the MLPs that it learns to work at too (docs/prune.md)
    exits: tuple[int, ...] = ()  # of an encoder: layers after which texts may leave, by gates (docs/prune.md)
    kv_heads: int = 0  # key/value heads, each with its queries; 0: the teacher's
    scratch: bool = False  # random weights in place of the teacher's
    causal_encoder: bool = False  # keep the causal mask in the encoder, for comparison
    centred_positions: bool = False  # count the encoder's positions from the middle
    cross: str = "copy"  # cross-attention starts as the layer's self-attention (copy), or random
    cross_steps: int = 0  # first steps in which only the cross-attention is trained
    pooling: str = "mean"  # of an encoder: mean, last, cls, max, latent
    # --- what it is taught with
    adapt_steps: int = 0  # steps of LoRA fine-tuning that the teacher gets first; 0: none
    adapt_rate: float = 2e-4  # their learning rate
    targets: str = "data"  # targets of the data, or those that the teacher writes (teacher)
    alpha: float = 0.9  # weight of the teacher's distribution beside the targets, in [0, 1]; 0: cross-entropy alone
    reverse: float = 0.0  # share of the reverse divergence, KL(student ‖ teacher), in [0, 1]
    temperature: float = 1.0  # of both distributions, above 0
    on_policy: float = 0.0  # share of steps whose targets the student samples, in [0, 1]
    sample_temperature: float = 0.9  # of these samples, above 0
    sample_top_k: int = 128  # likeliest tokens that are sampled from; 0: all
    match_hidden: float = 0.0  # weight of the distance to the teacher's hidden states
    match_cosine: bool = False  # that distance is 1 − cosine, not the mean squared error
    top_k: int = 32  # tokens of the teacher's distribution that are kept on disk
    scores: str = ""  # folder where that is kept for other runs with the same teacher and data; empty: this run's own
    mask_steps: int = 0  # of an encoder: steps of masked next-token prediction first
    contrast_steps: int = 0  # of an encoder: steps of unsupervised contrast before those of pairs or labels
    contrast_dropout: float = 0.3  # of that contrast: of attention and of what each block adds, above 0 and below 1
    gate_beta: float = 0.1  # of gates: the quality that all layers together may cost, from 0: the more, the earlier
    gate_data: float = 0.2  # share of the data that gates alone learn from, above 0 and below 1
    nested_every: bool = False  # train all nested widths at every step, not one that is drawn
    dropout: float = 0.0  # of the same while targets, pairs or labels are taught, in [0, 1)
    untaught: bool = False  # no last course: a student as it is made, or after mask_steps and contrast_steps alone
    # --- how long, and how
    steps: int = 0  # optimizer steps; 0: as many as `minutes` allow
    minutes: float = 0.0  # of wall time, when no steps are given; 0: 20
    batch: int = 32  # examples of a step
    rows: int = 0  # examples that run at once, what memory holds; 0: the batch
    learning_rate: float = 3e-4  # highest one, after the warm-up
    warmup: int = 20  # steps until the learning rate is at its highest
    patience: int = 0  # evaluations without a better one after which training stops; 0: never
    precision: str = "auto"  # auto, bf16, no; auto: bf16 where the machine gains by it
    max_source: int = 512  # tokens of a source or text
    max_target: int = 128  # tokens of a target
    cut: bool = False  # cut what is longer; else it is refused, by file and line

    def __post_init__(self) -> None:
        """Refuse values out of range; what training refuses it says itself."""
        for name, known in (("student", _KINDS), ("cross", ("copy", "random")), ("targets", ("data", "teacher"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"distill.{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("own_texts", "max_source", "max_target", "batch", "top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"distill.{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("adapt_steps", "cross_steps", "mask_steps", "contrast_steps", "steps", "minutes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"distill.{name}: expected at least 0, got {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"distill.held_out: expected a share between 0 and 1, got {self.held_out}")
        if self.gate_beta < 0 or not 0 < self.gate_data < 1:
            raise ConfigError("distill.gate_beta must not be negative, and distill.gate_data be above 0 and below 1")
        if not 0 < self.contrast_dropout < 1:
            raise ConfigError(f"distill.contrast_dropout: expected above 0 and below 1, got {self.contrast_dropout}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"distill.dropout: expected from 0 to below 1, got {self.dropout}")
        if not 0 < self.adapt_rate <= 1:
            raise ConfigError(f"distill.adapt_rate: expected a number above 0 and up to 1, got {self.adapt_rate}")
        self._check_kind()
        self._check_together()

    def _check_together(self) -> None:
        """Refuse options that contradict each other."""
        for name, contradicts, sentence in (
            ("steps and distill.minutes", bool(self.steps and self.minutes), "give one of them"),
            (
                "untaught",
                self.untaught and bool(self.steps or self.minutes or self.adapt_steps),
                "give no steps, minutes or adapt_steps with it: nothing is taught",
            ),
            ("exits and distill.nested", bool(self.exits and self.nested), "give one of them"),
            (
                "start",
                self.student == "encoder" and bool(self.start),
                "an encoder student is taught further by giving it as MODEL",
            ),
        ):
            if contradicts:
                raise ConfigError(f"distill.{name}: {sentence}")

    def _check_kind(self) -> None:
        """Refuse options that mean nothing to this kind of student."""
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        for kinds, names in _ONLY:
            for name in names:
                if self.student not in kinds and getattr(self, name) != usual[name]:
                    raise ConfigError(
                        f"distill.{name} means something to a student of kind {' or '.join(kinds)} alone, "
                        f"and this one is of kind {self.student}: leave it out"
                    )

    def check(self, model: TorchModel) -> None:
        """Refuse a teacher that no student can be made of, and data that can't be read."""
        from edgepipe.students.config import is_student
        from edgepipe.students.from_teacher import config_of, plan_student
        from edgepipe.students.result import teacher_tokens
        from edgepipe.training.course import check_options, student_plan

        check_options(self)
        if self.student == "encoder" and is_student(model.info.config):
            from edgepipe.training.encoder_course import check_taught_further

            check_taught_further(model, self)
        elif model.info.task != "text-generation":
            raise ConfigError(f"a teacher is a text-generation model, but {model.info.name} is for {model.info.task}")
        else:
            plan_student(config_of(model), student_plan(self))
        teacher_tokens(model.info)
        reads_texts = bool(self.data) or not self.untaught or self.student == "encoder-decoder"
        if reads_texts and "tokenizer.json" not in model.info.tokenizer:
            raise ConfigError(f"{model.info.name} has no tokenizer.json, by which a student's texts become tokens")
        self._check_files(model)

    def _check_files(self, model: TorchModel) -> None:
        """Refuse what training would refuse of the files, a text too long among them, before a baseline is built."""
        from edgepipe.training.course import check_start
        from edgepipe.training.scores import check_folder

        self.reads()
        if self.scores:
            check_folder(Path(self.scores))
        if self.start:
            check_start(model, self)
        if self.student == "encoder":
            from edgepipe.training.encoder_course import check_mask, check_texts

            check_mask(model, self)
            if self.data:
                check_texts(model, self)
        elif self.data and not self.untaught:
            from edgepipe.training.course import check_data

            check_data(model, self)

    def reads(self) -> Json:
        """Return the contents this stage depends on besides the model: its key changes with them."""
        from edgepipe.store import versions
        from edgepipe.training.data import read_data

        read: Json = {"versions": versions(_TRAINERS)}
        if self.data:
            read["data"] = read_data(self.data, columns=self.columns, option="distill.columns").sha256
        if self.start:
            from edgepipe.students.files import student_fingerprint

            read["start"] = student_fingerprint(Path(self.start))
        return read

    def __call__(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Return the student, trained."""
        from edgepipe.training.processes import call_the_others

        call_the_others()
        if self.student == "encoder":
            from edgepipe.training.encoder_course import teach_encoder

            return teach_encoder(model, self, ctx)
        from edgepipe.training.course import teach_generator

        return teach_generator(model, self, ctx)

    @property
    def time(self) -> tuple[int, float]:
        """Return steps and minutes, one of them 0."""
        return (self.steps, 0.0) if self.steps else (0, self.minutes or _USUAL_MINUTES)
