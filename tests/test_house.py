"""The house rules of the code itself: which way imports point, what stays light, how long a file may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "edgepipe"
CLI = PACKAGE / "cli.py"
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py"))

# A module imports from its own floor and from those below it. First part of the dotted name after `edgepipe.`.
FLOORS = (
    {"", "errors", "artifacts", "package_data", "lock", "levels"},
    {"numerics"},
    {"weights", "target", "calibration", "rows", "sbom"},
    {"store", "sources", "graph", "students", "training", "quantizers", "pruning", "engines", "runtime"},
    {"machine"},
    {"bundle", "measuring", "report", "compiling"},
    {"stages"},
    {"recipe"},
    {"pipeline"},
    {"search"},
    {
        "compress",
        "distill",
        "doctor",
        "evaluate",
        "inspect",
        "measure",
        "stage_help",
        "talk",
        "verify",
    },  # one library function behind each verb
    {"cli", "__main__"},
)
RUNTIME_MAY = {
    *("edgepipe", "jinja2", "numpy", "onnxruntime", "onnxruntime_qnn", "tokenizers", "tvm_ffi"),
    *sys.stdlib_module_names,
}
HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "gguf", "huggingface_hub", "safetensors"}
# package → names of its homes under engines/, runtime/
ENGINE_PACKAGES = {
    "onnxruntime": ("onnxruntime", "qnn"),  # qnn is a provider of onnxruntime's
    "onnxruntime_qnn": ("qnn",),
    "tvm": ("tvm",),
    "tvm_ffi": ("tvm",),
}

# Signatures that another library dictates: Jinja hands a template's namespace(found=false) over as keywords.
DICTATED = {("edgepipe/runtime/chat.py", "_PlainNamespace.__init__")}


@dataclass(frozen=True, slots=True)
class Import:
    """Say what one import statement asks for."""

    module: str  # absolute dotted name; for `from a import b` both a and a.b are given, b may be a module
    line: int
    at_import: bool  # runs when the file is imported, not inside a function


def imports(source: str) -> Iterator[Import]:
    """Yield the imports of a file; those under `if TYPE_CHECKING:` never run and are left out."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            children: list[ast.AST] = list(node.orelse)
        else:
            children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"line {node.lineno}: imports are absolute in this house"
            yield Import(node.module, node.lineno, at_import)
            yield from (Import(f"{node.module}.{alias.name}", node.lineno, at_import) for alias in node.names)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in children:
            yield from visit(child, at_import and not inside)

    return visit(ast.parse(source), True)


def room_of(dotted: str) -> str:
    """Return the first part after `edgepipe.`, an empty string for the package itself."""
    return dotted.partition(".")[2].partition(".")[0]


def floor(dotted: str) -> int:
    """Return the floor of an edgepipe module."""
    part = room_of(dotted)
    for number, parts in enumerate(FLOORS):
        if part in parts:
            return number
    raise AssertionError(f"{dotted} has no floor yet: give it one in tests/test_house.py, FLOORS")


def complaints(path: str, source: str) -> list[str]:
    """Return what is wrong with the imports of the file at `path` (relative to the repository)."""
    dotted = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    here, room = floor(dotted), room_of(dotted)
    found = []
    for item in imports(source):
        top = item.module.partition(".")[0]
        where = f"{path}:{item.line}: "
        if top == "edgepipe":
            if is_module(item.module) and floor(item.module) > here:
                found.append(f"{where}{dotted} imports upwards: {item.module}")
            if room == "runtime" and is_module(item.module) and not allowed_in_runtime(item.module):
                found.append(f"{where}the runtime may use edgepipe.errors and itself, not {item.module}")
        elif room == "runtime" and top not in RUNTIME_MAY:
            found.append(f"{where}the base install has no {top}")
        if top in ENGINE_PACKAGES and not at_home(dotted, ENGINE_PACKAGES[top]):
            found.append(f"{where}{top} is imported outside its engine's home")
        if room == "stages" and item.at_import and top in HEAVY:
            found.append(f"{where}a stage imports {top} inside __call__")
        if room == "cli" and item.at_import and not light(item.module):
            found.append(f"{where}cli.py imports {item.module} inside the command that needs it")
    return found


def is_module(dotted: str) -> bool:
    """Tell a module from a name that lives in one."""
    path = ROOT / dotted.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def allowed_in_runtime(dotted: str) -> bool:
    """Say whether the runtime may import this edgepipe module; `edgepipe` alone is its version."""
    return dotted in {"edgepipe", "edgepipe.errors", "edgepipe.runtime"} or dotted.startswith("edgepipe.runtime.")


def at_home(dotted: str, engines: tuple[str, ...]) -> bool:
    """Say whether a module is one of the homes of an engine's package, two for each engine."""
    return any(dotted == home or dotted.startswith(home + ".") for engine in engines for home in homes(engine))


def homes(engine: str) -> tuple[str, str]:
    """Return the modules that may import an engine's package."""
    return f"edgepipe.engines.{engine}", f"edgepipe.runtime.{engine}"


def light(dotted: str) -> bool:
    """Say whether cli.py may import this when it is imported itself."""
    top = dotted.partition(".")[0]
    own = top == "edgepipe" and (not is_module(dotted) or dotted in {"edgepipe", "edgepipe.errors"})
    return own or top == "click" or top in sys.stdlib_module_names


@pytest.mark.parametrize("path", MODULES)
def test_imports_point_one_way_and_heavy_ones_stay_at_home(path: str) -> None:
    """Each module keeps to the import arrows of the design."""
    assert complaints(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("edgepipe/errors.py", "from edgepipe import weights", "upwards"),
        ("edgepipe/numerics/grids.py", "def f():\n    from edgepipe.sources import open_model", "upwards"),
        ("edgepipe/runtime/chat.py", "import torch", "base install has no torch"),
        ("edgepipe/runtime/chat.py", "def f():\n    import transformers", "base install has no transformers"),
        ("edgepipe/runtime/chat.py", "from edgepipe.artifacts import Json", "may use edgepipe.errors and itself"),
        ("edgepipe/runtime/chat.py", "from edgepipe import artifacts", "may use edgepipe.errors and itself"),
        ("edgepipe/runtime/chat.py", "import onnxruntime", "outside its engine's home"),
        ("edgepipe/stages/export.py", "def f():\n    import onnxruntime as ort", "outside its engine's home"),
        ("edgepipe/engines/onnxruntime/names.py", "import tvm.relax", "outside its engine's home"),
        ("edgepipe/runtime/tvm.py", "import tvm", "base install has no tvm"),
        ("edgepipe/runtime/growing.py", "import tvm_ffi", "outside its engine's home"),
        ("edgepipe/stages/export.py", "import torch", "inside __call__"),
        ("edgepipe/stages/export.py", "class A:\n    import torch", "inside __call__"),
        ("edgepipe/cli.py", "import numpy as np", "inside the command"),
        ("edgepipe/cli.py", "from edgepipe.weights import Weight", "inside the command"),
        ("edgepipe/cli.py", "from edgepipe import weights", "inside the command"),
        ("edgepipe/stages/export.py", "import torch\nif TYPE_CHECKING:\n    import gguf", "inside __call__"),
    ],
)
def test_the_checks_notice(path: str, source: str, complaint: str) -> None:
    """Each rule finds the mistake it is there for, and only that one."""
    (found,) = complaints(path, source)
    assert complaint in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("edgepipe/runtime/onnxruntime.py", "import onnxruntime\nfrom edgepipe.errors import ConfigError"),
        ("edgepipe/engines/onnxruntime/names.py", "import onnxruntime"),
        ("edgepipe/stages/export.py", "def f():\n    import torch"),
        ("edgepipe/cli.py", "import click\ndef f():\n    from edgepipe.pipeline import compress"),
        ("edgepipe/errors.py", "if TYPE_CHECKING:\n    from edgepipe.pipeline import x\n"),
        ("edgepipe/runtime/chat.py", "from edgepipe import __version__"),
    ],
)
def test_the_checks_let_through(path: str, source: str) -> None:
    """What the design allows is not complained about."""
    assert complaints(path, source) == []


@pytest.mark.parametrize("path", MODULES)
def test_no_file_grows_beyond_a_sitting(path: str) -> None:
    """A module of more than 500 lines is two modules."""
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= 500


@pytest.mark.parametrize("path", MODULES)
def test_no_function_takes_arbitrary_keywords(path: str) -> None:
    """A signature says what it takes: **kwargs swallows the typing errors of callers."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    found = {(path, name) for name, function in functions(tree) if function.args.kwarg}
    assert found - DICTATED == set()


def functions(node: ast.AST, outer: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield every function below a node with its qualified name."""
    for child in ast.iter_child_nodes(node):
        name = f"{outer}.{child.name}".lstrip(".") if hasattr(child, "name") and child.name else outer
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, child
        yield from functions(child, name)


def test_importing_the_runtime_loads_nothing_of_the_compressor() -> None:
    """What an app embeds pulls in no training or export package, whatever else is installed beside it."""
    code = f"import sys, edgepipe.runtime; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_tracked_text_names_a_registry_or_this_machine() -> None:
    """Where packages come from is the user's pip configuration's business, and paths of one machine help nobody."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    private = re.compile(r"index-url|pypi\.org|pythonhosted|download\.pytorch|(?<![\w.$}])/(?:work|opt|root)/")
    found = []
    for name in listed.stdout.split("\0"):
        path = ROOT / name
        if name and path.is_file() and path != Path(__file__).resolve():
            text = path.read_bytes().decode("utf-8", errors="ignore")
            found += [f"{name}: {match[0]}" for match in private.finditer(text)]
    assert found == []


@pytest.mark.skipif(not CLI.exists(), reason="edgepipe has no command line yet")
def test_help_answers_at_once() -> None:
    """`edgepipe --help` loads no array or tensor package and takes under 0.4 s of a processor (best of five)."""
    resource = pytest.importorskip("resource", reason="times of children are POSIX")

    code = "import sys, edgepipe.cli; print(sorted({'numpy', 'onnxruntime', 'jinja2', 'torch'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-c", "from edgepipe.cli import main; main()", "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert "compress" in done.stdout
    assert min(seconds) < 0.4, f"seconds of five runs: {seconds}"
