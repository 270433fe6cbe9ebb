"""Check what callers pass as prompts, token ids and stop strings, and sort single ones from batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgepipe.errors import ConfigError
from edgepipe.runtime.tokenizer import Tokenizer

Message = dict[str, Any]  # {"role": "user", "content": "…"}


def checked_ids(ids: object) -> list[int]:
    """Return token ids as a list; raise ConfigError when they are no whole numbers."""
    array = np.asarray(ids) if isinstance(ids, list | tuple | np.ndarray) else None
    if array is None or array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
        raise ConfigError(f"expected a text or a list of token ids, got {type(ids).__name__}: {str(ids)[:40]!r}")
    found: list[int] = array.tolist()
    return found


def checked_stop(stop: object) -> tuple[str, ...]:
    """Return the stop strings as a tuple; raise ConfigError when one is empty or no text."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list | tuple) else (None,)
    if not all(isinstance(one, str) and one for one in stops):
        raise ConfigError(f"stop must be texts of at least one character, but is {stop!r}")
    return stops


def split_prompts(prompt: Any) -> tuple[list[str | list[Message]], bool]:
    """Return the prompts, and whether they are a batch; raise ConfigError for what is neither text nor messages."""
    if isinstance(prompt, str):
        return [prompt], False
    if not isinstance(prompt, list | tuple):
        raise ConfigError(
            f"a prompt must be a text, a list of messages, or a list of either, but is {type(prompt).__name__}"
        )
    if len(prompt) == 0:
        raise ConfigError("the prompt is an empty list: give a text, messages, or a batch of them")
    if all(isinstance(one, Mapping) for one in prompt):
        return [list(prompt)], False
    if all(isinstance(one, str) for one in prompt):
        return list(prompt), True
    if all(isinstance(one, list | tuple) for one in prompt):
        return [list(one) for one in prompt], True
    raise ConfigError("a batch must hold only texts or only lists of messages, but holds a mixture")


def choice_ids(choices: object, tokenizer: Tokenizer) -> list[int]:
    """Return the id of each choice, an id or a text of one token; raise ConfigError when there are fewer than two."""
    if not isinstance(choices, list | tuple) or len(choices) < 2:
        raise ConfigError(f"choices must be at least two ids or texts of one token each, but are {str(choices)[:80]}")
    found: list[int] = []
    for choice in choices:
        ids = tokenizer.encode(choice, add_special_tokens=False) if isinstance(choice, str) else checked_ids([choice])
        if len(ids) != 1:
            raise ConfigError(f"a choice must be one token, but {choice!r} has {len(ids)}: choose others, or pass ids")
        found += ids
    return found
