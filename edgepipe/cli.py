"""The command line: parse, call one library function, print. Imports nothing heavy, so that --help answers at once.

People read stderr (progress, tables); programs read the last line of stdout, one JSON document.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

import edgepipe
from edgepipe.errors import ConfigError, EdgepipeError, StageError

_INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C
_OVER_BUDGET = 3


class _Commands(click.Group):
    """A group that turns edgepipe's errors into one sentence and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a known error is printed without a traceback."""
        try:
            return super().invoke(ctx)
        except StageError as error:
            done = f" (finished and kept: {', '.join(error.done)})" if error.done else ""
            stage = f"stage {error.stage}: " if error.stage and f"stage {error.stage}" not in str(error) else ""
            _fail(f"{stage}{error}{done}", error.exit_code)
        except EdgepipeError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            kept = "; finished stages are kept, the same command goes on from there"
            _fail(f"stopped{kept if ctx.invoked_subcommand in ('compress', 'distill') else ''}", _INTERRUPTED)
        except BrokenPipeError:  # the reader of our stdout is gone: nothing left to tell anybody
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:  # whatever the library has no better sentence for
            where = f": {error.filename}" if error.filename else ""
            _fail(f"{error.strerror or error}{where}", 2 if error.errno == errno.ENAMETOOLONG else 1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(edgepipe.__version__, prog_name="edgepipe")
def main() -> None:
    """Compress a language model for a small device, and measure what came out."""


@main.command("compress")
@click.argument("model", default="smollm2-135m")
@click.option("--target", help="Name in `edgepipe targets`, or a TOML file.  [default: cpu]")
@click.option("--bits", help="Bits of the layers: 1.58, 2, 4, 8, 16, or mixed (--max-drop 1%).  [default: 4]")
@click.option("--embedding-bits", type=int, help="Bits of embedding and output head: 2, 4, 8 or 16.  [default: 8]")
@click.option("--engine", help="onnxruntime, tvm, qnn, or auto: the faster here (docs/tvm.md).  [default: target's]")
@click.option("--keep-both", is_flag=True, help="With --engine auto: keep the bundle of the other engine too.")
@click.option("--tune", type=float, metavar="MINUTES", help="Tune the kernels of --engine tvm here (docs/tvm.md).")
@click.option("--trim-vocab", metavar="DATA", help="Keep only the tokens that the texts of a file use (docs/trim.md).")
@click.option("--student", help="Distill MODEL into an encoder-decoder, encoder or decoder first (docs/distill.md).")
@click.option("--data", help="What a student learns from, or --max-drop is measured on: .jsonl, .csv, .tsv, a text.")
@click.option("--max-drop", metavar="DROP", help="Search bits and groups of each layer: 1% or 0.005 of the metric.")
@click.option("--metric", help="What may drop by that, as in `edgepipe eval`.  [default: by the model's task]")
@click.option("--eval", "evaluation", multiple=True, metavar="NAME=VALUE", help="An option of `edgepipe eval` for it.")
@click.option("--goal", help="smallest or fastest: what the search is for.  [default: smallest]")
@click.option("--never-slower", is_flag=True, help="Keep only grids that are no slower here than floats.")
@click.option("--steps", type=int, help="Steps the student is trained for.")
@click.option("--minutes", type=float, help="Minutes it is trained for, in place of steps.  [default: 20]")
@click.option("--prune", type=float, metavar="RATIO", help="Cut this share of FFN channels and heads (docs/prune.md).")
@click.option("--budget-bytes", type=int, help="Cut out of a nested student the widest whose bundle has no more.")
@click.option("--budget-ms", type=float, help="The same by time: to the first token, or of an encoder's call.")
@click.option("--out", type=click.Path(path_type=Path), help="Where the bundle goes.  [default: runs/NAME/bundle]")
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), help="A recipe in TOML.")
@click.option("--set", "settings", multiple=True, metavar="STAGE.OPTION=VALUE", help="Set one option of a stage.")
@click.option(
    "--context", type=int, help="Tokens the KV cache holds.  [default: 2048, or fewer if the model takes fewer]"
)
@click.option("--seed", type=int, help="Seed of everything random.  [default: 0]")
@click.option("--task", metavar="TASK", help="What the model is for, where its config doesn't say so: docs/tasks.md.")
@click.option("--fresh", is_flag=True, help="Repeat stages that an earlier run finished.")
@click.option("--dry-run", is_flag=True, help="Check and print the recipe; do nothing.")
def compress_command(
    model: str,
    target: str | None,
    bits: str | None,
    embedding_bits: int | None,
    engine: str | None,
    keep_both: bool,
    tune: float | None,
    trim_vocab: str | None,
    student: str | None,
    data: str | None,
    max_drop: str | None,
    metric: str | None,
    evaluation: tuple[str, ...],
    goal: str | None,
    never_slower: bool,
    steps: int | None,
    minutes: float | None,
    prune: float | None,
    budget_bytes: int | None,
    budget_ms: float | None,
    out: Path | None,
    recipe_file: Path | None,
    settings: tuple[str, ...],
    context: int | None,
    seed: int | None,
    task: str | None,
    fresh: bool,
    dry_run: bool,
) -> None:
    """Compress MODEL (a directory, a hub id, a .gguf file or a packaged name) into a bundle, and measure it."""
    from edgepipe.compress import compress
    from edgepipe.recipe import parse_setting, resolve
    from edgepipe.search.asked import asked_of, number_of, room_of

    if tune is not None and not tune > 0:
        raise ConfigError(f"--tune: expected minutes above 0, got {tune:g}; leave it out for the defaults")
    search = asked_of(
        bits=bits,
        embedding_bits=embedding_bits,
        max_drop=max_drop,
        data=data,
        metric=metric,
        options=evaluation,
        goal=goal,
    )
    if search is not None:
        bits = data = None
    flags: list[tuple[str, str, object]] = [("trim", "data", trim_vocab), ("quantize", "bits", number_of(bits))]
    flags += [
        ("quantize", "embedding_bits", embedding_bits),
        ("export", "context", context),
        ("compile", "engine", engine),
        ("compile", "tune", tune),
    ]
    flags += [("distill", "student", student), ("distill", "data", data)]
    flags += [("distill", "steps", steps), ("distill", "minutes", minutes), ("prune", "ratio", prune)]
    room = room_of(budget_bytes, budget_ms)
    chosen: list[tuple[str, str, object]] = [] if room is None else [("prune", "importance", "nested")]
    chosen += [parse_setting(text) for text in settings]
    chosen += [(stage, option, value) for stage, option, value in flags if value is not None]
    before = [stage for stage, asked in (("trim", trim_vocab), ("distill", student)) if asked is not None]
    before += [name for name in ("prune", "exits") if any(stage == name for stage, _, _ in chosen)]
    recipe = resolve(target=target, file=recipe_file, settings=chosen, seed=seed, before=before)
    _say(f"recipe: {json.dumps(recipe.to_json())}")
    if dry_run:
        asked_for = {} if search is None else {"search": dataclasses.asdict(search)}
        _print_json({"model": model, "recipe": recipe.to_json(), **asked_for})
        return
    from edgepipe.report.progress import Progress
    from edgepipe.report.terminal import finished_lines

    summary = compress(
        model,
        recipe,
        listener=Progress(),
        out=out,
        fresh=fresh,
        task=task,
        asked=search,
        without_slower=never_slower,
        keep_both=keep_both,
        room=room,
    )
    for line in finished_lines(summary):
        _say(line)
    broken = summary.setdefault("over_budget", [])
    summary.pop("figures", None)
    _print_json(summary)
    for sentence in broken:
        _say(sentence)
    if broken:
        sys.exit(_OVER_BUDGET)


@main.command("distill")
@click.argument("model", default="smollm2-135m")
@click.option("--student", default="encoder-decoder", show_default=True, help="encoder-decoder, encoder or decoder.")
@click.option(
    "--data", help="What the student learns from: .jsonl, .csv, .tsv, a text.  [default: its teacher's texts]"
)
@click.option("--steps", type=int, help="Steps it is trained for.")
@click.option("--minutes", type=float, help="Minutes it is trained for, in place of steps.  [default: 20]")
@click.option("--trim-vocab", metavar="DATA", help="Keep only the tokens that the texts of a file use (docs/trim.md).")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The student's model directory.")
@click.option("--set", "settings", multiple=True, metavar="STAGE.OPTION=VALUE", help="Set one option of a stage.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random.")
@click.option("--fresh", is_flag=True, help="Begin anew where an earlier run was stopped.")
def distill_command(
    model: str,
    student: str,
    data: str | None,
    steps: int | None,
    minutes: float | None,
    trim_vocab: str | None,
    out: Path,
    settings: tuple[str, ...],
    seed: int,
    fresh: bool,
) -> None:
    """Make a student of MODEL, teach it, and write it as a model directory, which `edgepipe compress` takes."""
    from edgepipe.distill import distill
    from edgepipe.recipe import parse_setting
    from edgepipe.report.progress import Progress

    flags: list[tuple[str, str, object]] = [("trim", "data", trim_vocab), ("distill", "data", data)]
    flags += [("distill", "student", student)]
    flags += [("distill", "steps", steps), ("distill", "minutes", minutes)]
    chosen = [parse_setting(text) for text in settings]
    chosen += [(stage, option, value) for stage, option, value in flags if value is not None]
    found = distill(model, chosen, out=out, seed=seed, fresh=fresh, listener=Progress())
    _say(f"student: {out}    next: edgepipe compress {out}")
    _print_json(found)


@main.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--max-new-tokens", default=256, show_default=True, help="Tokens to generate at most.")
@click.option("--temperature", default=0.0, show_default=True, help="0 picks the most likely token each time.")
@click.option("--top-k", default=0, show_default=True, help="Sample among the K most likely tokens; 0: all.")
@click.option("--top-p", default=1.0, show_default=True, help="Sample among the most likely tokens of this mass.")
@click.option("--repetition-penalty", default=1.0, show_default=True, help="Above 1: repeat less.")
@click.option("--stop", multiple=True, help="Stop before this text.")
@click.option("--seed", type=int, help="Seed of the sampling.")
@click.option("--threads", type=int, help="Threads of the engine.  [default: one per physical core]")
@click.option("--raw", is_flag=True, help="Continue PROMPT as it is, without the chat template.")
def run_command(
    bundle: Path,
    prompt: str | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    stop: tuple[str, ...],
    seed: int | None,
    threads: int | None,
    raw: bool,
) -> None:
    """Stream the answer of BUNDLE to PROMPT; without PROMPT, chat (or answer what stdin holds, if it is piped).

    A bundle that embeds or classifies prints the embedding, or the probability of each label, as JSON.
    """
    from edgepipe.talk import talk

    sampling: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop,
        "seed": seed,
    }
    found = talk(bundle, prompt, sampling, threads=threads, raw=raw)
    if found is not None:
        _print_json(found)


@main.command("inspect")
@click.argument("model")
def inspect_command(model: str) -> None:
    """Show layers, parameters, bytes per part and bits per weight of MODEL or a bundle."""
    from edgepipe.inspect import inspect_any
    from edgepipe.report.terminal import megabytes, table

    facts = inspect_any(model)
    for key, value in facts.items():
        if key != "parts":
            _say(f"{key.replace('_', ' '):16} " + (f"{value:,}" if isinstance(value, int) else str(value)))
    rows = [
        [p["part"], p["storage"], f"{p['parameters']:,}", megabytes(p["bytes"]), f"{p['bits_per_weight']:.2f}"]
        for p in facts["parts"]
    ]
    _say("\n" + table(["part", "stored as", "parameters", "MB", "bits/weight"], rows))
    _print_json(facts)


@main.command("measure")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), help="Another bundle, measured in turn with this one.")
@click.option("--since", type=click.Path(path_type=Path), help="An earlier measurement (what this command printed).")
@click.option("--text", default="prose-eval", show_default=True, help="Evaluation text of the perplexity.")
@click.option("--tokens", default=8192, show_default=True, help="Tokens scored at most; 0: the whole text.")
@click.option("--blocks", default=2, show_default=True, help="Fresh processes per bundle.")
@click.option("--turns", default=4, show_default=True, help="Turns per process: more make intervals narrower.")
@click.option("--prompt-tokens", default=128, show_default=True, help="Tokens of the headline's prompt or source.")
@click.option("--output-tokens", default=80, show_default=True, help="Tokens that follow it in a turn.")
@click.option("--threads", default=0, help="Threads of the engine.  [default: one per physical core]")
def measure_command(
    bundle: Path,
    against: Path | None,
    since: Path | None,
    text: str,
    tokens: int,
    blocks: int,
    turns: int,
    prompt_tokens: int,
    output_tokens: int,
    threads: int,
) -> None:
    """Measure BUNDLE on this machine: TTFT, time per output token, memory, perplexity. The base install is enough."""
    from edgepipe.measure import measure
    from edgepipe.report.progress import Progress
    from edgepipe.report.terminal import measured_table
    from edgepipe.stages.measure import Measure

    options = Measure(
        text=text,
        tokens=tokens,
        blocks=blocks,
        turns=turns,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        threads=threads,
    )
    figures = measure(bundle, options, listener=Progress(), against=against, since=since)
    _say(f"\n{measured_table(figures, 'against' if against is not None else '')}\n")
    for sentence in figures["since"]["sentences"] if since is not None else ():
        _say(sentence)
    _print_json(figures)


@main.command("eval")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", required=True, help="A text, .tsv, .csv or .jsonl file, or the name of a shipped text.")
@click.option("--metric", required=True, help="perplexity, kl-to-float, spearman, accuracy, bleu, rouge or exact.")
@click.option("--against", type=click.Path(path_type=Path), help="Another bundle on the same examples.")
@click.option("--tokens", default=0, help="Tokens of a text scored at most.  [default: all]")
@click.option("--window", default=512, show_default=True, help="Tokens of a window, or the context if that is less.")
@click.option("--stride", default=0, help="Tokens from window to window.  [default: the window]")
@click.option("--limit", default=0, help="Examples drawn from the file with the seed.  [default: all]")
@click.option("--columns", default="", metavar="PART=COLUMN,…", help="Where an example's parts stand.")
@click.option("--header/--no-header", default=None, help="Whether the first line names columns.  [default: look]")
@click.option("--prompt", default="{text}", show_default=True, help="What a text model is asked.")
@click.option("--labels", default="", metavar="LABEL=WORDS,…", help="What each label of the file stands for.")
@click.option("--chat", is_flag=True, help="Ask through the chat template.")
@click.option("--max-new-tokens", default=64, show_default=True, help="Tokens of an answer at most.")
@click.option("--stop", multiple=True, help="End an answer before this text.")
@click.option("--batch", default=8, show_default=True, help="Examples that run together.")
@click.option("--exit-threshold", type=float, help="When texts or tokens leave at exits.  [default: 0.5; decoder: 1]")
@click.option("--threads", default=0, help="Threads of the engine.  [default: one per physical core]")
@click.option("--seed", default=0, show_default=True, help="Seed of the intervals and of --limit.")
def eval_command(
    bundle: Path,
    data: str,
    metric: str,
    against: Path | None,
    tokens: int,
    window: int,
    stride: int,
    limit: int,
    columns: str,
    header: bool | None,
    prompt: str,
    labels: str,
    chat: bool,
    max_new_tokens: int,
    stop: tuple[str, ...],
    batch: int,
    exit_threshold: float | None,
    threads: int,
    seed: int,
) -> None:
    """Score BUNDLE on a file by one metric, with its 95 % interval, through the runtime that ships."""
    from edgepipe.evaluate import evaluate
    from edgepipe.measuring.metrics import Evaluation
    from edgepipe.report.progress import Progress
    from edgepipe.report.terminal import evaluated_table

    options = Evaluation(
        metric=metric,
        tokens=tokens,
        window=window,
        stride=stride,
        limit=limit,
        columns=columns,
        header=header,
        prompt=prompt,
        labels=labels,
        chat=chat,
        max_new_tokens=max_new_tokens,
        stop=stop,
        batch=batch,
        exit_threshold=exit_threshold,
        threads=threads,
        seed=seed,
    )
    found = evaluate(bundle, data, options, listener=Progress(), against=against)
    _say(f"\n{evaluated_table(found)}\n")
    _print_json(found)


@main.command("report")
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE…", type=click.Path(path_type=Path))
@click.option("--figures", multiple=True, type=click.Path(path_type=Path), help="What `edgepipe measure` printed.")
@click.option("--out", multiple=True, type=click.Path(path_type=Path), help="A file that ends in .html, .md or .json.")
def report_command(bundles: tuple[Path, ...], figures: tuple[Path, ...], out: tuple[Path, ...]) -> None:
    """Report on BUNDLE, a bundle or a run's directory; several are set side by side."""
    from edgepipe.report.markdown import render_markdown
    from edgepipe.report.outputs import report

    found = report(list(bundles), figures=list(figures), out=list(out))
    _say(render_markdown(found))
    _print_json(found.to_json())


@main.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
def verify_command(bundle: Path) -> None:
    """Check BUNDLE against its manifest and the contract: hashes, files, sizes, licence, tokenizer, graph."""
    from edgepipe.verify import verify_bundle

    found = verify_bundle(bundle)
    for check in found["checks"]:
        outcome = {True: "ok", False: "failed", None: "not checked, since an earlier check failed"}[check["ok"]]
        _say(f"{check['name']:16} {outcome}")
    _print_json(found)
    for check in found["checks"]:
        if check["ok"] is False:
            _fail(f"{check['name']}: {check['problem']}", 1)


@main.command("doctor")
@click.option("--target", help="Name in `edgepipe targets`, or a TOML file.  [default: all of them]")
def doctor_command(target: str | None) -> None:
    """Say what this machine can build, run and measure; what may crash is tried in child processes."""
    from edgepipe.doctor import examine
    from edgepipe.report.findings import finding_lines

    found = examine(target)
    for line in finding_lines(found):
        _say(line)
    _print_json(found)
    if not found["ok"]:
        _fail(found["problem"], 1)


@main.command("targets")
def targets_command() -> None:
    """List the machines a model can be made for."""
    from edgepipe.report.terminal import table
    from edgepipe.target import list_targets, load_target

    targets = [load_target(name) for name in list_targets()]
    rows = [[t.name, ", ".join(t.engines), t.measurable, t.description] for t in targets]
    _say(table(["target", "engines", "measured", "what it is"], rows))
    _print_json([{"name": t.name, "engines": list(t.engines), "description": t.description} for t in targets])


@main.command("stages")
@click.argument("name", required=False)
def stages_command(name: str | None) -> None:
    """List the stages, or the options of the stage NAME with their defaults and meaning."""
    from edgepipe.report.terminal import table
    from edgepipe.stage_help import describe_stages, stage_options_help

    if name is None:
        stages = describe_stages()
        _say(table(["stage", "what it does"], [[s["name"], s["summary"]] for s in stages]))
        _print_json(stages)
        return
    options = stage_options_help(name)
    rows = [[f"{name}.{o['name']}", o["default"], o["meaning"]] for o in options]
    _say(table(["option", "default", "meaning"], rows))
    _print_json(options)


@main.command("models")
def models_command() -> None:
    """List the models that come as packages: no hub needed."""
    from edgepipe.report.terminal import table
    from edgepipe.sources import DEFAULT_MODEL, PACKAGED

    rows = [[m.name + (" (default)" if m.name == DEFAULT_MODEL else ""), m.licence.id, m.title] for m in PACKAGED]
    _say(table(["model", "licence", "what it is"], rows))
    _print_json([{"name": m.name, "licence": m.licence.id, "description": m.title} for m in PACKAGED])


def _say(text: str) -> None:
    click.echo(text, err=True)


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, ensure_ascii=False))


def _fail(message: str, code: int) -> None:
    if sys.stderr.isatty():
        click.echo("\r\x1b[2K", nl=False, err=True)  # the line that showed the progress
    _say(f"edgepipe: {message}")
    sys.exit(code)
