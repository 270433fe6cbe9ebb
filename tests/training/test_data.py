"""Training data: every form by its names, refusals by file and line, parts that share no text."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from edgepipe.errors import ConfigError
from edgepipe.training.batches import Limits, Special, seq2seq
from edgepipe.training.data import Form, Record, TrainingData, check_vocabularies, hold_out, read_data
from tests.tiny_models import save_tiny_tokenizer

DATA = Path(os.environ.get("EDGEPIPE_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
SPECIAL = Special(start=0, eos=1, pad=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of a small tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(folder, 384)
    return {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}


def write(folder: Path, name: str, content: str | bytes) -> str:
    """Write a file and return its path."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def lines(*records: Any) -> str:
    """Return records as JSONL."""
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(
    ("name", "content", "form", "first"),
    [
        ("a.jsonl", lines({"source": "s", "target": "t"}), "source-target", ("s", "t", "")),
        ("a.jsonl", lines({"question": "s", "answer": "t", "more": 1}), "source-target", ("s", "t", "")),
        ("a.csv", 'mr,ref\n"name[A], food[B]","A, with B."\n', "source-target", ("name[A], food[B]", "A, with B.", "")),
        ("a.jsonl", lines({"first": "a", "second": "b", "score": 2.5}), "pairs", ("a", "b", "2.5")),
        ("a.tsv", "sentence1\tsentence2\na\tb\n", "pairs", ("a", "b", "")),
        ("a.jsonl", lines({"text": "a", "label": 1}), "labels", ("a", "", "1")),
        ("a.tsv", "sentence\tlabel\na\t1\n", "labels", ("a", "", "1")),
        ("a.jsonl", lines({"text": "a"}), "text", ("a", "", "")),
        ("a.txt", "one\ntwo\n\n \nthree\n", "text", ("one\ntwo", "", "")),
        ("a.md", "\ufeffone", "text", ("one", "", "")),
    ],
)
def test_forms(name: str, content: str, form: Form, first: tuple[str, str, str], tmp_path: Path) -> None:
    """A file's form is what its names say."""
    data = read_data(write(tmp_path, name, content))
    assert data.form == form
    assert (data.records[0].first, data.records[0].second, data.records[0].value) == first
    assert len(data.sha256) == 64


def test_columns_by_number(tmp_path: Path) -> None:
    """A table without a header is read by numbers; STS-B's pairs with their scores."""
    name = write(tmp_path, "a.tsv", "g\tf\ty\t1\t4.5\tone\ttwo\n")
    data = read_data(name, columns="first=5,second=6,score=4")
    assert data.form == "pairs"
    assert data.records == (Record("one", "two", "4.5", f"{name}, line 1"),)
    assert read_data(name, columns="text=5", form="text").records[0].first == "one"


def test_lines_of_passages(tmp_path: Path) -> None:
    """A passage is named by the line it begins at."""
    data = read_data(write(tmp_path, "a.txt", "\n\none\ntwo\n\nthree"))
    assert [r.place.rpartition(", ")[2] for r in data.records] == ["line 3", "line 6"]


@pytest.mark.parametrize(
    ("name", "content", "form", "sentence"),
    [
        ("a.jsonl", lines({"source": "s", "target": "t"}, {"source": "s"}), None, r"line 2: expected the key 'target'"),
        ("a.jsonl", lines({"source": "s", "target": ""}), None, r"line 1: expected a text in column target"),
        ("a.jsonl", lines({"prompt": "s"}), None, r"line 1: expected source and target or .*, but it has prompt"),
        ("a.jsonl", lines({"source": "s"}), "source-target", r"line 1: .* without target: name the columns"),
        ("a.jsonl", "{broken\n", None, r"line 1: not valid JSON"),
        ("a.jsonl", lines({"text": "s"}) + "[1]\n", None, r"line 2: expected a JSON object"),
        ("a.jsonl", "", None, r"a\.jsonl is empty"),
        ("a.txt", " \n", None, r"a\.txt is empty"),
        ("a.txt", b"good\nb\xffd\n", None, r"line 2: expected UTF-8"),
        ("a.jsonl", lines({"text": "s"}).encode() + b'{"text": "\xe9"}\n', None, r"line 2: expected UTF-8"),
        ("a.csv", "mr,ref\na,b\nc\n", None, r"line 3: expected a column ref"),
        ("a.jsonl", lines({"first": "a", "second": "b", "score": "x"}), None, r"line 1: expected a score, a number"),
        ("a.jsonl", lines({"first": "a", "second": "b", "score": "nan"}), None, r"line 1: expected a score, a number"),
        ("a.txt", "words", "source-target", r"expected source and target, but it is plain text"),
    ],
)
def test_wrong_data(name: str, content: str | bytes, form: Form | None, sentence: str, tmp_path: Path) -> None:
    """One sentence that names file and line."""
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_data(write(tmp_path, name, content), form=form)
    assert name in str(caught.value)


def test_an_evaluation_text_is_not_for_training() -> None:
    """A shipped text that scores are taken on is refused."""
    with pytest.raises(ConfigError, match="is the evaluation set prose-eval, and a score on it would flatter"):
        read_data("prose-eval")


def test_a_directory_of_datasets(tmp_path: Path) -> None:
    """What `datasets` saved is read, a DatasetDict by its split train; rows are named."""
    datasets = pytest.importorskip("datasets", reason="the extra train is not installed")
    rows = datasets.Dataset.from_dict({"source": ["a", "b"], "target": ["c", "d"]})
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "dict"))
    one, other = read_data(str(tmp_path / "one")), read_data(str(tmp_path / "dict"))
    assert one.form == "source-target"
    assert one.sha256 == other.sha256
    assert one.records[1] == Record("b", "d", "", f"{tmp_path / 'one'}, row 1")
    with pytest.raises(ConfigError, match="is no directory that datasets saved"):
        read_data(str(tmp_path))
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "test"))
    with pytest.raises(ConfigError, match="expected a split 'train', but it has test"):
        read_data(str(tmp_path / "test"))
    datasets.Dataset.from_dict({"text": ["a", None]}).save_to_disk(str(tmp_path / "hole"))
    with pytest.raises(ConfigError, match="row 1: expected a text in column text"):
        read_data(str(tmp_path / "hole"))


def test_held_out_by_group(tmp_path: Path) -> None:
    """No source is in both parts; the seed decides which are where."""
    records = [{"source": f"s{i % 20}", "target": f"t{i}"} for i in range(100)]
    data = read_data(write(tmp_path, "a.jsonl", lines(*records)))
    kept, held = hold_out(data, 0.1, seed=0)
    assert len(held.records) == 10
    assert sorted([*kept.records, *held.records], key=lambda r: r.place) == sorted(data.records, key=lambda r: r.place)
    assert not {r.first for r in kept.records} & {r.first for r in held.records}
    assert hold_out(data, 0.1, seed=0)[1] == held != hold_out(data, 0.1, seed=1)[1]


def test_pairs_that_share_a_text_stay_together() -> None:
    """a–b and b–c are one group, though the pairs have no first text in common."""
    chain = [Record(f"{g}{i}", f"{g}{i + 1}", "1", "") for g in "abcdefgh" for i in range(5)]
    data = TrainingData(name="x", form="pairs", records=tuple(chain), sha256="")
    kept, held = hold_out(data, 0.2, seed=0)
    texts = [{t for r in part.records for t in (r.first, r.second)} for part in (kept, held)]
    assert not texts[0] & texts[1]
    assert len(held.records) == 10


def test_one_group_cannot_be_split() -> None:
    """One source with many targets leaves nothing to evaluate on."""
    data = TrainingData(name="x", form="source-target", records=(Record("s", "t", "", ""),) * 4, sha256="")
    with pytest.raises(ConfigError, match="x has one group of examples"):
        hold_out(data, 0.5, seed=0)


def test_e2e_is_split_by_meaning() -> None:
    """The public file, by its own header."""
    path = DATA / "e2e-dev.csv"
    if not path.exists():
        pytest.skip(f"no {path}: name the folder with EDGEPIPE_DATA")
    data = read_data(str(path))
    kept, held = hold_out(data, 0.1, seed=0)
    assert data.form == "source-target"
    assert len(data.records) == 4672
    assert not {r.first for r in kept.records} & {r.first for r in held.records}
    assert 0.1 <= len(held.records) / len(data.records) < 0.12


def test_seq2seq(tokenizer: dict[str, bytes], tmp_path: Path) -> None:
    """Ids, masks and padding of a batch; targets end with eos, the decoder's input begins with start."""
    text = lines({"source": "The river", "target": "rose"}, {"source": "mill", "target": "The mill, and boards"})
    found = seq2seq(
        read_data(write(tmp_path, "a.jsonl", text)), tokenizer, Limits(source=16, target=16), SPECIAL, print
    )
    batch = found.collate([1, 0])
    rows, longest = batch["target"].shape
    assert batch["index"].tolist() == [1, 0]
    assert batch["source_mask"].sum(1).tolist() == [len(found.sources[1]), len(found.sources[0])]
    for row, number in enumerate((1, 0)):
        target = found.targets[number].tolist()
        assert target[-1] == SPECIAL.eos
        assert batch["target"][row].tolist() == target + [-100] * (longest - len(target))
        assert batch["decoder_input"][row, : len(target)].tolist() == [SPECIAL.start, *target[:-1]]
    assert rows == 2
    assert found.lengths.tolist() == [len(x) + len(y) for x, y in zip(found.sources, found.targets, strict=True)]


def test_texts_are_halved(tokenizer: dict[str, bytes], tmp_path: Path) -> None:
    """A text without a target: its second half follows from its first."""
    data = read_data(write(tmp_path, "a.txt", "The river carried the timber down.\n\nEvery spring the water rose."))
    found = seq2seq(data, tokenizer, Limits(source=64, target=64), SPECIAL, print)
    from tokenizers import Tokenizer

    decoder = Tokenizer.from_buffer(tokenizer["tokenizer.json"])
    for i, record in enumerate(data.records):
        assert decoder.decode([*found.sources[i], *found.targets[i][:-1]]) == record.first
        assert 0 <= len(found.sources[i]) - len(found.targets[i][:-1]) <= 1


def test_a_line_of_200_000_tokens(tokenizer: dict[str, bytes], tmp_path: Path) -> None:
    """Too long is an error that names file and line, or cut when that is asked for, and said."""
    text = lines({"source": "short", "target": "t"}, {"source": "12 " * 100_000, "target": "t"})
    data = read_data(write(tmp_path, "a.jsonl", text))
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 2: expected at most 512 tokens, but .* has \d{6}:"):
        seq2seq(data, tokenizer, Limits(source=512, target=64), SPECIAL, print)
    notes: list[str] = []
    found = seq2seq(data, tokenizer, Limits(source=512, target=64, cut=True), SPECIAL, notes.append)
    assert [len(ids) for ids in found.sources][1] == 512
    assert len(notes) == 1
    assert notes[0].startswith("1 of 2 texts of ")


def test_other_forms_have_no_targets(tokenizer: dict[str, bytes]) -> None:
    """Labels are not for a sequence-to-sequence student."""
    data = TrainingData(name="x.tsv", form="labels", records=(Record("a", "", "1", ""),), sha256="")
    with pytest.raises(ConfigError, match="expected sources and targets, or texts, but it holds labels"):
        seq2seq(data, tokenizer, Limits(source=5, target=5), SPECIAL, print)


def test_vocabularies_that_do_not_match(tokenizer: dict[str, bytes], tmp_path: Path) -> None:
    """The first id that means two things is named; a longer vocabulary with the same beginning is fine."""
    save_tiny_tokenizer(tmp_path, 300)
    shorter = {"tokenizer.json": (tmp_path / "tokenizer.json").read_bytes()}
    check_vocabularies(tokenizer, shorter, ("teacher", "student"))
    record = json.loads(shorter["tokenizer.json"])
    table = record["model"]["vocab"]
    one, other = (next(t for t, i in table.items() if i == n) for n in (70, 71))
    table[one], table[other] = 71, 70
    swapped = {"tokenizer.json": json.dumps(record).encode()}
    with pytest.raises(ConfigError, match=r"teacher/tokenizer\.json and student/tokenizer\.json disagree about id 70"):
        check_vocabularies(tokenizer, swapped, ("teacher", "student"))
