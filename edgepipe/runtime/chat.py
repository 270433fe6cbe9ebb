"""Render chat messages into one text with the model's own Jinja template, as transformers does.

A template comes with the model, so it is not trusted: it runs in Jinja's immutable sandbox, sees plain JSON values
only, and works against a budget of loop rounds, macro calls and characters. The budget stops templates that run away;
it is no wall against one written to eat memory in a single expression. Open bundles from people you trust.
Source: transformers `utils/chat_template_utils.py` (environment, globals, filters, `None` fields dropped).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.parser
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from edgepipe.errors import ConfigError

_MOST_ROUNDS = 50_000  # loop rounds and macro calls of one rendering: about half a second of Python
_MOST_CHARACTERS = 4_000_000  # of the result and of any value kept in a variable: a million tokens, more than contexts
_MOST_EXPONENT = 64  # templates count; they do not compute powers


class ChatTemplate:
    """Hold one compiled template; safe for use from several threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str | None]) -> None:
        """Compile `source`; `special_tokens` maps bos_token, eos_token … to their text. Raises ConfigError."""
        self._special_tokens = {name: text for name, text in special_tokens.items() if text is not None}
        self._environment = _environment()
        try:
            self._template = self._environment.from_string(source)
        except (TemplateError, RecursionError, ValueError) as error:
            raise ConfigError(f"the bundle's chat template does not compile: {_one_line(error)}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """Return the text of `messages`, each with a role and a content, ending where the assistant's turn begins.

        Raises ConfigError when a message is malformed, or the template refuses them, fails or runs away.
        """
        values: dict[str, Any] = {
            "messages": _checked_messages(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._special_tokens,
        }
        self._environment.start_budget()
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(values):
                size += len(piece)
                if size > _MOST_CHARACTERS:
                    raise SecurityError(f"it wrote more than {_MOST_CHARACTERS} characters")
                pieces.append(piece)
        # A template can fail with any error of the Python under it: all of them are the template's.
        except Exception as error:
            raise ConfigError(f"the bundle's chat template refused these messages: {_one_line(error)}") from error
        return "".join(pieces)


def _checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages as plain JSON values without their None fields; raise ConfigError when one is malformed."""
    if len(messages) == 0:
        raise ConfigError("a chat needs at least one message, but the list is empty")
    plain: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ConfigError(
                f"message {number} must be a dict with a role and a content, but is {type(message).__name__}"
            )
        if not isinstance(message.get("role"), str):
            raise ConfigError(f"message {number} must have a role (user, assistant, system), but has none")
        if "content" not in message:
            raise ConfigError(f"message {number} must have a content, but has none")
        try:
            copy = json.loads(json.dumps({key: value for key, value in message.items() if value is not None}))
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"message {number} must hold text, numbers, lists and dicts only: {error}") from None
        plain.append(copy)
    return plain


def _one_line(error: BaseException) -> str:
    """Return the text of an error on one line of at most 300 characters, or its class when it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with a budget: every loop round, macro call and kept value is counted."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols])
        self._budget = threading.local()  # renderings in other threads have their own

    def start_budget(self) -> None:
        """Give the rendering that begins in this thread its full budget."""
        self._budget.rounds = _MOST_ROUNDS

    def spend_round(self) -> str:
        """Count one loop round or macro call; raise SecurityError when the budget is spent."""
        self._budget.rounds -= 1
        if self._budget.rounds < 0:
            raise SecurityError(f"it ran more than {_MOST_ROUNDS} loop rounds")
        return ""

    def weigh(self, value: Any) -> Any:
        """Return value; raise SecurityError when it is a text or list too large to be a chat's."""
        if isinstance(value, str | list | tuple) and len(value) > _MOST_CHARACTERS:
            raise SecurityError(f"it made a value of more than {_MOST_CHARACTERS} characters")
        return value

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parse, then plant the counters: calls through the environment, which a template cannot rename."""
        tree = super()._parse(source, name, filename)
        for block in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            assert isinstance(block, nodes.For | nodes.Macro | nodes.CallBlock)  # for the type checker
            block.body.insert(0, nodes.ExprStmt(_environment_call("spend_round", []), lineno=block.lineno))
        for assignment in tree.find_all(nodes.Assign):
            assignment.node = _environment_call("weigh", [assignment.node])
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator, refusing the ones that make huge values out of small ones."""
        if operator == "*":
            for sized, times in ((left, right), (right, left)):
                repeats = isinstance(sized, str | list | tuple) and isinstance(times, int)
                if repeats and len(sized) * times > _MOST_CHARACTERS:
                    raise SecurityError(f"it repeated a value beyond {_MOST_CHARACTERS} characters")
        if operator == "**" and not (isinstance(right, int | float) and abs(right) <= _MOST_EXPONENT):
            raise SecurityError(f"it raised to a power above {_MOST_EXPONENT}")
        if operator == "%" and isinstance(left, str) and any(letter.isdigit() or letter == "*" for letter in left):
            raise SecurityError("it formatted text with a width")  # '%1000000000d' is a gigabyte
        return self.weigh(super().call_binop(context, operator, left, right))


def _environment_call(method: str, arguments: list[Any]) -> nodes.Call:
    """Return the node that calls one of the environment's own methods."""
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)


class _GenerationTag(jinja2.ext.Extension):
    """Accept `{% generation %}` … `{% endgeneration %}`, which marks what the assistant said, and render its body."""

    tags = {"generation"}  # noqa: RUF012  # declared without ClassVar by Jinja, which mypy holds us to

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        """Return the body in a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _PlainNamespace(Namespace):
    """Reject underscore names, which could reach the Python below."""

    def __init__(self, /, *pairs: Any, **names: Any) -> None:  # a template names what it likes: namespace(found=false)
        attributes = dict(*pairs, **names)
        for name in attributes:
            _PlainNamespace._check(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _PlainNamespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")


def _environment() -> _Environment:
    """Return the environment transformers gives its templates, with a budget."""
    environment = _Environment()
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _now_as
    environment.globals["namespace"] = _PlainNamespace
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> str:
    """Let a template refuse its messages."""
    raise TemplateError(message)


def _now_as(pattern: str) -> str:
    """Return the local time in the given strftime pattern."""
    return datetime.now().strftime(pattern)
