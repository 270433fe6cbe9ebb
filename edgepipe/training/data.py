"""Read what a model is trained with, and keep part of it aside.

    source-target   .jsonl with source and target, a table whose header has them (or E2E's mr and ref …)
    pairs           first and second, a score where the file has one
    labels          text and label
    text            a text column, or a plain text file: passages between blank lines
    datasets        a directory that `datasets` saved (save_to_disk), with columns of one of these names

`read_data` finds the form by the names, or takes `columns` ("first=5,second=6,score=4"). `hold_out` splits by group: no
source, and no text of a pair, is in both parts. What is wrong is a ConfigError that names file and line.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from edgepipe.errors import ConfigError, TargetError
from edgepipe.rows import Columns, Data, first_names, open_data, parse_columns, read_text, rows

Form = Literal["source-target", "pairs", "labels", "text"]
_TEXT = ("text", "sentence")
# The parts of each form with the names they go by; the first form that fits is the file's.
_PARTS: Mapping[Form, Mapping[str, tuple[str, ...]]] = {
    "source-target": {
        "source": ("source", "input", "mr", "question", "prompt"),
        "target": ("target", "output", "ref", "reference", "answer"),
    },
    "pairs": {"first": ("first", "sentence1"), "second": ("second", "sentence2")},
    "labels": {"text": _TEXT, "label": ("label",)},
    "text": {"text": _TEXT},
}
_SCORE = "score"  # the one part that may be missing, of pairs
_TABLES = (".tsv", ".csv", ".jsonl")


@dataclass(frozen=True, slots=True)
class Record:
    """Hold one example as the file writes it."""

    first: str  # the source, the text, or the first of a pair
    second: str  # the target, or the second of a pair; empty otherwise
    value: str  # the label, or a pair's score; empty without one
    place: str  # file and line, for messages


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """Hold all examples of one file."""

    name: str
    form: Form
    records: tuple[Record, ...]
    sha256: str  # of the contents


def read_data(given: str, *, form: Form | None = None, columns: str = "", option: str = "--columns") -> TrainingData:
    """Read a file, a shipped text that isn't for evaluation, or a directory of `datasets`.

    `form` is the one that is needed; None: what the names say. `option` is what `columns` is called to the user.
    Raises ConfigError, naming file and line, TargetError when the package `datasets` is missing.
    """
    asked = parse_columns(option, columns)
    if Path(given).is_dir():
        return _read_directory(given, form, asked, option)
    data = open_data(given, "training")
    if data.suffix not in _TABLES:
        if form not in (None, "text"):
            raise ConfigError(f"{given}: expected {_wanted(form)}, but it is plain text: give .jsonl, .csv or .tsv")
        return TrainingData(name=given, form="text", records=tuple(_passages(data)), sha256=data.sha256)
    found, places = _choose(given, first_names(data), form, asked, option)
    records = tuple(_record(found, parts, place) for place, parts in rows(data, Columns(places=places, option=option)))
    return TrainingData(name=given, form=found, records=records, sha256=data.sha256)


def _wanted(form: Form | None) -> str:
    forms = get_args(Form) if form is None else (form,)
    return " or ".join(" and ".join(_PARTS[one]) for one in forms)


def _choose(
    name: str, names: Sequence[str], form: Form | None, asked: Mapping[str, str], option: str
) -> tuple[Form, dict[str, str]]:
    """Return the form of a file with columns or keys of these names, and where its parts stand."""
    lower = {one.lower(): one for one in reversed(names)}
    missing: tuple[str, ...] = ()
    for one in get_args(Form) if form is None else (form,):
        parts = _PARTS[one]
        if set(asked) - {*parts, _SCORE} or (asked and form is None and not set(parts) <= set(asked)):
            continue
        places = {p: asked.get(p) or next((lower[w] for w in words if w in lower), "") for p, words in parts.items()}
        missing = tuple(part for part, place in places.items() if not place)
        if not missing:
            if one == "pairs" and (_SCORE in asked or _SCORE in lower):
                places[_SCORE] = asked.get(_SCORE) or lower[_SCORE]
            return one, places
    lacking = f", without {missing[0]}" if form is not None and missing else ""
    raise ConfigError(
        f"{name}, line 1: expected {_wanted(form)}, but it has {', '.join(names) or 'no names'}{lacking}: name the "
        f"columns with {option}, as in source=0,target=1"
    )


def _record(form: Form, parts: Mapping[str, Any], place: str) -> Record:
    """Make a record of a row's parts, all texts."""
    first, second = parts.get("source") or parts.get("first") or parts["text"], ""
    value = parts.get("label", parts.get(_SCORE, ""))
    if form in ("source-target", "pairs"):
        second = parts["target" if form == "source-target" else "second"]
    if form == "pairs" and value:
        try:
            known = math.isfinite(float(value))
        except ValueError:
            known = False
        if not known:
            raise ConfigError(f"{place}: expected a score, a number, but it holds {value[:60]!r}: correct it")
    return Record(first, second, value, place)


def _passages(data: Data) -> Iterator[Record]:
    """Yield the passages of a plain text, with the line each begins at."""
    held: list[str] = []
    start = 1
    for number, line in enumerate([*read_text(data).split("\n"), ""], start=1):
        if line.strip():
            start = number if not held else start
            held.append(line.rstrip("\r"))
        elif held:
            yield Record("\n".join(held).strip(), "", "", f"{data.name}, line {start}")
            held = []


def _read_directory(given: str, form: Form | None, asked: Mapping[str, str], option: str) -> TrainingData:
    """Read what `datasets` saved: a Dataset, or the split `train` of a DatasetDict."""
    try:
        import datasets
    except ImportError:
        raise TargetError(
            f"{given} is a directory, which the package datasets reads: install edgepipe[train]"
        ) from None
    try:
        loaded = datasets.load_from_disk(given)
    except (FileNotFoundError, OSError, ValueError) as error:
        raise ConfigError(f"{given} is no directory that datasets saved: {str(error).splitlines()[0]}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise ConfigError(f"{given}: expected a split 'train', but it has {', '.join(loaded)}: name it so")
        loaded = loaded["train"]
    found, places = _choose(given, loaded.column_names, form, asked, option)
    records, digest = [], hashlib.sha256()
    for number, row in enumerate(loaded):
        place = f"{given}, row {number}"
        parts = {part: row.get(column) for part, column in places.items()}
        parts = {part: str(cell) if isinstance(cell, int | float) else cell for part, cell in parts.items()}
        for part, cell in parts.items():
            if not isinstance(cell, str) or not cell.strip():
                raise ConfigError(f"{place}: expected a text in column {places[part]} ({part}), but it holds {cell!r}")
            digest.update(f"{part}\0{cell}\0".encode())
        records.append(_record(found, parts, place))
    if not records:
        raise ConfigError(f"{given} holds no examples: give a directory with some")
    return TrainingData(name=given, form=found, records=tuple(records), sha256=digest.hexdigest())


def hold_out(data: TrainingData, share: float, seed: int) -> tuple[TrainingData, TrainingData]:
    """Split examples into those to train with and those to evaluate on, at least `share` of them, in (0, 1).

    Records that share a source, or a text of a pair, stay together. Raises ConfigError when there is one group only.
    """
    groups = _groups(data)
    order = sorted(groups, key=lambda members: data.records[members[0]].first)
    random.Random(f"hold out {seed}").shuffle(order)
    chosen: set[int] = set()
    for members in order[:-1]:
        if len(chosen) >= share * len(data.records):
            break
        chosen.update(members)
    if not chosen:
        raise ConfigError(
            f"{data.name} has one group of examples with the same text, and none could be held out: give more data"
        )
    parts = ([r for i, r in enumerate(data.records) if (i in chosen) == held] for held in (False, True))
    kept, held = (TrainingData(name=data.name, form=data.form, records=tuple(p), sha256=data.sha256) for p in parts)
    return kept, held


def _groups(data: TrainingData) -> list[list[int]]:
    """Return the indices of records that are joined by a common text; the target of a source is none."""
    leader: dict[str, str] = {}

    def find(text: str) -> str:
        while leader.setdefault(text, text) != text:
            leader[text] = leader[leader[text]]
            text = leader[text]
        return text

    if data.form == "pairs":
        for record in data.records:
            leader[find(record.second.strip())] = find(record.first.strip())
    groups: dict[str, list[int]] = {}
    for i, record in enumerate(data.records):
        groups.setdefault(find(record.first.strip()), []).append(i)
    return list(groups.values())


def check_vocabularies(teacher: Mapping[str, bytes], student: Mapping[str, bytes], names: tuple[str, str]) -> None:
    """Refuse a teacher and a student whose tokenizer.json give the ids they share to different tokens.

    One may have more tokens than the other: logits are cut to the smaller vocabulary. Raises ConfigError.
    """
    import tokenizers

    tables = []
    for files in (teacher, student):
        found = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"]).get_vocab(with_added_tokens=True)
        tables.append({number: token for token, number in found.items()})
    for number in range(min(max(table) for table in tables) + 1):
        one, other = (table.get(number) for table in tables)
        if one != other:
            raise ConfigError(
                f"{names[0]}/tokenizer.json and {names[1]}/tokenizer.json disagree about id {number}, which is {one!r} "
                f"and {other!r}: a student is trained with its teacher's tokenizer"
            )
