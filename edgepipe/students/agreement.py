"""Hold a student's graphs against its torch module on seeded inputs: padded sources, with a cache and without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from edgepipe.artifacts import OnnxModel
from edgepipe.graph.evaluate import evaluate, logits_in_pieces
from edgepipe.graph.parts import padding
from edgepipe.runtime.exits import PART
from edgepipe.students.config import StudentConfig
from edgepipe.students.models import Encoder, EncoderDecoder
from edgepipe.students.reference import answered, encoded, encoded_at_exits, filled_student

_ROWS = 2
_STEPS = 4  # tokens that are decoded one by one
_SCORED = 5  # tokens of the vocabulary that the scorer is asked for

Compared = tuple[str, np.ndarray, np.ndarray]  # what, the graph's, torch's


def disagreements(config: StudentConfig, model: OnnxModel, tokens: int, seed: int) -> Iterator[Compared]:
    """Yield every output of a student's graphs beside torch's, for texts and answers of `tokens` tokens."""
    rng = np.random.default_rng(seed)
    student = filled_student(config, model.weights, None)
    vocab = model.spec["vocab_size"]
    source = {
        "input_ids": rng.integers(0, vocab, (_ROWS, tokens), dtype=np.int64),
        "attention_mask": padding([_ROWS, tokens]),
    }
    ids, mask = source.values()
    if not isinstance(student, EncoderDecoder):
        ((name, got),) = evaluate(model.graphs["model"], model.weights, source).items()
        yield f"model, {name}", got, encoded(student, ids, mask)
        if config.exits:
            yield from _at_exits(student, model, source)
        return
    target = rng.integers(0, vocab, (_ROWS, tokens), dtype=np.int64)
    expected = answered(student, ids, mask, target)
    crossed = evaluate(model.graphs["encoder"], model.weights, source)
    for name, value in expected.crossed.items():
        yield f"encoder, {name}", crossed[name], value
    steps = min(_STEPS, tokens - 1)
    pieces = [tokens - steps, *[1] * steps]
    yield "decoder with a cache", logits_in_pieces(model, target, pieces, source), expected.logits
    asked = rng.integers(0, vocab, _SCORED, dtype=np.int64)
    for length in sorted({1, tokens}):
        feeds = {"input_ids": target[:, :length], "token_ids": asked, "encoder_attention_mask": mask, **crossed}
        got = evaluate(model.graphs["scorer"], model.weights, feeds)["logits"]
        yield f"scorer after {length} tokens", got, expected.logits[:, length - 1, asked]


def _at_exits(student: Encoder, model: OnnxModel, source: Mapping[str, np.ndarray]) -> Iterator[Compared]:
    """Yield what the parts between an encoder's exits give beside torch's, each fed by the one before it."""
    ids, mask = source["input_ids"], source["attention_mask"]
    feeds = dict(source)
    for number, (answer, gate) in enumerate(encoded_at_exits(student, ids, mask)):
        got = evaluate(model.graphs[f"{PART}{number}"], model.weights, feeds)
        yield f"after {student.config.depths[number]} layers", next(iter(got.values())), answer
        if gate is not None:
            # Beside 1: log odds of an untrained gate are 0, and those of a trained one are compared with numbers
            yield (
                f"the gate after {student.config.depths[number]} layers",
                np.append(got["gate"], 1),
                np.append(gate, 1),
            )
            feeds = {"states": got["next_states"], "attention_mask": mask}
