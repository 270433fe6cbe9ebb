"""Facts that every kind of source needs: licence, fingerprint; plain words for a missing package or bad JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgepipe.artifacts import Json
from edgepipe.errors import ConfigError, TargetError

_CHUNK_BYTES = 1 << 20  # read at a time: a fingerprint must not need the memory of a model

# Licence names as the hub and GGUF files write them → SPDX ids.
_SPDX = {
    "apache-2.0": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "mit": "MIT",
    "bsd-2-clause": "BSD-2-Clause",
    "bsd-3-clause": "BSD-3-Clause",
    "cc-by-4.0": "CC-BY-4.0",
    "cc-by-sa-4.0": "CC-BY-SA-4.0",
    "cc-by-nc-4.0": "CC-BY-NC-4.0",
    "cc0-1.0": "CC0-1.0",
    "gpl-3.0": "GPL-3.0-only",
    "agpl-3.0": "AGPL-3.0-only",
    "lgpl-3.0": "LGPL-3.0-only",
    "mpl-2.0": "MPL-2.0",
    "unlicense": "Unlicense",
}


@contextmanager
def compress_extra(work: str) -> Iterator[None]:
    """Turn a missing package into a TargetError that names the extra to install; `work` is what needed it."""
    try:
        yield
    except ImportError as error:
        raise TargetError(
            f'{work} needs a package that is not installed ({error}); run: pip install "edgepipe[compress]"'
        ) from error


def read_json(path: Path) -> Json:
    """Read a JSON object; ConfigError when the file is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: bad JSON, and bad UTF-8
        raise ConfigError(f"{path} cannot be read as JSON ({error}); take the file from its source again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} should hold a JSON object, but holds a {type(value).__name__}")
    return value


def spdx(licence: str | None) -> str:
    """Return the SPDX id of a licence as hubs write it, the text itself when it has none, or "unknown"."""
    if not isinstance(licence, str) or not licence.strip():
        return "unknown"
    return _SPDX.get(licence.strip().lower(), licence.strip())


def fingerprint(paths: Iterable[Path]) -> str:
    """Return the sha256 (hex) over the contents of files, sorted by name, each preceded by its length in bytes."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def token_ids(value: object) -> set[int]:
    """Return the token ids in a config's `eos_token_id`: an integer, a list of them, or nothing."""
    items = value if isinstance(value, list) else [value]
    return {item for item in items if isinstance(item, int) and not isinstance(item, bool) and item >= 0}
