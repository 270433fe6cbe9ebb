"""Make the conformance bundle of a student and its vectors: `python -m tests.conformance.make_student`, from the root.

Writes tests/conformance/schema-N/student/ with `bundle` and `student.json`; docs/bundle.md describes them. The student
is trained for some seconds to answer. What a vector expects comes from torch, over the weights on their grid, and from
reference.py, never from the runtime.
"""

from __future__ import annotations

import base64
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgepipe.artifacts import Context
from edgepipe.pipeline import run
from edgepipe.recipe import resolve
from edgepipe.sources import open_model
from edgepipe.stages.quantize import Quantize
from edgepipe.students.config import StudentConfig, read_student, with_layers
from edgepipe.students.files import make_student, save_student
from edgepipe.students.models import EncoderDecoder
from edgepipe.students.reference import answered, filled_student
from tests.conformance.make import GRIDS, HERE, SAMPLINGS, answerer, as_lines
from tests.conformance.tiny import CONTEXT, LINES, TALK, VOCABULARY, save_tokenizer
from tests.listener import Silent

START, END = 0, 2  # <s>, <|im_end|>
STACK: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
CONFIG = StudentConfig(kind="encoder-decoder", encoder=STACK, decoder=with_layers(STACK, [0]))
PAIRS = (*TALK, *((line[: len(line) // 2], line[len(line) // 2 :]) for line in LINES))
_STEPS = 300


def main() -> None:
    """Train, compress, and write bundle and vectors."""
    settings, tolerance = GRIDS["symmetric"]
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        directory, tokenizer = save_trained_student(scratch / "tiny-student")
        recipe_file = scratch / "recipe.toml"
        recipe_file.write_text('stages = ["quantize", "export", "compile"]\n', encoding="utf-8")
        recipe = resolve(target="cpu", file=recipe_file, settings=[("export", "context", CONTEXT), *settings])
        model = open_model(str(directory))
        run(model, recipe, out=scratch / "bundle", runs=scratch / "runs", fresh=True, listener=Silent())
        (quantize,) = [stage for _, stage in recipe.stages if isinstance(stage, Quantize)]
        on_grid = quantize(model, Context(target=recipe.target, work_dir=scratch))
        student = filled_student(read_student(model.info.config), on_grid.weights, None)
        assert isinstance(student, EncoderDecoder)
        manifest = json.loads((scratch / "bundle" / "manifest.json").read_text(encoding="utf-8"))
        home = HERE / f"schema-{manifest['schema']}" / "student"
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(scratch / "bundle", home / "bundle")
        found = vectors(student, tokenizer, tolerance)
        lines = [f"{json.dumps(key)}: {as_lines(value)}" for key, value in found.items()]
        (home / "student.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def save_trained_student(path: Path) -> tuple[Path, Any]:
    """Write a student that answers PAIRS as a directory; return it and its tokenizer."""
    path.mkdir()
    tokenizer = save_tokenizer(path)
    torch.set_num_threads(1)  # sums in one order, however many cores there are
    student = make_student(CONFIG, seed=0)
    assert isinstance(student, EncoderDecoder)
    sources = [tokenizer.encode(source).ids for source, _ in PAIRS]
    targets = [[*tokenizer.encode(target, add_special_tokens=False).ids, END] for _, target in PAIRS]
    ids, mask = _padded(sources, 0), _padded([[1] * len(source) for source in sources], 0)
    wanted = _padded(targets, -100)
    given = _padded([[START, *target[:-1]] for target in targets], 0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        logits = student(ids, mask, given).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    special = {"decoder_start_token_id": START, "bos_token_id": START, "eos_token_id": END}
    save_student(student, path, {}, special)
    return path, tokenizer


def _padded(rows: list[list[int]], filler: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def vectors(student: EncoderDecoder, tokenizer: Any, tolerance: float) -> dict[str, Any]:
    """Return all vectors."""
    sources = [tokenizer.encode(source).ids for source, _ in PAIRS[:3]]
    targets = [[START, *tokenizer.encode(target, add_special_tokens=False).ids][:6] for _, target in PAIRS[:3]]
    expected = [_logits(student, source, target) for source, target in zip(sources, targets, strict=True)]
    noise = tolerance * max(float(np.abs(logits).max()) for logits in expected)
    answers = []
    for text, _ in PAIRS[:2]:
        source = tokenizer.encode(text).ids
        answer = answerer(lambda ids, source=source: _logits(student, source, ids), [END], noise)  # type: ignore[misc]
        for options in SAMPLINGS:
            found = answer([START], options, 16)
            del found["prompt_ids"]
            answers.append({"prompt": text, "source_ids": source, **found})
    tokens = [5, 40, 99, 200]
    return {
        "tolerance": noise,
        "sequences": [
            {"source": source, "ids": ids, "logits": base64.b64encode(logits.astype("<f4").tobytes()).decode()}
            for source, ids, logits in zip(sources, targets, expected, strict=True)
        ],
        "answers": answers,
        "scores": [
            {"prompt": text, "tokens": tokens, "logprobs": _among(logits[0], tokens)}
            for (text, _), logits in zip(PAIRS, expected, strict=False)
        ],
    }


def _logits(student: EncoderDecoder, source: list[int], ids: list[int]) -> np.ndarray:
    """Return torch's logits [n, vocab] of an answer's ids."""
    given = np.array([source])
    return answered(student, given, np.ones_like(given), np.array([ids])).logits[0]


def _among(logits: np.ndarray, tokens: list[int]) -> list[float]:
    total = math.log(sum(math.exp(float(logits[token])) for token in tokens))
    return [float(logits[token]) - total for token in tokens]


if __name__ == "__main__":
    main()
