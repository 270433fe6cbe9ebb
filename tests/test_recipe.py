"""Recipes: three layers of defaults, and a sentence for whatever doesn't fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from edgepipe.artifacts import CompiledModel, Context, Measured, OnnxModel, TorchModel
from edgepipe.errors import ConfigError
from edgepipe.recipe import (
    DEFAULT_STAGES,
    Recipe,
    check_chain,
    find_stage,
    list_stages,
    parse_setting,
    read_recipe_file,
    resolve,
    stage_options,
)
from edgepipe.stages.compile import Compile
from edgepipe.stages.export import Export
from edgepipe.stages.measure import Measure
from edgepipe.stages.quantize import Quantize


def from_text(folder: Path, text: str, *settings: tuple[str, str, object], **more: Any) -> Recipe:
    """Resolve a recipe file of this text."""
    file = folder / "mine.toml"
    file.write_text(text, encoding="utf-8")
    return resolve(**{"target": None, "file": file, "settings": settings, **more})


def options_of(recipe: Recipe) -> dict[str, Any]:
    """Return the options of every stage."""
    return {name: stage_options(stage) for name, stage in recipe.stages}


def test_without_a_file_and_flags_every_default_holds() -> None:
    recipe = resolve(target=None)
    assert recipe.target.name == "cpu"
    assert recipe.seed == 0
    assert tuple(name for name, _ in recipe.stages) == DEFAULT_STAGES
    assert [stage for _, stage in recipe.stages] == [Quantize(), Export(), Compile(), Measure()]


def test_the_file_wins_over_defaults_and_settings_over_the_file(tmp_path: Path) -> None:
    text = "seed = 3\n[quantize]\nbits = 8\ngroup = 64\n[export]\ncontext = 512\n"
    recipe = from_text(tmp_path, text, ("quantize", "group", 128), ("measure", "blocks", 1))
    options = options_of(recipe)
    assert recipe.seed == 3
    assert (options["quantize"]["bits"], options["quantize"]["group"]) == (8, 128)
    assert options["quantize"]["symmetric"] is True
    assert options["export"]["context"] == 512
    assert options["measure"]["blocks"] == 1


def test_the_last_of_two_settings_wins() -> None:
    recipe = resolve(target=None, settings=[("quantize", "bits", 8), ("quantize", "bits", 16)])
    assert options_of(recipe)["quantize"]["bits"] == 16


def test_a_flag_names_target_and_seed_over_the_file(tmp_path: Path) -> None:
    board = tmp_path / "board.toml"
    board.write_text(
        'description = "a board"\nengines = ["onnxruntime"]\nmeasurable = "no"\n[onnxruntime]\nthreads = 3\n',
        encoding="utf-8",
    )
    text = f"target = {json.dumps(str(board))}\nseed = 5\n"
    recipe = from_text(tmp_path, text)
    assert (recipe.target.name, recipe.target.onnxruntime.threads, recipe.seed) == ("board", 3, 5)
    recipe = from_text(tmp_path, text, target="cpu", seed=0)
    assert (recipe.target.name, recipe.target.onnxruntime.threads, recipe.seed) == ("cpu", 0, 0)


def test_a_file_may_choose_the_stages(tmp_path: Path) -> None:
    recipe = from_text(tmp_path, 'stages = ["export", "compile"]')
    assert [name for name, _ in recipe.stages] == ["export", "compile"]


def test_a_stage_that_takes_what_it_gives_may_be_left_out_but_not_the_others(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^Compile takes OnnxModel, but would be given TorchModel$"):
        from_text(tmp_path, 'stages = ["quantize", "compile"]')


def test_a_resolved_recipe_written_as_a_file_resolves_to_itself(tmp_path: Path) -> None:
    recipe = resolve(
        target=None,
        seed=9,
        settings=[
            ("quantize", "overrides", ["*.mlp.*=8/64"]),
            ("quantize", "import", False),
            ("export", "context", 99),
        ],
    )
    printed = recipe.to_json()
    lines = [f"target = {json.dumps(printed['target'])}", f"stages = {json.dumps(printed['stages'])}", "seed = 9"]
    for stage, options in printed["options"].items():
        lines += [f"[{stage}]", *(f"{key} = {json.dumps(value)}" for key, value in options.items())]
    assert from_text(tmp_path, "\n".join(lines)) == recipe


def test_options_are_written_as_users_write_them() -> None:
    assert stage_options(Quantize(import_=False))["import"] is False
    assert "import_" not in stage_options(Quantize())
    recipe = resolve(target=None, settings=[("quantize", "import", False)])
    assert dict(recipe.stages)["quantize"].import_ is False


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("quantize.bits=8", ("quantize", "bits", 8)),
        ("quantize.import=false", ("quantize", "import", False)),
        ("export.tolerance=1e-4", ("export", "tolerance", 1e-4)),
        ('quantize.overrides=["*.mlp.*=8", "lm_head*=16"]', ("quantize", "overrides", ["*.mlp.*=8", "lm_head*=16"])),
        ("measure.text=prose-eval", ("measure", "text", "prose-eval")),
        ('measure.text="prose-eval"', ("measure", "text", "prose-eval")),
        ("measure.text= prose-eval ", ("measure", "text", "prose-eval")),
        (" quantize.bits = 8", ("quantize", "bits", 8)),
        ("measure.text=", ("measure", "text", "")),
        ("measure.text=a=b", ("measure", "text", "a=b")),
        ("quantize.bits=True", ("quantize", "bits", "True")),
    ],
)
def test_settings_are_toml_or_plain_text(text: str, expected: tuple[str, str, object]) -> None:
    assert parse_setting(text) == expected
    assert type(parse_setting(text)[2]) is type(expected[2])


@pytest.mark.parametrize("text", ["", "quantize", "quantize.bits", "bits=8", "=8", ".bits=8", "quantize.=8", "."])
def test_settings_of_another_form(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--set: expected STAGE\.OPTION=VALUE, got"):
        parse_setting(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            [("quantise", "bits", 4)],
            r"^there is no stage 'quantise' \(did you mean 'quantize'\?\): known are compile, ",
        ),
        (
            [("shrink", "steps", 4)],
            r"^there is no stage 'shrink': known are compile, distill, exits, export, measure, prune, quantize, trim$",
        ),
        ([("", "bits", 4)], r"^there is no stage ''"),
        (
            [("quantize", "bitz", 4)],
            r"^stage quantize has no option 'bitz' \(did you mean 'bits'\?\): known are bits, ",
        ),
        ([("quantize", "import_", True)], r"^stage quantize has no option 'import_' \(did you mean 'import'\?\)"),
        ([("quantize", "zzz", 1)], r"^stage quantize has no option 'zzz': known are bits, embedding_bits, group, "),
        ([("quantize", "bits", "four")], r"^'quantize\.bits' must be a number, not 'four'$"),
        ([("quantize", "group", 4.0)], r"must be a whole number, not 4\.0"),
        ([("quantize", "bits", True)], r"must be a number, not True"),
        ([("quantize", "group", True)], r"must be a whole number, not True"),
        ([("quantize", "symmetric", 1)], r"^'quantize\.symmetric' must be true or false, not 1$"),
        ([("quantize", "overrides", "*=8")], r"^'quantize\.overrides' must be a list of strings, not '\*=8'$"),
        ([("quantize", "overrides", [8])], r"must be a list of strings"),
        ([("export", "tolerance", "small")], r"^'export\.tolerance' must be a number, not 'small'$"),
        ([("compile", "cache_dtype", 16)], r"^'compile\.cache_dtype' must be a string, not 16$"),
    ],
)
def test_names_and_types_that_do_not_fit(settings: list[tuple[str, str, object]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(target=None, settings=settings)


@pytest.mark.parametrize(
    ("stage", "option", "value", "message"),
    [
        ("quantize", "bits", 5, "quantize.bits: expected one of 1.58, 2, 4, 8, 16, got 5"),
        ("quantize", "bits", 0, "got 0"),
        ("quantize", "embedding_bits", 3, "quantize.embedding_bits: expected one of 2, 4, 8, 16, got 3"),
        ("quantize", "group", 48, "quantize.group: expected one of 16, 32, 64, 128, got 48"),
        ("quantize", "overrides", ["*.mlp.*"], "expected PATTERN=BITS"),
        ("quantize", "overrides", ["=8"], "expected PATTERN=BITS"),
        ("quantize", "overrides", ["*=8/40"], "expected PATTERN=BITS"),
        ("quantize", "overrides", ["*=8/x"], "expected PATTERN=BITS"),
        ("export", "context", 7, "export.context: expected at least 8 tokens, got 7"),
        ("export", "context", -1, "got -1"),
        ("export", "check_tokens", -1, "export.check_tokens"),
        ("export", "tolerance", 0, "export.tolerance must be positive"),
        ("compile", "accuracy_level", 5, "compile.accuracy_level: expected 0 to 4, or -1"),
        ("compile", "accuracy_level", -2, "got -2"),
        ("compile", "cache_dtype", "int4", "compile.cache_dtype: expected float32, float16 or int8, got 'int4'"),
        ("compile", "exact_tolerance", -1e-3, "the tolerances must not be negative"),
        ("compile", "shipped_tolerance", -0.1, "the tolerances must not be negative"),
        ("compile", "check_tokens", -1, "compile.check_tokens"),
        ("measure", "blocks", 0, "measure.blocks must be at least 1"),
        ("measure", "threads", -1, "measure.threads must not be negative"),
        ("measure", "tokens", 1, "measure.tokens: expected at least 2, or 0 for the whole text, got 1"),
        ("measure", "text", "prose-evil", "did you mean 'prose-eval'"),
    ],
)
def test_values_out_of_range(stage: str, option: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(target=None, settings=[(stage, option, value)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "option", "values"),
    [
        ("quantize", "bits", (4, 8, 16)),
        ("quantize", "embedding_bits", (0, 2, 4, 8, 16)),
        ("quantize", "group", (16, 32, 64, 128)),
        ("export", "context", (0, 8, 4096)),
        ("export", "tolerance", (1, 0.5)),
        ("compile", "accuracy_level", (-1, 0, 4)),
        ("compile", "cache_dtype", ("float32", "float16", "int8")),
        ("measure", "tokens", (0, 2)),
    ],
)
def test_values_at_the_edge_of_their_range(stage: str, option: str, values: tuple[object, ...]) -> None:
    for value in values:
        assert options_of(resolve(target=None, settings=[(stage, option, value)]))[stage][option] == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('stages = ["export", "quantize", "compile"]', "^Quantize takes TorchModel, but would be given OnnxModel$"),
        ('stages = ["compile", "export"]', "^Compile takes OnnxModel, but would be given TorchModel$"),
        ('stages = ["quantize"]', "the stages end in TorchModel: the last one must be compile or measure"),
        ('stages = ["export"]', "the stages end in OnnxModel"),
        ('stages = ["export", "compile", "measure", "measure"]', "a stage is named twice in export, compile"),
        ('stages = ["shrink", "export", "compile"]', "^there is no stage 'shrink': known are compile, distill"),
        ('stages = ["shrink", "export", "compile"]', "^there is no stage 'shrink': known are"),
        ('stages = ["Quantize"]', r"no stage 'Quantize' \(did you mean 'quantize'"),
        ('stages = ["../errors"]', "no stage '../errors'"),
        ("stages = []", r"mine\.toml: stages must be a list of stage names, not \[\]"),
        ('stages = "export"', "stages must be a list of stage names, not 'export'"),
        ("stages = [1]", "stages must be a list of stage names"),
        ("seed = -1", "seed must be a whole number of at least 0, not -1"),
        ("seed = true", "seed must be a whole number of at least 0, not True"),
        ('seed = "one"', "seed must be a whole number"),
        ("target = 3", "target must be a name or a path, not 3"),
        ('target = ""', "target must be a name or a path, not ''"),
        ('target = "cpux"', r"unknown target 'cpux' \(did you mean 'cpu'"),
        ("bits = 4", r"mine\.toml: unknown key 'bits': known are target, stages, seed and a table per stage"),
        ("[shrink]", "^there is no stage 'shrink'"),
        ("[shrink]\nratio = 0.3", "^there is no stage 'shrink'"),
        ("[quantize", r"mine\.toml is not valid TOML"),
        (
            'stages = ["export", "compile"]\n[quantize]\nbits = 4',
            "^options of quantize are set, but the recipe has no stage 'quantize': it has export, compile$",
        ),
        ("[quantize]\nbits = 5", "quantize.bits: expected one of 1.58, 2, 4, 8, 16, got 5"),
        ("[quantize.deep]\nbits = 5", "stage quantize has no option 'deep'"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        from_text(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_setting_for_a_stage_that_is_left_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the recipe has no stage 'measure': it has export, compile"):
        from_text(tmp_path, 'stages = ["export", "compile"]', ("measure", "blocks", 1))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml can't be read: No such file"):
        read_recipe_file(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="can't be read: Is a directory"):
        read_recipe_file(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8 text: expected a TOML file"):
        read_recipe_file(tmp_path / "binary.toml")


def test_a_negative_seed_from_a_flag() -> None:
    with pytest.raises(ConfigError, match="seed must be a whole number of at least 0, not -1"):
        resolve(target=None, seed=-1)


def test_every_stage_is_found_by_its_file() -> None:
    assert list_stages() == ("compile", "distill", "exits", "export", "measure", "prune", "quantize", "trim")
    for name in list_stages():
        kind = find_stage(name)
        assert kind.__module__ == f"edgepipe.stages.{name}"
        assert dataclasses.is_dataclass(kind)
        kind()  # every option has a default


class Shrink:
    """A stage that gives back what it takes."""

    def __call__(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Return the model."""
        return model


class Lower:
    """A stage from torch to the engine at once."""

    def __call__(self, model: TorchModel, ctx: Context) -> CompiledModel:
        """Never called."""
        raise AssertionError


class Again:
    """A stage that measures what it is given."""

    def __call__(self, model: CompiledModel, ctx: Context) -> Measured:
        """Never called."""
        raise AssertionError


class Patch:
    """A stage on graphs."""

    def __call__(self, model: OnnxModel, ctx: Context) -> OnnxModel:
        """Return the model."""
        return model


def test_any_chain_of_annotations_that_fits_is_taken() -> None:
    check_chain({"shrink": Shrink, "lower": Lower, "again": Again})
    check_chain({"export": Export, "patch": Patch, "compile": Compile})
    with pytest.raises(ConfigError, match=r"^Patch takes OnnxModel, but would be given TorchModel$"):
        check_chain({"shrink": Shrink, "patch": Patch, "compile": Compile})
    with pytest.raises(ConfigError, match=r"^Shrink takes TorchModel, but would be given Measured$"):
        check_chain({"lower": Lower, "again": Again, "shrink": Shrink})


@pytest.mark.parametrize(("given", "kept"), [(4, 4), (4.0, 4), (1.58, 1.58)])
def test_whole_bits_stay_whole(given: float, kept: float) -> None:
    """Bits may be 1.58; 4 and 4.0 are one recipe."""
    settings: list[tuple[str, str, object]] = [("quantize", "bits", given), ("quantize", "data", "texts.txt")]
    settings = [*settings, ("quantize", "steps", 1)] if kept == 1.58 else settings[:1]
    bits = resolve(target=None, settings=settings).to_json()["options"]["quantize"]["bits"]
    assert (bits, type(bits)) == (kept, type(kept))
