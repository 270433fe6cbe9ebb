"""A trained student as an artifact: its weights and facts, ready for the rest of the river, or for a directory.

as_model   Student → TorchModel
save       TorchModel → a model directory (config.json, model.safetensors, tokenizer, model card) that
           `edgepipe compress` and, for a decoder, other tools take
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgepipe.artifacts import Json, Licence, ModelInfo, TorchModel
from edgepipe.errors import ConfigError
from edgepipe.store import publish, write_json
from edgepipe.students.config import embedding_names, head_alias, is_student, read_student, student_task
from edgepipe.students.files import WEIGHTS, student_config
from edgepipe.students.models import Decoder, Student
from edgepipe.weights import WeightStore, held_weight

_SAVED = "edgepipe_saved"  # in the weights' header: the names of all files of the directory
_DECODER_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def as_model(student: Student, teacher: ModelInfo, *, name: str, tokenizer: Mapping[str, bytes]) -> TorchModel:
    """Return a student as the artifact that stages pass on; it keeps the teacher's licence and lineage.

    `tokenizer` is the student's, file name → content. An answer begins with the teacher's token for beginnings, or with
    its end token where it has none.
    """
    config: Json = {**teacher_tokens(teacher), **student_config(student)}
    decodes = isinstance(student, Decoder)
    weights = {name: held_weight(name, value.detach().cpu().numpy()) for name, value in student.state_dict().items()}
    aliases = head_alias(read_student(config)) if is_student(config) else {}
    if decodes and student.tied:
        aliases = {"lm_head.weight": "model.embed_tokens.weight"}
    digest = hashlib.sha256(teacher.fingerprint.encode())
    for key in sorted(weights):
        digest.update(key.encode() + np.ascontiguousarray(weights[key].load()).tobytes())
    info = dataclasses.replace(
        teacher,
        name=name,
        task="text-generation" if decodes else student_task(config),
        config=config,
        tokenizer=dict(tokenizer),
        chat_template=teacher.chat_template if decodes else None,
        licence=Licence(id=teacher.licence.id, source=name, lineage=(teacher.licence.source, *teacher.licence.lineage)),
        fingerprint=digest.hexdigest(),
        embeddings=_DECODER_EMBEDDINGS if decodes else embedding_names(read_student(config)),
        sentence=_sentence(config),
    )
    return TorchModel(info=info, weights=WeightStore(weights, aliases))


def teacher_tokens(teacher: ModelInfo) -> Json:
    """Return what a student's config says of special tokens; ConfigError when the teacher names no end token."""
    if not teacher.eos_token_ids:
        raise ConfigError(
            f"{teacher.name} names no end token, which a student's texts end with: put eos_token_id into config.json"
        )
    end = min(teacher.eos_token_ids)
    start = end if teacher.bos_token_id is None else teacher.bos_token_id
    return {
        "bos_token_id": teacher.bos_token_id,
        "eos_token_id": sorted(teacher.eos_token_ids),
        "pad_token_id": end,
        "decoder_start_token_id": start,
    }


def strangers(directory: Path) -> list[str]:
    """Return the names in a directory that `save` didn't put there; the weights' header says what it did."""
    from safetensors import SafetensorError, safe_open

    names = sorted(entry.name for entry in directory.iterdir())
    try:
        with safe_open(directory / WEIGHTS, framework="numpy") as file:
            ours = set((file.metadata() or {}).get(_SAVED, "").split())
    except (OSError, SafetensorError):
        ours = set()
    return [name for name in names if name not in ours]


def save(model: TorchModel, directory: Path) -> None:
    """Write a student as a model directory, whole or not at all; what stood there before goes."""
    from safetensors.numpy import save_file

    staged = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        values = {name: np.ascontiguousarray(model.weights.float32(name)) for name in model.weights}
        saved = " ".join((WEIGHTS, "config.json", "README.md", *model.info.tokenizer))
        save_file(values, staged / WEIGHTS, metadata={"format": "pt", _SAVED: saved})
        write_json(staged / "config.json", model.info.config)
        for name, content in model.info.tokenizer.items():
            (staged / name).write_bytes(content)
        (staged / "README.md").write_text(_card(model.info), encoding="utf-8")
        publish(staged, directory)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _card(info: ModelInfo) -> str:
    """Return a model card whose header says licence and ancestors, as hubs and `edgepipe compress` read them."""
    bases = "".join(f"- {base}\n" for base in info.licence.lineage)
    return f"---\nlicense: {info.licence.id}\nbase_model:\n{bases}---\n\n# {info.name}\n\nMade by edgepipe's distill.\n"


def _sentence(config: Json) -> Json | None:
    """Return how an encoder's embedding is made, as sentence encoders' files say it."""
    if not is_student(config) or student_task(config) != "feature-extraction":
        return None
    return {"pooling": config["pooling"], "normalize": config["normalize"], "max_tokens": None}
