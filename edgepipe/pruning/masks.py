"""Put masks on the matrices of a model's blocks, block by block, so that later ones see what earlier ones lost.

Embedding, head and vectors stay as they are: a token's row is read alone, and vectors are small. The scores are
numerics/sparsity.py's. Zeros are exact, and stay: training keeps them (training/zeros.py), every grid of quantize has
a code for zero, and its methods leave zeros alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepipe.artifacts import Context, TorchModel
from edgepipe.errors import ConfigError
from edgepipe.numerics.sparsity import Pattern, keep_mask, wanda_scores, without
from edgepipe.pruning.families import Anatomy
from edgepipe.pruning.sizes import Sizes
from edgepipe.weights import WeightStore, held_weight

if TYPE_CHECKING:
    from edgepipe.quantizers.texts import Batch

MASKS = ("magnitude", "wanda", "sparsegpt")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Masked:
    """Hold a model's weights with zeros in them."""

    weights: WeightStore
    matrices: int
    zeros: int  # weights that are zero in them
    total: int


def matrices_of(model: TorchModel, anatomy: Anatomy) -> list[str]:
    """Return the names of the matrices in a model's blocks."""
    inside = tuple(stack.prefix for stack in anatomy.stacks)
    return [name for name in model.weights if name.startswith(inside) and len(model.weights[name].shape) == 2]


def check_pattern(anatomy: Anatomy, sizes: Sequence[Sizes], pattern: Pattern | None) -> None:
    """Refuse a pattern that what a matrix reads can't be divided by, or a share of all of it, once it is smaller."""
    if pattern is not None and not pattern.of:
        _check_share(anatomy, sizes, pattern.share)
    for stack, size in zip(anatomy.stacks, sizes, strict=True):
        group = stack.heads // stack.kv_heads * stack.head_dim  # places of a key/value group's query heads
        for option, kept, had, places in (
            ("hidden", size.hidden, stack.hidden, 1),
            *(("ffn", width, stack.ffn, 1) for width in size.ffns),
            ("kv_heads", size.kv_heads, stack.kv_heads, group),
        ):
            if pattern is None or not pattern.of or kept * places % pattern.of == 0:
                continue
            fitting = [n for n in range(1, had + 1) if n * places % pattern.of == 0]
            _, nearest = min(((abs(n - kept), n) for n in fitting), default=(0, 0))
            instead = f"the nearest possible is prune.{option}={nearest}, or take" if nearest else "take"
            raise ConfigError(
                f"prune.pattern: {pattern.name} needs rows that {pattern.of} divides, but {kept * places} columns are "
                f"left of those that prune.{option} counts: {instead} another pattern"
            )


def _check_share(anatomy: Anatomy, sizes: Sequence[Sizes], share: float) -> None:
    """Refuse a share that leaves nothing of the shortest rows: their outputs would be constant."""
    heads = [
        size.kv_heads * (stack.heads // stack.kv_heads) * stack.head_dim
        for stack, size in zip(anatomy.stacks, sizes, strict=True)
    ]
    least = min(*heads, *(size.hidden for size in sizes), *(width for size in sizes for width in size.ffns))
    if round(share * least) < least:
        return
    nearest = next(n / 1000 for n in range(999, -1, -1) if round(n / 1000 * least) < least)
    raise ConfigError(
        f"prune.sparsity: {share:g} would leave nothing of rows of {least} columns: the nearest possible is {nearest:g}"
    )


def mask_weights(
    model: TorchModel,
    anatomy: Anatomy,
    pattern: Pattern,
    method: str,
    batches: list[Batch],
    module: Any,
    progress: Progress,
) -> Masked:
    """Return a model's weights with masks, as float32 where a method looked at texts; `module` is the model's."""
    names = matrices_of(model, anatomy)
    if method == "magnitude":
        changed = {}
        for done, name in enumerate(names):
            progress("masks", done, len(names))
            value = model.weights.float32(name)
            changed[name] = value * keep_mask(np.abs(value), pattern, by_row=False)
    else:
        changed = _by_texts(module, names, pattern, method, batches, progress)
    zeros = sum(int((value == 0).sum()) for value in changed.values())
    return Masked(
        weights=model.weights.replace({name: held_weight(name, value) for name, value in changed.items()}),
        matrices=len(changed),
        zeros=zeros,
        total=sum(value.size for value in changed.values()),
    )


def _by_texts(
    module: Any, names: list[str], pattern: Pattern, method: str, batches: list[Batch], progress: Progress
) -> dict[str, np.ndarray]:
    """Return the masked matrices, each block with the inputs that the masked ones before it give."""
    from edgepipe.quantizers.layers import blocks_of, inputs_of, put

    found: dict[str, np.ndarray] = {}
    for block in blocks_of(module, names):
        inputs = inputs_of(module, block, batches)
        for name, layer in block.layers.items():
            progress("masks", len(found), len(names))
            value = layer.weight.data.numpy()
            gram = inputs[name].gram.numpy() if name in inputs else np.eye(value.shape[1], dtype=np.float32)
            if method == "sparsegpt":
                found[name] = without(value, gram, pattern)
            else:
                found[name] = value * keep_mask(wanda_scores(value, np.diag(gram)), pattern)
            put(layer, found[name])
    return found


def say(masked: Masked, pattern: Pattern, method: str, ctx: Context) -> None:
    """Note how many zeros there are, and plainly what they are good for on the target."""
    share = masked.zeros / max(1, masked.total)
    ctx.note(f"{share:.1%} of the weights of {masked.matrices} matrices are zero ({pattern.name} by {method})")
    skips = pattern.name in ctx.target.sparse
    ctx.note(
        f"zeros buy {'speed' if skips else 'no speed'} on the target {ctx.target.name}: its kernels "
        f"{'skip them' if skips else 'multiply them like other weights'}; they buy bytes where compile stores weights "
        "deflated"
    )
    ctx.figures({"sparsity": share})
