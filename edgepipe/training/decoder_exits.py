"""Exits of a decoder: what stands in for the layers behind an exit, and gates that tell where that is enough.

    translator   h + A·h + b, from least squares to the last layer's states, then
                 L = KL(all layers ‖ exit) over the tokens that are likeliest in these texts
    gate         w·gelu(G·normed + c) + d, the log odds that the exit's likeliest token is that of all layers:
                 cross-entropy over texts that the translators weren't trained on

The model's own parameters stay as they are: its states are computed once, and these are trained on them.
Sources: Tuned Lens (arXiv:2303.08112) for translators, begun by least squares here; CALM (arXiv:2207.07061) for the
labels of gates.
"""
# ruff: noqa: TID253  this is training's side: imported only where a model is trained

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgepipe.artifacts import Context, Json, TorchModel
from edgepipe.graph.exits import GATE_WIDTH
from edgepipe.graph.shape import read_shape
from edgepipe.quantizers.layers import first_tensor, kept_rows
from edgepipe.quantizers.modules import feeds, module_of
from edgepipe.quantizers.texts import Batch, Calibration, batches
from edgepipe.weights import Weight, held_weight

_RIDGE = 1e-2  # of each feature's mean square: least squares alone would fit the noise of few texts
_LIKELY, _LOOKED_AT, _TOP = 2048, 4096, 8  # tokens of the vocabulary that are compared: the likeliest 8 in 4096 places
_ROWS = 256  # states whose logits are held at once: 50 MB of a vocabulary of 50,000
_WARMUP = 20  # steps
_GATE_PASSES, _GATE_BATCH, _GATE_RATE, _GATE_DECAY = 8, 128, 1e-3, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Teaching:
    """Say which exits are trained, and how."""

    exits: tuple[int, ...]
    steps: int
    batch: int  # tokens of a step
    learning_rate: float
    gate_data: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _States:
    """Hold what goes into the exits and comes out of all layers, a row a token."""

    exits: Sequence[Tensor]  # [n, hidden] float32 each
    last: Tensor  # [n, hidden] float32


@dataclass(frozen=True, slots=True, kw_only=True)
class _Top:
    """Hold what comes behind the layers: norm and head."""

    norm: Any  # torch.nn.Module
    head: Tensor  # [vocab, hidden]
    divisor: float

    def likeliest(self, states: Tensor) -> Tensor:
        """Return the likeliest token [n] of each state [n, hidden]."""
        return torch.cat([(self.norm(part) @ self.head.T).argmax(-1) for part in torch.split(states, _ROWS)])

    def some(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Return log-probabilities of states [n, hidden] among some tokens [m] → [n, m]."""
        return lambda states, tokens: functional.log_softmax(self.norm(states) @ self.head[tokens].T / self.divisor, -1)


def train_exits(
    model: TorchModel, texts: Calibration, teaching: Teaching, ctx: Context
) -> tuple[dict[str, Weight], Json]:
    """Return the parameters of the exits by name, and how many tokens are right at each."""
    module = module_of(model)
    found = batches(model, texts, seed=ctx.seed, module=module, progress=ctx.progress)
    whole = _states(module, found, teaching.exits, ctx)
    shape = read_shape(model.info.config, None)
    top = _Top(norm=module.model.norm, head=module.lm_head.weight, divisor=shape.logits_divisor)
    # Rows stand in the seed's order: the last ones are other texts
    train = int(len(whole.last) * (1 - teaching.gate_data))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ctx.seed)
        return _train(whole, train, top, teaching, ctx)


def _train(whole: _States, train: int, top: _Top, teaching: Teaching, ctx: Context) -> tuple[dict[str, Weight], Json]:
    """Train translators on the first tokens and gates on the others."""
    likely = _likely(whole.last[:train], top)
    right = top.likeliest(whole.last[train:])
    weights: dict[str, Weight] = {}
    record: Json = {"train_tokens": train, "gate_tokens": len(right), "exits": []}
    for number, (depth, states) in enumerate(zip(teaching.exits, whole.exits, strict=True)):
        translator = _least_squares(states[:train], whole.last[:train])
        losses = _distil(translator, states[:train], whole.last[:train], (top, likely), teaching, ctx)
        with torch.no_grad():
            moved = states[train:] + translator(states[train:])
            labels = top.likeliest(moved) == right
            normed = top.norm(moved)
        gate = _gate(normed, labels)
        told = (gate(normed) > 0) == labels
        record["exits"].append(
            {
                "layers": depth,
                "agrees": float(labels.float().mean()),
                "told": float(told.float().mean()),
                "losses": losses,
            }
        )
        named = {
            "translate.weight": translator.weight,
            "translate.bias": translator.bias,
            "gate_in.weight": gate.inner.weight,
            "gate_in.bias": gate.inner.bias,
            "gate_out.weight": gate.outer.weight[0],
            "gate_out.bias": gate.outer.bias,
        }
        for name, value in named.items():
            full = f"exits.{number}.{name}"
            weights[full] = held_weight(full, np.ascontiguousarray(value.detach().numpy(), np.float32))
    return weights, record


@torch.no_grad()
def _states(module: Any, found: Sequence[Batch], exits: Sequence[int], ctx: Context) -> _States:
    """Run the texts and return the states of every token that isn't padding."""
    layers = module.model.layers
    seen: dict[int, list[Tensor]] = {depth: [] for depth in (*exits, len(layers))}
    current = found[0]

    def watch(depth: int, output: Any) -> None:
        seen[depth].append(kept_rows(first_tensor(output), current).float())

    hooks = [
        layers[depth - 1].register_forward_hook(lambda _m, _i, output, depth=depth: watch(depth, output))
        for depth in seen
    ]
    try:
        for number, current in enumerate(found):
            ctx.progress("states at the exits", number, len(found))
            module.model(**feeds(current))
    finally:
        for hook in hooks:
            hook.remove()
    joined = {depth: torch.cat(parts) for depth, parts in seen.items()}
    return _States(exits=[joined[depth] for depth in exits], last=joined[len(layers)])


@torch.no_grad()
def _likely(last: Tensor, top: _Top) -> Tensor:
    """Return the tokens [m] that are most often among the likeliest."""
    places = last[:: max(1, len(last) // _LOOKED_AT)]
    counts = torch.zeros(len(top.head), dtype=torch.int64)
    for part in torch.split(places, _ROWS):
        best = (top.norm(part) @ top.head.T).topk(min(_TOP, len(top.head))).indices
        counts += torch.bincount(best.flatten(), minlength=len(counts))
    return counts.argsort(descending=True, stable=True)[:_LIKELY]


@torch.no_grad()
def _least_squares(states: Tensor, last: Tensor) -> nn.Linear:
    """Return the linear layer that comes nearest to the change from states to those of the last layer, both [n, h]."""
    x = torch.cat([states, torch.ones(len(states), 1)], 1).double()
    gram = x.T @ x
    solved = torch.linalg.solve(gram + _RIDGE * torch.diag(gram.diagonal()), x.T @ (last - states).double()).float()
    layer = nn.Linear(states.shape[1], states.shape[1])
    layer.weight.copy_(solved[:-1].T)
    layer.bias.copy_(solved[-1])
    return layer


def _distil(
    translator: nn.Linear, states: Tensor, last: Tensor, judge: tuple[_Top, Tensor], teaching: Teaching, ctx: Context
) -> list[float]:
    """Train a translator in place; return the mean loss of each tenth of the steps."""
    top, likely = judge
    log_p = top.some()
    optimizer = torch.optim.Adam(translator.parameters(), lr=teaching.learning_rate)
    losses = []
    for step in range(teaching.steps):
        for group in optimizer.param_groups:
            group["lr"] = teaching.learning_rate * min(1, (step + 1) / _WARMUP) * (1 - step / teaching.steps)
        rows = torch.randint(0, len(states), (teaching.batch,))
        with torch.no_grad():
            wanted = log_p(last[rows], likely)
        given = log_p(states[rows] + translator(states[rows]), likely)
        loss = functional.kl_div(given, wanted, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
        ctx.progress("what stands in for later layers", step, teaching.steps)
    return [float(np.mean(part)) for part in np.array_split(losses, min(10, len(losses)))] if losses else []


class _Gate(nn.Module):
    """Give the log odds [n] of normed states [n, hidden]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden, GATE_WIDTH)
        self.outer = nn.Linear(GATE_WIDTH, 1)

    def forward(self, normed: Tensor) -> Tensor:
        """Return the log odds."""
        odds: Tensor = self.outer(functional.gelu(self.inner(normed)))[:, 0]
        return odds


def _gate(normed: Tensor, right: Tensor) -> _Gate:
    """Return a gate trained to tell where an exit is right, from normed states [n, hidden] and labels [n] bool."""
    gate = _Gate(normed.shape[1])
    scale = normed.std(0).clamp_min(1e-6)
    x, y = normed / scale, right.float()
    optimizer = torch.optim.AdamW(gate.parameters(), lr=_GATE_RATE, weight_decay=_GATE_DECAY)
    total = _GATE_PASSES * -(-len(x) // _GATE_BATCH)
    step = 0
    for _ in range(_GATE_PASSES):
        for rows in torch.split(torch.randperm(len(x)), _GATE_BATCH):
            for group in optimizer.param_groups:
                group["lr"] = _GATE_RATE * (1 - step / total)
            loss = functional.binary_cross_entropy_with_logits(gate(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
    with torch.no_grad():
        gate.inner.weight.div_(scale)
    return gate
