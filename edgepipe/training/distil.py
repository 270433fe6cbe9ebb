"""What a student learns from its teacher: one objective for encoder-decoder and decoder students.

    L = α · L_kd + (1 − α) · L_ce + γ · L_hidden         each a mean over tokens, padding left out

    L_kd      divergence from the teacher, forward, reverse or mixed, at a temperature (numerics/losses.py), over
              off-policy   the targets of the data; scores are the teacher's, or come from disk (scores.py)
              on-policy    targets that the student samples for this batch, and the teacher then scores
    L_ce      cross-entropy on the targets of the data
    L_hidden  distance of chosen layers' states from those of the teacher's layers they were copied from

α = 0.9 with samples (temperature 0.9, top-k 128) and forward KL is what the code of arXiv:2501.16273 does; a share of
steps on samples and the others on the data is arXiv:2306.13649 (GKD). Samples are drawn with numbers that depend on
(seed, step, example) alone, so a resumed run, and one with more processes, draws the same.
"""
# ruff: noqa: TID253  an objective is of tensors: this file is imported only where a model is trained

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from edgepipe.errors import ConfigError
from edgepipe.numerics.losses import (
    IGNORED,
    TopK,
    cross_entropy,
    divergence,
    hidden_loss,
    masked_mean,
    top_k_divergence,
)
from edgepipe.students.models import Decoder, EncoderDecoder, State
from edgepipe.training.batches import Batch
from edgepipe.training.loop import Objective, Step
from edgepipe.training.parts import WEIGHT, Counts, Prepare, factor
from edgepipe.training.scores import Scores
from edgepipe.training.teacher import Judged, Teacher, judge

AnyTeacher = Teacher | Decoder | EncoderDecoder  # transformers' decoder, or what a student of its own kind was cut from
_SAMPLES, _SOURCES = "samples", "sources"  # means over other things than the data's targets (parts.py)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilOptions:
    """Say what a student is taught with."""

    alpha: float = 0.9  # weight of the teacher beside the data's targets, in [0, 1]; 0: no teacher
    reverse: float = 0.0  # share of reverse KL, KL(student ‖ teacher), in [0, 1]
    temperature: float = 1.0  # of both distributions, above 0
    on_policy: float = 0.0  # share of steps whose targets the student samples, in [0, 1]
    sample_temperature: float = 0.9  # of these samples, above 0
    sample_top_k: int = 128  # tokens that are sampled from; 0: all
    match_hidden: float = 0.0  # weight γ of hidden states, from 0
    match_cosine: bool = False  # 1 − cosine instead of the mean squared error
    seed: int = 0  # of the samples

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        for name in ("alpha", "reverse", "on_policy"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: expected a number from 0 to 1, got {getattr(self, name)}")
        for name in ("temperature", "sample_temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        for name in ("sample_top_k", "match_hidden", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: expected at least 0, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMap:
    """Say which of the teacher's layers a student's are compared with, after the block; both count from 0."""

    encoder: tuple[int, ...] = ()  # the teacher's layer for each of the encoder's; empty: none is compared
    decoder: tuple[int, ...] = ()  # the same of the decoder


class Projected(nn.Module):
    """Hold a student beside the matrices that bring its states to the teacher's width; only the student is kept."""

    def __init__(self, student: Decoder | EncoderDecoder, width: int, *, seed: int = 0) -> None:
        """Draw a projection [width, own width] for each stack, close to keeping the length of states."""
        super().__init__()
        self.student = student
        generator = torch.Generator().manual_seed(seed)
        widths = stack_widths(student)
        self.encoder, self.decoder = (nn.Linear(own, width, bias=False) for own in widths)
        for layer, own in zip((self.encoder, self.decoder), widths, strict=True):
            with torch.no_grad():
                layer.weight.normal_(0.0, own**-0.5, generator=generator)


def stack_widths(student: Decoder | EncoderDecoder) -> tuple[int, int]:
    """Return the widths of a student's encoder and decoder; a decoder's twice."""
    if isinstance(student, Decoder):
        return student.shape.hidden, student.shape.hidden
    return student.encoder_shape.hidden, student.decoder_shape.hidden


class StudentOutputs(NamedTuple):
    """Hold what a student computes of a batch, at the places of its targets."""

    logits: Tensor  # [B, D, V]
    encoder_states: list[Tensor]  # layers + 1 of [B, N, H]; empty for a decoder
    decoder_states: list[Tensor]  # layers + 1 of [B, D, H]


def run_student(student: Decoder | EncoderDecoder, batch: Batch) -> StudentOutputs:
    """Run a student over sources and targets; a decoder reads both as one row and is looked at from y_1 on."""
    if isinstance(student, EncoderDecoder):
        found = student(batch["source"], batch["source_mask"], batch["decoder_input"])
        return StudentOutputs(found.logits, found.encoder_states, found.decoder_states)
    ids, places = joined(batch)
    found, _ = student(ids)
    logits, *states = (_pick(x, places) for x in (found.logits, *found.decoder_states))
    return StudentOutputs(logits, [], states)


def joined(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return rows [x ; y_1 … y_(D−1)] padded on the right [B, N + D − 1], and the columns [B, D] that predict y."""
    source, mask, target = batch["source"], batch["source_mask"], batch["target"]
    count = mask.sum(1, keepdim=True)
    places = count - 1 + torch.arange(target.shape[1], device=source.device)
    room = source.new_zeros(len(source), target.shape[1])
    ids = torch.cat([source * mask, room], 1)
    ids = ids.scatter(1, places + 1, target.clamp_min(0))  # IGNORED becomes 0: it stands to the right of what counts
    return ids[:, :-1], places


def _pick(x: Tensor, places: Tensor) -> Tensor:
    """Return columns [B, D] of x [B, T, H]."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def likelihood(module: nn.Module, batch: Batch, _step: int) -> Step:
    """Score the data's targets: cross-entropy, and the share of tokens chosen right. All students are judged by it."""
    logits = run_student(_student(module), batch).logits
    mask = batch["target"] != IGNORED
    right = (logits.argmax(-1) == batch["target"]).float()
    loss = masked_mean(cross_entropy(logits, batch["target"]), mask)
    return Step(loss, mask.sum(), {"accuracy": masked_mean(right, mask)})


def ask(teacher: AnyTeacher, batch: Batch, *, states: bool = False) -> Judged:
    """Return what a teacher says of a batch; a student's module may be one, of a smaller student of its own kind."""
    if isinstance(teacher, Teacher):
        return judge(teacher, batch, states=states)
    with torch.no_grad():
        run = run_student(teacher.to(batch["source"].device), batch)
    return Judged(run.logits, run.encoder_states, run.decoder_states)


def distillation(
    options: DistilOptions,
    teacher: AnyTeacher | None = None,
    scores: Scores | None = None,
    layers: LayerMap | None = None,
    vocab: int | None = None,
) -> Objective:
    """Return the objective. Off-policy it takes `scores` where there are some, else it asks the teacher each time.

    `vocab`: how many tokens the scores are over; None: the student's. A loop that divides batches needs `drawing` too.
    `layers` belongs to `match_hidden`. For students of another width than the teacher's train
    `Projected(student, width)`.
    Raises ConfigError when something that the options need is missing, or scores are at another temperature.
    """
    layers = layers or LayerMap()
    if options.alpha and teacher is None and (scores is None or options.on_policy):
        raise ConfigError("alpha: a teacher's weight above 0 needs a teacher to ask, or its scores without on_policy")
    if options.match_hidden and (teacher is None or not (layers.encoder or layers.decoder)):
        raise ConfigError("match_hidden: comparing states needs a teacher, and which layers are compared")
    if scores is not None and scores.temperature != options.temperature:
        raise ConfigError(f"temperature: the scores are kept at {scores.temperature}, not at {options.temperature}")

    def objective(module: nn.Module, batch: Batch, step: int) -> Step:
        student = _student(module)
        run = run_student(student, batch)
        mask = batch["target"] != IGNORED
        ce = masked_mean(cross_entropy(run.logits, batch["target"]), mask)
        figures, loss = {"cross_entropy": ce}, (1 - options.alpha) * ce
        on_policy = _is_on_policy(options, step)
        judged = None
        if teacher is not None and (options.match_hidden or (options.alpha and not on_policy and scores is None)):
            judged = ask(teacher, batch, states=options.match_hidden > 0)
        if options.alpha:
            if on_policy:
                assert teacher is not None
                kd = _sampled_divergence(student, teacher, batch, options, step)
            elif scores is not None:
                kept = scores.at(batch["index"].tolist(), run.logits.device)
                kd = masked_mean(_stored_divergence(run.logits, kept, options, vocab), mask)
            else:
                assert judged is not None
                kd = masked_mean(_divergence(run.logits, judged.logits, options), mask)
            figures["divergence"], loss = kd, loss + options.alpha * kd
        if options.match_hidden:
            assert judged is not None
            states = _hidden(module, run, judged, batch, layers, options)
            figures["hidden"], loss = states, loss + options.match_hidden * states
        return Step(loss, mask.sum(), figures)

    return objective


def _student(module: nn.Module) -> Decoder | EncoderDecoder:
    found = module.student if isinstance(module, Projected) else module
    return cast("Decoder | EncoderDecoder", found)


def _divergence(student: Tensor, teacher: Tensor, options: DistilOptions) -> Tensor:
    return divergence(student, teacher, temperature=options.temperature, reverse=options.reverse)


def _stored_divergence(student: Tensor, kept: TopK, options: DistilOptions, vocab: int | None) -> Tensor:
    return top_k_divergence(
        student,
        kept,
        vocab=student.shape[-1] if vocab is None else vocab,
        temperature=options.temperature,
        reverse=options.reverse,
    )


def drawing(options: DistilOptions) -> Prepare | None:
    """Return what comes before a step's runs: samples, and how many tokens each mean is over; None: not needed."""
    if not (options.alpha and options.on_policy) and not options.match_hidden:
        return None

    def prepare(module: nn.Module, batch: Batch, whole: Batch, step: int) -> tuple[Batch, Counts]:
        found, counts = dict(batch), {WEIGHT: (batch["target"] != IGNORED).sum()}
        if options.match_hidden:
            counts[_SOURCES] = batch["source_mask"].sum()
        if options.alpha and _is_on_policy(options, step):
            found[_SAMPLES] = sample(_student(module), batch, options, step, whole["target"].shape[1])
            counts[_SAMPLES] = (found[_SAMPLES] != IGNORED).sum()
        return found, counts

    return prepare


def _is_on_policy(options: DistilOptions, step: int) -> bool:
    """Say whether a step's targets are sampled: the same in every process, and after a resume."""
    return bool(np.random.default_rng([options.seed, step]).random() < options.on_policy)


def _sampled_divergence(
    student: Decoder | EncoderDecoder,
    teacher: AnyTeacher,
    batch: Batch,
    options: DistilOptions,
    step: int,
) -> Tensor:
    """Let the student write, the teacher score what it wrote, and return their divergence there."""
    target = batch[_SAMPLES] if _SAMPLES in batch else sample(student, batch, options, step)
    start = batch["decoder_input"][:, :1]
    written = {**batch, "target": target, "decoder_input": torch.cat([start, target[:, :-1].clamp_min(0)], 1)}
    logits = run_student(student, written).logits
    mean = masked_mean(_divergence(logits, ask(teacher, written).logits, options), target != IGNORED)
    return mean * factor(batch, _SAMPLES)


@torch.no_grad()
def sample(student: Decoder | EncoderDecoder, batch: Batch, options: DistilOptions, step: int, room: int = 0) -> Tensor:
    """Return targets [B, D] that the student samples, ended by the data's end token, IGNORED after it.

    D is `room`, in training the data's longest target among all of the step's examples; 0: the batch's longest.
    """
    target = batch["target"]
    room = room or target.shape[1]
    eos = target.gather(1, (target != IGNORED).sum(1, keepdim=True) - 1)  # [B, 1]: every target ends with it
    chances = np.stack([np.random.default_rng([options.seed, step, i]).random(room) for i in batch["index"].tolist()])
    draws = torch.from_numpy(chances).to(target.device)  # [B, D] float64 in [0, 1)
    training = student.training
    student.eval()
    try:
        if isinstance(student, EncoderDecoder):
            state = student.start(batch["source"], batch["source_mask"])
            return _write(student, state, batch["decoder_input"][:, :1], eos, draws, options)
        found = target.new_full(draws.shape, IGNORED)
        lengths = batch["source_mask"].sum(1)
        for count in sorted(set(lengths.tolist())):  # a cache has no holes: rows of one length at a time
            same = lengths == count
            found[same] = _continue(student, batch["source"][same, :count], eos[same], draws[same], options)
        return found
    finally:
        student.train(training)


def _write(
    student: EncoderDecoder, state: State, ids: Tensor, eos: Tensor, draws: Tensor, options: DistilOptions
) -> Tensor:
    """Sample from an encoder-decoder, token by token over its cache."""
    written: list[Tensor] = []
    over = torch.zeros_like(ids, dtype=torch.bool)
    for place in range(draws.shape[1]):
        logits, _ = student.step(state, ids)
        ids, shown, over = _next(logits[:, -1], draws[:, place], eos, over, options)
        written.append(shown)
        if bool(over.all()):
            break
    return _filled(written, draws.shape[1])


def _continue(student: Decoder, ids: Tensor, eos: Tensor, draws: Tensor, options: DistilOptions) -> Tensor:
    """Sample from a decoder after sources of one length."""
    written: list[Tensor] = []
    past = None
    over = torch.zeros_like(eos, dtype=torch.bool)
    for place in range(draws.shape[1]):
        found, past = student(ids, None, past)
        ids, shown, over = _next(found.logits[:, -1], draws[:, place], eos, over, options)
        written.append(shown)
        if bool(over.all()):
            break
    return _filled(written, draws.shape[1])


def _next(
    logits: Tensor, draw: Tensor, eos: Tensor, over: Tensor, options: DistilOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a token by inverting the cumulative distribution; return it, it or IGNORED, and which rows are over."""
    kept = min(options.sample_top_k or logits.shape[-1], logits.shape[-1])
    top = (logits.float() / options.sample_temperature).topk(kept, -1)
    cumulative = top.values.softmax(-1).cumsum(-1)
    place = torch.searchsorted(cumulative, draw[:, None] * cumulative[:, -1:], right=True).clamp_max(kept - 1)
    ids = top.indices.gather(-1, place)
    return ids, ids.masked_fill(over, IGNORED), over | (ids == eos)


def _filled(written: list[Tensor], length: int) -> Tensor:
    """Return columns as one tensor [B, length], IGNORED where nothing was written."""
    found = torch.cat(written, 1)
    return nn.functional.pad(found, (0, length - found.shape[1]), value=IGNORED)


def _hidden(
    module: nn.Module, run: StudentOutputs, judged: Judged, batch: Batch, layers: LayerMap, options: DistilOptions
) -> Tensor:
    """Return the mean distance over the layers that are compared."""
    parts = (
        ("encoder", layers.encoder, run.encoder_states, judged.source_states, batch["source_mask"]),
        ("decoder", layers.decoder, run.decoder_states, judged.target_states, batch["target"] != IGNORED),
    )
    distances = []
    for name, chosen, ours, theirs, mask in parts:
        for own, layer in enumerate(chosen):
            state = ours[own + 1]
            if isinstance(module, Projected):
                state = getattr(module, name)(state)
            distance = masked_mean(hidden_loss(state, theirs[layer + 1], cosine=options.match_cosine), mask)
            distances.append(distance * factor(batch, _SOURCES) if name == "encoder" else distance)
    return torch.stack(distances).mean()
