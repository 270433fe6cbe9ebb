"""200 ways to damage a bundle, seeded: what copying, disks, editors and strangers do to files.

Each damage is a function of a bundle's copy and a random generator. `tests/runtime/test_damaged_bundles.py` holds
`edgepipe verify` and `runtime.load` against them. A byte that is changed together with its hash, in a place where any
byte is right (a weight, a note), is no damage: nobody can see it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Damage = Callable[[Path, random.Random], None]

BILL = "sbom.cdx.json"
PARTS = ("chat_template.jinja", "decoder.onnx", "tokenizer.json", "weights.bin", BILL)
MANIFEST = "manifest.json"


def read(bundle: Path) -> dict[str, Any]:
    """Return the manifest."""
    return dict(json.loads((bundle / MANIFEST).read_text(encoding="utf-8")))


def write(bundle: Path, manifest: object) -> None:
    """Write the manifest."""
    (bundle / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def own_up(bundle: Path) -> None:
    """Let manifest and bill state sizes and hashes of the files as they are now: the parsers get to see them."""
    with contextlib.suppress(
        OSError, ValueError, LookupError, TypeError, RecursionError
    ):  # the bill may be what was damaged
        bill = json.loads((bundle / BILL).read_bytes())
        for component in bill["components"]:
            if component["type"] == "file":
                content = (bundle / component["name"]).read_bytes()
                component["hashes"][0]["content"] = hashlib.sha256(content).hexdigest()
        (bundle / BILL).write_text(json.dumps(bill), encoding="utf-8")
    for name in read(bundle)["files"]:
        if (bundle / name).exists():
            write_hash(bundle, name)
    manifest = read(bundle)
    weights = manifest["weights"]
    weights["bytes"] = manifest["files"][weights["file"]]["bytes"]
    weights["bits_per_weight"] = round(8 * weights["bytes"] / weights["parameters"], 4)
    write(bundle, manifest)


def write_hash(bundle: Path, name: str) -> None:
    """Let the manifest state the size and hash of one file as it is now."""
    manifest, content = read(bundle), (bundle / name).read_bytes()
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write(bundle, manifest)


# ---------------------------------------------------------------------------------------------------------------------
# bytes


def flip(name: str, count: int) -> Damage:
    """Change `count` bytes of a file. In the manifest, so that it is no UTF-8: any text may stand in a note."""

    def damage(bundle: Path, rng: random.Random) -> None:
        content = bytearray((bundle / name).read_bytes())
        for place in rng.sample(range(len(content)), count):
            content[place] ^= 0x80 if name == MANIFEST else rng.randrange(1, 256)
        (bundle / name).write_bytes(content)

    return damage


def cut(name: str, keep: float) -> Damage:
    """Keep the first part of a file."""

    def damage(bundle: Path, _: random.Random) -> None:
        content = (bundle / name).read_bytes()
        (bundle / name).write_bytes(content[: int((len(content) - 2) * keep)])  # of the manifest more than its newline

    return damage


def append(name: str) -> Damage:
    """Add a few bytes to a file."""

    def damage(bundle: Path, rng: random.Random) -> None:
        (bundle / name).write_bytes((bundle / name).read_bytes() + rng.randbytes(7))

    return damage


def zero(name: str) -> Damage:
    """Overwrite a page of a file, or all of a smaller one, as a disk does that lost it."""

    def damage(bundle: Path, rng: random.Random) -> None:
        content = bytearray((bundle / name).read_bytes())
        start = rng.randrange(max(1, len(content) - 4096))
        content[start : start + 4096] = bytes(len(content[start : start + 4096]))
        (bundle / name).write_bytes(content)

    return damage


def stated_hash(name: str) -> Damage:
    """Change one digit of a hash in the manifest."""

    def damage(bundle: Path, rng: random.Random) -> None:
        manifest = read(bundle)
        digits = list(manifest["files"][name]["sha256"])
        place = rng.randrange(64)
        digits[place] = "0" if digits[place] != "0" else "1"
        manifest["files"][name]["sha256"] = "".join(digits)
        write(bundle, manifest)

    return damage


# ---------------------------------------------------------------------------------------------------------------------
# files


def remove(name: str) -> Damage:
    """Delete a file."""
    return lambda bundle, _: (bundle / name).unlink()


def folder(name: str) -> Damage:
    """Put a folder in a file's place."""

    def damage(bundle: Path, _: random.Random) -> None:
        (bundle / name).unlink()
        (bundle / name).mkdir()

    return damage


def pipe(name: str) -> Damage:
    """Put a named pipe in a file's place: who opens it waits for ever."""

    def damage(bundle: Path, _: random.Random) -> None:
        (bundle / name).unlink()
        os.mkfifo(bundle / name)

    return damage


def link(name: str, to: str) -> Damage:
    """Put a link in a file's place: to the same content outside, to nowhere, to itself, to a device."""

    def damage(bundle: Path, _: random.Random) -> None:
        outside = bundle.parent / f"{bundle.name}-{name}"
        (bundle / name).rename(outside)
        (bundle / name).symlink_to({"outside": outside, "itself": bundle / name}.get(to, Path(to)))

    return damage


def extra(name: str, content: bytes = b"x") -> Damage:
    """Add a file that the manifest doesn't list."""

    def damage(bundle: Path, _: random.Random) -> None:
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_bytes(content)

    return damage


def swap(first: str, second: str, *, owned_up: bool = False) -> Damage:
    """Exchange two files' contents."""

    def damage(bundle: Path, _: random.Random) -> None:
        contents = [(bundle / name).read_bytes() for name in (second, first)]
        for name, content in zip((first, second), contents, strict=True):
            (bundle / name).write_bytes(content)
        if owned_up:
            own_up(bundle)

    return damage


def replaced(name: str, make: Callable[[bytes, random.Random], bytes]) -> Damage:
    """Change a file and own up to it."""

    def damage(bundle: Path, rng: random.Random) -> None:
        (bundle / name).write_bytes(make((bundle / name).read_bytes(), rng))
        own_up(bundle)

    return damage


# ---------------------------------------------------------------------------------------------------------------------
# the manifest


def put(where: str, value: object) -> Damage:
    """Set one value of the manifest."""

    def damage(bundle: Path, _: random.Random) -> None:
        manifest = read(bundle)
        *parents, last = where.split("/")
        holder: Any = manifest
        for parent in parents:
            holder = holder[parent]
        holder[last] = value
        write(bundle, manifest)

    return damage


def drop(where: str) -> Damage:
    """Take one key out of the manifest."""

    def damage(bundle: Path, _: random.Random) -> None:
        manifest = read(bundle)
        *parents, last = where.split("/")
        holder: Any = manifest
        for parent in parents:
            holder = holder[parent]
        del holder[last]
        write(bundle, manifest)

    return damage


def name_file(where: str, name: str) -> Damage:
    """Name a file that the bundle should not reach, listed with size and hash as if it were right."""

    def damage(bundle: Path, _: random.Random) -> None:
        manifest = read(bundle)
        part, key = where.split("/")
        (bundle.parent / f"{bundle.name}-outside").write_bytes((bundle / manifest[part][key]).read_bytes())
        manifest["files"][name] = manifest["files"].pop(manifest[part][key])
        manifest[part][key] = name
        write(bundle, manifest)

    return damage


def text(content: bytes) -> Damage:
    """Write other bytes as the manifest."""
    return lambda bundle, _: (bundle / MANIFEST).write_bytes(content) and None


def spliced(before: bytes, content: bytes) -> Damage:
    """Write raw JSON into the manifest, in front of a key: what json.dumps would not write."""

    def damage(bundle: Path, _: random.Random) -> None:
        whole = (bundle / MANIFEST).read_bytes()
        assert before in whole
        (bundle / MANIFEST).write_bytes(whole.replace(before, content + before, 1))

    return damage


def hole(nbytes: int) -> Damage:
    """Make the manifest a hole of many bytes: takes no disk, and memory if somebody reads it."""

    def damage(bundle: Path, _: random.Random) -> None:
        with (bundle / MANIFEST).open("wb") as file:
            file.truncate(nbytes)

    return damage


def many_files(count: int) -> Damage:
    """List files that aren't there."""

    def damage(bundle: Path, _: random.Random) -> None:
        manifest = read(bundle)
        manifest["files"] |= {f"f{number}": {"bytes": 0, "sha256": "0" * 64} for number in range(count)}
        write(bundle, manifest)

    return damage


NAMES = (
    *("../weights.bin", "/etc/hostname", "a/../../weights.bin", "./weights.bin", "", "a//b", "C:weights.bin"),
    *("..\\weights.bin", "weights.bin\0", "weights\n.bin", "\ud800", "w" * 4000, "..", "w/" * 3000 + "w"),
)
SCHEMAS = (0, -1, 3, 99, 2**31, 10**30, "1", 1.5, True, None, [1], {"is": 1})
ABSURD = (
    *(("model/layers", value) for value in (0, -1, 1, 3, 4096, 10**12)),
    *(("model/kv_heads", value) for value in (0, 1, 4097)),
    *(("model/heads", value) for value in (0, 8, 10**30)),
    *(("model/head_dim", value) for value in (0, 8, 10**9)),
    *(("model/hidden_size", value) for value in (0, None)),
    *(("model/vocab_size", value) for value in (1, 385, 1 << 24, 10**18)),
    *(("model/context", value) for value in (1, 64, 1 << 26, 1 << 60)),
    *(("model/eos_token_ids", value) for value in ([384], [-1], None, [[1]], [True], list(range(500)))),
    *(("model/bos_token_id", value) for value in (384, -1, 1.5)),
    *(("cache/bytes", value) for value in (0, 114687, 10**40)),
    *(("cache/dtype", value) for value in ("float32", "int4", 16)),
    *(("cache/shape", value) for value in ([], [1, 7, 128], [1, 7, 10**9, 16], "1")),
    *(("weights/bytes", value) for value in (0, 1 << 60)),
    *(("weights/parameters", value) for value in (0, 1, 10**400)),
    *(("weights/bits_per_weight", value) for value in (0, 1e308, "4")),
    *(("files/weights.bin/bytes", value) for value in (0, 1 << 41, 1 << 70, -1, 1.0)),
    ("files/tokenizer.json/bytes", 1 << 33),
    ("files/chat_template.jinja/bytes", 1 << 24),
)
OWNED_UP: tuple[tuple[str, str, Callable[[bytes, random.Random], bytes]], ...] = (
    *(("noise", name, lambda content, rng: rng.randbytes(len(content))) for name in PARTS[1:3]),
    *(("nothing", name, lambda content, rng: b"") for name in PARTS[1:]),
    *(("half", name, lambda content, rng: content[: len(content) // 2]) for name in PARTS[1:]),
    ("other JSON", BILL, lambda content, rng: b"[1, 2]"),
    ("deep", BILL, lambda content, rng: b"[" * 500_000),
    ("open block", "chat_template.jinja", lambda content, rng: content + b"{% if"),
    ("no text", "chat_template.jinja", lambda content, rng: b"\xff\xfe" + content),
    ("deep", "chat_template.jinja", lambda content, rng: b"{{" + b"(" * 50_000 + b")" * 50_000 + b"}}"),
    ("deep", "tokenizer.json", lambda content, rng: b'{"model":' * 50_000 + b"1" + b"}" * 50_000),
    ("other JSON", "tokenizer.json", lambda content, rng: b"[1, 2]"),
    (
        "larger",
        "tokenizer.json",
        lambda content, rng: content.replace(b'"vocab":', b'"vocab": {"far": 99999},"was":', 1),
    ),
    ("absurd length", "decoder.onnx", lambda content, rng: b"\x3a\xff\xff\xff\xff\x7f" + content),
    ("weights outside", "decoder.onnx", lambda content, rng: content.replace(b"weights.bin", b"../ights.bi")),
    ("no such operator", "decoder.onnx", lambda content, rng: content.replace(b"MatMulNBits", b"MatMulNBitz")),
    ("no such input", "decoder.onnx", lambda content, rng: content.replace(b"past_key.0", b"past_kex.0")),
    ("no such output", "decoder.onnx", lambda content, rng: content.replace(b"present_key.0", b"present_kex.0")),
)


def damages() -> dict[str, Damage]:
    """Return the damages by name."""
    every = (MANIFEST, *PARTS)
    found: dict[str, Damage] = {}
    for name in every:
        found |= {f"flip {count} of {name}": flip(name, count) for count in (1, 2, 3, 9)}
        found |= {f"cut {name} to {keep}": cut(name, keep) for keep in (0, 0.3, 0.8, 1)}
        found |= {f"append to {name}": append(name), f"zero {name}": zero(name), f"remove {name}": remove(name)}
        found |= {f"folder {name}": folder(name), f"pipe {name}": pipe(name)}
        found |= {f"link {name} to {to}": link(name, to) for to in ("outside", "/nowhere", "itself", "/dev/zero")}
    found |= {f"hash of {name}": stated_hash(name) for name in PARTS}
    for index, first in enumerate(PARTS):
        for second in PARTS[index + 1 :]:
            found[f"swap {first}, {second}"] = swap(first, second)
            found[f"swap {first}, {second}, owned up"] = swap(first, second, owned_up=True)
    found |= {f"extra {name!r}": extra(name) for name in ("notes.txt", ".hidden", "folder/file", "MANIFEST.JSON")}
    places = ("weights/file", "graphs/decoder", "tokenizer/file")
    found |= {f"{places[n % 3]} is {name[:30]!r}": name_file(places[n % 3], name) for n, name in enumerate(NAMES)}
    found |= {f"schema is {value!r}": put("schema", value) for value in SCHEMAS}
    found |= {f"{where} is {str(value)[:30]}": put(where, value) for where, value in ABSURD}
    found |= {f"without {key}": drop(key) for key in ("schema", "files", "licence", "licence/lineage", "versions")}
    found |= {f"{how}: {name}, owned up": replaced(name, make) for how, name, make in OWNED_UP}
    return found | {
        "empty licence": put("licence/id", ""),
        "other task": put("task", "\x1b[2J speech\nto text"),
        "other engine": put("engine", "tvm"),
        "deep lists": text(b"[" * 1_000_000),
        "deep objects": text(b'{"a":' * 1_000_000),
        "deep inside": spliced(b'"cache"', b'"more": ' + b"[" * 100_000 + b"]" * 100_000 + b", "),
        "many digits": spliced(b'"cache"', b'"more": ' + b"9" * 100_000 + b", "),
        "NaN": spliced(b'"cache"', b'"more": NaN, '),
        "17 MiB of blanks": text(b" " * (17 << 20)),
        "a hole of 1 TiB": hole(1 << 40),
        "UTF-16": text("{}".encode("utf-16")),
        "100,000 files": many_files(100_000),
    }
