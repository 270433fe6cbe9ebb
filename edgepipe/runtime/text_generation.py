"""Generate and score text with a loaded bundle.

One loop serves whole answers, streams and batches: a `_Row` takes logits, chooses a token and says which text became
certain; the model runs what the row chose. So a stream's pieces joined are exactly the text of the whole answer.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, overload

import numpy as np

from edgepipe.errors import ConfigError
from edgepipe.runtime.bundle import Bundle
from edgepipe.runtime.caches import CachePool, Slot
from edgepipe.runtime.chat import ChatTemplate
from edgepipe.runtime.leaving import LeavingDecoder
from edgepipe.runtime.prompts import Message, checked_ids, checked_stop, choice_ids, split_prompts
from edgepipe.runtime.sampling import Sampling, choose_token, log_softmax, random_generator
from edgepipe.runtime.tokenizer import StopFilter, Tokenizer

PROMPT_CHUNK = 128  # tokens of a prompt run at once: bounds activation memory (70 MB less than 512), as fast
_LOGITS_CHUNK = 64  # positions whose logits are held at once: 64 × 150k tokens of vocabulary = 38 MB

FinishReason = Literal["stop", "length", "context"]


class Decoder(Protocol):
    """Say what an engine's loaded decoder offers; runtime/onnxruntime.py has one."""

    @property
    def context(self) -> int:
        """Return the most tokens one row can hold."""

    @property
    def vocab_size(self) -> int:
        """Return the number of logits per position."""

    @property
    def cache_bytes(self) -> int:
        """Return the bytes of one row's cache at full context."""

    def new_cache(self, batch: int) -> Any:
        """Return an empty cache of `batch` rows."""

    def read_source(self, cache: Any, row: int, ids: np.ndarray) -> None:
        """Run the encoder over ids [1, tokens] for one row of the cache; only decoders behind an encoder do."""

    def score(self, ids: np.ndarray, prefix: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return the logits [C] of tokens [C] after prefix [1, S], for a source ids [1, N]; only behind an encoder."""

    def run(
        self, cache: Any, input_ids: np.ndarray, past: np.ndarray, lengths: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """Add input_ids [batch, sequence] to the cache after `past` [batch] tokens; return logits [batch, P, vocab].

        `lengths` [batch] counts each row's valid tokens, `positions` [batch, P] says which of them get logits.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Hold what was generated for one prompt."""

    text: str  # without special tokens, cut before a stop string
    token_ids: tuple[int, ...]  # every token generated, those of a stop string included, the end token not
    prompt_tokens: int
    reused_tokens: int  # of the prompt, already in a cache: not run again
    finish_reason: FinishReason  # "stop": end token or stop string; "length": max_new_tokens; "context": it is full


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """Hold one checked prompt and how to continue it."""

    ids: tuple[int, ...]  # what the answer continues
    source: tuple[int, ...]  # what an encoder reads; empty for a model that continues its prompt
    limit: int  # tokens to generate at most
    at_limit: FinishReason
    sampling: Sampling
    stop: tuple[str, ...]
    seed: int | None
    end_ids: frozenset[int]


class Model:
    """Generate and score with one loaded bundle; see `edgepipe.runtime.load`. Safe for concurrent callers."""

    def __init__(self, bundle: Bundle, decoder: Decoder, *, callers: int) -> None:
        """Join a checked bundle and its loaded decoder; at most `callers` calls run at a time."""
        self._bundle = bundle
        self._decoder = decoder
        assert bundle.tokenizer is not None, "read_bundle has looked"
        self._tokenizer = Tokenizer(bundle.tokenizer)
        special = bundle.manifest["tokenizer"]["special_tokens"]
        self._chat = None if bundle.chat_template is None else ChatTemplate(bundle.chat_template, special)
        facts = bundle.manifest["model"]
        # What an answer to a source begins with; None for a model that continues its prompt.
        self._prefix = tuple(facts["decoder_prefix_ids"]) if "decoder_prefix_ids" in facts else None
        self._source_context = int(facts.get("source_context", 0))
        self._end_ids = frozenset(bundle.manifest["model"]["eos_token_ids"])
        self._pool = CachePool(lambda: decoder.new_cache(1), callers)

    @property
    def name(self) -> str:
        """Return the model's name."""
        return str(self._bundle.manifest["name"])

    @property
    def context(self) -> int:
        """Return the most tokens that prompt and answer can have together."""
        return self._decoder.context

    @property
    def cache_bytes(self) -> int:
        """Return the bytes of one caller's key/value cache at full context."""
        return self._decoder.cache_bytes

    @property
    def tokens_by_depth(self) -> dict[int, int]:
        """Return how many tokens that ran alone left after how many layers, since the model was loaded.

        Empty where it has no exits, or was loaded with a threshold of 1.
        """
        return self._decoder.tokens_by_depth if isinstance(self._decoder, LeavingDecoder) else {}

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Return the bundle's manifest."""
        return self._bundle.manifest

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer."""
        return self._tokenizer

    def encode(self, text: str) -> list[int]:
        """Return the token ids of raw text, special tokens as the model expects them."""
        return self._tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids without special tokens."""
        return self._tokenizer.decode(ids)

    def apply_chat_template(self, messages: Sequence[Message]) -> str:
        """Return the text the model sees for chat messages, up to where its answer begins.

        Raises ConfigError when the bundle has no chat template, or the template refuses the messages.
        """
        if self._chat is None:
            raise ConfigError(f"{self.name} has no chat template: pass the prompt as text instead of messages")
        return self._chat.render(messages)

    @overload
    def generate(
        self,
        prompt: str | list[Message],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        stream: Literal[False] = False,
        reuse_prefix: bool = True,
        ignore_eos: bool = False,
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[Message]],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        stream: Literal[False] = False,
        reuse_prefix: bool = True,
        ignore_eos: bool = False,
    ) -> list[Generation]: ...

    @overload
    def generate(
        self,
        prompt: str | list[Message],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        stream: Literal[True],
        reuse_prefix: bool = True,
        ignore_eos: bool = False,
    ) -> Generator[str, None, Generation]: ...

    def generate(
        self,
        prompt: str | list[Message] | list[str] | list[list[Message]],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        stream: bool = False,
        reuse_prefix: bool = True,
        ignore_eos: bool = False,
    ) -> Generation | list[Generation] | Generator[str, None, Generation]:
        """Continue a prompt: text as it is, or chat messages through the model's template; a list of either = a batch.

        :param max_new_tokens: tokens to generate at most, ≥ 1; the context may end it earlier.
        :param temperature: 0 = the most likely token each time (greedy); otherwise logits are divided by it.
        :param top_k: choose among the k most likely tokens; 0 = all.
        :param top_p: choose among the most likely tokens that together hold this probability, in (0, 1].
        :param repetition_penalty: above 1 makes tokens of prompt and answer less likely; 1 = off.
        :param stop: strings that end the text; it is cut before them.
        :param seed: the same seed gives the same answer; row i of a batch uses seed + i. None = a fresh one.
        :param stream: return an iterator of text pieces, which joined are the whole text. It holds one of the model's
            caches from its first piece until it ends, is closed or is collected; its return value is the Generation.
        :param reuse_prefix: keep what a cache already holds of the prompt's beginning; False runs all of it.
        :param ignore_eos: go on at the end token (for measuring); it then counts as any other.
        :raises ConfigError: for a value out of range, an empty prompt, or one that leaves no room in the context.

        A batch of n rows allocates n caches while it runs, and its prompts run at once, padded to the longest. The
        padding changes nothing; but an engine may round steps of several rows, or a prompt taken from a cache, another
        way than one row from the beginning, so that two nearly equal tokens can change places.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty)
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be a whole number of at least 1, but is {max_new_tokens!r}")
        random_generator(seed)  # refuses a wrong seed before anything runs
        stops = checked_stop(stop)
        end_ids = frozenset[int]() if ignore_eos else self._end_ids
        prompts, is_batch = split_prompts(prompt)
        if stream and is_batch:
            raise ConfigError("a batch cannot be streamed: pass one prompt, or stream=False")
        rows: list[_Row] = []
        for number, one in enumerate(prompts):
            prompt_ids = self._prompt_ids(one)
            ids = prompt_ids if self._prefix is None else self._prefix
            room = self.context - len(ids)
            request = _Request(
                ids=ids,
                source=() if self._prefix is None else prompt_ids,
                limit=min(max_new_tokens, room),
                at_limit="length" if max_new_tokens <= room else "context",
                sampling=sampling,
                stop=stops,
                seed=seed,
                end_ids=end_ids,
            )
            rows.append(_Row(request, self._tokenizer, number))
        if stream:
            return self._pieces(rows[0], reuse=reuse_prefix)
        if len(rows) == 1:
            for _ in self._pieces(rows[0], reuse=reuse_prefix):
                pass
        else:
            self._run_batch(rows)
        return [row.result() for row in rows] if is_batch else rows[0].result()

    def logits(self, prompt: str | Sequence[int], *, all_positions: bool = True) -> np.ndarray:
        """Return the logits [tokens, vocab] float32 of text or token ids; of the last token only, [1, vocab], if asked.

        All positions of a long text are large: tokens × vocab × 4 bytes. `token_logprobs` needs no such memory.
        Raises ConfigError when the prompt is empty or longer than the context.
        """
        ids = self._scored_ids(prompt)
        if all_positions:
            chunks = list(self._logit_chunks(ids))
            return np.concatenate(chunks)
        with self._pool.lend(ids, reuse=False) as (slot, _):
            return self._extend(slot, ids)[None].copy()

    def logit_chunks(self, prompt: str | Sequence[int]) -> Iterator[np.ndarray]:
        """Yield what `logits` returns, in order, [64, vocab] float32 at a time and the rest: memory stays small.

        Holds one of the model's caches until it ends, is closed or is collected. Raises ConfigError as `logits` does.
        """
        return self._logit_chunks(self._scored_ids(prompt))

    def token_logprobs(self, prompt: str | Sequence[int]) -> np.ndarray:
        """Return log p(token | tokens before it), natural log, float64 [tokens − 1], from the second token on.

        Runs a few positions at a time, so memory stays small whatever the length. Raises ConfigError as `logits` does.
        """
        ids = self._scored_ids(prompt)
        scores: list[np.ndarray] = []
        start = 0
        for chunk in self._logit_chunks(ids[:-1]) if len(ids) > 1 else ():
            following = np.asarray(ids[start + 1 : start + 1 + len(chunk)], np.int64)
            scores.append(log_softmax(chunk)[np.arange(len(chunk)), following])
            start += len(chunk)
        return np.concatenate(scores) if scores else np.empty(0, np.float64)

    def score(self, source: str | Sequence[str], choices: Sequence[str | int]) -> np.ndarray:
        """Return log p of each choice as an answer's first token, among the choices: float64 [choices] or [n, choices].

        One run of the encoder and one step of the decoder per source, as monoT5 ranks passages (arXiv:2003.06713); a
        bundle with a graph `scorer` computes the logits of the choices alone. A choice is an id or a text of one token.
        Raises ConfigError for anything else, and for a model without an encoder: see `token_logprobs`.
        """
        if self._prefix is None:
            raise ConfigError(f"{self.name} continues its prompt and has no source to score: use token_logprobs")
        tokens = np.asarray(choice_ids(choices, self._tokenizer), np.int64)
        self._check_ids(tokens.tolist(), len(tokens), "no limit")
        prefix = np.asarray([self._prefix], np.int64)
        sources, is_batch = split_prompts(source)
        scores = []
        for one in sources:
            ids = np.asarray([self._prompt_ids(one)], np.int64)
            with self._pool.turn():
                scores.append(log_softmax(self._decoder.score(ids, prefix, tokens)))
        return np.stack(scores) if is_batch else scores[0]

    def _prompt_ids(self, prompt: str | list[Message]) -> tuple[int, ...]:
        """Return the ids of a prompt that leaves room for one token at least; raise ConfigError otherwise."""
        if isinstance(prompt, str):
            ids = self._tokenizer.encode(prompt)
        else:  # the template writes the special tokens itself
            ids = self._tokenizer.encode(self.apply_chat_template(prompt), add_special_tokens=False)
        if self._prefix is not None:
            self._check_ids(ids, self._source_context, "that is what its encoder reads")
        else:
            self._check_ids(ids, self.context - 1, "one token at least must be left for the answer")
        return tuple(ids)

    def _scored_ids(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """Return the ids of text or ids to score; raise ConfigError when there are none or too many."""
        if self._prefix is not None:
            raise ConfigError(f"{self.name} answers a source: it scores no text by itself, use generate")
        ids: Sequence[int] = self._tokenizer.encode(prompt) if isinstance(prompt, str) else checked_ids(prompt)
        self._check_ids(ids, self.context, "score it in parts")
        return tuple(ids)

    def _check_ids(self, ids: Sequence[int], most: int, advice: str) -> None:
        """Raise ConfigError unless there are 1 to `most` ids and the model knows them all."""
        if len(ids) == 0:
            raise ConfigError("the prompt has no tokens: give it some text")
        if len(ids) > most:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens, but {self.name} has a context of {self.context}: "
                f"shorten it to {most} ({advice})"
            )
        largest, least = max(ids), min(ids)
        if least < 0 or largest >= self._decoder.vocab_size:
            wrong = least if least < 0 else largest
            raise ConfigError(f"token id {wrong} is not in the model's vocabulary of {self._decoder.vocab_size}")

    def _pieces(self, row: _Row, *, reuse: bool) -> Generator[str, None, Generation]:
        """Run one row to its end, yielding text as it becomes certain; the cache goes back when the iterator ends."""
        with self._pool.lend(row.ids, reuse=reuse and not row.source) as (slot, reused):
            if row.source:
                self._decoder.read_source(slot.cache, 0, np.asarray([row.source], np.int64))
            row.reused_tokens = reused
            todo: Sequence[int] = row.ids[reused:]
            while row.finish_reason is None:
                piece = row.accept(self._extend(slot, todo))
                todo = row.token_ids[-1:]
                if piece:
                    yield piece
        return row.result()

    def _extend(self, slot: Slot, ids: Sequence[int]) -> np.ndarray:
        """Run ids after what the slot holds, in chunks; return the logits [vocab] of the last."""
        logits = np.empty(0, np.float32)
        for start in range(0, len(ids), PROMPT_CHUNK):
            chunk = ids[start : start + PROMPT_CHUNK]
            logits = self._run_chunk(slot, chunk, np.asarray([len(chunk) - 1], np.int64))[-1]
        return logits

    def _logit_chunks(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield the logits [≤ 64, vocab] of all positions in order, each array the caller's own."""
        with self._pool.lend(ids, reuse=False) as (slot, _):
            for start in range(0, len(ids), _LOGITS_CHUNK):
                chunk = ids[start : start + _LOGITS_CHUNK]
                yield self._run_chunk(slot, chunk, np.arange(len(chunk), dtype=np.int64)).copy()

    def _run_chunk(self, slot: Slot, ids: Sequence[int], positions: np.ndarray) -> np.ndarray:
        """Add ids to the slot; return logits [P, vocab] at positions [P], valid until its next run."""
        logits: np.ndarray = self._decoder.run(
            slot.cache,
            np.asarray([ids], np.int64),
            np.asarray([len(slot.ids)], np.int64),
            np.asarray([len(ids)], np.int64),
            positions[None],
        )
        slot.ids.extend(ids)  # only now: a run that failed added nothing that counts
        row: np.ndarray = logits[0]
        return row

    def _run_batch(self, rows: Sequence[_Row]) -> None:
        """Run all rows to their ends: the prompts at once, then one token of every row per step."""
        lengths = np.asarray([len(row.ids) for row in rows], np.int64)
        input_ids = np.zeros((len(rows), int(lengths.max())), np.int64)  # rows padded on the right
        for number, row in enumerate(rows):
            input_ids[number, : len(row.ids)] = row.ids
        with self._pool.turn():
            cache = self._decoder.new_cache(len(rows))
            for number, row in enumerate(rows):
                if row.source:
                    self._decoder.read_source(cache, number, np.asarray([row.source], np.int64))
            past = np.zeros(len(rows), np.int64)
            logits = self._decoder.run(cache, input_ids, past, lengths, lengths[:, None] - 1)
            past = lengths.copy()
            ones = np.ones(len(rows), np.int64)
            step_ids = np.zeros((len(rows), 1), np.int64)
            last = np.zeros((len(rows), 1), np.int64)
            while True:
                for number, row in enumerate(rows):
                    if row.finish_reason is None:
                        row.accept(logits[number, -1])
                        if row.finish_reason is None:
                            step_ids[number, 0] = row.token_ids[-1]
                running = [row.finish_reason is None for row in rows]
                if not any(running):
                    return
                # A finished row runs along at its last place, which nobody reads any more.
                logits = self._decoder.run(cache, step_ids, past, ones, last)
                past += np.asarray(running, np.int64)


class _Row:
    """Hold one answer in the making: choose tokens, decode them, decide when it ends."""

    def __init__(self, request: _Request, tokenizer: Tokenizer, number: int) -> None:
        self.ids = request.ids
        self.source = request.source
        self.token_ids: list[int] = []
        self.reused_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._request = request
        self._detokenizer = tokenizer.detokenizer()
        self._stop = StopFilter(request.stop)
        self._random = random_generator(request.seed, number)
        self._text: list[str] = []
        # Prompt and answer in one array, so that the penalty needs no copy per token.
        self._seen = np.empty(len(request.ids) + request.limit, np.int64)
        self._seen[: len(request.ids)] = request.ids

    def accept(self, logits: np.ndarray) -> str:
        """Choose a token from logits [vocab]; return the text that became certain; set `finish_reason` at the end."""
        request = self._request
        seen = self._seen[: len(self.ids) + len(self.token_ids)]
        token = choose_token(logits, seen, request.sampling, self._random)
        if token in request.end_ids:
            self.finish_reason = "stop"
            piece = self._stop.push(self._detokenizer.flush())
        else:
            self._seen[len(seen)] = token
            self.token_ids.append(token)
            piece = self._stop.push(self._detokenizer.push(token))
            if not self._stop.stopped and len(self.token_ids) == request.limit:
                self.finish_reason = request.at_limit
                piece += self._stop.push(self._detokenizer.flush())
        if self._stop.stopped:
            self.finish_reason = "stop"
        elif self.finish_reason is not None:
            piece += self._stop.flush()
        self._text.append(piece)
        return piece

    def result(self) -> Generation:
        """Return the finished answer."""
        assert self.finish_reason is not None, "result() before the end"
        return Generation(
            text="".join(self._text),
            token_ids=tuple(self.token_ids),
            prompt_tokens=len(self.source or self.ids),
            reused_tokens=self.reused_tokens,
            finish_reason=self.finish_reason,
        )
