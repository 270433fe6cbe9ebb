"""Make conformance bundles and their vectors: `python -m tests.conformance.make [GRID …]`, from the repository's root.

Writes tests/conformance/schema-N/GRID/ with `bundle` and `vectors.json`, where N is the manifest schema of today, and
touches no other schema: those folders are how old bundles stay readable. docs/bundle.md describes the vectors.

Nothing that a vector expects comes from the runtime. Logits are transformers' own, over the weights on their grid;
ids and chat texts are its tokenizer's; tokens are chosen by reference.py. Answers are kept only where noise as large
as the tolerance changes none of them, so that a runtime that rounds otherwise isn't held to luck.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe.artifacts import Context, TorchModel
from edgepipe.graph.reference import torch_logits
from edgepipe.pipeline import run
from edgepipe.recipe import resolve
from edgepipe.sources import open_model
from edgepipe.stages.quantize import Quantize
from tests.conformance.reference import Options, RandomNumbers, choose, kept_tokens
from tests.conformance.tiny import CONTEXT, LINES, TALK, save_trained_model
from tests.decoders import changed, gguf_blocks
from tests.listener import Silent

HERE = Path(__file__).resolve().parent
Settings = list[tuple[str, str, object]]
Logits = Callable[[list[int]], np.ndarray]  # ids [n] → logits [n, vocab] float32

# The grids, and how far logits may be off, in largest logits: float32 sums in another order, or keys of 11 bits.
GRIDS: dict[str, tuple[Settings, float]] = {
    "symmetric": ([("compile", "cache_dtype", "float32")], 1e-4),
    "zero-points": (
        [
            ("quantize", "symmetric", False),
            ("quantize", "embedding_bits", 4),
            ("quantize", "overrides", ["model.layers.0.*=8"]),
        ],
        3e-3,
    ),
    "minima": ([("quantize", "embedding_bits", 4)], 3e-3),
    "deflated": ([("compile", "cache_dtype", "float32"), ("compile", "deflate", "always")], 1e-4),
}
NOISES = 4  # times an answer is made again with noise on its logits
PROMPT = "The river carried the timber"
TEXTS = ["", PROMPT, "  two  spaces\n\tand a tab", "Björn and 王伟 — 🙂", "<|im_end|> said <s>", *LINES[:1]]
CHATS = [
    [{"role": "user", "content": TALK[0][0]}],
    [
        {"role": "system", "content": "Speak."},
        {"role": "user", "content": TALK[0][0]},
        {"role": "assistant", "content": TALK[0][1]},
        {"role": "user", "content": TALK[1][0]},
    ],
]
SAMPLINGS = [
    Options(),
    Options(repetition_penalty=2.0),
    Options(temperature=2.0),
    Options(temperature=3.0, top_k=5),
    Options(temperature=2.5, top_p=0.8),
    Options(temperature=2.5, top_k=40, top_p=0.9, repetition_penalty=1.5),
]
# Equal ones at every border; ids 2 and 7 were seen, one above zero and one below.
ROW = [0.5, 2.0, 3.0, 2.0, -1.0, 2.0, 0.5, -0.25, 1.0, -4.0]
SEEN = [7, 2, 2, 500]
FILTERS = [
    Options(),
    Options(repetition_penalty=2.0),
    Options(temperature=0.7),
    Options(temperature=1.0, top_k=2),
    Options(temperature=1.0, top_p=0.55),
    Options(temperature=1.0, top_p=1e-9),
    Options(temperature=2.0, top_k=6, top_p=0.9, repetition_penalty=1.5),
    Options(temperature=1e-30),
]


def main(names: list[str]) -> None:
    """Make the sets of the grids that are named, or of all."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = save_trained_model(Path(scratch) / "tiny-llama")
        for name in names or GRIDS:
            settings, tolerance = GRIDS[name]
            model = open_model(str(directory))
            if name == "minima":
                model = changed(model, lambda _name: lambda value: gguf_blocks(value, "Q4_1"))
            make_set(name, model, directory, settings, tolerance, Path(scratch) / name)


def make_set(
    name: str, model: TorchModel, directory: Path, settings: Settings, tolerance: float, scratch: Path
) -> None:
    """Write one bundle and its vectors."""
    scratch.mkdir()
    recipe_file = scratch / "recipe.toml"
    recipe_file.write_text('stages = ["quantize", "export", "compile"]\n', encoding="utf-8")
    recipe = resolve(target="cpu", file=recipe_file, settings=[("export", "context", CONTEXT), *settings])
    run(model, recipe, out=scratch / "bundle", runs=scratch / "runs", fresh=True, listener=Silent())
    manifest = json.loads((scratch / "bundle" / "manifest.json").read_text(encoding="utf-8"))
    (quantize,) = [stage for _, stage in recipe.stages if isinstance(stage, Quantize)]
    on_grid = quantize(model, Context(target=recipe.target, work_dir=scratch))

    def logits(ids: list[int]) -> np.ndarray:
        return torch_logits(on_grid, np.array([ids], np.int64))[0]

    home = HERE / f"schema-{manifest['schema']}" / name
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(scratch / "bundle", home / "bundle")
    lines = [
        f"{json.dumps(key)}: {as_lines(value)}"
        for key, value in vectors(directory, logits, manifest, tolerance).items()
    ]
    (home / "vectors.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def as_lines(value: Any) -> str:
    """Return JSON with a line for each entry of a list."""
    rows = value if isinstance(value, list) else None
    text = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows or [value]]
    return text[0] if rows is None else "[\n  " + ",\n  ".join(text) + "\n]"


def vectors(directory: Path, logits: Logits, manifest: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """Return all vectors of one bundle."""
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory)
    sequences = [tokenizer(text).input_ids[:count] for text, count in ((PROMPT, 8), ("Numbers such", 5), ("Who", 3))]
    expected = [logits(ids) for ids in sequences]
    largest = max(float(np.abs(row).max()) for row in expected)
    ends = manifest["model"]["eos_token_ids"]
    answer = answerer(logits, ends, tolerance * largest)
    return {
        "tolerance": tolerance * largest,
        "sequences": [
            {"ids": ids, "logits": base64.b64encode(values.astype("<f4").tobytes()).decode()}
            for ids, values in zip(sequences, expected, strict=True)
        ],
        "calls": _calls(sequences),
        "encode": [
            {
                "text": text,
                "ids": tokenizer(text).input_ids,
                "plain": tokenizer(text, add_special_tokens=False).input_ids,
            }
            for text in TEXTS
        ],
        "decode": [
            {"ids": ids, "text": tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)}
            for ids in (tokenizer(text).input_ids for text in TEXTS)
        ],
        "chat": [
            {
                "messages": messages,
                "text": tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
                "ids": tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"],
            }
            for messages in CHATS
        ],
        "random": [
            {"seed": seed, "numbers": [numbers.next() for _ in range(4)]}
            for seed in (0, 1, 42, 2**32 + 5, 2**130 + 3)
            for numbers in [RandomNumbers(seed)]
        ],
        "filters": [_filtered(options) for options in FILTERS],
        "answers": [{"prompt": PROMPT, **answer(tokenizer(PROMPT).input_ids, options, 8)} for options in SAMPLINGS],
        "stops": _stops(tokenizer, answer),
    }


def _calls(sequences: list[list[int]]) -> list[dict[str, Any]]:
    """Return runs of the graph over one cache each. `expect` says which logits: [sequence, position] per wanted one."""
    long, middle, _ = sequences
    width = len(long)
    padded = [ids + [0] * (width - len(ids)) for ids in sequences]
    ends = [len(ids) - 1 for ids in sequences]
    half = width // 2
    first = {"input_ids": [long], "past": [0], "lengths": [width], "wanted": [list(range(width))]}
    return [
        {"name": "a prompt at once", "steps": [{**first, "expect": [[[0, i] for i in range(width)]]}]},
        {"name": "a prompt in pieces", "steps": [_piece(long, 0, half), _piece(long, half, width)]},
        {
            "name": "token by token",
            "steps": [_piece(long, 0, 4), *(_piece(long, i, i + 1) for i in range(4, width))],
        },
        {
            "name": "a rewind, then another text",
            "steps": [_piece(long, 0, width), _piece(middle, 0, len(middle), sequence=1), _piece(long, 0, half)],
        },
        {"name": "a rewind to the middle", "steps": [_piece(long, 0, width), _piece(long, half, width)]},
        {
            "name": "a batch of ragged rows, then a token of every row",
            "steps": [
                {
                    "input_ids": [row[: width - 1] for row in padded],
                    "past": [0, 0, 0],
                    "lengths": [width - 1, ends[1], ends[2]],
                    "wanted": [[width - 2], [ends[1] - 1], [ends[2] - 1]],
                    "expect": [[[0, width - 2]], [[1, ends[1] - 1]], [[2, ends[2] - 1]]],
                },
                {
                    "input_ids": [[ids[-1]] for ids in sequences],
                    "past": [width - 1, ends[1], ends[2]],
                    "lengths": [1, 1, 1],
                    "wanted": [[0], [0], [0]],
                    "expect": [[[row, end]] for row, end in enumerate(ends)],
                },
            ],
        },
    ]


def _piece(ids: list[int], start: int, end: int, sequence: int = 0) -> dict[str, Any]:
    """Return one run of a part of a sequence in one row; the logits of its last token are wanted."""
    return {
        "input_ids": [ids[start:end]],
        "past": [start],
        "lengths": [end - start],
        "wanted": [[end - start - 1]],
        "expect": [[[sequence, end - 1]]],
    }


def _filtered(options: Options) -> dict[str, Any]:
    """Return what the filters leave of ROW, and twelve draws from it with one generator."""
    logits, numbers = np.array(ROW, np.float32), RandomNumbers(7)
    kept = {str(token): float(score) for token, score in kept_tokens(logits, SEEN, options).items()}
    drawn = [choose(logits, SEEN, options, numbers) for _ in range(12)]
    more = {"logits": ROW, "seen": SEEN, "kept": kept, "seed": 7, "drawn": drawn}
    return {"options": dataclasses.asdict(options), **more}


def answerer(logits: Logits, ends: list[int], noise: float) -> Callable[[list[int], Options, int], dict[str, Any]]:
    """Return a function that makes an answer with the first seed for which it isn't short and noise changes nothing."""

    def tokens(prompt: list[int], options: Options, seed: int, most: int, rough: np.random.Generator | None) -> Any:
        numbers, ids = RandomNumbers(seed), list(prompt)
        while len(ids) < len(prompt) + most:
            row = logits(ids)[-1]
            if rough is not None:
                row = (row + rough.uniform(-noise, noise, row.shape)).astype(np.float32)
            token = choose(row, ids, options, numbers)
            if token in ends:
                return ids[len(prompt) :], "stop"
            ids.append(token)
        return ids[len(prompt) :], "length"

    def answer(prompt: list[int], options: Options, most: int) -> dict[str, Any]:
        for seed in itertools.count():
            ids, reason = tokens(prompt, options, seed, most, None)
            again = (tokens(prompt, options, seed, most, np.random.default_rng(i)) for i in range(NOISES))
            if (not options.temperature or len(ids) > 3) and all(other == (ids, reason) for other in again):
                more = {"seed": seed, "max_new_tokens": most, "ids": ids, "finish_reason": reason}
                return {"prompt_ids": prompt, "options": dataclasses.asdict(options), **more}
            assert options.temperature, "the greedy answer hangs on noise: choose another prompt"
        raise AssertionError("unreachable")

    return answer


def _stops(tokenizer: Any, answer: Callable[[list[int], Options, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """Return greedy answers to PROMPT that end in each way: what is shown, and what was run."""
    found = []
    for stop, most in (
        ([], 40),
        ([], 3),
        (["the mill"], 40),
        (["ill", "own to"], 40),
        (["never"], 40),
        (["down t"], 3),
    ):
        whole = answer(tokenizer(PROMPT).input_ids, Options(), most)
        ids, reason = whole["ids"], whole["finish_reason"]
        text = _decoded(tokenizer, ids)
        for count in range(1, len(ids) + 1):
            so_far = _decoded(tokenizer, ids[:count])
            if places := [so_far.find(one) for one in stop if one in so_far]:
                ids, text, reason = ids[:count], so_far[: min(places)], "stop"
                break
        found.append({"prompt": PROMPT, "stop": stop, "max_new_tokens": most, "text": text, "finish_reason": reason})
        found[-1]["ids"] = ids
    return found


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


if __name__ == "__main__":
    main(sys.argv[1:])
