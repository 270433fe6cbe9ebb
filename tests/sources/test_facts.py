"""Facts of a model, and what a base install without the compress extra is told."""

import subprocess
import sys
from pathlib import Path

import pytest

from edgepipe.sources.facts import fingerprint, spdx, token_ids


def test_spdx() -> None:
    """Hub spellings become SPDX ids, others stay, nothing is unknown."""
    assert [spdx(text) for text in ("apache-2.0", " MIT ", "house", "", None)] == [
        "Apache-2.0",
        "MIT",
        "house",
        "unknown",
        "unknown",
    ]


def test_token_ids() -> None:
    """Only token ids are taken from a config's field."""
    assert token_ids([3, 1, -1, True, "2", None]) == {1, 3}
    assert token_ids(0) == {0}
    assert token_ids(None) == set()


def test_fingerprint_knows_where_files_end(tmp_path: Path) -> None:
    """The same bytes divided otherwise over two files are another model; the order asked in does not matter."""
    one, two = tmp_path / "1", tmp_path / "2"
    one.write_bytes(b"ab")
    two.write_bytes(b"c")
    first = fingerprint([one, two])
    assert fingerprint([two, one]) == first
    one.write_bytes(b"a")
    two.write_bytes(b"bc")
    assert fingerprint([one, two]) != first


@pytest.mark.parametrize(
    ("missing", "reference"),
    [("gguf", "smollm2"), ("transformers", "smollm2"), ("transformers", "minilm"), ("safetensors", "minilm")],
)
def test_base_install_names_the_extra(missing: str, reference: str, smollm2_gguf: Path, minilm_directory: Path) -> None:
    """Without one of the extra's packages the answer is how to install it."""
    path = smollm2_gguf if reference == "smollm2" else minilm_directory
    code = f"""
import sys
sys.modules[{missing!r}] = None  # makes the import fail as it does where the package is not installed
from edgepipe.errors import TargetError
from edgepipe.sources import open_model
try:
    open_model({str(path)!r})
except TargetError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 'pip install "edgepipe[compress]"' in said


def test_importing_sources_is_light() -> None:
    """Listing the packaged models imports none of the extra's packages."""
    code = "import sys, edgepipe.sources; print([m.name for m in edgepipe.sources.PACKAGED]); print(*sys.modules)"
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0] == "['smollm2-135m', 'minilm-l6-v2']"
    assert not {"torch", "transformers", "gguf", "safetensors", "huggingface_hub", "ml_dtypes"} & set(lines[1].split())
