"""Other families from directory to base install: six of them, then every one in the table of docs/tasks.md."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe.artifacts import Context
from edgepipe.compress import compress
from edgepipe.errors import EdgepipeError
from edgepipe.graph.framework import build_module, fill_module
from edgepipe.recipe import resolve
from edgepipe.runtime import load, open_graphs, read_bundle
from edgepipe.sources import open_model
from edgepipe.stages.quantize import Quantize
from edgepipe.weights import WeightStore
from tests.families import FAMILIES, save_family
from tests.listener import Silent
from tests.slow.conftest import ROOT, Made

pytestmark = pytest.mark.slow

SIX = ("bert", "modernbert", "t5", "bart", "whisper", "vit")
# Largest difference from torch's float32 run, in largest outputs.
ON_GRID = 1e-3  # over the same 8-bit weights: float32 sums in another order, products of two int8 parts in decoders
ORIGINAL = 0.1  # over the weights as they were: what 8 bits cost a tiny model of large random weights

_CHILD = """
import importlib.util, sys
import numpy as np
assert importlib.util.find_spec("torch") is None, "torch is importable"
from edgepipe.runtime import open_graphs, read_bundle
bundle, given, out = sys.argv[1:]
feeds = dict(np.load(given))
graphs = open_graphs(read_bundle(bundle), 1)
if "answer" in feeds:
    answer = feeds.pop("answer")
    cache = graphs.new_cache(1)
    graphs.read_source(cache, 0, feeds["input_ids"])
    steps = []
    for past in range(answer.shape[1]):
        one = (np.array([past]), np.array([1]), np.array([[0]]))
        steps.append(graphs.run(cache, answer[:, past : past + 1], *one))
    np.savez(out, logits=np.concatenate(steps, axis=1))
else:
    np.savez(out, **graphs.run(feeds))
"""


def feeds_of(bundle: Path) -> dict[str, np.ndarray]:
    """Make seeded inputs for a bundle, the answer of an encoder-decoder among them."""
    from edgepipe.graph.parts import seeded_feeds

    manifest = read_bundle(bundle).manifest
    if "encoder" in manifest["ends"]:
        rng = np.random.default_rng(3)
        vocabulary = manifest["model"]["vocab_size"]
        return {"input_ids": rng.integers(3, vocabulary, (1, 11)), "answer": rng.integers(3, vocabulary, (1, 9))}
    return seeded_feeds(manifest["ends"]["model"]["inputs"], manifest["model"]["vocab_size"], 3)


def torch_outputs(directory: Path, weights: WeightStore, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run transformers' own module on the inputs; pooling is done here once more, in float64."""
    import torch

    from tests.reference import pooled

    module = build_module(open_model(str(directory)).info)
    fill_module(module, weights)
    given = {name: torch.from_numpy(value) for name, value in feeds.items()}
    with torch.inference_mode():
        if "answer" in given:
            result = module(input_ids=given["input_ids"], decoder_input_ids=given["answer"], use_cache=False)
            return {"logits": result.logits.numpy()}
        core = module.get_encoder() if module.config.is_encoder_decoder else module
        states = core(**given).last_hidden_state.numpy()
    if "attention_mask" not in feeds:
        return {"last_hidden_state": states}
    mask = feeds["attention_mask"]
    return {"last_hidden_state": states, "embedding": pooled(states, mask, "mean", normalize=True)}


@pytest.mark.parametrize("name", SIX)
def test_eight_bits_in_the_base_install_are_torch_s(
    name: str, tmp_path: Path, make_bundle: Callable[..., Made], base_python: Path
) -> None:
    """Through the command, then where nothing of torch is installed."""
    directory = save_family(tmp_path / name, name)
    made = make_bundle(str(directory), "--bits", "8", measured=False)
    feeds = feeds_of(made.bundle)
    given, out = tmp_path / "given.npz", tmp_path / "out.npz"
    np.savez(given, **feeds)  # type: ignore[arg-type]
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [base_python, "-c", _CHILD, made.bundle, given, out]
    subprocess.run(command, cwd=base_python.parent, env=env, check=True)
    found = dict(np.load(out))
    source = open_model(str(directory))
    recipe = resolve(target="cpu", settings=[("quantize", "bits", 8)])
    on_grid = Quantize(bits=8)(source, Context(target=recipe.target, work_dir=tmp_path)).weights
    for weights, allowed in ((on_grid, ON_GRID), (source.weights, ORIGINAL)):
        expected = torch_outputs(directory, weights, feeds)
        assert found.keys() == expected.keys()
        for output, value in expected.items():
            error = float(np.abs(found[output] - value).max() / np.abs(value).max())
            assert error < allowed, (output, allowed, error)


@pytest.fixture(scope="module")
def large_t5(tmp_path_factory: pytest.TempPathFactory, make_bundle: Callable[..., Made]) -> tuple[Path, Made]:
    """Make a T5 of the small one's sizes, random weights and a tokenizer of 32,000 words, and its 16-bit bundle."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    directory = tmp_path_factory.mktemp("t5") / "t5-small-sizes"
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=32128, decoder_start_token_id=0)  # the rest is T5-small's
    transformers.T5ForConditionalGeneration(config).half().save_pretrained(directory)
    words = [(hashlib.sha256(str(number).encode()).hexdigest()[:9], -10.0) for number in range(32_000)]
    tokenizer = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words], unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "</s>", "pad_token": "<pad>"}', encoding="utf-8")
    made = make_bundle(str(directory), "--bits", "16", "--set", "export.check_tokens=4", measured=False)
    return directory, made


def test_a_t5_of_16_bits_is_no_larger_than_its_parameters(large_t5: tuple[Path, Made]) -> None:
    """Two graphs, one file: the embedding that encoder, decoder and head share is there once."""
    directory, made = large_t5
    parameters = open_model(str(directory)).weights.parameters
    assert parameters > 60_000_000
    total = sum(file.stat().st_size for file in made.bundle.iterdir())
    assert (made.bundle / "tokenizer.json").stat().st_size > 500_000
    assert total <= 1.05 * 2 * parameters, total / (2 * parameters)


def test_decoding_with_a_cache_is_decoding_without(large_t5: tuple[Path, Made]) -> None:
    """Greedy ids token by token are those of whole runs from nothing, and so are the logits."""
    _, made = large_t5
    decoder = open_graphs(read_bundle(made.bundle), None)
    source = np.random.default_rng(0).integers(3, 32000, (1, 30))
    cached, fresh = decoder.new_cache(1), decoder.new_cache(1)
    for cache in (cached, fresh):
        decoder.read_source(cache, 0, source)
    ids = [0]
    for past in range(16):
        one = np.array([[ids[-1]]])
        step = decoder.run(cached, one, np.array([past]), np.array([1]), np.array([[0]]))[0, 0]
        count = len(ids)
        whole = decoder.run(fresh, np.array([ids]), np.array([0]), np.array([count]), np.array([[count - 1]]))[0, 0]
        assert np.abs(step - whole).max() < 1e-4 * np.abs(whole).max()
        assert step.argmax() == whole.argmax()
        ids.append(int(step.argmax()))


def build(directory: Path, folder: Path, task: str) -> Path:
    """Make an 8-bit bundle in this process."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text('stages = ["quantize", "export", "compile"]\n', encoding="utf-8")
    recipe = resolve(target="cpu", file=folder / "recipe.toml", settings=[("quantize", "bits", 8)])
    compress(str(directory), recipe, listener=Silent(), out=folder / "bundle", runs=folder / "runs", task=task)
    return folder / "bundle"


def stated() -> dict[str, tuple[str, str]]:
    """Return what docs/tasks.md says of each family: yes or no, and the sentence."""
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8").partition("## Families that were tried")[2]
    rows = re.findall(r"^\| `([^`]+)` \| [\w-]+ \| (yes|no) \| (.*?) ?\|$", page, re.MULTILINE)
    return {name: (outcome, sentence) for name, outcome, sentence in rows}


def test_the_page_names_every_family() -> None:
    """No more and no fewer than are tried here."""
    assert list(stated()) == sorted(FAMILIES)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_page_says_which_families_go_through(name: str, tmp_path: Path) -> None:
    """Compressed at 8 bits, checked against torch on the way, and loaded; or refused with the sentence of the page."""
    outcome, sentence = stated()[name]
    directory = save_family(tmp_path / "model", name)
    if outcome == "yes":
        assert load(build(directory, tmp_path / "made", FAMILIES[name].task)).manifest["task"] == FAMILIES[name].task
        return
    with pytest.raises(EdgepipeError) as caught:
        build(directory, tmp_path / "made", FAMILIES[name].task)
    assert sentence and sentence in str(caught.value)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


_BUILD = """
import sys
from pathlib import Path
from tests.slow.test_families import build
if sys.argv[3] == "after another":
    build(Path(sys.argv[4]), Path(sys.argv[2]) / "before", "feature-extraction")
build(Path(sys.argv[1]), Path(sys.argv[2]), "text2text-generation")
"""


def test_two_builds_in_two_processes_have_the_same_bytes(tmp_path: Path) -> None:
    """Whatever the seed of Python's hashes, the directory, and what was traced before in the process."""
    model, other = save_family(tmp_path / "model", "t5"), save_family(tmp_path / "other", "bert")
    hashes = []
    for seed, order in (("1", "alone"), ("2", "after another")):
        folder = tmp_path / f"made-{order.replace(' ', '-')}"
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", _BUILD, model, folder, order, other]
        subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True)
        files = sorted((folder / "bundle").iterdir())
        hashes.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})
    assert hashes[0] == hashes[1]
    assert json.loads((folder / "bundle" / "manifest.json").read_text(encoding="utf-8"))["task"] == ANSWERS


ANSWERS: Any = "text2text-generation"
