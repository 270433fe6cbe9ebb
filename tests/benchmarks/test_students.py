"""The stored comparison of an encoder-decoder with its decoder-only twin, and what the page says of it."""

from __future__ import annotations

import json
import math

from benchmarks import students
from benchmarks.stored import read_result, section
from edgepipe.students.config import parameters, twin
from edgepipe.students.files import make_student

SMALL = students.VOCABULARIES[0]


def test_the_page_shows_the_stored_run() -> None:
    """No figure of the table is typed by hand."""
    assert section(students.PAGE, students.NAME) == students.page_section(read_result(students.NAME)).strip()


def test_every_case_was_taken_beside_its_twin() -> None:
    """All lengths for the small vocabulary, the headline for the teacher's, in float32 and at 4 bits."""
    cases = read_result(students.NAME)["cases"]
    taken = {(case["vocabulary"], case["stored"], case["length"]) for case in cases}
    assert taken == {(case.vocabulary, case.stored, case.length) for case in students.CASES}
    assert all({"ttft_ms", "token_ms"} == set(case["ratios"]) for case in cases)
    assert all(case["sides"]["encoder-decoder"]["limits"] for case in cases)


def test_the_pair_has_equal_parameters() -> None:
    """45 million within 5 % for the small vocabulary, and as many in the twin as whole layers allow."""
    config = students.student(SMALL)
    count = parameters(config)
    assert math.isclose(count, 45e6, rel_tol=0.05)
    decoder = make_student(twin(config))
    assert math.isclose(sum(p.numel() for p in decoder.parameters()), count, rel_tol=0.05)
    stored = read_result(students.NAME)["models"][str(SMALL)]
    assert stored["encoder-decoder"] == count


def test_an_encoder_decoder_pays() -> None:
    """512 in, 32 out, vocabulary of 8,192: 2.3 times the tokens (4 bits: 1.8), and the first token 25 % earlier."""
    found = {case["stored"]: case for case in read_result(students.NAME)["cases"] if is_headline(case)}
    for stored, gain in (("float32", 2.3), ("4-bit", 1.8)):
        assert found[stored]["ratios"]["ttft_ms"]["value"] <= 0.75
        assert found[stored]["ratios"]["token_ms"]["value"] <= 1 / gain


def test_the_pages_words_are_the_tables() -> None:
    """What the paragraph below the table says is read off the stored run."""
    taken = [case for case in read_result(students.NAME)["cases"] if case["length"] == students.HEADLINE]
    cases = {(case["vocabulary"], case["stored"]): case["ratios"] for case in taken}
    small = [cases[SMALL, stored] for stored in ("float32", "4-bit")]
    large = [cases[students.VOCABULARIES[1], stored] for stored in ("float32", "4-bit")]
    earlier = {f"{100 * (1 - ratios['ttft_ms']['value']):.0f}" for ratios in small}
    faster = [f"{1 / ratios['token_ms']['value']:.1f}" for ratios in (*small, *large)]
    words = " ".join(students.PAGE.read_text("utf-8").split())
    assert f"the first token comes {' and '.join(earlier)} % earlier in float32 and at 4 bits" in words
    assert f"the next ones {faster[0]} and {faster[1]} times as fast" in words
    assert f"for every token, {faster[2]} and {faster[3]} times" in words
    readme = " ".join((students.ROOT / "README.md").read_text("utf-8").split())
    assert f"the first token {earlier.pop()} % earlier than a decoder alone" in readme
    assert f"the next ones {faster[0]} times as fast ({faster[1]} at 4 bits)" in readme


def test_what_is_counted_agrees() -> None:
    """Fewer multiply-adds to the first token and fewer bytes for the next one, at every length."""
    for case in read_result(students.NAME)["cases"]:
        pair, decoder = (case["sides"][name]["limits"] for name in ("encoder-decoder", "decoder"))
        assert pair["prefill"]["multiply_adds"] < 0.8 * decoder["prefill"]["multiply_adds"], students.title(case)
        assert pair["token"]["bytes"] < 0.75 * decoder["token"]["bytes"], students.title(case)


def is_headline(case: dict[str, object]) -> bool:
    """Say whether a case is the one that is promised."""
    return (case["vocabulary"], case["length"]) == (SMALL, students.HEADLINE)


def test_first_tokens_are_a_tokenizer() -> None:
    """What is cut from a byte-level BPE still gives every text back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("t", "h"), ("th", "e"), ("a", "n")]
    words = {**letters, "th": 256, "the": 257, "an": 258}
    whole = Tokenizer(models.BPE(vocab=words, merges=merges))
    whole.pre_tokenizer, whole.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    files = students.first_tokens({"tokenizer.json": whole.to_str().encode()}, 258)
    cut = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert cut.get_vocab_size() == 258
    assert json.loads(files["tokenizer.json"])["model"]["merges"] == [["t", "h"], ["th", "e"]]
    assert cut.decode(cut.encode("the anthem").ids) == "the anthem"
    assert cut.encode("an").ids == [letters["a"], letters["n"]]
