"""Which task a config means, and what --task may say."""

from __future__ import annotations

from typing import Any

import pytest

from edgepipe.errors import ConfigError
from edgepipe.graph.tasks import TASKS, task_of


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "text-generation"),
        ({"model_type": "llama", "architectures": ["LlamaModel"]}, "text-generation"),
        ({"model_type": "new", "architectures": ["NewForCausalLM"]}, "text-generation"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "text-generation"),
        ({"model_type": "qwen2"}, "text-generation"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "feature-extraction"),
        ({"model_type": "bert"}, "feature-extraction"),
        ({"model_type": "roberta", "architectures": ["RobertaForMaskedLM"]}, "feature-extraction"),
        ({"model_type": "roberta", "architectures": ["RobertaForSequenceClassification"]}, "text-classification"),
        ({"model_type": "bert", "architectures": ["BertForTokenClassification"]}, "token-classification"),
        ({"model_type": "bert", "architectures": ["BertForQuestionAnswering"]}, "question-answering"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "text2text-generation"),
        ({"model_type": "marian", "architectures": ["MarianMTModel"]}, "text2text-generation"),
        ({"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}, "feature-extraction"),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, "image-classification"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "feature-extraction"),
    ],
)
def test_the_class_a_model_was_saved_as_says_its_task(config: dict[str, Any], task: str) -> None:
    """Bodies are embedded, unless the family is one of decoders; heads keep their task."""
    assert task_of(config, "x") == task


@pytest.mark.parametrize("config", [{}, {"model_type": "new", "architectures": ["NewForDepthEstimation"]}])
def test_an_unknown_task_is_refused_with_those_known(config: dict[str, Any]) -> None:
    """Anything else needs --task."""
    with pytest.raises(ConfigError, match="add --task, one of text-generation"):
        task_of(config, "x")


@pytest.mark.parametrize("task", list(TASKS))
def test_a_task_that_is_asked_for_wins(task: str) -> None:
    """--task overrides what the config says."""
    assert task_of({"model_type": "bert", "architectures": ["BertModel"]}, "x", task) == task


def test_an_unknown_word_for_a_task_is_refused() -> None:
    """A typing error in --task is a sentence that lists the names."""
    with pytest.raises(ConfigError, match="--task embed: expected one of text-generation"):
        task_of({}, "x", "embed")
