"""Talk: what stands behind `edgepipe run`. Stream an answer, chat, or say what an encoder makes of a text.

Text goes to stdout as it comes; what is said about it goes to stderr. The base install is enough.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgepipe.artifacts import Json
from edgepipe.errors import ConfigError

if TYPE_CHECKING:
    from edgepipe.runtime import Encoder, Model

_CUT = {  # why an answer ended before its end, by its finish reason
    "length": "--max-new-tokens ended it after {tokens} tokens",
    "context": "the model's context was full after {tokens} tokens",
}
_ROOM_TOKENS = 64  # what a chat leaves for an answer before it forgets its oldest turns


def talk(
    bundle: Path, prompt: str | None, sampling: Mapping[str, Any], *, threads: int | None, raw: bool
) -> Json | None:
    """Answer a prompt; None: chat, or answer what stdin holds, if it is piped. Return what an encoder says of a text.

    `sampling` is what `Model.generate` takes; `raw` leaves the chat template out. Raises ConfigError for a prompt that
    is empty or not UTF-8, and what `edgepipe.runtime.load` raises.
    """
    from edgepipe.runtime import Encoder, load

    model = load(bundle, threads=threads)
    _say_emulated(model)
    if isinstance(model, Encoder):
        return _encoded(model, prompt if prompt is not None else _read_stdin())
    if prompt is None and sys.stdin.isatty():
        _chat(model, sampling)
        return None
    text = prompt if prompt is not None else _read_stdin()
    if not text.strip():
        raise ConfigError("the prompt is empty: give some text as PROMPT or on stdin")
    _check_utf8(text)
    asked: Any = text if raw or not _has_template(model) else [{"role": "user", "content": text}]
    _stream(model.generate(asked, stream=True, **sampling))
    return None


def _say_emulated(model: Model | Encoder) -> None:
    """Say where a bundle for an NPU runs, when that isn't its NPU."""
    if model.manifest["engine"] == "qnn":
        from edgepipe.runtime.qnn import said_of

        if said := said_of(model.manifest):
            _say(said)


def _encoded(model: Encoder, text: str) -> Json:
    """Return what an encoder makes of a text: probabilities by label, or an embedding."""
    import numpy as np

    _check_utf8(text)
    if model.manifest["task"] != "text-classification":
        return {"embedding": [float(value) for value in model.embed(text)]}
    logits = model.classify(text).astype(np.float64)
    weights = np.exp(logits - logits.max())
    return {"labels": dict(zip(model.labels, (weights / weights.sum()).tolist(), strict=True))}


def _chat(model: Any, sampling: Mapping[str, Any]) -> None:
    """Talk until Ctrl-D; each turn pays only for what is new."""
    _say(f"{model.name}: write a message, or end with Ctrl-D.")
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = click.prompt("you", prompt_suffix="> ", err=True)
        except click.Abort:
            _say("")
            return
        except UnicodeDecodeError as error:
            raise ConfigError("what was typed is not UTF-8: check the terminal's encoding") from error
        _check_utf8(text)
        messages.append({"role": "user", "content": text})
        forget_the_beginning(model, messages)
        try:
            answer = _stream(model.generate(messages, stream=True, **sampling))
        except ConfigError as error:  # the chat goes on without that message
            _say(f"edgepipe: {error}")
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


def forget_the_beginning(model: Any, messages: list[dict[str, str]]) -> None:
    """Drop the oldest turns of a chat until what is left leaves room for an answer."""
    dropped = 0
    while len(messages) > 2 and _prompt_tokens(model, messages) + _ROOM_TOKENS > model.context:
        del messages[:2]
        dropped += 1
    if dropped:
        _say(f"(the context is full: the oldest {dropped} of your messages and the answers to them are forgotten)")


def _prompt_tokens(model: Any, messages: list[dict[str, str]]) -> int:
    text = model.apply_chat_template(messages) if _has_template(model) else messages[-1]["content"]
    return len(model.encode(text))


def _stream(pieces: Generator[str, None, Any]) -> str:
    """Print pieces of text as they come, and a note when the answer was cut; return the whole."""

    def shown() -> Iterator[str]:
        answer = yield from pieces
        click.echo()
        if answer.finish_reason in _CUT:
            _say(f"(not finished: {_CUT[answer.finish_reason].format(tokens=len(answer.token_ids))})")

    text = []
    for piece in shown():
        text.append(piece)
        click.echo(piece, nl=False)
        sys.stdout.flush()
    return "".join(text)


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the text on stdin is not UTF-8 (byte {error.start}): convert it first") from error


def _check_utf8(text: str) -> None:
    """Refuse bytes that Python let pass as half characters: they have no tokens."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"the prompt is not UTF-8 (character {error.start}): convert it first") from error


def _has_template(model: Any) -> bool:
    return model.manifest["tokenizer"]["chat_template"] is not None


def _say(text: str) -> None:
    click.echo(text, err=True)
