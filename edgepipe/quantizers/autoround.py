"""AutoRound through auto-round: learn how each weight is rounded and where each group's range ends.

    w̃ = s · (clip(round(w / s + v) + z, 0, 2^b − 1) − z)        v of a weight, low and high of a group are learned
    minimize  ‖block(x̃; w̃) − block(x; w)‖²                       x̃ went through the quantized blocks before

Source: Cheng et al., arXiv:2309.05516. Rounding with its straight-through gradient (`auto_round.data_type.int`) and the
optimizer (`SignSGD`) are the library's, and so are learning rate, schedule and number of steps. Its driver isn't used:
it writes the model to disk, leaves layers alone whose width isn't whole groups, and wants models of transformers.
Scales are float16 throughout, and the symmetric grid is ours, negative scales included.
"""
# ruff: noqa: TID253  learning runs torch modules: this file is imported only where the method is asked for

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from edgepipe.artifacts import QuantizedTensor
from edgepipe.numerics.grids import Grid, on_grid
from edgepipe.quantizers.layers import Block, Call, calls_of, first_tensor, kept_rows, outputs_of, put
from edgepipe.quantizers.texts import Batch

STEPS = 200  # the library's default
_LEARNED = ("v", "low", "high")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Learning:
    """Hold what is learned of one matrix."""

    weight: Tensor  # [out, in]
    grid: Grid
    v: Tensor  # [out · groups, group]: added before rounding
    low: Tensor  # [out · groups]: what is left of the range below zero
    high: Tensor  # [out · groups]: and above

    def rounded(self) -> tuple[Tensor, Tensor, Any]:
        """Return the weight on its grid, scale and zero points [out · groups, 1]; gradients go straight through."""
        from auto_round.data_type.int import quant_tensor_asym, quant_tensor_sym

        for part in (self.low, self.high):
            part.data.clamp_(0, 1)
        quantize: Any = quant_tensor_sym if self.grid.symmetric else quant_tensor_asym
        values, scale, zero = quantize(
            self.weight,
            bits=self.grid.bits,
            group_size=self.grid.group,
            v=self.v,
            min_scale=self.low,
            max_scale=self.high,
            scale_dtype=torch.float16,
        )
        return values, scale, zero


def learn(
    module: Any,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    grids: Mapping[str, Grid],
    *,
    seed: int,
    progress: Callable[[int, int], None],
) -> dict[str, QuantizedTensor]:
    """Return the matrices of all blocks on their grids; the module holds their values afterwards.

    `progress` is told (steps done, steps in all).
    """
    steps = STEPS
    found: dict[str, QuantizedTensor] = {}
    targets = outputs_of(module, blocks, batches)
    for number, block in enumerate(blocks):
        calls = calls_of(module, block, batches)
        wanted = targets.pop(block.name)
        learning = {name: _start(layer.weight.data, grids[name]) for name, layer in block.layers.items()}
        if calls:
            generator = np.random.default_rng([seed, number])

            def tell(done: int, before: int = number * steps) -> None:
                progress(before + done, len(blocks) * steps)

            _learn_block(block, learning, (calls, wanted), generator, steps, tell)
        for name, layer in block.layers.items():
            found[name] = _finished(learning[name])
            put(layer, learning[name].rounded()[0].detach())
    return found


def _start(weight: Tensor, grid: Grid) -> _Learning:
    rows, groups = weight.shape[0], -(-weight.shape[1] // grid.group)
    return _Learning(
        weight=weight.clone(),
        grid=grid,
        v=torch.zeros(rows * groups, grid.group, requires_grad=True),
        low=torch.ones(rows * groups, requires_grad=True),
        high=torch.ones(rows * groups, requires_grad=True),
    )


def _learn_block(
    block: Block,
    learning: dict[str, _Learning],
    data: tuple[list[Call], list[Tensor]],
    generator: np.random.Generator,
    steps: int,
    tell: Callable[[int], None],
) -> None:
    """Learn from one call of the block a step; where that ends worse than it began, take the beginning."""
    from auto_round.algorithms.quantization.sign_round.sign_sgd import SignSGD

    groups = [
        {"params": [getattr(one, part) for part in _LEARNED], "lr": (2.0 if one.grid.bits < 4 else 1.0) / steps}
        for one in learning.values()
    ]
    optimizer: Any = SignSGD(groups, lr=1.0 / steps)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
    before = _whole_loss(block, learning, data)
    order: list[int] = []
    for step in range(steps):
        order = order or generator.permutation(len(data[0])).tolist()
        loss = _loss(block, learning, data, order.pop())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        tell(step + 1)
    if not _whole_loss(block, learning, data) <= before:  # NaN is worse too
        for one in learning.values():
            for part, start in zip(_LEARNED, (0.0, 1.0, 1.0), strict=True):
                getattr(one, part).data.fill_(start)


def _loss(block: Block, learning: dict[str, _Learning], data: tuple[list[Call], list[Tensor]], i: int) -> Tensor:
    """Return how far one call's output lies from the float model's, mean square over what isn't padding."""
    call, wanted = data[0][i], data[1][i]
    weights = {name.removeprefix(f"{block.name}."): one.rounded()[0] for name, one in learning.items()}
    output = first_tensor(functional_call(block.module, weights, call.args, call.kwargs))
    return (kept_rows(output, call.batch) - kept_rows(wanted, call.batch)).pow(2).mean()


@torch.no_grad()
def _whole_loss(block: Block, learning: dict[str, _Learning], data: tuple[list[Call], list[Tensor]]) -> float:
    return sum(float(_loss(block, learning, data, i)) for i in range(len(data[0])))


@torch.no_grad()
def _finished(one: _Learning) -> QuantizedTensor:
    """Return what was learned as codes."""
    values, scale, zero = one.rounded()
    rows = len(one.weight)
    zeros = None if one.grid.symmetric else zero.reshape(rows, -1).numpy()
    return on_grid(values.numpy(), scale.float().reshape(rows, -1).numpy(), zeros, one.grid, "autoround")
