"""Embed a bundle in an app: a chat that streams, and several callers at once. Needs the base install only.

python examples/chat.py BUNDLE                        talk to the model
python examples/chat.py BUNDLE "First?" "Second?"     answer the questions at the same time, each in its own thread
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

from edgepipe.errors import EdgepipeError
from edgepipe.runtime import Generation, Message, Model, load

MAX_NEW_TOKENS = 64
CALLERS = 4  # calls that run at a time; each one holds a key/value cache of model.cache_bytes


def answer(model: Model, question: str) -> Generation:
    """Answer one question; safe to call from several threads."""
    return model.generate([{"role": "user", "content": question}], max_new_tokens=MAX_NEW_TOKENS)


def answer_all(model: Model, questions: list[str]) -> list[Generation]:
    """Answer questions at the same time, in the order they were asked."""
    with ThreadPoolExecutor(CALLERS) as threads:
        return list(threads.map(lambda question: answer(model, question), questions))


def talk(model: Model) -> None:
    """Chat until the input ends. The cache keeps the conversation: each turn runs only what is new."""
    messages: list[Message] = []
    for line in sys.stdin:
        messages.append({"role": "user", "content": line.strip()})
        pieces = []
        for piece in model.generate(messages, max_new_tokens=MAX_NEW_TOKENS, stream=True):
            pieces.append(piece)
            print(piece, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": "".join(pieces)})


def main(arguments: list[str]) -> None:
    """Load the bundle named first; answer the questions that follow, or chat."""
    if not arguments:
        sys.exit("give the directory of a bundle: python examples/chat.py BUNDLE [QUESTION …]")
    try:
        model = load(arguments[0], callers=CALLERS)
        questions = arguments[1:]
        if not questions:
            talk(model)
        for question, generation in zip(questions, answer_all(model, questions), strict=True):
            print(f"{question}\n  {generation.text.strip()}")
    except EdgepipeError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main(sys.argv[1:])
