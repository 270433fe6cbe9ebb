"""The one loop for everything that trains: students, adapters of a teacher, encoders.

    train(module, objective, data, options, place) → a record of the run (JSON)

`module` is trained in place and comes back with its best weights (or its last, without held-out data). `objective` is

    objective(module, batch, step) → Step(loss, weight, figures)

a mean over `weight` things (tokens, rows), and figures that are means over the same things. `step` counts from 1 while
training and is 0 on held-out data. A batch is what `data.train.collate` makes (training/batches.py), on the device.

One step: `batch` examples are divided over the processes, and over runs of at most `rows` examples; losses are summed
with their weights, so gradients are those of the mean over the whole batch, however it was divided; a loss of several
means over different things is parts.py's matter. Then clipping and AdamW (β 0.9, 0.98; decay on matrices only) on a
cosine after a linear warm-up. What draws random numbers is seeded from (seed, step), and the examples of a step are a
function of both: a run that is killed and started again ends in the same weights. With `alone`, only the parameters it
matches are trained in the first `alone_steps` (new cross-attention, as in arXiv:2504.06225).

Processes come from a launcher (`accelerate launch` for GPUs, `torchrun` for CPUs too), over one machine or several;
each holds the whole model. Source of the settings: arXiv:2501.16273.
"""
# ruff: noqa: TID253  a training loop is of tensors: this file is imported only where a model is trained

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from edgepipe.artifacts import Json
from edgepipe.errors import ConfigError, StageError
from edgepipe.store import cache_key
from edgepipe.training import checkpoints
from edgepipe.training.batches import Batch, Examples, batch_at
from edgepipe.training.parts import Prepare, with_factors
from edgepipe.training.precision import choose_precision
from edgepipe.training.processes import shared

_BETAS = (0.9, 0.98)
_PROBED_STEPS = 8  # whose speed decides how many steps a number of minutes is
_UNPROBED_STEPS = 2  # of these, the first ones warm up
_EVALUATIONS = 20  # a run, when nothing else is said
_CURVE_POINTS = 500  # a curve has about so many: enough to draw, few enough to keep


class Step(NamedTuple):
    """Hold what an objective says of one batch."""

    loss: Tensor  # scalar: a mean over `weight` things
    weight: Tensor | int  # tokens or rows
    figures: Mapping[str, Tensor]  # scalars, means over the same things


Objective = Callable[[nn.Module, Batch, int], Step]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopOptions:
    """Say how long and how fast a model is trained."""

    steps: int = 0  # optimizer steps; 0: as many as `minutes` allow
    minutes: float = 0.0  # of wall time; decides the steps once, from the speed of the first ones
    batch: int = 32  # examples of a step, over all processes
    rows: int = 0  # examples that run at once in one process, what memory holds; 0: its share of the batch
    learning_rate: float = 1e-4  # at the end of the warm-up
    warmup: int = 4  # steps
    weight_decay: float = 0.01  # of matrices
    clip: float = 1.0  # norm of the gradient; 0: don't clip
    evaluate_every: int = 0  # steps; 0: 20 times a run
    patience: int = 0  # evaluations in a row without a better one after which training stops; 0: never
    save_every: int = 0  # steps; 0: by time alone
    save_seconds: float = 300.0  # seconds; 0: by steps alone
    precision: str = "auto"  # auto, bf16, no; auto: bf16 where the machine gains by it
    alone: str = ""  # regular expression: parameters that are trained alone at first
    alone_steps: int = 0  # how many steps that is
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        for name in ("steps", "minutes", "rows", "warmup", "weight_decay", "clip", "evaluate_every", "patience"):
            _at_least(name, getattr(self, name), 0)
        for name in ("save_every", "save_seconds", "alone_steps", "seed"):
            _at_least(name, getattr(self, name), 0)
        _at_least("batch", self.batch, 1)
        if (self.steps > 0) == (self.minutes > 0):
            raise ConfigError(f"give steps or minutes, not {'both' if self.steps else 'neither'}")
        if not 0 < self.learning_rate <= 1:
            raise ConfigError(f"learning_rate: expected a number above 0 and up to 1, got {self.learning_rate}")
        if self.precision not in ("auto", "bf16", "no"):
            raise ConfigError(f"precision: expected auto, bf16 or no, got {self.precision!r}")
        if bool(self.alone) != bool(self.alone_steps):
            raise ConfigError("alone and alone_steps go together: which parameters, and for how many steps")


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ConfigError(f"{name}: expected at least {least}, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopData:
    """Hold the examples to train with, and those to evaluate on."""

    train: Examples
    held_out: Examples | None = None
    judge: Objective | None = None  # what is computed on held-out data; None: the training's objective
    prepare: Prepare | None = None  # for an objective of several means: what comes before a step's first run


def _silent(_what: str, _done: int, _total: int) -> None:
    """Report no progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Say where checkpoints lie, and what run they belong to."""

    folder: Path  # this run's own
    key: str  # of everything else that decides the result: model, data, objective
    progress: Callable[[str, int, int], None] = field(default=_silent)  # Context.progress


def train(module: nn.Module, objective: Objective, data: LoopData, options: LoopOptions, place: Place) -> Json:
    """Train a module, or go on where a killed run left off; return what happened.

    The record: steps, tokens, seconds, precision, processes, `train` (rows of step, loss, learning rate, gradient norm
    and the objective's figures), `held_out` (rows of step, loss and figures), `best`, `stopped` ("steps" or "early"),
    `unjudged`: the held-out data gave nothing to judge by, so the weights are the last ones.
    Raises ConfigError when the data don't fit the options, StageError when the loss is no number any more.
    """
    run = _Run(module, objective, data, options, place)
    try:
        run.go()
    finally:
        run.close()
    return run.record()


@dataclass(slots=True, kw_only=True)
class _State:
    """Hold how far a run is; all of it is in a checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    worse: int = 0  # evaluations since the best one
    best: Json = field(default_factory=dict)  # step, loss
    train: list[Json] = field(default_factory=list)
    held_out: list[Json] = field(default_factory=list)
    window: dict[str, float] = field(default_factory=dict)  # sums since the curve's last point
    stopped: str = ""


class _Shell(nn.Module):
    """Run an objective as a module's forward: gradients are synchronized around that, whatever it calls inside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, objective: Objective, batch: Batch, step: int, short: bool) -> dict[str, Tensor]:
        """Return loss, weight and figures as scalars; `short`: products in bfloat16."""
        device = batch["index"].device
        with torch.autocast(device.type, torch.bfloat16, enabled=short):
            found = objective(self.module, batch, step)
        weight = torch.as_tensor(found.weight, device=device, dtype=torch.float32)
        return {"loss": found.loss.float(), "weight": weight, **{k: v.detach() for k, v in found.figures.items()}}


class _Run:
    """Hold what one training needs, and take its steps."""

    def __init__(
        self, module: nn.Module, objective: Objective, data: LoopData, options: LoopOptions, place: Place
    ) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        # Autocast is our own: accelerate's precision is one for all trainings of a process.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # heads that an objective leaves alone
        self.accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[unused])
        self.module, self.objective, self.data, self.options, self.place = module, objective, data, options, place
        self.trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self.state = _State()
        self._check()
        self.optimizer = torch.optim.AdamW(self._groups(), lr=options.learning_rate, betas=_BETAS)
        self.common: Any = None
        self._wrap()
        self.plan: Json = shared(lambda: checkpoints.open_folder(place.folder, self._key()))
        self.precision = choose_precision(options.precision, self.accelerator.device)
        self.total = options.steps or int(self.plan.get("steps", 0))  # 0: not known yet
        self._restore()
        self.begun = self.saved = time.monotonic()
        self.probe = (self.state.step + _UNPROBED_STEPS, 0.0)  # the step whose end the clock starts at, and when it was
        self.evaluation_s = 0.0

    def _check(self) -> None:
        """Refuse what contradicts the options."""
        processes, held_out = self.accelerator.num_processes, self.data.held_out
        if self.options.batch < processes:
            raise ConfigError(f"batch: expected at least one example for each of {processes} processes")
        if not len(self.data.train.lengths) or (held_out is not None and not len(held_out.lengths)):
            raise ConfigError("expected at least one example to train with, and one that is held out")
        if self.options.alone and not any(re.search(self.options.alone, name) for name in self.trained):
            raise ConfigError(f"alone: no parameter's name matches {self.options.alone!r}")

    def _key(self) -> str:
        decides = dataclasses.asdict(self.options)
        for name in ("save_every", "save_seconds"):
            del decides[name]
        return cache_key(self.place.key, decides, self.accelerator.num_processes)

    def _groups(self) -> list[Json]:
        return [
            {"params": [p for p in self.trained.values() if p.ndim >= 2], "weight_decay": self.options.weight_decay},
            {"params": [p for p in self.trained.values() if p.ndim < 2], "weight_decay": 0.0},
        ]

    def _wrap(self) -> None:
        """Make the processes' common module for the next step: gradients for what it trains, and nothing else."""
        alone = self.state.step < self.options.alone_steps
        for name, value in self.trained.items():
            value.requires_grad_(not alone or bool(re.search(self.options.alone, name)))
            value.grad = None
        self.shell = _Shell(self.module)
        if self.common is not None:  # its hooks must go before the next one's come
            self.common = None
            self.accelerator.free_memory()
        self.common = self.accelerator.prepare_model(self.shell)

    def _decide(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what the plan says; the first time, what `make` (run in all processes) gives the first one."""
        if name not in self.plan:
            made = make()
            self.plan = {**self.plan, name: shared(lambda: made)}
            if self.accelerator.is_main_process:
                checkpoints.save_plan(self.place.folder, self.plan)
        return self.plan[name]

    def _restore(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        found = shared(lambda: checkpoints.load_last(self.place.folder))
        if found is not None:
            checkpoints.put_weights(self.trained, found["weights"])
            self.optimizer.load_state_dict(found["optimizer"])
            self.state = _State(**found["state"])
            self._wrap()

    def go(self) -> None:
        """Take the steps that are left, and put the best weights into the module."""
        self.common.train()
        self._tell("getting ready", 0, 1)  # the steps are another work: time left is judged from where they begin
        if self.data.held_out is not None and not self.state.held_out:
            self._evaluate()
        while not self.state.stopped:
            if self.options.alone_steps and self.state.step == self.options.alone_steps:
                self._wrap()
            self._step()
            if not self.total:
                self._time()
            self._after_step()
        best = shared(lambda: checkpoints.load_best(self.place.folder))
        if best is not None:
            checkpoints.put_weights(self.trained, best)

    def close(self) -> None:
        """Leave the module fit for use, and for another training."""
        for value in self.trained.values():
            value.requires_grad_(True)
            value.grad = None
        self.common = None
        self.accelerator.free_memory()
        self.module.eval()

    def _shares(self, step: int) -> list[Batch]:
        """Return this process's part of a step's examples, as many at once as memory holds."""
        chosen = self._chosen(step)
        mine = chosen[self.accelerator.process_index :: self.accelerator.num_processes]
        pieces = np.array_split(mine, -(-len(mine) // self.options.rows) if self.options.rows else 1)
        batches = [self._on_device(self.data.train.collate(piece.tolist())) for piece in pieces]
        prepare = self.data.prepare
        if prepare is None:
            return batches
        whole = self._on_device(self.data.train.collate(chosen.tolist()))
        short = torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with torch.no_grad(), short:
            parts = [prepare(self.module, batch, whole, step) for batch in batches]
        return with_factors(parts, lambda counts: self.accelerator.reduce(counts, "sum"))

    def _chosen(self, step: int) -> np.ndarray:
        return batch_at(self.data.train.lengths, self.options.batch, self.options.seed, step - 1)

    def _on_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.accelerator.device, non_blocking=True) for name, value in batch.items()}

    def _step(self) -> None:
        """Take one optimizer step."""
        state, options = self.state, self.options
        state.step += 1
        rate = options.learning_rate * schedule(state.step, options.warmup, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums: dict[str, Tensor] = {}
        batches = self._shares(state.step)
        for number, batch in enumerate(batches):
            self._seed(state.step, self.accelerator.process_index, number)
            last = number == len(batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.common):
                found = self.common(self.objective, batch, state.step, self.precision == "bf16")
                self.accelerator.backward(found["loss"] * found["weight"])
            _add(sums, found)
        figures, weight = self._mean(sums)
        if not math.isfinite(figures["loss"]):
            raise StageError(
                f"the loss of step {state.step} is {figures['loss']}: lower the learning rate, or warm up longer"
            )
        figures["gradient_norm"] = self._scale_gradients(weight)
        self.optimizer.step()
        self.optimizer.zero_grad()
        state.tokens += int(self.data.train.lengths[self._chosen(state.step)].sum())
        self._report(figures, rate)

    def _seed(self, *place: int) -> None:
        state = np.random.SeedSequence([self.options.seed, *place]).generate_state(2)
        torch.manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)

    def _mean(self, sums: Mapping[str, Tensor]) -> tuple[dict[str, float], float]:
        """Return the means of loss and figures over all processes, and the weight they are over."""
        names = sorted(sums)
        total = self.accelerator.reduce(torch.stack([sums[name] for name in names]), "sum")
        found = dict(zip(names, total.tolist(), strict=True))
        weight = found.pop("weight")
        return {name: value / max(weight, 1e-9) for name, value in found.items()}, weight

    def _scale_gradients(self, weight: float) -> float:
        """Turn sums of gradients into their mean, clip them, and return their norm before clipping."""
        scale = self.accelerator.num_processes / max(weight, 1e-9)  # the processes' sums were averaged
        parameters = [value for value in self.trained.values() if value.grad is not None]
        for value in parameters:
            assert value.grad is not None
            value.grad.mul_(scale)
        return float(nn.utils.clip_grad_norm_(parameters, self.options.clip or math.inf))

    def _report(self, figures: Mapping[str, float], rate: float) -> None:
        """Add a step to the curve, whose points are means, and tell how it goes."""
        state = self.state
        for name, value in {**figures, "steps": 1.0}.items():
            state.window[name] = state.window.get(name, 0.0) + value
        if state.step % max(1, self.total // _CURVE_POINTS) == 0 or state.step == self.total:
            count = state.window.pop("steps")
            means = {name: value / count for name, value in state.window.items()}
            state.train.append({"step": state.step, "learning_rate": rate, **means})
            state.window = {}
        speed = state.tokens / max(self._elapsed(), 1e-9)
        self._tell(f"loss {figures['loss']:.3f}, {speed:,.0f} tokens/s", state.step, self.total or _PROBED_STEPS)

    def _tell(self, what: str, done: int, total: int) -> None:
        if self.accelerator.is_main_process:
            self.place.progress(what, done, total)

    def _elapsed(self) -> float:
        """Return seconds since the beginning, those of runs that were killed up to their last checkpoint."""
        return self.state.seconds + time.monotonic() - self.begun

    def _time(self) -> None:
        """Decide from the speed of the first steps how many there will be."""
        options, now = self.options, time.monotonic()
        first, since = self.probe
        if self.state.step == first:
            self.probe = first, now
        elif self.state.step >= max(_PROBED_STEPS, first + 1):
            step_s = (now - since) / (self.state.step - first)
            left = options.minutes * 60 - self._elapsed()
            if options.evaluate_every:
                step_s += self.evaluation_s / options.evaluate_every
            else:
                left -= _EVALUATIONS * self.evaluation_s
            self.total = self._decide("steps", lambda: self.state.step + max(1, int(left / step_s)))

    def _after_step(self) -> None:
        """Evaluate, stop and save where it is time."""
        state, options = self.state, self.options
        every = options.evaluate_every or max(1, self.total // _EVALUATIONS)
        done = 0 < self.total <= state.step
        if self.data.held_out is not None and self.total and (done or state.step % every == 0):
            self._evaluate()
            if options.patience and state.worse >= options.patience:
                state.stopped = "early"
        if done and not state.stopped:
            state.stopped = "steps"
        by_time = options.save_seconds > 0 and time.monotonic() - self.saved > options.save_seconds
        by_steps = options.save_every > 0 and state.step % options.save_every == 0
        if shared(lambda: bool(state.stopped) or by_steps or by_time):
            self._save()

    def _save(self) -> None:
        state = self.state
        state.seconds, self.begun = self._elapsed(), time.monotonic()
        if self.accelerator.is_main_process:
            weights = {name: value.detach() for name, value in self.trained.items()}
            checkpoints.save_last(
                self.place.folder, weights, self.optimizer.state_dict(), {f: getattr(state, f) for f in _STATE_FIELDS}
            )
        self.saved = time.monotonic()

    def _evaluate(self) -> None:
        """Score the held-out examples."""
        begun = time.monotonic()
        held_out = self.data.held_out
        assert held_out is not None
        size = self.options.rows or self.options.batch
        order = np.argsort(held_out.lengths, kind="stable")
        pieces = [order[i : i + size].tolist() for i in range(0, len(order), size)]
        sums: dict[str, Tensor] = {}
        self.shell.eval()
        with torch.no_grad():
            for number in range(self.accelerator.process_index, len(pieces), self.accelerator.num_processes):
                self._seed(0, 0, number)
                batch = self._on_device(held_out.collate(pieces[number]))
                judge = self.data.judge or self.objective
                _add(sums, self.shell(judge, batch, 0, self.precision == "bf16"))
        self.shell.train()
        if self.accelerator.num_processes > 1:  # one that got no piece has no names
            nothing = torch.zeros((), dtype=_wide(self.accelerator.device), device=self.accelerator.device)
            sums = {name: sums.get(name, nothing) for name in shared(lambda: sorted(sums))}
        figures, weight = self._mean(sums)
        if weight:  # else nothing was judged (no token masked, say), and a loss of 0 would be the best for ever
            self._judge(figures)
        self.evaluation_s = time.monotonic() - begun

    def _judge(self, figures: Mapping[str, float]) -> None:
        """Add an evaluation to the curve, and keep the weights when they are the best so far."""
        state = self.state
        state.held_out.append({"step": state.step, **figures})
        state.worse += 1
        if not state.best or figures["loss"] < state.best["loss"]:
            state.best, state.worse = {"step": state.step, "loss": figures["loss"]}, 0
            if self.accelerator.is_main_process:
                checkpoints.save_best(self.place.folder, {n: v.detach() for n, v in self.trained.items()})

    def record(self) -> Json:
        """Return what happened."""
        state = self.state
        return {
            "steps": state.step,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 3),
            "precision": self.precision,
            "processes": self.accelerator.num_processes,
            "stopped": state.stopped,
            "best": state.best,
            "train": state.train,
            "held_out": state.held_out,
            "unjudged": self.data.held_out is not None and not state.held_out,
        }


_STATE_FIELDS = tuple(f.name for f in dataclasses.fields(_State))


def schedule(step: int, warmup: int, total: int) -> float:
    """Return the learning rate of a step, counted from 1, relative to the highest; `total` 0: not known yet."""
    if step <= warmup:
        return step / warmup
    if total <= warmup:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / (total - warmup)))


def _add(sums: dict[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Add a batch's loss and figures, weighted, and its weight."""
    wide = _wide(found["weight"].device)
    weight = found["weight"].detach().to(wide)
    for name, value in found.items():
        term = weight if name == "weight" else value.detach().to(wide) * weight
        sums[name] = sums[name] + term if name in sums else term


def _wide(device: torch.device) -> torch.dtype:
    """Return what sums are kept in; Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
