"""What is promised of models on an NPU, on the stored run."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.npu import NAME
from benchmarks.stored import read_result

RESULT = read_result(NAME)


@pytest.mark.parametrize("row", RESULT["rows"], ids=lambda row: f"{row['model']} {row['target']}")
def test_encoders_keep_what_they_are(row: dict) -> None:
    """95 % of the nodes, every sentence within a cosine of 0.99 of float32's, Spearman within a point."""
    assert row["npu"]["share"] >= 0.95
    assert len(row["cosines"]) == 2 * row["pairs"] and min(row["cosines"]) >= 0.99
    assert abs(row["spearman"]["npu"] - row["spearman"]["float32"]) <= 0.01


@pytest.mark.parametrize("row", RESULT["steps"], ids=lambda row: f"{row['model']} {row['target']}")
def test_a_decoder_keeps_its_distribution(row: dict) -> None:
    """95 % of the nodes, and little divergence from float32's next tokens."""
    assert row["npu"]["share"] >= 0.95
    assert len(row["divergence"]) == row["tokens"] and 0 < np.mean(row["divergence"]) < 0.05
    assert np.mean(row["same_token"]) >= 0.8
    assert row["loss"]["npu"] - row["loss"]["float32"] < 0.05
