"""The tokenizer of a student ends every source with the end token, and changes nothing else."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from edgepipe.errors import ConfigError
from edgepipe.sources import open_model
from edgepipe.students.tokenizer import with_end_token

TEXTS = ["name[The Eagle], food[French]", "", "a  b\n\nc", "<|im_start|>user"]


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_sources_end_with_the_end_token(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With special tokens the end is added; without them the ids are as before."""
    from tests.decoders import saved

    model = open_model(str(saved(tmp_path_factory.mktemp("decoders"), kind)))
    (end, *_) = model.info.eos_token_ids
    files = with_end_token(model.info.tokenizer, end)
    before, after = (Tokenizer.from_str(f["tokenizer.json"].decode()) for f in (model.info.tokenizer, files))
    for text in TEXTS:
        assert after.encode(text).ids == [*before.encode(text).ids, end]
        assert after.encode(text, add_special_tokens=False).ids == before.encode(text, add_special_tokens=False).ids
        assert after.decode(after.encode(text).ids) == before.decode(before.encode(text).ids)
    assert {n: c for n, c in files.items() if n != "tokenizer.json"} == {
        n: c for n, c in model.info.tokenizer.items() if n != "tokenizer.json"
    }


def test_a_processor_before_it_stays() -> None:
    """A tokenizer that begins texts with a token still does, also when it had several rules."""
    from tokenizers import AddedToken, models, processors

    plain = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    plain.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    for before in (begin, processors.Sequence([processors.ByteLevel(), begin])):
        plain.post_processor = before
        files = with_end_token({"tokenizer.json": plain.to_str().encode()}, 3)
        assert Tokenizer.from_str(files["tokenizer.json"].decode()).encode("ab").ids == [2, 0, 1, 3]


def test_what_has_no_end_token() -> None:
    """Each is one sentence."""
    with pytest.raises(ConfigError, match=r"a teacher with a tokenizer\.json"):
        with_end_token({}, 3)
    with pytest.raises(ConfigError, match="the end token 3 is none of the special tokens"):
        with_end_token({"tokenizer.json": b'{"added_tokens": []}'}, 3)
