"""Tasks: what each one is called, which of transformers' classes computes it, and what its graph gives.

The names are those of transformers' pipelines. A task decides under which names a checkpoint's weights are read, so it
is settled when a model is opened.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgepipe.artifacts import Json
from edgepipe.errors import ConfigError
from edgepipe.students.config import is_student, student_task


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Say what one task needs of a model."""

    name: str
    auto_class: str  # of transformers
    architectures: tuple[str, ...]  # endings of class names in a config that mean this task
    outputs: tuple[str, ...] = ("logits",)  # of a task with one graph; generation has outputs of its own


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="text-generation",
            auto_class="AutoModelForCausalLM",
            architectures=("ForCausalLM", "LMHeadModel"),
        ),
        Task(
            name="text2text-generation",
            auto_class="AutoModelForSeq2SeqLM",
            architectures=("ForConditionalGeneration", "MTModel"),
        ),
        Task(
            name="text-classification",
            auto_class="AutoModelForSequenceClassification",
            architectures=("ForSequenceClassification",),
        ),
        Task(
            name="token-classification",
            auto_class="AutoModelForTokenClassification",
            architectures=("ForTokenClassification",),
        ),
        Task(
            name="question-answering",
            auto_class="AutoModelForQuestionAnswering",
            architectures=("ForQuestionAnswering",),
            outputs=("start_logits", "end_logits"),
        ),
        Task(
            name="image-classification",
            auto_class="AutoModelForImageClassification",
            architectures=("ForImageClassification",),
        ),
        Task(
            name="audio-classification",
            auto_class="AutoModelForAudioClassification",
            architectures=("ForAudioClassification",),
        ),
        Task(
            name="fill-mask",
            auto_class="AutoModelForMaskedLM",
            architectures=(),  # a BertForMaskedLM is taken for an encoder: --task fill-mask keeps its head
        ),
        Task(
            name="feature-extraction",
            auto_class="AutoModel",
            architectures=("ForMaskedLM", "ForPreTraining", "Model", "Encoder"),
            outputs=("last_hidden_state",),
        ),
    )
}
GENERATION = ("text-generation", "text2text-generation")  # tasks with a cache of keys and values

# By model_type, for a config that names no architecture, or only a body that two tasks share (LlamaModel).
# fmt: off
_DECODERS = frozenset({
    "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neo", "gpt_neox", "granite", "llama", "mistral", "mpt",
    "olmo", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2",
})
_ENCODERS = frozenset({
    "albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet",
    "nomic_bert", "roberta", "xlm-roberta",
})
_HEARERS = frozenset({  # their …ForSequenceClassification judges sound
    "data2vec-audio", "hubert", "sew", "sew-d", "unispeech", "unispeech-sat", "wav2vec2", "wav2vec2-bert",
    "wav2vec2-conformer", "wavlm",
})
# fmt: on
_LISTENERS = frozenset({"whisper"})  # encoder-decoders whose source isn't text: their encoder is what is taken


def task_of(config: Json, source: str, wanted: str | None = None) -> str:
    """Return the task a config describes, or `wanted` (--task). Raises ConfigError when it is none of `TASKS`."""
    if wanted is not None:
        if wanted not in TASKS:
            raise ConfigError(f"--task {wanted}: expected one of {', '.join(TASKS)}")
        if is_student(config) and wanted != student_task(config):
            raise ConfigError(f"--task {wanted}: the student in {source} is for {student_task(config)}; leave it out")
        return wanted
    if is_student(config):
        return student_task(config)
    model_type = str(config.get("model_type"))
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        raise ConfigError(f"{source}: `architectures` in the config should be a list, but is {architectures!r}")
    if model_type in _LISTENERS:
        return "feature-extraction"
    names = [str(name) for name in architectures]
    bodies = [name for name in names if name.endswith("Model") and not name.endswith(("LMHeadModel", "MTModel"))]
    if model_type in _DECODERS and (not names or bodies):
        return "text-generation"
    for task in TASKS.values():
        if any(name.endswith(task.architectures) for name in names if task.architectures):
            hears = model_type in _HEARERS and task.name == "text-classification"
            return "audio-classification" if hears else task.name
    if model_type in _ENCODERS:
        return "feature-extraction"
    what = ", ".join(names) or f"model_type {model_type!r}"
    raise ConfigError(
        f"{source} holds {what}, which says no task edgepipe knows: add --task, one of {', '.join(TASKS)}"
    )
