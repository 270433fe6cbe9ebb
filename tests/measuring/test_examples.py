"""Evaluation data: every format read to the letter, and what doesn't fit refused with file and line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgepipe import package_data
from edgepipe.calibration import describe_set
from edgepipe.errors import ConfigError
from edgepipe.measuring.examples import read_asked, read_labelled, read_pairs, sample
from edgepipe.rows import Columns, Data, open_data, read_text, read_texts

LABELLED = Columns(places={"text": "0", "label": "1"})
ASKED = Columns(places={"input": "0", "reference": "1"})
PAIRS = Columns(places={"score": "0", "first": "1", "second": "2"})
STSB = Columns(places={"score": "4", "first": "5", "second": "6"})
BY_NAME = Columns(places={"text": "review", "label": "stars"})


def data(text: str | bytes, suffix: str = ".tsv") -> Data:
    """Make a file's contents."""
    content = text if isinstance(text, bytes) else text.encode()
    return Data(name=f"data{suffix}", suffix=suffix, content=content, sha256="")


def test_pairs_as_sts_b_writes_them() -> None:
    """Seven columns, no header, quotes that are only characters, and whatever else stands at the end."""
    rows = 'main\tMSRvid\t2012test\t0000\t5.000\tA "man".\tOne "man\textra\nmain\tx\ty\t1\t0.25\ta\tb\n'
    found = read_pairs(data(rows), STSB)
    assert [(p.first, p.second, p.score, p.place) for p in found] == [
        ('A "man".', 'One "man', 5.0, "data.tsv, line 1"),
        ("a", "b", 0.25, "data.tsv, line 2"),
    ]


@pytest.mark.parametrize(
    ("text", "header", "labels"),
    [
        ("sentence\tlabel\ngood \t1\n", None, ["1"]),
        ("good\tWorld\nbad\tSports\n", None, ["World", "Sports"]),
        ("label\tlabel\n", False, ["label"]),
        ("odd\tthing\ngood\t1\n", True, ["1"]),
        ("Text\tLabel\r\ngood\t1\r\n", None, ["1"]),
        ("\ufefftext\tlabel\ngood\t1", None, ["1"]),
        ("good\t1\n\nbad\t0\n", None, ["1", "0"]),
    ],
)
def test_headers_are_recognised(text: str, header: bool | None, labels: list[str]) -> None:
    found = read_labelled(data(text), Columns(places=LABELLED.places, header=header))
    assert [one.label for one in found] == labels


def test_columns_by_name() -> None:
    found = read_labelled(data("id,stars,review\n7,4,good\n", ".csv"), BY_NAME)
    assert [(one.text, one.label) for one in found] == [("good", "4")]


def test_references_of_one_input_are_one_example() -> None:
    """As E2E has them: quoted commas and line ends, the same input on several lines, not always neighbours."""
    text = 'mr,ref\r\n"name[A], food[B]","one\r\nmore"\r\nother,x\r\n"name[A], food[B]",two\r\nother,x\r\n'
    found = read_asked(data(text, ".csv"), ASKED)
    assert [(one.text, one.references, one.place) for one in found] == [
        ("name[A], food[B]", ("one\r\nmore", "two"), "data.csv, line 2"),
        ("other", ("x",), "data.csv, line 4"),
    ]


def test_jsonl_takes_lists_of_references_and_numbers_as_labels() -> None:
    keys = Columns(places={"input": "q", "reference": "a"})
    found = read_asked(data('{"q": "1+1", "a": ["2", "two"]}\n\n{"q": "x", "a": 3}\n', ".jsonl"), keys)
    assert [(one.text, one.references) for one in found] == [("1+1", ("2", "two")), ("x", ("3",))]
    assert found[1].place == "data.jsonl, line 3"
    labels = read_labelled(
        data('{"text": "a", "label": 0}', ".jsonl"), Columns(places={"text": "text", "label": "label"})
    )
    assert labels[0].label == "0"


@pytest.mark.parametrize(
    ("reader", "content", "suffix", "columns", "sentence"),
    [
        (read_pairs, "1\ta\tb\n2\ta\n", ".tsv", PAIRS, r"data\.tsv, line 2: expected a column 2 \(second\).*has 2 col"),
        (read_pairs, "1\ta\tb\nx\ta\tb\n", ".tsv", PAIRS, r"line 2: expected a score in column 0, but it holds 'x'"),
        (read_pairs, "1\ta\tb\nnan\ta\tb\n", ".tsv", PAIRS, r"line 2: expected a score"),
        (read_pairs, "1\ta\tb\n1\tc\td\n", ".tsv", PAIRS, r"scores, but all are the same"),
        (read_pairs, "1\ta\t \n", ".tsv", PAIRS, r"line 1: expected a text in column 2 \(second\), but it holds ' '"),
        (read_labelled, "text\tlabel\n", ".tsv", LABELLED, r"data\.tsv holds no examples"),
        (read_labelled, "a\t1\n", ".txt", LABELLED, r"expected a file that ends in \.tsv, \.csv, \.jsonl"),
        (read_labelled, "a,b\nc,1\n", ".csv", BY_NAME, r"expected a column 'review' \(text\), but the header has a, b"),
        (read_labelled, b"a\t1\n\xff\t1\n", ".tsv", LABELLED, r"data\.tsv, line 2: expected UTF-8"),
        (read_labelled, 'a,1\n"b"x,1\n', ".csv", LABELLED, r"data\.csv, line 2: not a well-formed \.csv line"),
        (read_labelled, 'a,1\n"b,1\n', ".csv", LABELLED, r"data\.csv, line 2: not a well-formed"),
        (read_labelled, "a" * 200_000 + "\t1\n", ".tsv", LABELLED, r"line 1: not a well-formed \.tsv line"),
        (read_asked, '{"0": "a", "1": "b"}\n{', ".jsonl", ASKED, r"data\.jsonl, line 2: not valid JSON"),
        (read_asked, "[" * 100_000, ".jsonl", ASKED, r"line 1: not valid JSON"),
        (read_asked, "[1]", ".jsonl", ASKED, r"line 1: expected a JSON object, but it holds \[1\]"),
        (read_asked, '{"0": "a", "x": 1}', ".jsonl", ASKED, r"line 1: expected the key '1', but it has 0, x"),
        (read_asked, '{"0": "a", "1": []}', ".jsonl", ASKED, r"line 1: expected a text in column 1 \(reference\)"),
        (read_asked, '{"0": ["a"], "1": "b"}', ".jsonl", ASKED, r"line 1: expected a text in column 0 \(input\)"),
        (read_asked, '{"0": "a", "1": ["b", 1]}', ".jsonl", ASKED, r"line 1: expected a text in column 1"),
    ],
)
def test_what_does_not_fit_is_refused(reader: Any, content: Any, suffix: str, columns: Columns, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as raised:
        reader(data(content, suffix), columns)
    assert len(str(raised.value)) < 400


def test_a_name_without_a_header_is_refused() -> None:
    with pytest.raises(ConfigError, match="the file has no header"):
        read_labelled(data("a\t1\n"), Columns(places=BY_NAME.places, header=False))


def test_a_sample_is_drawn_in_order_and_repeats() -> None:
    whole = list(range(100))
    drawn = sample(whole, 10, 1)
    assert drawn == sorted(set(drawn)) and len(drawn) == 10
    assert drawn == sample(whole, 10, 1) != sample(whole, 10, 2)
    assert set(sample(whole, 10, 1)) < set(sample(whole, 20, 1))  # a larger one holds the smaller
    assert sample(whole, 0, 1) == sample(whole, 100, 1) == sample(whole, 500, 1) == whole


def test_files_and_shipped_texts_open(tmp_path: Path) -> None:
    file = tmp_path / "Own.TXT"
    file.write_bytes("grüne Hügel\n".encode())
    opened = open_data(str(file))
    assert (read_text(opened), opened.suffix, len(opened.sha256)) == ("grüne Hügel\n", ".txt", 64)
    assert open_data("prose-eval").sha256 == describe_set("prose-eval").sha256


def test_what_can_t_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate((1 << 30) + 1)
    for name, sentence in (
        ("none.txt", r"none\.txt can't be read \(No such file.*one of the texts prose-eval"),
        ("empty.txt", "is empty"),
        ("pipe", "is no regular file"),
        (".", "is no regular file"),
        ("huge.txt", "has 1073741825 bytes, but 1073741824 is the most"),
        ("nul\0", "can't be read"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            open_data(f"{tmp_path}/{name}")


def test_calibration_text_is_refused_under_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score on it would flatter the bundle; the sentence says which set it is."""
    shutil.copytree(package_data.data_folder("calibration"), tmp_path / "_data" / "calibration")
    monkeypatch.setattr(package_data, "_PACKAGE", tmp_path)
    own, shipped = tmp_path / "_data" / "calibration" / "own.txt", describe_set("prose-eval")
    own.write_text("seen before\n" * 3)
    record = (tmp_path / "_data" / "calibration" / "prose-eval.toml").read_text()
    record = record.replace('"evaluation"', '"calibration"', 1).replace("prose-eval.txt", "own.txt")
    record = record.replace(shipped.sha256, open_data(str(own)).sha256)
    (tmp_path / "_data" / "calibration" / "own.toml").write_text(record)
    copy = shutil.copy(own, tmp_path / "renamed.txt")
    for name in ("own", str(own), str(copy)):
        with pytest.raises(ConfigError, match="is the calibration set own, and a score on it would flatter"):
            open_data(name)
    assert open_data("prose-eval").content


def test_every_text_of_a_file_is_read(tmp_path: Path) -> None:
    """Columns, header and all kinds of files; what a vocabulary is trimmed to."""

    def texts(name: str, content: str) -> list[str]:
        (tmp_path / name).write_text(content, encoding="utf-8")
        return read_texts(open_data(str(tmp_path / name), "trimming"))

    assert texts("a.csv", 'mr,ref\n"name[A, B]",A mill.\n"two\nlines",\n') == ["name[A, B]", "A mill.", "two\nlines"]
    assert texts("b.tsv", 'a "b\tc\n1\t2\n') == ['a "b', "c", "1", "2"]
    record = {"text": "river", "score": 5, "more": [{"x": "mill"}, ["water", None]], "none": " "}
    assert texts("c.jsonl", f"{json.dumps(record)}\n\n") == ["river", "mill", "water"]
    assert texts("d.txt", "a\r\n\r\nb\n") == ["a\r\n\r\nb\n", "a", "b"]
    long = "word\n" * 300_000
    passages = texts("e.md", long)[:2]
    assert "".join(passages) == long and passages[0].endswith("word\n")
    with pytest.raises(ConfigError, match=r"f\.jsonl holds no texts: give a file with some$"):
        texts("f.jsonl", '{"score": 5}\n')
    with pytest.raises(ConfigError, match=r"g\.jsonl, line 2: not valid JSON"):
        texts("g.jsonl", '{"a": "b"}\n{"a"\n')
    with pytest.raises(ConfigError, match=r"h\.csv, line 2: not a well-formed \.csv line"):
        texts("h.csv", 'a,b\n"c"d,e\n')
    assert read_texts(open_data("prose-eval", "trimming"))
