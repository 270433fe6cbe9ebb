"""Compare the widths of a nested student with students that were trained at one width, and with slices of a plain one.

    python benchmarks/nested.py --data e2e-dev.csv [--steps 400]   run what is left, rewrite the table of docs/prune.md
    python benchmarks/nested.py --page-only                        rewrite the table from what is stored

An encoder-decoder of SmolLM2, its vocabulary trimmed to the data, learns E2E by cross-entropy: once nested, all widths
at every step, and once for each width, for the same steps on the same examples. Each is judged by the loss over the
same held-out part. A slice is the first channels of the student that was trained at the whole width alone. The fifth
member has one width in its first layers and the next in the others; how long cutting it out takes is timed, to the
files of a model directory. Training goes on from its checkpoint, and a row is stored as soon as it is there.
Source of the claims: MatFormer, arXiv:2310.07707.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.stored import RESULTS, ROOT, markdown_table, provenance, read_result, replace_section, write_result
from edgepipe.artifacts import Context, Json, TorchModel
from edgepipe.measuring.run import describe_machine
from edgepipe.pipeline import run_stages
from edgepipe.quantizers.modules import module_of
from edgepipe.recipe import resolve
from edgepipe.report.progress import Progress
from edgepipe.sources import open_model
from edgepipe.stages.distill import Distill
from edgepipe.stages.prune import Prune
from edgepipe.store import file_sha256
from edgepipe.students.result import save
from edgepipe.target import load_target
from edgepipe.training.course import SPLIT_SEED, given_data, pair_reading
from edgepipe.training.data import hold_out
from edgepipe.training.distil import likelihood
from edgepipe.training.nested import at_width

NAME = "nested"
PAGE = ROOT / "docs" / "prune.md"
ROWS = 32  # held-out examples that run at once
HEADER = ("FFN channels", "parameters", "trained alone", "nested", "against alone", "slice of the plain one")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Say what is trained: a teacher, the widths, and the options of distill that all students share."""

    teacher: str
    widths: tuple[int, ...]  # the whole one last
    options: dict[str, object]


SMOLLM2 = Setting(
    teacher="smollm2-135m",
    widths=(192, 384, 768, 1536),
    options={
        "student": "encoder-decoder",
        "encoder_layers": 2,
        "decoder_layers": 2,
        "hidden": 192,
        "kv_heads": 1,  # with three query heads of 64: whole heads of this width
        "alpha": 0.0,
        "batch": 32,
        "learning_rate": 1e-3,
        "max_source": 96,
        "max_target": 96,
        "held_out": 0.1,
    },
)


def main(arguments: list[str]) -> None:
    """Run, store and show, as the arguments say."""
    parser = argparse.ArgumentParser(description="Compare nested widths with students of one width.")
    parser.add_argument("--data", type=Path, help="E2E's table of mr and ref, .csv")
    parser.add_argument("--steps", type=int, default=400, help="steps of every student (default: 400)")
    parser.add_argument("--page-only", action="store_true", help="rewrite the table from what is stored")
    options = parser.parse_args(arguments)
    if not options.page_only:
        if options.data is None:
            parser.error("--data FILE is needed")
        take(SMOLLM2, options.data, options.steps)
    result = read_result(NAME)
    replace_section(PAGE, NAME, page_section(result))
    print(json.dumps({row["name"]: row["losses"] for row in result["rows"]}))


def rows_of(setting: Setting) -> dict[str, dict[str, object]]:
    """Return every student's own options by its name: the nested one, and one for each width, the whole one first."""
    *narrow, whole = setting.widths
    alone: dict[str, dict[str, object]] = {f"alone {width}": {"ffn": width} for width in (whole, *reversed(narrow))}
    return {"nested": {"nested": narrow, "nested_every": True}, **alone}


def take(setting: Setting, data: Path, steps: int) -> None:
    """Train and judge every student that isn't stored with these settings, and store each."""
    place = RESULTS / f"{NAME}.json"
    result: Json = read_result(NAME) if place.is_file() else {"rows": []}
    for name, own in rows_of(setting).items():
        options = {**setting.options, **own, "steps": steps}
        settings = json.loads(json.dumps({"teacher": setting.teacher, "distill": options, "data": file_sha256(data)}))
        stored = next((row for row in result["rows"] if row["name"] == name), None)
        if stored is not None and stored["settings"] == settings:
            continue
        print(name, file=sys.stderr, flush=True)
        row = {"name": name, "provenance": provenance(), "settings": settings, "machine": describe_machine(0)}
        row |= one_row(name, setting, options, data)
        result["rows"] = [*(one for one in result["rows"] if one is not stored), row]
        write_result(NAME, result)


def one_row(name: str, setting: Setting, options: Mapping[str, object], data: Path) -> Json:
    """Return the losses of a student by width: at its own, or at all where it is nested or was trained at the whole."""
    folder = ROOT / "runs" / NAME / name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    teacher, trim = open_model(setting.teacher), ("trim", "data", str(data))
    trimmed = run_stages(
        teacher,
        resolve(target="cpu", settings=[trim], stages=["trim"]),
        runs=folder.parent / "trim",
        fresh=False,
        listener=Progress(),
    )
    given = {**options, "data": str(data)}
    recipe = resolve(
        target="cpu",
        settings=[trim, *(("distill", key, value) for key, value in given.items())],
        stages=["trim", "distill"],
    )
    student = run_stages(teacher, recipe, runs=folder, fresh=False, listener=Progress())
    assert isinstance(trimmed, TorchModel)
    assert isinstance(student, TorchModel)
    stage = next(stage for kind, stage in recipe.stages if kind == "distill")
    assert isinstance(stage, Distill)
    several = name == "nested" or stage.ffn == setting.widths[-1]
    widths = setting.widths if several else (stage.ffn,)
    losses = held_out_losses(student, trimmed, stage, widths)
    found: Json = {"losses": {str(width): loss for width, loss in losses.items()}}
    found["parameters"] = {str(width): parameters_at(student, width, folder) for width in widths}
    return {**found, "mixed": mixed_member(student, setting, folder)} if name == "nested" else found


def held_out_losses(
    student: TorchModel, teacher: TorchModel, options: Distill, widths: Sequence[int]
) -> dict[int, float]:
    """Return the mean cross-entropy of a target's token over the held-out part, at each width of the student."""
    data = given_data(options)
    _, held = hold_out(data, options.held_out, SPLIT_SEED)
    examples = pair_reading(teacher, options, data).examples(held, lambda _note: None)
    module = module_of(student)
    found = {}
    for width in widths:
        losses, weights = [], []
        with torch.inference_mode(), at_width(module, width):
            for start in range(0, len(examples.sources), ROWS):
                batch = examples.collate(range(start, min(start + ROWS, len(examples.sources))))
                step = likelihood(module, batch, 0)
                losses.append(float(step.loss))
                weights.append(int(step.weight))
        found[width] = float(np.average(losses, weights=weights))
    return found


def parameters_at(student: TorchModel, width: int, folder: Path) -> int:
    """Count the parameters of what is cut out at a width."""
    if width == student.info.config["encoder"]["intermediate_size"]:
        return student.weights.parameters
    return cut(student, (width,) * layers_of(student), folder).weights.parameters


def mixed_member(student: TorchModel, setting: Setting, folder: Path) -> Json:
    """Cut out a member of two widths, write it as a model directory, and say how long that took."""
    layers = layers_of(student)
    widths = tuple(setting.widths[1 if 2 * layer < layers else 2] for layer in range(layers))
    started = time.perf_counter()
    member = cut(student, widths, folder)
    save(member, folder / "member")
    seconds = time.perf_counter() - started
    return {"ffn_widths": list(widths), "parameters": member.weights.parameters, "seconds": round(seconds, 3)}


def layers_of(student: TorchModel) -> int:
    """Count the layers of both stacks."""
    config = student.info.config
    return int(config["encoder"]["num_hidden_layers"] + config["decoder"]["num_hidden_layers"])


def cut(student: TorchModel, widths: Sequence[int], folder: Path) -> TorchModel:
    """Cut a member out of a student."""
    stage = Prune(ratio=0.0, importance="nested", ffn_widths=tuple(widths))
    return stage(student, Context(target=load_target("cpu"), work_dir=folder))


def page_section(result: Json) -> str:
    """Return the table and the sentences below it, from what is stored alone."""
    rows = {row["name"]: row for row in result["rows"]}
    nested = rows.get("nested")
    if nested is None:
        return "Not measured yet."
    widths = sorted(nested["losses"], key=int)
    plain = rows.get(f"alone {widths[-1]}", {"losses": {}})
    cells = []
    for width in widths:
        alone = rows.get(f"alone {width}", {"losses": {}})["losses"].get(width)
        mine, slice_ = nested["losses"][width], plain["losses"].get(width)
        cells.append(
            [
                width,
                f"{nested['parameters'][width] / 1e6:.2f} million",
                "" if alone is None else f"{alone:.3f}",
                f"{mine:.3f}",
                "" if alone is None else f"{100 * (mine / alone - 1):+.1f} %",
                "" if slice_ is None else f"{slice_:.3f}",
            ]
        )
    mixed, settings = nested["mixed"], nested["settings"]["distill"]
    dates = sorted({(row["provenance"]["date"], row["provenance"]["commit"][:12]) for row in result["rows"]})
    said = (
        f"Loss of a target's token over the held-out part of E2E, in nats; {settings['steps']} steps each, the nested "
        f"student's at all widths. A mixed member ({', '.join(map(str, mixed['ffn_widths']))}; "
        f"{mixed['parameters'] / 1e6:.2f} million parameters) was cut out and written in {mixed['seconds']:.1f} s. "
        f"{nested['machine']['cpu']}; {', '.join(f'{date} at `{commit}`' for date, commit in dates)}."
    )
    return f"{markdown_table(HEADER, cells)}\n\n{said}"


if __name__ == "__main__":
    main(sys.argv[1:])
