"""The one set of blocks all students are built of: RMSNorm, rotary positions, grouped-query attention, MLP.

Pre-norm blocks as in transformers' Llama family, under the same parameter names, so a teacher's weights fit as they
are; graph/blocks.py says the same in ONNX. B rows, S new tokens, T tokens seen, H width; masks are bool, True: seen.
Source: Touvron et al., arXiv:2302.13971; cross-attention as in Zhang et al., arXiv:2504.06225 (no positions).
"""
# ruff: noqa: TID253  a student is a torch module: this file is imported only where one is made

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgepipe.artifacts import Json
from edgepipe.graph.shape import Shape, rotary_frequencies

KeysValues = tuple[Tensor, Tensor]  # [B, kv_heads, T, head_dim] each


@dataclass(slots=True)
class Dropout:
    """Hold the rate that all blocks of a model share; training sets it, and it is 0 otherwise."""

    rate: float = 0.0


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · weight, or · (1 + weight) in families that say so (Gemma)."""

    def __init__(self, width: int, eps: float, *, plus_one: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if plus_one else torch.ones(width))
        self.eps, self.plus_one = eps, plus_one

    def forward(self, x: Tensor) -> Tensor:
        """Normalize over the last axis, in float32 whatever x is."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        weight = self.weight.float() + 1 if self.plus_one else self.weight.float()
        return (wide * weight).to(x.dtype)


class Rotary(nn.Module):
    """Give cosine and sine [B, 1, S, head_dim] of positions [B, S], which may be negative."""

    inverse: Tensor  # [head_dim / 2] float32

    def __init__(self, shape: Shape, config: Json) -> None:
        super().__init__()
        inverse, self.factor = rotary_frequencies(config, shape)
        self.register_buffer("inverse", torch.from_numpy(inverse), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the two tables."""
        angles = positions[:, None, :, None].float() * self.inverse
        angles = torch.cat([angles, angles], -1)
        return angles.cos() * self.factor, angles.sin() * self.factor


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x [B, heads, S, head_dim]: the first half of a head is paired with the second."""
    cos, sin = tables
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention; queries from x [B, S, H], keys and values from x, or from an encoder's states."""

    def __init__(self, shape: Shape, dropout: Dropout, *, source_width: int | None = None) -> None:
        super().__init__()
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        width = shape.hidden if source_width is None else source_width
        self.q_proj = nn.Linear(shape.hidden, q, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(width, kv, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(width, kv, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(q, shape.hidden, bias=shape.o_bias)
        if shape.variant.qk_norm:
            plus_one = shape.variant.norm_plus_one
            self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps, plus_one=plus_one)
            self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps, plus_one=plus_one)
        self.shape, self.dropout = shape, dropout

    def keys_values(self, x: Tensor, tables: tuple[Tensor, Tensor] | None) -> KeysValues:
        """Project x [B, T, width] to keys and values, the keys rotated when tables are given."""
        k, v = (self._split(p(x), self.shape.kv_heads) for p in (self.k_proj, self.v_proj))
        if self.shape.variant.qk_norm:
            k = self.k_norm(k)
        return (k if tables is None else rotate(k, tables)), v

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor] | None, seen: KeysValues, mask: Tensor | None, *, causal: bool
    ) -> Tensor:
        """Attend from x to `seen`; mask [B, 1, S or 1, T], or `causal` over T = S tokens. → [B, S, H]"""
        q = self._split(self.q_proj(x), self.shape.heads)
        if self.shape.variant.qk_norm:
            q = self.q_norm(q)
        if tables is not None:
            q = rotate(q, tables)
        keys, values = seen
        if keys.shape[1] != q.shape[1]:
            groups = q.shape[1] // keys.shape[1]
            keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        # torch's bfloat16 gradients of attention are slow on a CPU: four times what float32 takes
        narrow = q.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
        with torch.autocast("cpu", enabled=False) if narrow else contextlib.nullcontext():
            y = functional.scaled_dot_product_attention(
                *((q.float(), keys.float(), values.float()) if narrow else (q, keys, values)),
                attn_mask=mask,
                dropout_p=self.dropout.rate if self.training else 0.0,
                is_causal=causal,
                scale=self.shape.attention_scale,
            )
        output: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return output

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, self.shape.head_dim).transpose(1, 2)


class Mlp(nn.Module):
    """down(act(gate·x) ⊙ up·x), or down(act(up·x)) where the shape is not gated.

    With `kept` it computes with its first channels alone, as the MLP does that is cut out of it (training/nested.py).
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        if shape.gated:
            self.gate_proj = nn.Linear(shape.hidden, shape.ffn, bias=shape.mlp_bias)
        self.up_proj = nn.Linear(shape.hidden, shape.ffn, bias=shape.mlp_bias)
        self.down_proj = nn.Linear(shape.ffn, shape.hidden, bias=shape.mlp_bias)
        self.activation, self.gated = shape.activation, shape.gated
        self.kept: int | None = None  # channels; None: all

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to x [B, S, H]."""
        up = self._first(self.up_proj, x)
        y = self._activate(self._first(self.gate_proj, x)) * up if self.gated else self._activate(up)
        down = self.down_proj
        output: Tensor = down(y) if self.kept is None else functional.linear(y, down.weight[:, : self.kept], down.bias)
        return output

    def _first(self, layer: nn.Linear, x: Tensor) -> Tensor:
        if self.kept is None:
            output: Tensor = layer(x)
            return output
        bias = None if layer.bias is None else layer.bias[: self.kept]
        return functional.linear(x, layer.weight[: self.kept], bias)

    def _activate(self, x: Tensor) -> Tensor:
        if self.activation == "silu":
            return functional.silu(x)
        return functional.gelu(x, approximate="tanh" if self.activation == "gelu_pytorch_tanh" else "none")


class Block(nn.Module):
    """Self-attention, cross-attention when there is a source, and MLP, each on a residual stream."""

    def __init__(self, shape: Shape, dropout: Dropout, *, layer: int, source_width: int | None) -> None:
        super().__init__()
        plus_one = shape.variant.norm_plus_one
        self.input_layernorm = RMSNorm(shape.hidden, shape.norm_eps, plus_one=plus_one)
        self.self_attn = Attention(shape, dropout)
        if source_width is not None:
            self.cross_attention_layernorm = RMSNorm(shape.hidden, shape.norm_eps, plus_one=plus_one)
            self.cross_attn = Attention(shape, dropout, source_width=source_width)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.norm_eps, plus_one=plus_one)
        self.mlp = Mlp(shape)
        self.rotates, self.scale, self.dropout = shape.ropes[layer], shape.residual_scale, dropout

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past: KeysValues | None,
        source: tuple[KeysValues, Tensor | None] | None,
        *,
        causal: bool,
    ) -> tuple[Tensor, KeysValues]:
        """Return the stream after this block, and the keys and values of all tokens it has seen."""
        turned = tables if self.rotates else None
        h = self.input_layernorm(x)
        seen = self.self_attn.keys_values(h, turned)
        if past is not None:
            seen = torch.cat([past[0], seen[0]], 2), torch.cat([past[1], seen[1]], 2)
        x = self._add(x, self.self_attn(h, turned, seen, mask, causal=causal))
        if source is not None:
            h = self.cross_attention_layernorm(x)
            x = self._add(x, self.cross_attn(h, None, source[0], source[1], causal=False))
        return self._add(x, self.mlp(self.post_attention_layernorm(x))), seen

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        y = functional.dropout(y, self.dropout.rate, self.training) if self.dropout.rate else y
        return x + (y if self.scale == 1 else y * self.scale)


class Stack(nn.Module):
    """Blocks one after another and a last norm; a model may hang its embedding here, as transformers does."""

    embed_tokens: nn.Embedding

    def __init__(self, shape: Shape, config: Json, dropout: Dropout, *, source_width: int | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Block(shape.at(i), dropout, layer=i, source_width=source_width) for i in range(shape.layers)
        )
        self.norm = RMSNorm(shape.hidden, shape.norm_eps, plus_one=shape.variant.norm_plus_one)
        self.rotary = Rotary(shape, config)
        self.shape = shape
        self.kept: int | None = None  # the first blocks alone compute (training/exits.py); None: all

    @property
    def blocks(self) -> list[Block]:
        """Return the blocks, typed."""
        return [cast(Block, layer) for layer in self.layers]

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        *,
        causal: bool = False,
        past: list[KeysValues] | None = None,
        source: list[KeysValues] | None = None,
        source_mask: Tensor | None = None,
    ) -> tuple[Tensor, list[KeysValues], list[Tensor]]:
        """Return normed states [B, S, H], the layers' keys and values, and the stream before and after each block."""
        tables = self.rotary(positions)
        states, present = [x], []
        for i, block in enumerate(self.blocks[: self.kept]):
            crossed = None if source is None else (source[i], source_mask)
            x, seen = block(x, tables, mask, None if past is None else past[i], crossed, causal=causal)
            present.append(seen)
            states.append(x)
        return self.norm(x), present, states
