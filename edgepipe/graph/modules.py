"""Torch modules around transformers' models, one per graph: named tensors in, named tensors out, no hidden cache.

    OneGraph        inputs of the model → the outputs of its task; for sentence encoders the pooled embedding as well
    CrossEncoder    source → keys and values of every decoder layer's cross-attention
    CachedDecoder   new ids, past keys and values (and those of the source) → logits, present keys and values

torch is imported when one is made: this file is read without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def one_graph(model: Any, outputs: Sequence[str], pooling: str | None = None, normalize: bool = False) -> Any:
    """Return a module that gives the named `outputs` of a model, and `embedding` when there is a pooling.

    `pooling`: "mean" over the tokens that aren't padding, "cls" (the first), "last" (of each row) or "max".
    """
    import torch

    class OneGraph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            input_ids: Any = None,
            attention_mask: Any = None,
            token_type_ids: Any = None,
            pixel_values: Any = None,
            input_features: Any = None,
            input_values: Any = None,
        ) -> dict[str, Any]:
            given = {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "token_type_ids": token_type_ids,
                "pixel_values": pixel_values,
                "input_features": input_features,
                "input_values": input_values,
            }
            result = self.model(**{name: value for name, value in given.items() if value is not None})
            found = {name: getattr(result, name) for name in outputs}
            if pooling is not None:
                found = {"embedding": pooled(found["last_hidden_state"], attention_mask), **found}
            return found

    def pooled(hidden: Any, mask: Any) -> Any:
        """Pool hidden [B, S, H] over the tokens where mask [B, S] is 1 → [B, H]."""
        if pooling == "cls":
            vector = hidden[:, 0]
        elif pooling == "last":
            last = mask.sum(1) - 1
            vector = hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]
        elif pooling == "max":
            vector = hidden.masked_fill(mask[:, :, None] == 0, torch.finfo(hidden.dtype).min).amax(1)
        else:
            weight = mask[:, :, None].to(hidden.dtype)
            vector = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(vector, dim=1) if normalize else vector

    return OneGraph()


def cross_encoder(model: Any, start: int) -> Any:
    """Return a module from a source to cross-attention keys and values, those of layer i called cross_key.i, …_value.i.

    The whole model runs on one start token, so that every architecture fills its cache itself; what only the decoder
    needs is dropped from the graph.
    """
    import torch
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    class CrossEncoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> dict[str, Any]:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                decoder_input_ids=torch.full_like(input_ids[:, :1], start),
                past_key_values=cache,
                use_cache=True,
            )
            layers: Any = cache.cross_attention_cache.layers
            pairs = {f"cross_key.{i}": layer.keys for i, layer in enumerate(layers)}
            pairs |= {f"cross_value.{i}": layer.values for i, layer in enumerate(layers)}
            return {f"cross_{kind}.{i}": pairs[f"cross_{kind}.{i}"] for i in range(len(layers)) for kind in _KINDS}

    return CrossEncoder()


_KINDS = ("key", "value")


def cached_decoder(model: Any, *, has_source: bool) -> Any:
    """Return a module that appends ids to a cache of keys and values; behind an encoder it reads those of a source too.

    Logits of all new positions come out, [B, S, vocab].
    """
    import torch
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    def filled(pairs: Any) -> Any:
        cache = DynamicCache()
        for layer, (key, value) in enumerate(pairs):
            cache.update(key, value, layer)
        return cache

    def named(logits: Any, cache: Any) -> dict[str, Any]:
        found = {"logits": logits}
        for i, layer in enumerate(cache.layers):
            found |= {f"present_key.{i}": layer.keys, f"present_value.{i}": layer.values}
        return found

    class SourceDecoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.width = model.config.hidden_size

        def forward(self, input_ids: Any, encoder_attention_mask: Any, cross: Any, past: Any) -> dict[str, Any]:
            cache = EncoderDecoderCache(filled(past), filled(cross))
            # only its shape is read: keys and values of the source are in the cache
            source = encoder_attention_mask[:, :, None].expand(-1, -1, self.width).to(torch.float32)
            result = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=source),
                attention_mask=encoder_attention_mask,
                decoder_input_ids=input_ids,
                past_key_values=cache,
                use_cache=True,
            )
            return named(result.logits, cache.self_attention_cache)

    class PlainDecoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, past: Any) -> dict[str, Any]:
            cache = filled(past)
            result = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
            return named(result.logits, result.past_key_values)

    return SourceDecoder() if has_source else PlainDecoder()
