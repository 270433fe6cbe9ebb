"""Encoders with exits as a compiled library: the same parts, the same gates, the same answers at 1."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgepipe.errors import ContractError
from edgepipe.runtime import Encoder, load, open_graphs, read_bundle
from edgepipe.sources import open_model
from edgepipe.stages.export import Export
from edgepipe.students.config import StudentConfig
from edgepipe.verify import verify_bundle
from tests.decoders import all_on, context
from tests.engines.tvm_bundles import NOTE, built
from tests.stages.test_prune import STACK
from tests.students.tiny import save_tiny_student

pytest.importorskip("tvm", reason="TVM isn't here: pip install 'edgepipe[tvm]'")

TEXTS = [f"The river rose {i} times and {'fell' * (i % 4)}." for i in range(7)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile a classifier of 2 layers with an exit, its matrices on 4 bits and products of bytes where there are."""
    folder = tmp_path_factory.mktemp("exits")
    config = StudentConfig(
        kind="encoder", encoder={**STACK, "num_hidden_layers": 2}, exits=(1,), labels=("no", "yes"), pooling="cls"
    )
    model = all_on(open_model(str(save_tiny_student(folder / "student", config))), "4 bits")
    notes: list[str] = []
    made = built(Export(context=48, check_tokens=0)(model, context(folder)), folder / "made", notes, accuracy_level=4)
    assert notes[0].startswith(NOTE.partition(":")[0])
    return made.path


def opened(bundle: Path, threshold: float) -> Encoder:
    """Load the bundle."""
    model = load(bundle, threads=1, exit_threshold=threshold)
    assert isinstance(model, Encoder)
    return model


def test_texts_leave_and_at_1_none_does(bundle: Path) -> None:
    whole = open_graphs(read_bundle(bundle), 1, in_parts=False)
    model = opened(bundle, 1.0)
    feeds = model.feeds(TEXTS)
    assert np.array_equal(model.run(feeds)["logits"], whole.run(feeds)["logits"])
    assert model.texts_by_depth == {1: 0, 2: 7}
    layers = []
    for threshold in (0.0, 0.3, 0.5, 0.7):
        model = opened(bundle, threshold)
        assert model.classify(TEXTS).shape == (7, 2)
        layers.append(sum(depth * count for depth, count in model.texts_by_depth.items()))
    assert layers == sorted(layers)
    assert layers[0] == 7 < layers[-1]


def test_a_library_without_a_part_is_refused(bundle: Path, tmp_path: Path) -> None:
    assert {check["name"]: check for check in verify_bundle(bundle)["checks"]}["graph"]["ok"]
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    functions = manifest["library"]["functions"]
    functions["part_0"], functions["part_1"] = functions["part_1"], functions["part_0"]
    (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ContractError, match=r"build (the bundle|it) again"):
        load(copy)
