"""Turn text into token ids and back, whole or piece by piece, with the bundle's tokenizer.json.

Piecewise decoding compares the text of a short window of tokens before and after a new one, so that spaces come out as
they do for the whole, and holds back a character until all its bytes are there.
Source: the prefix / read offsets of text-generation-inference's `decode_token`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from edgepipe.errors import ConfigError

_HALF_CHARACTER = "\ufffd"  # what a decoder writes for bytes that are no whole character (yet)


class Tokenizer:
    """Encode and decode with one tokenizer.json; safe for use from several threads."""

    def __init__(self, path: Path) -> None:
        """Read `path`; raise ConfigError when it is not a tokenizer."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{path.name} is not a tokenizer that can be read: {error}") from error
        # A file saved for training may cut or pad its inputs; here the whole text counts.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @property
    def vocab_size(self) -> int:
        """Return the number of ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def largest_id(self) -> int:
        """Return the largest id, added tokens included; −1 when there is none."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of text; special tokens (BOS …) are added as the tokenizer's post-processor says."""
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except Exception as error:  # lone surrogates, and models without an unknown token
            raise ConfigError(f"the text cannot be turned into tokens: {error}") from error

    def cut_at(self, tokens: int) -> None:
        """Cut every text after `tokens` tokens from now on, special tokens included; of a pair the longer one first."""
        try:
            self._tokenizer.enable_truncation(tokens)
        except Exception as error:  # fewer than the special tokens
            raise ConfigError(f"texts can't be cut at {tokens} tokens: {error}") from error

    def encode_rows(self, texts: Sequence[str | tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Return ids and type ids (0, or 1 in the second text of a pair) of each text or pair, special tokens added."""
        try:
            return [(list(row.ids), list(row.type_ids)) for row in self._tokenizer.encode_batch(list(texts))]
        except Exception as error:
            raise ConfigError(f"the texts cannot be turned into tokens: {error}") from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ids; ids that the tokenizer does not know are left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def detokenizer(self) -> Detokenizer:
        """Return a fresh piecewise decoder."""
        return Detokenizer(self)


class Detokenizer:
    """Decode one stream of tokens; the pieces joined are the text of all of them.

    Special tokens are left out. Equal to `Tokenizer.decode` of all tokens, except that bytes which never become a
    character may be written as another number of replacement characters.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # the tokens of the last piece, then those not yet written
        self._written = 0  # how many of the window's tokens have been written

    def push(self, token: int) -> str:
        """Return the text that has become certain with this token, often "" in the middle of a character."""
        self._window.append(token)
        before, after = self._texts()
        if len(after) <= len(before) or after.endswith(_HALF_CHARACTER):
            return ""
        self._window = self._window[self._written :]
        self._written = len(self._window)
        return after[len(before) :]

    def flush(self) -> str:
        """Return what was held back, when no more tokens will come."""
        before, after = self._texts()
        self._written = len(self._window)
        return after[len(before) :]

    def _texts(self) -> tuple[str, str]:
        """Return the text of the written part of the window, and of the whole window."""
        return self._tokenizer.decode(self._window[: self._written]), self._tokenizer.decode(self._window)


class StopFilter:
    """Pass text through until one of the stop strings appears; never let out a part of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""  # the end of the text so far, while it may be the beginning of a stop string
        self.stopped = False

    def push(self, text: str) -> str:
        """Return the text that can be shown; `stopped` is set when a stop string ended it."""
        if self.stopped:
            return ""
        held = self._held + text
        found = [start for start in (held.find(stop) for stop in self._stop) if start >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return held[: min(found)]
        keep = self._possible_start(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """Return what was held back, when no more text will come."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Return the length of the longest end of text that is the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0
