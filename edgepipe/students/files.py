"""Make a student, save it as safetensors + config.json, read it back.

A saved student is a model directory like any other: `edgepipe compress DIRECTORY` takes it. A decoder student is saved
as the Llama-family model it is, so other tools take it too.
"""
# ruff: noqa: TID253  a student is a torch module: this file is imported only where one is made

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from edgepipe.artifacts import Json
from edgepipe.errors import ConfigError
from edgepipe.sources.facts import read_json
from edgepipe.store import file_sha256, write_json
from edgepipe.students.config import StudentConfig, is_student, read_student
from edgepipe.students.models import Decoder, Encoder, EncoderDecoder, Student, initialize

WEIGHTS = "model.safetensors"


def make_student(config: StudentConfig | Json, *, seed: int = 0, context: int | None = None) -> Student:
    """Make a student with random weights: a StudentConfig's, or of a Llama-family config the decoder."""
    torch.manual_seed(seed)
    student = bare_student(config, context)
    initialize(student, seed)
    return student


def bare_student(config: StudentConfig | Json, context: int | None = None) -> Student:
    """Make a student whose weights are still to be filled in."""
    if not isinstance(config, StudentConfig):
        return read_bare(config, context)
    return Encoder(config, context) if config.decoder is None else EncoderDecoder(config, context)


def read_bare(config: Json, context: int | None = None) -> Student:
    """Make the student that a config.json describes, its weights still to be filled in."""
    return bare_student(read_student(config), context) if is_student(config) else Decoder(config, context)


def student_config(student: Student) -> Json:
    """Return a student's config.json."""
    return student.config if isinstance(student, Decoder) else student.config.to_json()


def save_student(student: Student, directory: Path, files: Mapping[str, bytes], extra: Json | None = None) -> None:
    """Write config.json, model.safetensors and `files` (the tokenizer's) into `directory`, which must exist.

    `extra` is added to the config: the ids of special tokens.
    """
    from safetensors.torch import save_file

    state = {name: value.detach().contiguous().cpu() for name, value in student.state_dict().items()}
    save_file(state, directory / WEIGHTS, metadata={"format": "pt"})
    write_json(directory / "config.json", {**student_config(student), **(extra or {})})
    for name, content in files.items():
        (directory / name).write_bytes(content)


def student_fingerprint(directory: Path) -> str:
    """Return a hash of what a saved student is; ConfigError when the directory holds none."""
    files = [directory / name for name in ("config.json", WEIGHTS, "tokenizer.json")]
    for path in files:
        if not path.is_file():
            raise ConfigError(f"{directory} is no student's directory: it has no {path.name}")
    return "".join(file_sha256(path) for path in files)


def load_student(directory: Path) -> Student:
    """Read a saved student; ConfigError names the file that is damaged, or both when they contradict each other."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config_path, weights_path = directory / "config.json", directory / WEIGHTS
    config = read_json(config_path)
    try:
        student = read_bare(config)
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{config_path} describes no student: {why}") from error
    try:
        values = load_file(weights_path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{weights_path} is truncated or not a safetensors file ({error}); copy it again") from error
    own = student.state_dict()
    for name in sorted(own.keys() | values.keys()):
        if name not in own or name not in values or own[name].shape != values[name].shape:
            raise ConfigError(f"{directory}: config.json and {WEIGHTS} disagree about {name}; copy both again")
    student.load_state_dict(values)
    return student
