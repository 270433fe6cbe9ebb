"""Does a quantized encoder-decoder still listen to its encoder?

    listening = mean of log p(token | own source) − log p(token | another text's source)

over the tokens that the float model would write, at every step of its own answers; in nats a token. It is taken before
and after quantization on the same tokens. Cross-attention is where encoder-decoders break first: queries, keys or
values that are rounded too coarsely leave a decoder that writes fluently about nothing, and a loss over short answers
hardly shows it. A divergence between the two distributions would take noise that varies with the source for listening;
what the right source is worth to the right token can't.

It is read on torch's module with the weights that ship; what 8-bit activations cost is left to the bundle's own scores.
"""
# ruff: noqa: TID253  it is read on a torch module: this file is imported only where one runs

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgepipe.artifacts import Context, TorchModel
from edgepipe.graph.framework import fill_module
from edgepipe.quantizers.modules import logits_of, module_of, run_batch
from edgepipe.quantizers.texts import Batch, Calibration, batches
from edgepipe.weights import WeightStore

LEAST = 0.8  # share of the float model's listening below which a sentence warns
_ROWS = 32  # sources, some hundred steps: each is run four times
_NOTHING = 0.01  # nats: a float model that gains less by its source has none to lose


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """Hold some answers with their sources, with other ones, and what the float model would write at each step."""

    own: Batch
    other: Batch  # the same answers to the sources of other rows
    steps: Tensor  # [rows, steps] bool: those that count
    tokens: Tensor  # [n] int64, one for each of those


@torch.no_grad()
def heard(module: Any, found: Sequence[Batch]) -> list[Heard]:
    """Return what `listening` runs, for the float model that `module` computes; one row alone has no other source."""
    texts = []
    for batch in found:
        if len(batch.input_ids) > 1 and batch.decoder_mask is not None:
            other = dataclasses.replace(
                batch,
                input_ids=np.ascontiguousarray(np.roll(batch.input_ids, 1, 0)),
                attention_mask=np.ascontiguousarray(np.roll(batch.attention_mask, 1, 0)),
            )
            steps = torch.from_numpy(batch.decoder_mask) > 0
            tokens = logits_of(run_batch(module, batch))[steps].argmax(-1)
            texts.append(Heard(own=batch, other=other, steps=steps, tokens=tokens))
    return texts


@torch.no_grad()
def listening(module: Any, texts: Sequence[Heard]) -> float:
    """Return how much likelier the tokens are with their own sources than with others, nats a token."""
    gained = [_likelihoods(module, text.own, text) - _likelihoods(module, text.other, text) for text in texts]
    return float(torch.cat(gained).mean())


def _likelihoods(module: Any, batch: Batch, text: Heard) -> Tensor:
    """Return log p of each token [n]."""
    logits: Tensor = logits_of(run_batch(module, batch))[text.steps].double()
    return logits.log_softmax(-1).gather(-1, text.tokens[:, None])[:, 0]


def note_listening(model: TorchModel, after: WeightStore, calibration: Calibration, ctx: Context) -> None:
    """Note how much the model listens, and still does with the weights `after`; warn when too little is left.

    The figures go to the stage's record.
    """
    module = module_of(model)
    few = dataclasses.replace(calibration, samples=min(calibration.samples, _ROWS))
    texts = heard(module, batches(model, few, seed=ctx.seed, module=module, progress=ctx.progress))
    if not texts:
        return
    ctx.progress("does the decoder listen to its encoder", 0, 1)
    before = listening(module, texts)
    fill_module(module, after)
    left = listening(module, texts)
    ctx.figures({"listening": {"before": before, "after": left, "steps": sum(len(text.tokens) for text in texts)}})
    if before < _NOTHING:
        ctx.note(f"the float decoder hardly listens to its encoder ({before:.2g} nats a token): nothing to lose there")
        return
    share = left / before
    ctx.note(f"the decoder's gain by its source went from {before:.2f} to {left:.2f} nats a token ({share:.0%})")
    if not share >= LEAST:  # NaN warns too
        ctx.note(
            f"the decoder listens too little to its encoder: {share:.0%} of the float model's gain is left, and "
            f"{LEAST:.0%} is the least that is sound; give cross-attention more bits, with quantize.overrides"
        )
