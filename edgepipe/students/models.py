"""The students as torch modules: decoder, encoder, encoder-decoder. Rows are padded on the right.

    Decoder         input_ids → logits
    Encoder         input_ids, attention_mask → embedding, or logits of classes
    EncoderDecoder  source → encoder states → keys and values for every decoder layer; target ids → logits

Source: Mu (arXiv:2501.16273) for the shape with centred encoder positions, T5Gemma (arXiv:2504.06225) for adapting a
decoder's weights, NV-Embed (arXiv:2405.17428) for the latent-attention pooling.
"""
# ruff: noqa: TID253  a student is a torch module: this file is imported only where one is made

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgepipe.artifacts import Json
from edgepipe.graph.shape import Shape, read_shape
from edgepipe.students.blocks import Dropout, KeysValues, Stack
from edgepipe.students.config import StudentConfig

_INIT_STD = 0.02  # of matrices from scratch, as in Mu and most of the Llama family


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Hold what a training step compares: logits, and the residual streams around each block."""

    logits: Tensor  # [B, S, vocab], or [B, classes]
    encoder_states: list[Tensor]  # layers + 1 of [B, N, H]; empty without an encoder
    decoder_states: list[Tensor]  # layers + 1 of [B, S, H]; empty without a decoder


@dataclass(slots=True, kw_only=True)
class State:
    """Hold what decoding goes on from: the source's keys and values, and those of the tokens so far."""

    source: list[KeysValues]
    source_mask: Tensor  # [B, 1, 1, N] bool
    past: list[KeysValues] | None = None


class Decoder(nn.Module):
    """A causal decoder under the names of transformers' …ForCausalLM: the twin of a student, or a student itself."""

    def __init__(self, config: Json, context: int | None = None) -> None:
        super().__init__()
        self.config, self.shape = config, read_shape(config, context)
        self.dropout = Dropout()
        self.model = Stack(self.shape, config, self.dropout)
        self.model.embed_tokens = nn.Embedding(self.shape.vocab, self.shape.hidden)
        self.tied = bool(config.get("tie_word_embeddings"))
        if not self.tied:
            self.lm_head = nn.Linear(self.shape.hidden, self.shape.vocab, bias=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past: list[KeysValues] | None = None
    ) -> tuple[Output, list[KeysValues]]:
        """Return logits of every position and the cache; attention_mask [B, S] only marks padding on the right.

        A causal model never looks right, so padding there needs no mask.
        """
        x, present, states = _decode(self.model, self.model.embed_tokens.weight, self.shape, input_ids, past)
        head = self.model.embed_tokens.weight if self.tied else self.lm_head.weight
        logits = functional.linear(x, head) / self.shape.logits_divisor
        return Output(logits=logits, encoder_states=[], decoder_states=states), present


class Encoder(nn.Module):
    """A stack that sees all of a text at once, pooled to an embedding or to the logits of classes."""

    def __init__(self, config: StudentConfig, context: int | None = None) -> None:
        super().__init__()
        self.config, self.shape = config, config.encoder_shape(context)
        self.dropout = Dropout()
        self.embed_tokens = nn.Embedding(self.shape.vocab, self.shape.hidden)
        self.encoder = Stack(self.shape, config.encoder, self.dropout)
        if config.pooling == "latent":
            self.pooler = LatentPooling(self.shape.hidden, config.latents, config.latent_heads)
        if config.labels:
            self.classifier = nn.Linear(self.shape.hidden, len(config.labels))
        if config.exits:
            self.gates = nn.ModuleList(Gate(config.gate_features) for _ in config.exits)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the last states [B, N, H] and the streams around each block."""
        return _encode(self.encoder, self.embed_tokens.weight, self.config, self.shape, input_ids, attention_mask)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return embeddings [B, H], of length 1 when the config says so, or logits [B, classes]."""
        x, _ = self.hidden(input_ids, attention_mask)
        return self._answer(self.pool(x, attention_mask))

    def _answer(self, x: Tensor) -> Tensor:
        """Return embeddings or logits of pooled states x [B, H]."""
        if self.config.labels:
            logits: Tensor = self.classifier(x)
            return logits
        return functional.normalize(x, dim=-1, eps=1e-12) if self.config.normalize else x

    def at_depths(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return embeddings or logits at every exit and after all layers, and what the exits' gates look at.

        → exits + 1 of [B, H] or [B, classes]; exits of [B, features]
        """
        _, states = self.hidden(input_ids, attention_mask)
        answers, features = [], []
        for depth in self.config.depths:
            pooled = self.pool(self.encoder.norm(states[depth]), attention_mask)
            answers.append(self._answer(pooled))
            sure = [answers[-1].softmax(-1).amax(-1, keepdim=True)] if self.config.labels else []
            features.append(torch.cat([pooled, *sure], -1))
        return answers, features[:-1]

    def pool(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """Pool states x [B, N, H] over the tokens that count. → [B, H]"""
        if self.config.pooling == "cls":
            return x[:, 0]
        if self.config.pooling == "last":
            return x[torch.arange(len(x)), attention_mask.sum(1) - 1]
        if self.config.pooling == "max":
            return x.masked_fill(attention_mask[..., None] == 0, torch.finfo(x.dtype).min).amax(1)
        if self.config.pooling == "latent":
            x = self.pooler(x)
        weight = attention_mask[..., None].to(x.dtype)
        return (x * weight).sum(1) / weight.sum(1).clamp_min(1e-9)

    def token_logits(self, x: Tensor) -> Tensor:
        """Return logits over the vocabulary, for masked prediction: the head is the embedding."""
        return functional.linear(x, self.embed_tokens.weight) / self.shape.logits_divisor


class Gate(nn.Module):
    """Say how likely an exit is right already: the log odds are w · features + b. As it is made: as likely as not."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, features: Tensor) -> Tensor:
        """Return the log odds [B] of features [B, features]."""
        return features @ self.weight + self.bias


class LatentPooling(nn.Module):
    """Let states attend to a learned array of latents, then an MLP; the mean over tokens follows (NV-Embed)."""

    def __init__(self, width: int, latents: int, heads: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width) * _INIT_STD)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.up_proj = nn.Linear(width, 4 * width)
        self.down_proj = nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, N, H] of x [B, N, H]."""
        q = self.q_proj(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2)
        k, v = (
            p(self.latents).unflatten(-1, (self.heads, -1)).transpose(0, 1)[None] for p in (self.k_proj, self.v_proj)
        )
        y = functional.scaled_dot_product_attention(q, k.expand(len(x), -1, -1, -1), v.expand(len(x), -1, -1, -1))
        x = x + self.o_proj(y.transpose(1, 2).flatten(2))
        output: Tensor = x + self.down_proj(functional.gelu(self.up_proj(x)))
        return output


class EncoderDecoder(nn.Module):
    """An encoder that reads the source once, and a small decoder that attends to it in every block."""

    def __init__(self, config: StudentConfig, context: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder_shape, self.decoder_shape = config.encoder_shape(context), config.decoder_shape(context)
        self.dropout = Dropout()
        assert config.decoder is not None
        vocab, width = self.encoder_shape.vocab, self.encoder_shape.hidden
        self.encoder = Stack(self.encoder_shape, config.encoder, self.dropout)
        self.decoder = Stack(self.decoder_shape, config.decoder, self.dropout, source_width=width)
        if config.shares_embedding:
            self.embed_tokens = nn.Embedding(vocab, width)
        else:
            self.encoder.embed_tokens = nn.Embedding(vocab, width)
            self.decoder.embed_tokens = nn.Embedding(vocab, self.decoder_shape.hidden)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(self.decoder_shape.hidden, vocab, bias=False)

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Return the embedding tables of encoder and decoder; one and the same where they share it."""
        if self.config.shares_embedding:
            return self.embed_tokens.weight, self.embed_tokens.weight
        return self.encoder.embed_tokens.weight, self.decoder.embed_tokens.weight

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the source's last states [B, N, H] and the streams around each block."""
        return _encode(self.encoder, self.tables[0], self.config, self.encoder_shape, input_ids, attention_mask)

    def start(self, input_ids: Tensor, attention_mask: Tensor) -> State:
        """Encode a source and project it for every decoder layer, once."""
        return self._state(self.encode(input_ids, attention_mask)[0], attention_mask)

    def _state(self, states: Tensor, attention_mask: Tensor) -> State:
        source = [block.cross_attn.keys_values(states, None) for block in self.decoder.blocks]
        return State(source=source, source_mask=attention_mask[:, None, None].bool())

    def step(self, state: State, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Append ids [B, S] to the state; return logits [B, S, vocab] and the streams around each block."""
        table = self.tables[1]
        x, state.past, states = _decode(
            self.decoder, table, self.decoder_shape, ids, state.past, source=state.source, source_mask=state.source_mask
        )
        head = table if self.config.tie_embeddings else self.lm_head.weight
        return functional.linear(x, head) / self.decoder_shape.logits_divisor, states

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Output:
        """Return logits of every target position, given the tokens before it."""
        encoded, encoder_states = self.encode(input_ids, attention_mask)
        logits, decoder_states = self.step(self._state(encoded, attention_mask), decoder_input_ids)
        return Output(logits=logits, encoder_states=encoder_states, decoder_states=decoder_states)


def _encode(
    stack: Stack, table: Tensor, config: StudentConfig, shape: Shape, input_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, list[Tensor]]:
    batch, length = input_ids.shape
    positions = torch.arange(length, device=input_ids.device).expand(batch, length)
    if config.centred_positions:
        positions = positions - (attention_mask.sum(1, keepdim=True) - 1) // 2
    x = functional.embedding(input_ids, table) * shape.embedding_scale
    if config.causal_encoder:  # right padding is never seen from the left
        x, _, states = stack(x, positions, None, causal=True)
    else:
        full = bool(attention_mask.all())
        x, _, states = stack(x, positions, None if full else attention_mask[:, None, None].bool())
    return x, states


def _decode(
    stack: Stack,
    table: Tensor,
    shape: Shape,
    ids: Tensor,
    past: list[KeysValues] | None,
    *,
    source: list[KeysValues] | None = None,
    source_mask: Tensor | None = None,
) -> tuple[Tensor, list[KeysValues], list[Tensor]]:
    batch, length = ids.shape
    before = 0 if past is None else past[0][0].shape[2]
    positions = torch.arange(before, before + length, device=ids.device).expand(batch, length)
    mask = None
    if before and length > 1:
        mask = positions[:, None, :, None] >= torch.arange(before + length, device=ids.device)
    x = functional.embedding(ids, table) * shape.embedding_scale
    return stack(  # type: ignore[no-any-return]
        x, positions, mask, causal=before == 0 and length > 1, past=past, source=source, source_mask=source_mask
    )


def initialize(module: nn.Module, seed: int) -> None:
    """Draw every matrix from a normal of σ 0.02 and zero the biases; norms keep their ones (or zeros)."""
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Embedding):
            with torch.no_grad():
                child.weight.normal_(0.0, _INIT_STD, generator=generator)
        if isinstance(child, nn.Linear) and child.bias is not None:
            nn.init.zeros_(child.bias)
        if isinstance(child, LatentPooling):
            with torch.no_grad():
                child.latents.normal_(0.0, _INIT_STD, generator=generator)


Student = Decoder | Encoder | EncoderDecoder
