"""Store the weights of a bundle deflated where that pays: where masks have left zeros in them."""

from __future__ import annotations

from pathlib import Path

from edgepipe.artifacts import Context, OnnxModel

_WORTH_IT = 0.9  # share of the bytes: a file that has to be unpacked when it is opened must be smaller than this


def deflate(model: OnnxModel, path: Path, ctx: Context, how: str) -> None:
    """Deflate the weights of the bundle in `path`: always, never, or "auto": of a model with masks, if it pays."""
    from edgepipe.bundle import deflate_weights
    from edgepipe.numerics.sparsity import pattern_of

    if how == "never" or (how == "auto" and pattern_of(model.history) is None):
        return
    most = 1.0 if how == "always" else _WORTH_IT
    before, after = deflate_weights(path, most)
    if after < most * before:
        ctx.note(
            f"weights are stored deflated, {after / 1e6:,.1f} of {before / 1e6:,.1f} MB ({after / before:.0%}), "
            "and unpacked into memory when the bundle is opened"
        )
    else:
        ctx.note(f"weights are stored as they are: deflated they would take {after / before:.0%}")
