"""What is least missed: scores of FFN channels, key/value groups, residual channels and layers.

By weights alone (`magnitude`; students/from_teacher.py has the same sums):

    FFN channel j          √ Π over the matrices that read or write j of ‖its row or column j‖²
    key/value group g      Σ over queries, keys, values and output of w² in the group
    residual channel c     Σ over all matrices that read or write c of w²

By place, in a student whose FFNs are nested (`nested`): channels come in the order in which they matter, so the first
stay. Nothing else has such an order: groups and residual channels by weights.

By activations over calibration texts (`activations`), after Minitron (arXiv:2407.14679), which takes the mean
size of what a channel, a head or a norm gives. Here it is multiplied by what the next matrix makes of it, so that it
doesn't matter how a model divides its scale between the two, and the score is the energy that goes missing:

    FFN channel j          mean(a_j²) · ‖down_j‖²                 a: what enters the MLP's last matrix
    key/value group g      mean ‖O_g · a_g‖² = Σ (O_g C_g) ⊙ O_g  a_g: what its query heads give, C_g = mean a_g a_gᵀ
    residual channel c     Σ over the blocks' matrices that read c of mean(x_c²) · ‖column c‖²

Layers (`contribution`): 1 − the mean cosine of the stream before and after the block (ShortGPT's block influence,
arXiv:2403.03853).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepipe.artifacts import TorchModel
from edgepipe.pruning.families import FFN, HIDDEN, Anatomy, Stack
from edgepipe.pruning.sizes import Sizes
from edgepipe.students.from_teacher import largest, spread
from edgepipe.weights import WeightStore

if TYPE_CHECKING:
    from edgepipe.quantizers.texts import Batch

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Hold what one stack keeps; every array is sorted."""

    layers: tuple[int, ...]
    ffn: Mapping[int, np.ndarray]  # layer → [ffn]
    groups: Mapping[tuple[int, str], np.ndarray]  # layer and attention → [kv_heads]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Hold the scores of a whole model: by the name of the matrix that reads the channels, float64."""

    ffn: Mapping[str, np.ndarray]  # [ffn]
    groups: Mapping[str, np.ndarray]  # [kv_heads]
    hidden: np.ndarray  # [hidden]


@dataclass(slots=True)
class Seen:
    """Sum up what goes through a model; by the name of a matrix, or of a block."""

    squares: dict[str, np.ndarray] = field(default_factory=dict)  # [in] mean of x²
    grams: dict[str, np.ndarray] = field(default_factory=dict)  # [groups, w, w] mean of x_g x_gᵀ
    changes: dict[str, float] = field(default_factory=dict)  # of a block: 1 − mean cosine


def choose(
    anatomy: Anatomy, sizes: Sequence[Sizes], scores: Scores, layers: Sequence[Sequence[int]]
) -> tuple[tuple[Kept, ...], np.ndarray]:
    """Return what each stack keeps, and the residual channels that all keep."""
    found = []
    for stack, size, kept in zip(anatomy.stacks, sizes, layers, strict=True):
        block = [(i, f"{stack.prefix}{i}.") for i in kept]
        found.append(
            Kept(
                layers=tuple(kept),
                ffn={
                    i: largest(scores.ffn[p + stack.ffn_output], width)
                    for (i, p), width in zip(block, size.ffns, strict=True)
                },
                groups={
                    (i, name): largest(scores.groups[p + matrix], size.kv_heads)
                    for i, p in block
                    for name, matrix in stack.attentions.items()
                },
            )
        )
    return tuple(found), largest(scores.hidden, sizes[0].hidden)


def choose_layers(
    anatomy: Anatomy, sizes: Sequence[Sizes], changes: Mapping[str, float] | None
) -> tuple[tuple[int, ...], ...]:
    """Return the layers that each stack keeps: those that change the stream most; without `changes` evenly spaced."""
    found = []
    for stack, size in zip(anatomy.stacks, sizes, strict=True):
        if changes is None or size.layers == stack.layers:
            found.append(spread(size.layers, stack.layers))
        else:
            scores = np.array([changes[f"{stack.prefix}{i}"] for i in range(stack.layers)])
            found.append(tuple(int(i) for i in largest(scores, size.layers)))
    return tuple(found)


def by_magnitude(weights: WeightStore, anatomy: Anatomy, layers: Sequence[Sequence[int]]) -> Scores:
    """Return the scores that weights alone give, of the layers that are kept."""
    ffn: dict[str, np.ndarray] = {}
    groups: dict[str, np.ndarray] = {}
    hidden = np.zeros(anatomy.stacks[0].hidden)
    for name, axes in anatomy.outside.items():
        hidden += _along(np.square(weights.float32(name), dtype=np.float64), axes, HIDDEN, len(hidden))
    for stack, kept in zip(anatomy.stacks, layers, strict=True):
        for i in kept:
            p = f"{stack.prefix}{i}."
            squares = {
                part: (np.square(weights.float32(p + part), dtype=np.float64), axes)
                for part, axes in stack.axes.items()
                if p + part in weights and len(axes) == 2
            }
            hidden += sum(_along(s, axes, HIDDEN, len(hidden)) for s, axes in squares.values())
            channels = [_along(s, axes, FFN, stack.ffn) for s, axes in squares.values() if FFN in axes]
            ffn[p + stack.ffn_output] = np.sqrt(np.prod(channels, axis=0))
            for attention, matrix in stack.attentions.items():
                groups[p + matrix] = _group_squares(stack, attention, squares)
    return Scores(ffn=ffn, groups=groups, hidden=hidden)


def by_place(scores: Scores) -> Scores:
    """Return scores by which the first FFN channels stay."""
    return dataclasses.replace(
        scores, ffn={name: -np.arange(len(own), dtype=float) for name, own in scores.ffn.items()}
    )


def _along(squares: np.ndarray, axes: tuple[str, ...], axis: str, size: int) -> np.ndarray:
    """Return the sums of a tensor along one axis of it [size]; zeros where it doesn't have that axis."""
    found = np.zeros(size)
    for place, name in enumerate(axes):
        if name == axis:
            found += squares.sum(tuple(other for other in range(squares.ndim) if other != place))
    return found


def _group_squares(
    stack: Stack, attention: str, squares: Mapping[str, tuple[np.ndarray, tuple[str, ...]]]
) -> np.ndarray:
    found = np.zeros(stack.kv_heads)
    for values, axes in squares.values():
        for axis in (f"{attention}.queries", f"{attention}.keys"):
            if axis in axes:
                found += _along(values, axes, axis, stack.size(axis) or 0).reshape(stack.kv_heads, -1).sum(1)
    return found


def by_activations(weights: WeightStore, anatomy: Anatomy, layers: Sequence[Sequence[int]], seen: Seen) -> Scores:
    """Return the scores that activations give, of the layers that are kept."""
    ffn: dict[str, np.ndarray] = {}
    groups: dict[str, np.ndarray] = {}
    hidden = np.zeros(anatomy.stacks[0].hidden)
    for stack, kept in zip(anatomy.stacks, layers, strict=True):
        for i in kept:
            p = f"{stack.prefix}{i}."
            for part in reading(stack):
                if p + part in weights and p + part in seen.squares:
                    columns = np.square(weights.float32(p + part), dtype=np.float64).sum(0)
                    hidden += columns * seen.squares[p + part]
            down = p + stack.ffn_output
            ffn[down] = np.square(weights.float32(down), dtype=np.float64).sum(0) * seen.squares[down]
            for matrix in stack.attentions.values():
                value = weights.float32(p + matrix).astype(np.float64)
                output = value.reshape(len(value), stack.kv_heads, -1).swapaxes(0, 1)  # [groups, hidden, w]
                groups[p + matrix] = ((output @ seen.grams[p + matrix]) * output).sum((1, 2))
    return Scores(ffn=ffn, groups=groups, hidden=hidden)


def reading(stack: Stack) -> list[str]:
    """Return the matrices of a block that read the residual stream."""
    return [part for part, axes in stack.axes.items() if len(axes) == 2 and axes[1] == HIDDEN]


class _Watch:
    """Sum up what passes the hooks of a module."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch  # the one that runs
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    def _add(self, name: str, value: Any, count: int) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + count

    def input_of(self, name: str, groups: int) -> Callable[..., None]:
        """Return a hook before a matrix: mean squares of what it reads, and of `groups` parts the mean of x xᵀ."""
        from edgepipe.quantizers.layers import kept_rows

        def watch(_layer: Any, given: Any) -> None:
            rows = kept_rows(given[0], self.batch).double()
            self._add(name, rows.square().sum(0), len(rows))
            if groups:
                parts = rows.view(len(rows), groups, -1).transpose(0, 1)
                self._add(f"{name} gram", parts.transpose(1, 2) @ parts, len(rows))

        return watch

    def change_by(self, name: str) -> Callable[..., None]:
        """Return a hook behind a block: the cosine of the stream before and after it."""
        import torch

        from edgepipe.quantizers.layers import first_tensor, kept_rows

        def watch(_block: Any, args: Any, kwargs: Any, output: Any) -> None:
            before = kept_rows(args[0] if args else kwargs["hidden_states"], self.batch).double()
            after = kept_rows(first_tensor(output), self.batch).double()
            cosines = torch.nn.functional.cosine_similarity(before, after, dim=-1)
            self._add(f"{name} block", cosines.sum(), len(cosines))

        return watch

    def seen(self) -> Seen:
        """Return the means."""
        found = Seen()
        for name, value in self._sums.items():
            mean = value / max(1, self._counts[name])
            if name.endswith(" block"):
                found.changes[name.removesuffix(" block")] = 1 - float(mean)
            elif name.endswith(" gram"):
                found.grams[name.removesuffix(" gram")] = mean.numpy()
            else:
                found.squares[name] = mean.numpy()
        return found


def observe(model: TorchModel, anatomy: Anatomy, module: Any, batches: Sequence[Batch], progress: Progress) -> Seen:
    """Run the batches through the model's module once, and return what was seen on the way; padding doesn't count."""
    from edgepipe.quantizers.modules import run_batch

    watch = _Watch(batches[0])
    with contextlib.ExitStack() as hooks:
        for stack in anatomy.stacks:
            watched = dict.fromkeys((*reading(stack), stack.ffn_output), 0)
            watched |= dict.fromkeys(stack.attentions.values(), stack.kv_heads)
            for i in range(stack.layers):
                p = f"{stack.prefix}{i}"
                hook = module.get_submodule(p).register_forward_hook(watch.change_by(p), with_kwargs=True)
                hooks.callback(hook.remove)
                for part, groups in watched.items():
                    name = f"{p}.{part}"
                    if name in model.weights:
                        layer = module.get_submodule(name.removesuffix(".weight"))
                        hooks.callback(layer.register_forward_pre_hook(watch.input_of(name, groups)).remove)
        for number, batch in enumerate(batches):
            progress("calibration texts", number, len(batches))
            watch.batch = batch
            run_batch(module, batch)
    return watch.seen()
