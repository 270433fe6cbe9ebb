"""The whole program on one page: check the chain, run each stage, record it, save it, publish the bundle.

    source ─▶ (trim) ─▶ (distill) ─▶ (prune) ─▶ quantize ─▶ export ─▶ compile ─▶ measure

Every finished stage is saved under runs/NAME/NN-stage with a key over the contents it depends on. A second run with
the same prefix reuses it, and a run that was stopped goes on after the last finished stage. The uncompressed baseline
goes down the same river without the compression stages, so that both meet the same exporter, engine and clock.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from edgepipe.artifacts import CompiledModel, Context, Json, Measured, StageRecord, TorchModel
from edgepipe.bundle import MANIFEST
from edgepipe.errors import ConfigError, ContractError, EdgepipeError, StageError
from edgepipe.lock import alone
from edgepipe.recipe import Recipe, Stage, stage_options
from edgepipe.store import (
    Artifact,
    cache_key,
    file_sha256,
    is_sealed,
    load_artifact,
    publish,
    read_json,
    save_artifact,
    seal,
    tidy,
    write_json,
)
from edgepipe.weights import WeightStore

_OWN_NAMES = r"\d\d-[\w-]+|run\.json|report\.(html|md|json)"  # what a run puts into its directory, beside the bundle
_BASELINE_STAGES = ("export", "compile")  # what is left of the river when nothing is compressed
# Above this a float32 baseline is not built: it would need more memory than the compression itself, on any machine.
BASELINE_LIMIT_BYTES = 2 << 30


class Listener(Protocol):
    """Hear how a run goes."""

    def begin(self, stage: str, number: int, total: int) -> None:
        """Hear that a stage begins: the `number`-th of `total`."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Hear how far the stage at work is."""

    def end(self, stage: str, seconds: float, *, reused: bool, notes: Sequence[str]) -> None:
        """Hear that a stage is done, or was reused from an earlier run."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _River:
    """Hold what stays the same from stage to stage of one river."""

    recipe: Recipe
    stages: tuple[tuple[str, Stage], ...]
    directory: Path
    label: str  # put before stage names shown to people: "" or "baseline "
    fresh: bool
    listener: Listener
    step: Callable[[], tuple[int, int]]  # numbers the stages of the whole run


def _river(recipe: Recipe, directory: Path, total: int, *, fresh: bool, listener: Listener) -> _River:
    """Return the river of a recipe, `total` stages long with all that flows beside it."""
    numbers = iter(range(1, total + 1))
    return _River(
        recipe=recipe,
        stages=recipe.stages,
        directory=directory,
        label="",
        fresh=fresh,
        listener=listener,
        step=lambda: (next(numbers), total),
    )


def run(
    model: TorchModel,
    recipe: Recipe,
    *,
    out: Path | None,
    runs: Path,
    fresh: bool,
    listener: Listener,
    accept: Callable[[CompiledModel], None] = lambda _bundle: None,
    finish: Callable[[CompiledModel | Measured], None] = lambda _result: None,
    beside: Json | None = None,
) -> CompiledModel | Measured:
    """Send a model down the river of `recipe` and put the bundle at `out` (default: runs/NAME/bundle).

    `accept` gets the bundle before it is put there, and raises what keeps it from that. `beside` is kept in run.json
    with the run's own record: how the recipe was found. `finish` gets the result while the run's directory and `out`
    are still kept from other runs. Raises ConfigError before any work begins when a
    stage can't take the model or another run is at work in the run's directory or at `out`, and StageError when a
    stage fails; whatever stood at `out` before is untouched then.
    """
    _check(model, recipe)
    directory = runs / run_name(model, recipe)
    target = out if out is not None else directory / "bundle"
    check_output(target)
    check_apart(target, directory)
    make_directory(directory)
    place = _real(target)
    lock = place.with_name(f".{place.name}.lock")
    with alone(directory / ".lock", str(directory)), alone(lock, f"--out {target}"):
        for folder in (directory, directory / "baseline"):
            tidy(folder, _OWN_NAMES)
        tidy(place.parent, re.escape(place.name))
        result = _run(model, recipe, directory, fresh, listener)
        accept(result.model if isinstance(result, Measured) else result)
        result = _published(result, target)
        if isinstance(result, Measured):
            try:
                write_json(directory / "run.json", _record(result, recipe) | (beside or {}))
            except OSError as error:
                raise StageError(f"the bundle is at {target}, but not its run.json: {_describe(error)}") from error
        finish(result)
        return result


def run_baseline(model: TorchModel, recipe: Recipe, *, runs: Path, fresh: bool, listener: Listener) -> CompiledModel:
    """Build the float32 baseline alone, where a run of the same recipe with other grids finds it again.

    Raises ConfigError where there is none, and what `run` raises.
    """
    _check(model, recipe)
    if without := _no_baseline(model.weights, recipe):
        raise ConfigError(f"there is no float32 model to compare with: {without}")
    directory = runs / run_name(model, recipe)
    make_directory(directory)
    with alone(directory / ".lock", str(directory)):
        for folder in (directory, directory / "baseline"):
            tidy(folder, _OWN_NAMES)
        return _baseline(model, _river(recipe, directory, len(_BASELINE_STAGES), fresh=fresh, listener=listener))


def run_stages(
    model: TorchModel, recipe: Recipe, *, runs: Path, fresh: bool, listener: Listener, last: str | None = None
) -> Artifact:
    """Run the stages of a recipe up to `last` (None: all), publish nothing, and return what the last one gives.

    Raises what `run` raises.
    """
    _check(model, recipe)
    names = [name for name, _ in recipe.stages]
    stages = recipe.stages if last is None else recipe.stages[: names.index(last) + 1]
    directory = runs / run_name(model, recipe)
    make_directory(directory)
    with alone(directory / ".lock", str(directory)):
        tidy(directory, _OWN_NAMES)
        river = _river(recipe, directory, len(stages), fresh=fresh, listener=listener)
        return _flow(model, dataclasses.replace(river, stages=stages), None, "")


def _check(model: TorchModel, recipe: Recipe) -> None:
    """Let every stage look at the target and the model before any work.

    What comes after another model was made looks at that one; until then it looks at the files that it reads, and at
    whether that model is to have exits.
    """
    from edgepipe.students.config import has_exits

    for _, stage in recipe.stages:
        if hasattr(stage, "meets"):
            stage.meets(recipe.target)
    same, leaves = True, has_exits(model.info.config)
    for _, stage in recipe.stages:
        if same and hasattr(stage, "check"):
            stage.check(model)
        elif hasattr(stage, "reads"):
            stage.reads()
        if leaves and hasattr(stage, "check_exits"):
            stage.check_exits("the model" if same else "the student")
        if hasattr(stage, "check_beside"):
            stage.check_beside(dict(recipe.stages), recipe.target)
        same = same and not getattr(stage, "makes_another", False)
        leaves = leaves or bool(getattr(stage, "exits", ()))


def _run(
    model: TorchModel, recipe: Recipe, directory: Path, fresh: bool, listener: Listener
) -> CompiledModel | Measured:
    """Run baseline and stages in `directory`, which is ours alone."""
    weights = model.weights
    without = _no_baseline(weights, recipe)
    wants_baseline = not without and any(name == "measure" for name, _ in recipe.stages)
    total = len(recipe.stages) + (len(_BASELINE_STAGES) if wants_baseline else 0)
    river = _river(recipe, directory, total, fresh=fresh, listener=listener)
    baseline: CompiledModel | None = None
    if wants_baseline:
        baseline = _baseline(model, river)
    finished = _flow(model, river, baseline, without)
    assert isinstance(finished, CompiledModel | Measured)
    return finished


def _published(finished: CompiledModel | Measured, target: Path) -> CompiledModel | Measured:
    """Put the bundle at `target`, and return the result as it lies there."""
    compiled = finished.model if isinstance(finished, Measured) else finished
    _publish_bundle(compiled, target)
    compiled = dataclasses.replace(compiled, path=target)
    return dataclasses.replace(finished, model=compiled) if isinstance(finished, Measured) else compiled


def _baseline(model: TorchModel, river: _River) -> CompiledModel:
    """Send the model through export and compile alone, in float32."""
    floats = dataclasses.replace(model, weights=model.weights.as_float32())
    stages = tuple(
        (name, _uncompressed(name, stage)) for name, stage in river.recipe.stages if name in _BASELINE_STAGES
    )
    side = dataclasses.replace(river, stages=stages, directory=river.directory / "baseline", label="baseline ")
    result = _flow(floats, side, None, "")
    assert isinstance(result, CompiledModel)
    return result


def _record(finished: Measured, recipe: Recipe) -> Json:
    """Return what run.json keeps: all that a report needs besides the bundle's manifest."""
    return {
        "recipe": recipe.to_json(),
        "budgets": dataclasses.asdict(recipe.target.budgets),
        "history": [dataclasses.asdict(record) for record in finished.history],
        "figures": finished.figures,
    }


def _uncompressed(name: str, stage: Stage) -> Stage:
    """Return a stage without the options that compress or tune: keys and values of the baseline are float32."""
    if name != "compile":
        return stage
    return dataclasses.replace(stage, cache_dtype="float32", calibration="", deflate="never", tune=0.0, tuning="")


def run_name(model: TorchModel, recipe: Recipe) -> str:
    """Name a run's directory after what is made: model, kind of student, target, and bits, as far as it has them."""
    student = next((f"-{stage.student}" for name, stage in recipe.stages if name == "distill"), "")
    bits = next((f"-{stage.bits}bit" for name, stage in recipe.stages if name == "quantize"), "")
    return f"{model.info.name.replace('/', '--')}{student}-{recipe.target.name}{bits}"


def _no_baseline(weights: WeightStore, recipe: Recipe) -> str:
    """Say why no float32 baseline is built; empty when one is."""
    if 4 * weights.parameters > BASELINE_LIMIT_BYTES:
        return "it would be larger than the limit for one"
    if any(name == "distill" and stage.student == "encoder" for name, stage in recipe.stages):
        return "an encoder and the decoder it was made of do different work"
    return ""


def _flow(model: TorchModel, river: _River, baseline: CompiledModel | None, without: str) -> Artifact:
    """Run the stages one after another, each from its cache where it has been run before."""
    weights = WeightStore({n: model.weights[n] for n in model.weights}, model.weights.aliases, origin="source")
    source = dataclasses.replace(model, weights=weights)
    artifact: Artifact = source
    key = cache_key(model.info.fingerprint, model.info.task, river.label)
    done: list[str] = []
    compiled: CompiledModel | None = None
    for number, (name, stage) in enumerate(river.stages, start=1):
        read = stage.reads() if hasattr(stage, "reads") else {}  # hashes of files that an option names
        met = stage.meets(river.recipe.target) if hasattr(stage, "meets") else {}  # what the target makes of it
        target = dataclasses.asdict(river.recipe.target)
        key = cache_key(key, name, stage_options(stage), read | met, target, river.recipe.seed)
        river.listener.begin(river.label + name, *river.step())
        apart = getattr(stage, "apart", "")  # what keeps a result beside others of the same stage
        directory = river.directory / (f"{number:02d}-{name}" + (f"-{apart}" if apart else ""))
        started = time.perf_counter()
        kept = None if river.fresh else _read_back(directory, key, source, compiled)
        if kept is None:
            make_directory(river.directory)
            _run_stage(artifact, (name, stage, key), directory, river, (baseline, without), tuple(done))
        artifact = kept or load_artifact(directory, source, compiled)
        if isinstance(artifact, CompiledModel):
            compiled = artifact
        done.append(name)
        notes = artifact.history[-1].notes
        seconds = time.perf_counter() - started
        river.listener.end(river.label + name, seconds, reused=kept is not None, notes=notes)
    return artifact


def _read_back(directory: Path, key: str, source: TorchModel, compiled: CompiledModel | None) -> Artifact | None:
    """Return what an earlier run kept under this key; None when there is nothing, or it was damaged since."""
    if not is_sealed(directory, key):
        return None
    try:
        return load_artifact(directory, source, compiled)
    except (OSError, ValueError, LookupError, TypeError, ContractError):
        return None


def _run_stage(
    artifact: Artifact,
    work: tuple[str, Stage, str],
    directory: Path,
    river: _River,
    baseline: tuple[CompiledModel | None, str],
    done: tuple[str, ...],
) -> None:
    """Run one stage and save its result in `directory`, whole or not at all."""
    name, stage, key = work
    staged = directory.with_name(f".{directory.name}.tmp")
    scratch = directory.with_name(f".{directory.name}.work")
    kept = _kept_directory(directory, key, fresh=river.fresh)
    notes: list[str] = []
    figures: Json = {}
    try:
        for path in (staged, scratch):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        ctx = Context(
            target=river.recipe.target,
            work_dir=scratch,
            keep_dir=kept,
            seed=river.recipe.seed,
            progress=river.listener.progress,
            note=notes.append,
            figures=figures.update,
            recipe=river.recipe.to_json(),
            baseline=baseline[0],
            no_baseline=baseline[1],
        )
        result = stage(artifact, ctx)
        record = StageRecord(stage=name, options=stage_options(stage), key=key, notes=tuple(notes), figures=figures)
        result = dataclasses.replace(result, history=(*artifact.history, record))
        save_artifact(result, staged, river.listener.progress)
        seal(staged, key)
        publish(staged, directory)
        shutil.rmtree(kept, ignore_errors=True)
    except EdgepipeError as error:
        if isinstance(error, StageError):
            error.stage, error.done = name, done
        raise
    except Exception as error:  # engines and file formats have errors of their own, below no common class
        raise StageError(f"stage {name} failed: {_describe(error)}", stage=name, done=done) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(staged, ignore_errors=True)


def _kept_directory(directory: Path, key: str, *, fresh: bool) -> Path:
    """Return where a stage may keep what a stopped run goes on from; what other keys left there goes."""
    kept = directory.with_name(f".{directory.name}.kept-{key[:16]}")
    for other in directory.parent.glob(f".{directory.name}.kept-*"):
        if fresh or other != kept:
            shutil.rmtree(other, ignore_errors=True)
    return kept


def _describe(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no details'}"


def check_output(path: Path) -> None:
    """Refuse an output that would overwrite something that isn't a bundle; nothing is written."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--out {path} is a file: expected a directory that is new, empty or an earlier bundle")
    if path.is_dir() and (strangers := _strangers(path)):
        raise ConfigError(
            f"--out {path} is a directory that isn't a bundle: it holds {strangers[0]}; name a new one or empty it"
        )
    check_place(path)


def check_place(path: Path) -> None:
    """Refuse an output at a place where nothing can be made; nothing is written."""
    there = next(parent for parent in _real(path).parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "can't be written to" if there.is_dir() else "is a file"
        raise ConfigError(f"--out {path} can't be made, because {there} {what}: name another place")


def _strangers(path: Path) -> list[str]:
    """Return the names in a directory that no bundle put there: what stands at the output is replaced as a whole.

    Many things are called manifest.json (a web app's, an extension's), so one counts only when edgepipe wrote it.
    """
    names = sorted(entry.name for entry in path.iterdir())
    try:
        manifest = read_json(path / MANIFEST)
        ours = {MANIFEST, *manifest["files"]} if manifest["edgepipe"] and manifest["schema"] else set()
    except (OSError, ValueError, LookupError, TypeError):
        ours = set()
    return [name for name in names if name not in ours]


def check_apart(target: Path, directory: Path) -> None:
    """Refuse an output that would replace the run's own stages."""
    place, home = _real(target), _real(directory)
    inside = place.relative_to(home).parts[:1] if place.is_relative_to(home) else ("bundle",)
    if home.is_relative_to(place) or inside != ("bundle",):
        raise ConfigError(f"--out {target} would lie over the finished stages in {directory}: name another place")


def _real(path: Path) -> Path:
    """Return the absolute path behind links and dots: what is renamed must be the directory itself."""
    return Path(os.path.realpath(path))


def make_directory(path: Path) -> None:
    """Create a directory, or say in one sentence why it can't be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".write-test"
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)  # another run may look at the same moment
    except OSError as error:
        raise ConfigError(
            f"{path} can't be written: {error.strerror}; name another place or change its rights"
        ) from error


def publish_beside(compiled: CompiledModel, target: Path) -> None:
    """Put a finished bundle at a second place; StageError when it can't be written there."""
    place = _real(target)
    with alone(place.with_name(f".{place.name}.lock"), str(target)):
        tidy(place.parent, re.escape(place.name))
        _publish_bundle(compiled, target)


def forget_stages(model: TorchModel, recipe: Recipe, *, runs: Path) -> None:
    """Remove the finished stages of earlier runs in the run's directory."""
    directory = runs / run_name(model, recipe)
    if not directory.is_dir():
        return
    with alone(directory / ".lock", str(directory)):
        for folder in (directory, directory / "baseline"):
            for stage in folder.glob("[0-9][0-9]-*"):
                shutil.rmtree(stage)
            for kept in folder.glob(".[0-9][0-9]-*.kept-*"):
                shutil.rmtree(kept)


def lend_stage(model: TorchModel, recipe: Recipe, stage: str, source: Path, runs: Path) -> None:
    """Copy what a recipe's first stage made under `source` to its run under `runs`, which then needn't repeat it."""
    name = f"01-{stage}"
    made, directory = source / run_name(model, recipe) / name, runs / run_name(model, recipe)
    make_directory(directory)
    with alone(directory / ".lock", str(directory)):
        staged = directory / f".{name}.tmp"
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(made, staged)
        publish(staged, directory / name)


def _publish_bundle(compiled: CompiledModel, target: Path) -> None:
    """Copy the finished bundle to where the user wants it; an earlier one there stays until the copy is whole."""
    manifest = target / MANIFEST
    same = manifest.is_file() and file_sha256(manifest) == file_sha256(compiled.path / MANIFEST)
    if same and all((target / n).is_file() and file_sha256(target / n) == f["sha256"] for n, f in _files(compiled)):
        return
    place = _real(target)
    staged = place.with_name(f".{place.name}.tmp")
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        for file in compiled.path.iterdir():
            shutil.copyfile(file, staged / file.name)
        publish(staged, place)
    except OSError as error:
        raise StageError(
            f"the bundle can't be written to {target}: {error.strerror}; it is kept in {compiled.path}"
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _files(compiled: CompiledModel) -> list[tuple[str, Json]]:
    return list(compiled.manifest["files"].items())
