"""A teacher that learns the task first: its loss, and that what comes out is what was trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgepipe.sources import open_model
from edgepipe.training.adapt import Adapters, adapt_teacher, answers
from edgepipe.training.loop import LoopData, LoopOptions, Place
from edgepipe.training.teacher import open_teacher
from tests.tiny_models import random_model, tiny_config
from tests.training.tiny import EOS, VOCAB, reversals


def test_the_loss_is_that_of_the_targets_alone() -> None:
    """Of a ragged batch: the mean over all target tokens of −log p, each row read alone; the source costs nothing."""
    module = random_model(tiny_config("llama", vocab_size=VOCAB, eos_token_id=EOS), seed=3)
    examples = reversals(6, 2)
    total, right, count = 0.0, 0, 0
    with torch.no_grad():
        found = answers(module, examples.collate(range(6)), 1)
        for x, y in zip(examples.sources, examples.targets, strict=True):
            logits = module(torch.tensor([[*x.tolist(), *y.tolist()]])).logits[0].double().numpy()
            for place, token in enumerate(y.tolist(), start=len(x) - 1):
                exponents = np.exp(logits[place] - logits[place].max())
                total -= float(np.log(exponents[token] / exponents.sum()))
                right += int(logits[place].argmax()) == token
                count += 1
    assert int(found.weight) == count
    assert float(found.loss) == pytest.approx(total / count, rel=1e-5)
    assert float(found.figures["accuracy"]) == pytest.approx(right / count)


def test_the_artifact_is_the_adapted_teacher(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Students are made of the artifact and taught by the module: both are what was trained, and no longer the base."""
    base = open_model(str(tiny_model_dir))
    options = LoopOptions(steps=4, batch=8, warmup=1, learning_rate=1e-2, precision="no")
    place = Place(folder=tmp_path, key="adapted")
    adapted, teacher, record = adapt_teacher(base, LoopData(train=reversals(32, 1)), Adapters(), options, place)
    assert record["train"][-1]["loss"] < record["train"][0]["loss"]
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, (2, 9)))
    with torch.no_grad():
        merged = teacher.module(ids).logits
        read, before = (open_teacher(model).module(ids).logits for model in (adapted, base))
    assert torch.allclose(read, merged, atol=1e-4)
    assert not torch.allclose(before, merged, atol=0.1)
    assert adapted.info.fingerprint == teacher.fingerprint != base.info.fingerprint
    assert set(adapted.weights) == set(base.weights)
