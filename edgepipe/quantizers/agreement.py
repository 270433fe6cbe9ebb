"""Token agreement: does a quantized decoder still write what the float one writes, and which layer is to blame if not?

The float model answers some prompts greedily. The quantized one reads prompt and answer, and is asked at each position
which token it would write. Up to the first position where the two differ both have read the same, so that is where two
greedy texts part, and one run shows all positions, with the divergence KL(p_float ‖ p) at each.

    blame       put one unit of matrices back to float: how far does the mean KL fall?
    fall-back   the units by that, the worst first: more bits, until the floor holds or the bytes are spent

It is read on torch's module with the values that ship, before any graph is made.
Source: "flips" of answers as what a mean hides, Dutta et al., arXiv:2407.09141; KL and top-1 agreement as llama.cpp's
`perplexity --kl-divergence` takes them.
"""
# ruff: noqa: TID253  it is read on a torch module: this file is imported only where one runs

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgepipe.artifacts import ModelInfo
from edgepipe.errors import StageError
from edgepipe.quantizers.modules import feeds, logits_of, slots_of, swapped
from edgepipe.quantizers.outputs import DISTRIBUTIONS, distances
from edgepipe.quantizers.texts import Batch
from edgepipe.training.texts import WriteOptions, generate
from edgepipe.weights import Weight, WeightStore

PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 16, 32, 32  # a few hundred positions: blame runs them once a unit
_ROWS = 8  # at once

Tick = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """Hold some prompts with the float model's greedy answers, and what it says at each of their positions."""

    batch: Batch
    scored: np.ndarray  # [rows, tokens] bool: the positions that predict a token of an answer
    logits: Tensor  # [n, vocab] float32, of those positions, row after row


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Say how alike two models write."""

    share: float  # of positions at which both find the same token likeliest
    parts_at: tuple[int | None, ...]  # of each answer: the first token that differs, from 0; None: none does
    kl: float  # mean over all positions, nats
    kl_by_token: tuple[float, ...]  # mean at the i-th token of the answers

    @property
    def median_parting(self) -> float | None:
        """Return the median first token that differs; None where more than half of the answers stay the same."""
        found = float(np.median([np.inf if one is None else one for one in self.parts_at]))
        return found if np.isfinite(found) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Blame:
    """Say what one unit costs."""

    unit: tuple[str, ...]  # names of its weights
    kl: float  # with it in float
    share: float  # of agreement, with it in float


@dataclass(frozen=True, slots=True, kw_only=True)
class Raised:
    """Say which matrices got more bits, and why."""

    unit: tuple[str, ...]
    before: str  # "q4"
    after: str
    kl_in_float: float  # the mean KL with this unit alone in float
    agreement: Agreement  # afterwards


def answered(module: Any, info: ModelInfo, batches: Sequence[Batch]) -> list[Answered]:
    """Return prompts and greedy answers of the float model that `module` computes; StageError for no finite logits.

    A decoder's prompts are the first tokens of the rows; an encoder-decoder's batches hold its answers already.
    """
    found = []
    for batch in batches:
        one, scored = (
            (batch, _answer_mask(batch)) if batch.decoder_mask is not None else _continued(module, info, batch)
        )
        logits = _logits(module, one, scored)
        if not bool(torch.isfinite(logits).all()):
            raise StageError("the float model's logits aren't finite on the calibration texts: it can't be compared")
        found.append(Answered(batch=one, scored=scored, logits=logits))
    return found


def _answer_mask(batch: Batch) -> np.ndarray:
    assert batch.decoder_mask is not None
    mask: np.ndarray = batch.decoder_mask > 0
    return mask


def _continued(module: Any, info: ModelInfo, batch: Batch) -> tuple[Batch, np.ndarray]:
    """Return a decoder's prompts with its greedy answers behind them, and the positions that predict these."""
    length = min(PROMPT_TOKENS, batch.input_ids.shape[1])
    prompts = [row[:length].astype(np.int32) for row in batch.input_ids]
    ends = sorted(info.eos_token_ids)
    texts = generate(module, prompts, ends, WriteOptions(tokens=ANSWER_TOKENS, temperature=0))
    longest = length + max(map(len, texts))
    ids = np.full((len(prompts), longest), ends[0], np.int64)
    mask = np.zeros_like(ids)
    scored = np.zeros(ids.shape, bool)
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        end = length + len(text)
        ids[i, :end], mask[i, :end] = [*prompt, *text], 1
        scored[i, length - 1 : min(end, length - 1 + ANSWER_TOKENS)] = True
    return Batch(input_ids=ids, attention_mask=mask), scored


@torch.no_grad()
def _logits(module: Any, batch: Batch, scored: np.ndarray) -> Tensor:
    logits: Tensor = logits_of(module(**feeds(batch)))[torch.from_numpy(scored)]
    return logits


def agreement(module: Any, texts: Sequence[Answered]) -> Agreement:
    """Return how far what `module` computes agrees with the answers."""
    same: list[np.ndarray] = []  # one array an answer
    apart: list[np.ndarray] = []
    for text in texts:
        logits = _logits(module, text.batch, text.scored)
        ends = np.cumsum(text.scored.sum(1))[:-1]
        hits = logits.argmax(-1) == text.logits.argmax(-1)
        same += np.split(hits.numpy(), ends)
        apart += np.split(distances(DISTRIBUTIONS, logits, text.logits).numpy(), ends)
    longest = max(map(len, apart))
    return Agreement(
        share=float(np.concatenate(same).mean()),
        parts_at=tuple(None if one.all() else int(one.argmin()) for one in same),
        kl=float(np.concatenate(apart).mean()),
        kl_by_token=tuple(float(np.mean([a[i] for a in apart if i < len(a)])) for i in range(longest)),
    )


def blame(
    module: Any,
    slots: Mapping[str, list[Tensor]],
    weights: WeightStore,
    units: Sequence[tuple[str, ...]],
    texts: Sequence[Answered],
    tick: Tick,
) -> list[Blame]:
    """Return what each unit costs, the worst first: the mean KL with it alone put back to its values in `weights`.

    `module` has the quantized values in its `slots`.
    """
    found = []
    for number, unit in enumerate(units):
        tick(number, len(units))
        with swapped(slots, {name: weights.float32(name) for name in unit}):
            without = agreement(module, texts)
        found.append(Blame(unit=unit, kl=without.kl, share=without.share))
    return sorted(found, key=lambda one: (one.kl, -one.share))


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Hold what a fall-back found."""

    weights: dict[str, Weight]  # those that changed
    before: Agreement
    blamed: tuple[Blame, ...]  # empty where the floor held from the start
    raised: tuple[Raised, ...]
    after: Agreement
    unaffordable: tuple[tuple[str, ...], ...]  # units that would have helped, but for the bytes


def hold(
    module: Any,
    weights: WeightStore,
    quantized: Mapping[str, Weight],
    units: Sequence[tuple[str, ...]],
    texts: Sequence[Answered],
    *,
    floor: float,
    spare_bytes: float,
    widen: Callable[[str, Weight], Weight | None],
    tick: Tick,
) -> Held:
    """Give the worst units more bits until the share of equal tokens reaches the floor, or the bytes are spent.

    `module` computes the float model of `weights`, and afterwards the quantized one; `quantized` are the weights that
    lie on grids; `widen` gives a weight (its name, and as it is now) on the next wider grid, None where there is none.
    """
    slots = slots_of(module, weights)
    now = dict(quantized)
    _fill(slots, now, now)
    before = after = agreement(module, texts)
    blamed: list[Blame] = []
    raised: list[Raised] = []
    unaffordable: list[tuple[str, ...]] = []
    while after.share < floor:
        ranked = blame(module, slots, weights, units, texts, tick)
        blamed = blamed or ranked
        progressed = False
        for one, wider in _wider(ranked, now, widen, after.kl):
            cost = sum(wider[name].nbytes - now[name].nbytes for name in wider)
            if cost > spare_bytes:
                unaffordable.append(one.unit)
                continue
            before_bits = now[one.unit[0]].dtype
            now |= wider
            spare_bytes -= cost
            _fill(slots, now, wider)
            after = agreement(module, texts)
            progressed = True
            raised.append(
                Raised(
                    unit=one.unit,
                    before=before_bits,
                    after=wider[one.unit[0]].dtype,
                    kl_in_float=one.kl,
                    agreement=after,
                )
            )
            if after.share >= floor:
                break
        if not progressed:
            break
    changed = {name: now[name] for one in raised for name in one.unit}
    left = tuple(dict.fromkeys(unaffordable)) if after.share < floor else ()
    return Held(
        weights=changed, before=before, blamed=tuple(blamed), raised=tuple(raised), after=after, unaffordable=left
    )


def _wider(
    ranked: Sequence[Blame], now: Mapping[str, Weight], widen: Callable[[str, Weight], Weight | None], kl: float
) -> Iterator[tuple[Blame, dict[str, Weight]]]:
    """Yield the units whose return to float brings something, the worst first, on their next wider grids."""
    for one in ranked:
        if one.kl >= kl:
            return
        wider = {name: weight for name in one.unit if (weight := widen(name, now[name])) is not None}
        if len(wider) == len(one.unit):
            yield one, wider


def _fill(slots: Mapping[str, list[Tensor]], now: Mapping[str, Weight], names: Mapping[str, Weight]) -> None:
    """Put the values of the named weights, as they are now, into the module."""
    for name in names:
        value = WeightStore({name: now[name]}).float32(name)
        for tensor in slots.get(name, ()):
            tensor.data = torch.from_numpy(np.require(value, requirements=["C", "W"]))
