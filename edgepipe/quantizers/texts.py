"""Calibration texts as batches of token ids: what every method that looks at data looks at, made in this one place.

    a name      a calibration set that comes with edgepipe
    a file      the user's: passages of a text, cells of a table, strings of a .jsonl
    "self"      a decoder writes the texts, sampling from its first token on, seeded

A decoder gets rows that are full: texts one after another with an end token between them, cut every `tokens` ids. Other
models get a text a row, cut at `tokens`, rows of like length together and padded on the right. An encoder-decoder gets
its own likeliest answers as its decoder's input, so that cross-attention is seen over real decoding steps.
Which texts are taken, and in which order, is a function of the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tokenizers

from edgepipe.artifacts import Json, ModelInfo, TorchModel
from edgepipe.calibration import list_sets, open_text, passages
from edgepipe.errors import ConfigError, StageError
from edgepipe.graph.parts import positions_of
from edgepipe.graph.reference import framework_config
from edgepipe.rows import Data, open_data, read_text, read_texts
from edgepipe.students.config import is_student, read_student

DEFAULT_SET = "everyday"
SELF = "self"
ANSWER_TOKENS = 32  # of an encoder-decoder's answers: cross-attention settles within its first steps
_TABLES = (".tsv", ".csv", ".jsonl")
_SHORTEST_SHARED = 40  # characters of an evaluation passage that can't stand in another text by chance


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Say which texts a method looks at, and how much of them."""

    source: str = ""  # a set's name, a file, or "self"; empty: DEFAULT_SET
    samples: int = 128  # rows at most
    tokens: int = 128  # of a row at most
    rows: int = 8  # of a batch

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        for name, least in (("samples", 1), ("tokens", 8), ("rows", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"calibration {name}: expected at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Hold some rows of ids."""

    input_ids: np.ndarray  # [rows, tokens] int64, padded on the right
    attention_mask: np.ndarray  # [rows, tokens] int64, 0 at padding
    decoder_input_ids: np.ndarray | None = None  # [rows, steps] int64, of an encoder-decoder
    decoder_mask: np.ndarray | None = None  # [rows, steps] int64, 0 after the end of an answer

    @property
    def tokens(self) -> int:
        """Return the tokens that aren't padding, those of answers left out."""
        return int(self.attention_mask.sum())


def check_calibration(model: ModelInfo, calibration: Calibration) -> None:
    """Refuse, before any work, what `batches` would refuse."""
    if model.preprocessor is not None or "tokenizer.json" not in model.tokenizer:
        raise ConfigError(
            f"calibration: expected a model of texts with a tokenizer, but {model.name} is none (task {model.task}): "
            "take a method that needs no data"
        )
    if calibration.source == SELF and model.task != "text-generation":
        raise ConfigError(
            f'calibration "self": expected a decoder, which can write texts, but {model.name} is for {model.task}: '
            "name a set or a file"
        )
    fingerprint(calibration)


def fingerprint(calibration: Calibration) -> Json:
    """Return what identifies the texts beside the options: the hash of a set or file; "self" has the model's."""
    return {} if calibration.source == SELF else {"sha256": _read(calibration).sha256}


def texts_of(calibration: Calibration) -> list[str]:
    """Return the texts of a set or a file; ConfigError when it is for evaluation, or holds a passage of that."""
    data = _read(calibration)
    if data.suffix in _TABLES:
        cells = read_texts(data)
        texts = [cell for cell in cells if " " in cell.strip()] or cells  # neither labels nor scores
    else:
        found = passages(read_text(data))
        texts = list(found) if len(found) > 1 else [line for line in read_text(data).splitlines() if line.strip()]
    _refuse_evaluation(data.name, texts)
    return list(dict.fromkeys(texts))


def batches(
    model: TorchModel,
    calibration: Calibration,
    *,
    seed: int = 0,
    module: Any = None,
    progress: Callable[[str, int, int], None] = lambda _what, _done, _total: None,
) -> list[Batch]:
    """Return the batches of ids that a calibration gives a model, always the same for the same seed.

    `module` is the model's torch module where the caller has it (modules.module_of); it writes the texts of "self" and
    an encoder-decoder's answers, and is made when it is needed and not given. Raises ConfigError: no tokenizer, an
    unknown set, evaluation data, a model that can't write.
    """
    check_calibration(model.info, calibration)
    if calibration.source == SELF:
        length = _length(model.info, calibration)
        rows = _full(_written(model, _module(model, module), calibration, length, seed, progress), calibration, length)
    else:
        rows = rows_of(model.info, calibration, seed=seed)
    step = calibration.rows
    padding = padding_of(model.info)
    found = [_padded(rows[first : first + step], padding) for first in range(0, len(rows), step)]
    if model.info.task == "text2text-generation":
        return _answered(model, _module(model, module), found, progress)
    return found


def rows_of(info: ModelInfo, calibration: Calibration, *, seed: int = 0) -> list[list[int]]:
    """Return the rows of ids that a set or a file gives a model, short ones first; ConfigError when there are none."""
    length = _length(info, calibration)
    texts = texts_of(calibration)
    order = np.random.default_rng(seed).permutation(len(texts))
    decodes = info.task == "text-generation"
    ids = _encoded(info, [texts[i] for i in order], None if decodes else length)
    ends = info.eos_token_ids[:1]
    rows = _full([[*one, *ends] for one in ids], calibration, length) if decodes else ids[: calibration.samples]
    rows = sorted((row for row in rows if row), key=len)  # a stable sort: the order stays the seed's
    if not rows:
        raise ConfigError(f"{calibration.source or DEFAULT_SET} gives {info.name} no tokens: name other texts")
    return rows


def _length(info: ModelInfo, calibration: Calibration) -> int:
    return min(calibration.tokens, longest_of(info) or calibration.tokens)


def _read(calibration: Calibration) -> Data:
    return open_data(calibration.source or DEFAULT_SET, "calibration")


def _refuse_evaluation(name: str, texts: Sequence[str]) -> None:
    """Raise ConfigError when a passage of a shipped evaluation set stands in some texts, line ends aside."""
    whole = "\n".join(" ".join(text.split()) for text in texts)
    for record in list_sets():
        if record.purpose == "evaluation":
            for passage in passages(open_text(record.name)):
                flat = " ".join(passage.split())
                if len(flat) >= _SHORTEST_SHARED and flat in whole:
                    raise ConfigError(
                        f"{name} holds a passage of the evaluation set {record.name} ({flat[:40]!r} …), and a "
                        "score on it would flatter the model: leave it out"
                    )


def _encoded(info: ModelInfo, texts: Sequence[str], longest: int | None) -> list[list[int]]:
    """Return the ids of each text with the special tokens a model is used to, cut at `longest` if it is given."""
    tokenizer = tokenizers.Tokenizer.from_buffer(info.tokenizer["tokenizer.json"])
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if longest is not None:
        tokenizer.enable_truncation(longest)
    return [row.ids for row in tokenizer.encode_batch(list(texts))]


def _full(texts: Sequence[Sequence[int]], calibration: Calibration, length: int) -> list[list[int]]:
    """Return rows of `length` ids cut from texts put one after another; a rest that is no whole row counts if alone."""
    rows: list[list[int]] = []
    row: list[int] = []
    for text in texts:
        for token in text:
            row.append(token)
            if len(row) == length:
                rows.append(row)
                row = []
                if len(rows) == calibration.samples:
                    return rows
    return rows or [row]


def _padded(rows: Sequence[Sequence[int]], padding: int) -> Batch:
    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), padding, np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return Batch(input_ids=ids, attention_mask=mask)


def padding_of(info: ModelInfo) -> int:
    """Return the id that fills rows up: some families count positions by it."""
    value = info.config.get("pad_token_id")
    return value if type(value) is int and value >= 0 else 0


def longest_of(info: ModelInfo) -> int | None:
    """Return the most tokens a text may have, if the model has a limit."""
    said = (info.sentence or {}).get("max_tokens")
    if is_student(info.config):
        limit: int | None = read_student(info.config).encoder_shape().context
    else:
        limit = positions_of(framework_config(info.config))
    return min((one for one in (said, limit) if one), default=None)


def _module(model: TorchModel, module: Any) -> Any:
    if module is not None:
        return module
    from edgepipe.quantizers.modules import module_of  # loads torch

    return module_of(model)


def _written(
    model: TorchModel,
    module: Any,
    calibration: Calibration,
    length: int,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> list[list[int]]:
    """Return texts that a decoder writes, with the token they begin with, until they fill the rows asked for."""
    import torch

    from edgepipe.training.texts import WriteOptions, generate

    info = model.info
    start = min(info.eos_token_ids) if info.bos_token_id is None else info.bos_token_id
    options = WriteOptions(tokens=length, temperature=1.0)
    found: list[list[int]] = []
    wanted = calibration.samples * length
    count = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while count < wanted:
            prompts = [np.array([start], np.int32)] * calibration.rows
            texts = generate(module, prompts, sorted(info.eos_token_ids), options)
            if not any(texts):
                raise StageError(f"{info.name} wrote no calibration texts: its first token is always an end")
            for text in texts:
                found.append([start, *text])
                count += len(text) + 1
            progress("the model writes its calibration texts", min(count, wanted), wanted)
    return found


def _answered(
    model: TorchModel, module: Any, found: Sequence[Batch], progress: Callable[[str, int, int], None]
) -> list[Batch]:
    """Return batches with the decoder's input: the model's own answers."""
    from edgepipe.quantizers.modules import answers

    start = model.info.config.get("decoder_start_token_id")
    if type(start) is not int:
        raise ConfigError("config.json has no decoder_start_token_id, which every answer begins with")
    answered = []
    for number, batch in enumerate(found):
        progress("the model answers its calibration texts", number, len(found))
        ends = frozenset(model.info.eos_token_ids)
        answered.append(_told_apart(answers(module, batch, start=start, ends=ends, tokens=ANSWER_TOKENS)))
    return answered


def _told_apart(batch: Batch) -> Batch:
    """Return a batch whose answers have another length than its sources: a mask is found by the shape of a state."""
    ids, mask = batch.decoder_input_ids, batch.decoder_mask
    assert ids is not None
    assert mask is not None
    if ids.shape != batch.input_ids.shape:
        return batch
    return replace(batch, decoder_input_ids=np.pad(ids, ((0, 0), (0, 1))), decoder_mask=np.pad(mask, ((0, 0), (0, 1))))
