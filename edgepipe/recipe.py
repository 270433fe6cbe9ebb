"""Recipe: target + ordered stages + options + seed; resolved once from three layers of defaults, printed, saved.

A stage's own defaults give way to the recipe file, and that to flags and `--set STAGE.OPTION=VALUE`. A stage is found
by its file name; the dataclass in it names the options. Unknown names, values out of range and stages in an order that
doesn't fit are refused before any work begins.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import tomllib
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepipe import stages
from edgepipe.artifacts import CompiledModel, Json, Measured, TorchModel
from edgepipe.errors import ConfigError
from edgepipe.package_data import did_you_mean, fill_record
from edgepipe.target import Target, load_target

DEFAULT_STAGES = ("quantize", "export", "compile", "measure")
_ORDER = ("trim", "distill", "prune", "exits", *DEFAULT_STAGES)  # where a stage goes that a flag asks for
_TOP_LEVEL = ("target", "stages", "seed")

Stage = Any  # an instance of the dataclass in stages/NAME.py: options, and a __call__ from artifact to artifact


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Hold everything that decides a run's result, apart from the model."""

    target: Target
    stages: tuple[tuple[str, Stage], ...]
    seed: int = 0

    def to_json(self) -> Json:
        """Return the resolved recipe as it is printed and kept in the manifest."""
        return {
            "target": self.target.name,
            "stages": [name for name, _ in self.stages],
            "options": {name: stage_options(stage) for name, stage in self.stages},
            "seed": self.seed,
        }


def list_stages() -> tuple[str, ...]:
    """Return the names of all stages: the files in stages/."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(stages.__path__)))


def find_stage(name: str) -> type[Stage]:
    """Return the dataclass of a stage; ConfigError when there is none of that name."""
    if name not in list_stages():
        hint = did_you_mean(name, list_stages())
        raise ConfigError(f"there is no stage {name!r}{hint}: known are {', '.join(list_stages())}")
    module = importlib.import_module(f"edgepipe.stages.{name}")
    kind: type[Stage] = getattr(module, name.title())
    return kind


def stage_options(stage: Stage) -> Json:
    """Return a stage's options under the names users write (import_ is written import)."""
    return {key.rstrip("_"): value for key, value in dataclasses.asdict(stage).items()}


def read_recipe_file(path: Path) -> Json:
    """Read a recipe's TOML; its tables are stages, its other keys target, stages and seed."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: expected a TOML file") from error
    except OSError as error:
        raise ConfigError(f"the recipe {path} can't be read: {error.strerror}") from error
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for key, value in table.items():
        if not isinstance(value, dict) and key not in _TOP_LEVEL:
            raise ConfigError(f"{path}: unknown key {key!r}: known are {', '.join(_TOP_LEVEL)} and a table per stage")
    return table


def parse_setting(text: str) -> tuple[str, str, object]:
    """Read STAGE.OPTION=VALUE; the value is read as TOML, and as plain text when it isn't TOML."""
    name, equals, value = text.partition("=")
    stage, dot, option = name.strip().partition(".")
    if not (equals and dot and stage and option):
        raise ConfigError(f"--set: expected STAGE.OPTION=VALUE, got {text!r}")
    try:
        return stage, option, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return stage, option, value.strip()


def resolve(
    *,
    target: str | None,
    file: Path | None = None,
    settings: Sequence[tuple[str, str, object]] = (),
    seed: int | None = None,
    before: Sequence[str] = (),
    stages: Sequence[str] | None = None,
) -> Recipe:
    """Build the recipe from a file and settings (later ones win); ConfigError says what is wrong with it.

    `before` names stages that flags ask for: each goes in front of the first of the recipe's that usually comes later,
    unless the recipe has it in a place of its own. `stages` are those of a verb that has no bundle: they end in a
    model, and no file names others.
    """
    table = read_recipe_file(file) if file is not None else {}
    where = str(file) if file is not None else "the recipe"
    chosen_target = target if target is not None else table.get("target", "cpu")
    if not isinstance(chosen_target, str) or not chosen_target:
        raise ConfigError(f"{where}: target must be a name or a path, not {chosen_target!r}")
    loaded = load_target(chosen_target)
    asked = {*table, *(stage for stage, _, _ in settings)}
    names = list(stages) if stages is not None else table.get("stages", _usual_stages(loaded, asked))
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ConfigError(f"{where}: stages must be a list of stage names, not {names!r}")
    for name in before:
        if name not in names:
            later = _ORDER[_ORDER.index(name) :]
            names = [*names]
            names.insert(next((i for i, other in enumerate(names) if other in later), len(names)), name)
    if len(set(names)) < len(names):
        raise ConfigError(f"{where}: a stage is named twice in {', '.join(names)}")
    chosen_seed = seed if seed is not None else table.get("seed", 0)
    if not isinstance(chosen_seed, int) or isinstance(chosen_seed, bool) or chosen_seed < 0:
        raise ConfigError(f"seed must be a whole number of at least 0, not {chosen_seed!r}")
    kinds = {name: find_stage(name) for name in names}
    options: dict[str, dict[str, object]] = {name: {} for name in names}
    for stage, values in table.items():
        if isinstance(values, dict):  # the other keys are read above
            _check_named(options, stage)
            for option, value in values.items():
                _put(options, stage, option, value)
    for stage, option, value in settings:
        _put(options, stage, option, value)
    check_chain(kinds, (CompiledModel, Measured) if stages is None else (TorchModel,))
    return Recipe(
        target=loaded,
        stages=tuple((name, _make_stage(kind, name, options[name])) for name, kind in kinds.items()),
        seed=chosen_seed,
    )


def _usual_stages(target: Target, asked: Collection[str]) -> list[str]:
    """Return the stages of a recipe that names none: an NPU has a grid of its own, so nothing is rounded before it.

    `asked` are the stages that somebody has set options of.
    """
    own_grid = target.engines[0] == "qnn" and "quantize" not in asked
    return [name for name in DEFAULT_STAGES if not (own_grid and name == "quantize")]


def check_chain(kinds: Mapping[str, type[Stage]], ends: tuple[type, ...] = (CompiledModel, Measured)) -> None:
    """Compare what each stage gives with what the next one takes; ConfigError names the pair that doesn't fit."""
    given: type = TorchModel
    for kind in kinds.values():
        hints = typing.get_type_hints(kind.__call__)
        if hints["model"] is not given:
            raise ConfigError(f"{kind.__name__} takes {hints['model'].__name__}, but would be given {given.__name__}")
        given = hints["return"]
    if given not in ends:
        raise ConfigError(f"the stages end in {given.__name__}: the last one must be compile or measure")


def _put(options: dict[str, dict[str, object]], stage: str, option: str, value: object) -> None:
    _check_named(options, stage)
    options[stage][option] = value


def _check_named(options: Mapping[str, object], stage: str) -> None:
    """Refuse options of a stage that the recipe doesn't run, even when there are none of them."""
    if stage not in options:
        find_stage(stage)  # an unknown name gets the better sentence
        raise ConfigError(
            f"options of {stage} are set, but the recipe has no stage {stage!r}: it has {', '.join(options)}"
        )


def _make_stage(kind: type[Stage], name: str, values: dict[str, object]) -> Stage:
    """Build a stage from options as users write them; ConfigError for unknown ones and wrong types."""
    fields = {f.name.rstrip("_"): f.name for f in dataclasses.fields(kind)}
    for option in values:
        if option not in fields:
            hint = did_you_mean(option, fields)
            raise ConfigError(f"stage {name} has no option {option!r}{hint}: known are {', '.join(fields)}")
    return fill_record(kind, {fields[option]: value for option, value in values.items()}, name)
