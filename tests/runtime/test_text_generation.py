"""Generation with a real (tiny, random) bundle: batches, streams, stop strings, prefix reuse and threads agree."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe.errors import ConfigError, ContractError, TargetError
from edgepipe.runtime import Model, load, text_generation, verify_hashes
from edgepipe.runtime.sampling import log_softmax

PROMPTS = ["The capital of France is", "a", "One, two, three, four and then", "Hello\nworld"]
CHAT = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Model:
    """Load the bundle once."""
    return load(tiny_bundle, threads=1)


def _changed(tiny_bundle: Path, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy the bundle to `path` with another manifest."""
    shutil.copytree(tiny_bundle, path)
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_bundle_states_what_the_model_offers(model: Model, tiny_bundle: Path) -> None:
    """Agree with the manifest, and with the hashes in it."""
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    assert model.manifest == manifest
    assert (model.name, model.context) == (manifest["name"], manifest["model"]["context"])
    assert model.cache_bytes == manifest["cache"]["bytes"]
    assert model.decode(model.encode("Hello world")) == "Hello world"
    verify_hashes(tiny_bundle, manifest)


def test_greedy_takes_the_largest_logit_each_time(model: Model) -> None:
    """Agree with the logits of the whole text, computed at once and without a cache to begin with."""
    ids = model.encode(PROMPTS[0])
    answer = model.generate(PROMPTS[0], max_new_tokens=12, ignore_eos=True)
    assert answer.prompt_tokens == len(ids) and len(answer.token_ids) == 12 and answer.finish_reason == "length"
    logits = model.logits([*ids, *answer.token_ids])
    assert logits.shape == (len(ids) + 12, model.manifest["model"]["vocab_size"]) and logits.dtype == np.float32
    assert tuple(logits[len(ids) - 1 : -1].argmax(-1)) == answer.token_ids
    assert answer.text == model.decode(answer.token_ids)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_k": 50, "seed": 3}], ids=str)
@pytest.mark.parametrize("prompt", [*PROMPTS, "chat"])
def test_stream_joins_to_the_whole(model: Model, prompt: str, options: dict[str, Any]) -> None:
    """Stream the very text that the whole answer has, in several pieces."""
    asked: Any = CHAT if prompt == "chat" else prompt
    whole = model.generate(asked, max_new_tokens=30, **options)
    pieces = list(model.generate(asked, max_new_tokens=30, stream=True, **options))
    assert "".join(pieces) == whole.text
    assert "" not in pieces and (len(pieces) > 3 or len(whole.token_ids) < 30)


def test_a_stream_returns_what_the_whole_answer_is(model: Model) -> None:
    whole = model.generate(PROMPTS[0], max_new_tokens=9, reuse_prefix=False)
    returned = []

    def shown() -> Iterator[str]:
        returned.append((yield from model.generate(PROMPTS[0], max_new_tokens=9, reuse_prefix=False, stream=True)))

    assert ("".join(shown()), returned) == (whole.text, [whole])


def test_batch_equals_single_prompts(model: Model) -> None:
    """Give every row of a padded batch the answer it gets alone, though they end at different lengths."""
    alone = [model.generate(prompt, max_new_tokens=20, reuse_prefix=False) for prompt in PROMPTS]
    batch = model.generate(PROMPTS, max_new_tokens=20)
    assert batch == alone


def test_batch_rows_that_end_early_do_not_disturb_the_others(model: Model) -> None:
    """End one row by its stop string and let the others run on."""
    alone = [model.generate(prompt, max_new_tokens=24, reuse_prefix=False, ignore_eos=True) for prompt in PROMPTS]
    stop = alone[0].text[4:7]
    expected = [
        model.generate(prompt, max_new_tokens=24, reuse_prefix=False, ignore_eos=True, stop=stop) for prompt in PROMPTS
    ]
    assert expected[0].finish_reason == "stop" and any(one.finish_reason == "length" for one in expected)
    assert model.generate(PROMPTS, max_new_tokens=24, ignore_eos=True, stop=stop) == expected


def test_sampled_batch_uses_seed_plus_row(model: Model) -> None:
    """Draw for row i what the single prompt draws with seed + i, and the same again the next time.

    Only the first tokens are compared with single prompts: where activations are rounded to int8, a step of four rows
    may round another way than a step of one, and a draw may then fall beside the same border.
    """
    first = [
        model.generate(PROMPTS[0], max_new_tokens=1, temperature=1.2, seed=5 + row, ignore_eos=True).token_ids
        for row in range(4)
    ]
    batch = model.generate([PROMPTS[0]] * 4, max_new_tokens=10, temperature=1.2, seed=5, ignore_eos=True)
    assert [one.token_ids[:1] for one in batch] == first
    assert len({one.token_ids for one in batch}) == 4
    assert model.generate([PROMPTS[0]] * 4, max_new_tokens=10, temperature=1.2, seed=5, ignore_eos=True) == batch


def test_batch_of_chats_and_batch_of_one(model: Model) -> None:
    """Return a list for a list, of messages too."""
    single = model.generate(CHAT, max_new_tokens=5)
    assert [one.token_ids for one in model.generate([CHAT], max_new_tokens=5)] == [single.token_ids]
    assert [one.token_ids for one in model.generate([CHAT, CHAT], max_new_tokens=5)] == [single.token_ids] * 2


def test_chat_is_encoded_without_a_second_bos(model: Model) -> None:
    """Count the template's own tokens only."""
    text = model.apply_chat_template(CHAT)
    assert "Hello there" in text
    count = len(model.tokenizer.encode(text, add_special_tokens=False))
    assert model.generate(CHAT, max_new_tokens=1).prompt_tokens == count


def test_stop_strings_cut_the_text(model: Model) -> None:
    """Cut before the first stop string, whole and streamed, and say so."""
    free = model.generate(PROMPTS[2], max_new_tokens=40, ignore_eos=True)
    stop = free.text[10:13]
    for given in (stop, [stop], ("never in there", stop)):
        cut = model.generate(PROMPTS[2], max_new_tokens=40, ignore_eos=True, stop=given)
        assert cut.text == free.text.split(stop)[0] and cut.finish_reason == "stop"
        assert cut.token_ids == free.token_ids[: len(cut.token_ids)] and len(cut.token_ids) < 40
        streamed = model.generate(PROMPTS[2], max_new_tokens=40, ignore_eos=True, stop=given, stream=True)
        assert "".join(streamed) == cut.text


def test_held_back_text_comes_at_the_end(model: Model) -> None:
    """Let go what only looked like the beginning of a stop string."""
    free = model.generate(PROMPTS[2], max_new_tokens=10, ignore_eos=True)
    stop = free.text[-2:] + "\x00"
    kept = model.generate(PROMPTS[2], max_new_tokens=10, ignore_eos=True, stop=stop)
    assert kept.text == free.text and kept.finish_reason == "length"


def test_end_token_ends_the_text(model: Model, tiny_bundle: Path, tmp_path: Path) -> None:
    """Stop at an end token, which is not part of the answer, unless told to ignore it."""
    free = model.generate(PROMPTS[0], max_new_tokens=16, ignore_eos=True)
    end = free.token_ids[-1]
    count = free.token_ids.index(end)
    path = _changed(tiny_bundle, tmp_path / "ends", lambda manifest: manifest["model"].update(eos_token_ids=[end]))
    other = load(path, threads=1)
    ended = other.generate(PROMPTS[0], max_new_tokens=16)
    assert ended.token_ids == free.token_ids[:count] and ended.finish_reason == "stop"
    assert ended.text == model.decode(free.token_ids[:count])
    assert other.generate(PROMPTS[0], max_new_tokens=16, ignore_eos=True).token_ids == free.token_ids


def test_full_context_ends_the_text(model: Model) -> None:
    """Fill the context to its last token; a batch's shorter rows fill theirs."""
    rows = [PROMPTS[0], "a"]
    alone = [model.generate(one, max_new_tokens=10**6, ignore_eos=True, reuse_prefix=False) for one in rows]
    for one in alone:
        assert one.finish_reason == "context" and one.prompt_tokens + len(one.token_ids) == model.context
    assert model.generate(rows, max_new_tokens=10**6, ignore_eos=True) == alone


def test_longest_prompt_and_one_longer(model: Model) -> None:
    """Take a prompt that leaves room for one token, and name both numbers for the next longer one."""
    text = "a"
    while len(model.encode(text + " a")) <= model.context - 1:
        text += " a"
    answer = model.generate(text, ignore_eos=True)
    assert len(answer.token_ids) == model.context - answer.prompt_tokens
    longer = text + " a" * (model.context - answer.prompt_tokens)
    count = len(model.encode(longer))
    with pytest.raises(ConfigError, match=f"{count} tokens.*context of {model.context}"):
        model.generate(longer)


def test_prefix_reuse_changes_nothing_but_the_work(tiny_bundle: Path) -> None:
    """Answer the same in a growing chat, with most of each prompt already there; and after going back."""
    model = load(tiny_bundle, threads=1)
    text, reused = PROMPTS[0], []
    for _ in range(4):
        fresh = model.generate(text, max_new_tokens=8, reuse_prefix=False)
        again = model.generate(text, max_new_tokens=8)
        assert fresh.reused_tokens == 0 and again.reused_tokens == again.prompt_tokens - 1
        assert again.token_ids == fresh.token_ids
        text += again.text + " and"
        grown = model.generate(text, max_new_tokens=8)
        reused.append(grown.reused_tokens)
        assert grown.token_ids == load(tiny_bundle, threads=1).generate(text, max_new_tokens=8).token_ids
    assert min(reused) > 0 and reused == sorted(reused)
    back = model.generate(PROMPTS[0], max_new_tokens=8)
    assert back.reused_tokens > 0
    assert back.token_ids == model.generate(PROMPTS[0], max_new_tokens=8, reuse_prefix=False).token_ids


def test_prompt_in_chunks_equals_prompt_at_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a long prompt a few tokens at a time."""
    text = " ".join(PROMPTS) * 2
    at_once = model.generate(text, max_new_tokens=8, reuse_prefix=False)
    whole = model.logits(text)
    monkeypatch.setattr(text_generation, "PROMPT_CHUNK", 7)
    monkeypatch.setattr(text_generation, "_LOGITS_CHUNK", 5)
    assert at_once.prompt_tokens > 21
    assert model.generate(text, max_new_tokens=8, reuse_prefix=False) == at_once
    np.testing.assert_allclose(model.logits(text), whole, atol=1e-3)
    np.testing.assert_allclose(model.logits(text, all_positions=False), whole[-1:], atol=1e-3)


def test_logprobs_are_those_of_the_logits(model: Model) -> None:
    """Score every token but the first, over more than one chunk of positions."""
    ids = np.random.default_rng(0).integers(0, model.manifest["model"]["vocab_size"], 100).tolist()
    scores = model.token_logprobs(ids)
    expected = log_softmax(model.logits(ids))[np.arange(99), ids[1:]]
    assert scores.shape == (99,) and scores.dtype == np.float64 and (scores < 0).all()
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert model.token_logprobs(ids[:1]).shape == (0,)


def test_scoring_fills_the_whole_context_and_no_more(model: Model) -> None:
    """Score exactly `context` tokens; refuse one more, none, and unknown ids."""
    ids = [1] * model.context
    assert model.token_logprobs(ids).shape == (model.context - 1,)
    vocabulary = model.manifest["model"]["vocab_size"]
    for wrong, words in (([*ids, 1], "context"), ([], "no tokens"), ([vocabulary], "vocabulary"), ([-1], "vocabulary")):
        with pytest.raises(ConfigError, match=words):
            model.logits(wrong)


def test_seeds_repeat(model: Model) -> None:
    """Give the same answer for the same seed and another one for another."""
    first, again, other = (
        model.generate("a", max_new_tokens=20, temperature=2.0, seed=seed).token_ids for seed in (1, 1, 2)
    )
    assert first == again != other


def test_callers_at_once_get_what_they_get_alone(tiny_bundle: Path) -> None:
    """Run 4 threads on 2 caches: whole answers, streams, batches and scores agree with the serial ones."""
    model = load(tiny_bundle, threads=1, callers=2)

    def whole(prompt: str) -> object:
        return model.generate(prompt, max_new_tokens=12).token_ids

    def streamed(prompt: str) -> object:
        return "".join(model.generate(prompt, max_new_tokens=12, temperature=1.0, seed=1, stream=True))

    def batch(prompt: str) -> object:
        return [one.token_ids for one in model.generate([prompt, "a"], max_new_tokens=12)]

    def scores(prompt: str) -> object:
        return model.token_logprobs(prompt).round(6).tolist()

    work = [(ask, prompt) for ask in (whole, streamed, batch, scores) for prompt in PROMPTS] * 2
    serial = [ask(prompt) for ask, prompt in work]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda job: job[0](job[1]), work)) == serial
    assert model._pool.caches <= 2


def test_stream_holds_its_cache_only_while_it_runs(tiny_bundle: Path) -> None:
    """Give the only cache back when a stream is closed early or dropped; hold none before the first piece."""
    model = load(tiny_bundle, threads=1, callers=1)
    expected = model.generate(PROMPTS[0], max_new_tokens=20).token_ids
    model.generate(PROMPTS[0], stream=True)  # never begun
    stream: Any = model.generate(PROMPTS[0], max_new_tokens=20, ignore_eos=True, stream=True)
    next(stream)
    answers: list[object] = []
    waiting = threading.Thread(
        target=lambda: answers.append(model.generate(PROMPTS[0], max_new_tokens=20).token_ids), daemon=True
    )
    waiting.start()
    waiting.join(0.3)
    assert answers == []  # it waits for the stream
    stream.close()
    waiting.join(10)
    assert answers == [expected]
    stream = model.generate(PROMPTS[0], max_new_tokens=20, ignore_eos=True, stream=True)
    next(stream)
    del stream
    assert model.generate(PROMPTS[0], max_new_tokens=20).token_ids == expected


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("a", {"max_new_tokens": 0}, "max_new_tokens"),
        ("a", {"max_new_tokens": 2.0}, "max_new_tokens"),
        ("a", {"temperature": -1}, "temperature"),
        ("a", {"top_p": 0}, "top_p"),
        ("a", {"seed": -1}, "seed"),
        ("a", {"stop": ""}, "stop"),
        ("a", {"stop": ["x", 3]}, "stop"),
        (["a", "b"], {"stream": True}, "batch cannot be streamed"),
        ([], {}, "empty list"),
        (["a", CHAT], {}, "mixture"),
        ([[]], {}, "at least one message"),
        (7, {}, "must be a text"),
    ],
    ids=str,
)
def test_wrong_requests_are_refused_at_once(model: Model, prompt: Any, options: dict[str, Any], words: str) -> None:
    """Say in one sentence what is wrong, before a stream's first piece is asked for."""
    with pytest.raises(ConfigError, match=words):
        model.generate(prompt, **options)


def test_empty_prompt_is_refused(model: Model) -> None:
    """Refuse text without tokens where the tokenizer adds no special ones."""
    if model.encode(""):
        assert model.generate("", max_new_tokens=1).prompt_tokens == len(model.encode(""))
    else:
        with pytest.raises(ConfigError, match="no tokens"):
            model.generate("")


def test_chat_without_template_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    """Tell to pass text."""
    path = _changed(tiny_bundle, tmp_path / "plain", lambda manifest: manifest["tokenizer"].update(chat_template=None))
    with pytest.raises(ConfigError, match="no chat template"):
        load(path, threads=1).generate(CHAT)


@pytest.mark.parametrize(
    ("key", "value", "error", "words"),
    [
        ("engine", "llvm", TargetError, "is for 'llvm'"),
        ("task", "feature-extraction", ConfigError, "graphs must name model"),
        ("schema", 4, ConfigError, "update edgepipe"),
    ],
)
def test_bundles_for_something_else_are_refused(
    tiny_bundle: Path, tmp_path: Path, key: str, value: Any, error: type[Exception], words: str
) -> None:
    """Say what the bundle is for."""
    path = _changed(tiny_bundle, tmp_path / "other", lambda manifest: manifest.update({key: value}))
    with pytest.raises(error, match=words):
        load(path)


def test_truncated_weights_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    """Find a half-copied bundle before the engine maps it."""
    path = _changed(tiny_bundle, tmp_path / "half", lambda manifest: None)
    weights = path / json.loads((path / "manifest.json").read_text())["weights"]["file"]
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ContractError, match="should have"):
        load(path)


@pytest.mark.parametrize("stop", [None, 5, [""], ["a", 3]])
def test_stop_strings_that_are_none(model: Model, stop: Any) -> None:
    with pytest.raises(ConfigError, match="stop must be texts"):
        model.generate("The river", stop=stop)


@pytest.mark.parametrize("ids", [["a"], [[1, 2]], [5.7], 5, [True, 2.5]])
def test_token_ids_that_are_none(model: Model, ids: Any) -> None:
    for call in (model.logits, model.token_logprobs):
        with pytest.raises(ConfigError, match="expected a text or a list of token ids"):
            call(ids)
