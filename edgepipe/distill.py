"""Distill: the library function behind `edgepipe distill`: a student of its own, as a model directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe.artifacts import Json, TorchModel
from edgepipe.errors import ConfigError, StageError

if TYPE_CHECKING:
    from edgepipe.pipeline import Listener


def distill(
    model: str,
    settings: Sequence[tuple[str, str, object]],
    *,
    out: Path,
    seed: int,
    fresh: bool,
    listener: Listener,
    runs: Path = Path("runs"),
) -> Json:
    """Make a student of MODEL, write it to the directory `out`, and return what it is and how training went.

    `settings` are those of the stage distill, and of trim where its data are among them. A run that was stopped goes
    on from its last checkpoint in `runs`; `fresh` begins anew. Raises ConfigError before any work begins (a directory
    at `out` that is no student's stays as it is), StageError when a stage fails. Of several processes that a launcher
    started the first one does this; the others help it train, and end here.
    """
    from edgepipe.pipeline import run_stages
    from edgepipe.recipe import resolve
    from edgepipe.sources import open_model
    from edgepipe.students.result import save
    from edgepipe.training.processes import dismiss_the_others, follow, follows

    _check_output(out, model)
    names = ["trim", "distill"] if any(stage == "trim" for stage, _, _ in settings) else ["distill"]
    recipe = resolve(target=None, settings=settings, seed=seed, stages=names)
    source = open_model(model)
    if follows():
        follow(source, recipe.stages, recipe.target, recipe.seed)
        raise SystemExit(0)
    student = run_stages(source, recipe, runs=runs, fresh=fresh, listener=listener)
    dismiss_the_others()
    assert isinstance(student, TorchModel), "the chain of stages was checked"
    try:
        save(student, out)
    except OSError as error:
        raise StageError(f"the student can't be written to {out}: {error.strerror}; it is kept in {runs}") from error
    record = student.history[-1]
    return {
        "student": str(out),
        "task": student.info.task,
        "parameters": student.weights.parameters,
        "notes": list(record.notes),
        "figures": record.figures,
    }


def _check_output(out: Path, model: str) -> None:
    """Refuse an output that would overwrite something that isn't a student, or the model itself."""
    from edgepipe.pipeline import check_place
    from edgepipe.students.result import strangers

    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file: expected a directory that is new, empty or an earlier student's")
    if out.is_dir() and Path(model).is_dir() and out.samefile(model):
        raise ConfigError(f"--out {out} is MODEL itself: name another directory")
    if out.is_dir() and (names := strangers(out)):
        raise ConfigError(
            f"--out {out} is a directory that isn't a student's: it holds {names[0]}; name a new one or empty it"
        )
    check_place(out)
