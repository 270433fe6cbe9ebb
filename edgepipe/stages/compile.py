"""Compile: lower the portable graphs for one engine, check the result, and write the bundle an app ships.

The check runs the lowered graphs through the very runtime that ships, a decoder as a prompt and then token by token,
against the portable ones: once with the engine's exact arithmetic (structure, packing and cache must be right to
float32 rounding), and once more when other arithmetic ships (int8 activations cost accuracy; how much is recorded).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgepipe.artifacts import ActivationPlan, CompiledModel, Context, Json, ModelInfo, OnnxModel, TorchModel
from edgepipe.compiling.checks import (
    EXACT,
    Asked,
    beside_one,
    in_steps,
    one_by_one,
    portable,
    within,
    worst_error,
    worst_loss,
)
from edgepipe.errors import ConfigError, ContractError, TargetError
from edgepipe.runtime.exits import GATE
from edgepipe.target import AUTO, ENGINES, Target

if TYPE_CHECKING:
    from edgepipe.compiling.library import Wanted
    from edgepipe.compiling.npu import Wanted as WantedOfNpu
    from edgepipe.engines.onnxruntime.cache_scales import CacheScales
    from edgepipe.engines.onnxruntime.integer_products import Range
    from edgepipe.engines.onnxruntime.planned import WeightsFile
    from edgepipe.levels import Level
    from edgepipe.quantizers.texts import Calibration

# Largest error allowed with exact arithmetic: float32 rounding through all layers, that of 11-bit keys and values, or
# that of 8-bit ones, which is eight times as large.
_TOLERANCE = 1e-3
_CACHE_TOLERANCES = {"float32": _TOLERANCE, "float16": 2e-2, "int8": 0.2}
# As shipped: MatMulNBits rounds activations per group, integer products per tensor, and entropy's ranges cut outliers.
# What lies above is broken: outputs that have nothing to do with each other differ by 1.4. Rounded to 16 levels, a
# model that was trained with that is far from itself in floats, and still right: its quality is what must be looked at.
_SHIPPED_TOLERANCE, _PLANNED_TOLERANCE, _FOUR_BIT_TOLERANCE = 0.1, 0.5, 1.2
_NPU_TOLERANCE = 0.2  # 8-bit weights with a scale a channel: a difference that a cosine of 0.98 stands for


@dataclass(frozen=True, slots=True, kw_only=True)
class Compile:
    """Options of the stage `compile`."""

    engine: str = ""  # onnxruntime; tvm (docs/tvm.md); qnn: an NPU (docs/npu.md); auto: the faster; "": target's first
    accuracy_level: int = -1  # of MatMulNBits: 0 float32, 4 int8 activations (faster, noisier); −1 takes the target's
    cache_dtype: str = "float16"  # of the KV cache: float16; float32: twice its bytes; int8: half, ranges from texts
    calibration: str = ""  # texts that ranges of an int8 cache or an NPU come from: a set or a file; empty: everyday
    tokens: int = 0  # on an NPU, of a text, or of a decoder's cache; 0: 64 or 512, or the context where that is less
    npu_share: float = 0.95  # least share of the nodes that must lie on an NPU, in [0, 1]
    deflate: str = "auto"  # weights are stored deflated: auto, where masks make that a tenth smaller; always; never
    tune: float = 0.0  # minutes in which tvm's products are tuned on this machine (docs/tvm.md); 0: its defaults
    tuning: str = ""  # a tuning database in place of that: the tuning.json of a bundle that was tuned
    check_tokens: int = 16  # tokens of the numeric check against the portable graph; 0 leaves it out
    exact_tolerance: float = 0.0  # error of exact arithmetic, in largest logits; 0: 1e-3, float16 cache 2e-2, int8 0.2
    shipped_tolerance: float = 0.0  # RMS difference as shipped, in RMS; 0: 0.1, int8 tensors 0.5, 4-bit activations 1.2

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.engine and self.engine not in (*ENGINES, AUTO):
            raise ConfigError(f"compile.engine: expected {', '.join(ENGINES)} or {AUTO}, got {self.engine!r}")
        if not -1 <= self.accuracy_level <= 4:
            raise ConfigError(
                f"compile.accuracy_level: expected 0 to 4, or -1 for the target's, got {self.accuracy_level}"
            )
        if self.cache_dtype not in _CACHE_TOLERANCES:
            raise ConfigError(f"compile.cache_dtype: expected float32, float16 or int8, got {self.cache_dtype!r}")
        if self.tokens < 0 or not 0 <= self.npu_share <= 1:
            raise ConfigError("compile.tokens must not be negative, and compile.npu_share must be from 0 to 1")
        if self.deflate not in ("auto", "always", "never"):
            raise ConfigError(f"compile.deflate: expected one of auto, always, never, got {self.deflate!r}")
        if not 0 <= self.tune < math.inf:
            raise ConfigError(f"compile.tune: expected minutes above 0, or 0 for the defaults, got {self.tune}")
        if self.tune and self.tuning:
            raise ConfigError("compile.tune searches and compile.tuning names what was found: leave one out")
        if self.check_tokens < 0 or self.exact_tolerance < 0 or self.shipped_tolerance < 0:
            raise ConfigError("compile.check_tokens and the tolerances must not be negative")

    @property
    def apart(self) -> str:
        """Return what keeps a finished bundle beside that of another engine: the engine that was asked for."""
        return self.engine

    def reads(self) -> Json:
        """Return what identifies the texts that ranges come from, and a tuning database."""
        if self.cache_dtype != "int8" and not self.calibration:
            return self._tuning_read()
        from edgepipe.quantizers.texts import fingerprint

        return fingerprint(self._texts()) | self._tuning_read()

    def _tuning_read(self) -> Json:
        from edgepipe.store import file_sha256

        try:
            return {"tuning": file_sha256(Path(self.tuning))} if self.tuning else {}
        except OSError as error:
            raise ConfigError(f"compile.tuning: {self.tuning} can't be read: {error.strerror}") from error

    def check(self, model: TorchModel) -> None:
        """Refuse, before any work, an int8 cache that has no use or no texts."""
        if self.cache_dtype == "int8":
            self._check_cache(model.info)

    def meets(self, target: Target) -> Json:
        """Refuse an engine that the target hasn't, that isn't here or can't do what is asked, before any work.

        Return the instructions that a library is built for, or the chip. The stage's key changes with them: a library
        that another machine left here is not taken for this one's.
        """
        engine = self._engine(target)
        if engine != "tvm" and (self.tune or self.tuning):
            raise ConfigError(
                f"compile.tune and compile.tuning are for tvm's kernels, not for {engine}'s: leave them out"
            )
        if engine == "qnn":
            return self._meets_npu(target)
        if self.calibration and self.cache_dtype != "int8":
            raise ConfigError(f"compile.calibration: a {self.cache_dtype} cache needs no texts: leave it out")
        if self.tokens:
            raise ConfigError(f"compile.tokens: texts of one length are for an NPU, not for {engine}: leave it out")
        if engine != "tvm":
            return {}
        from edgepipe.engines.linking import linked_by
        from edgepipe.engines.nvcc import compiled_by

        level = self._level(target)
        return {"level": asdict(level), **linked_by(level), **compiled_by(level), **self._meets_tuning(level)}

    def _meets_tuning(self, level: Level) -> Json:
        """Return the processor that tilings are searched for on; refuse what can't be timed here, or be used."""
        from edgepipe.compiling.tuning import check_tunable, read_database

        if self.tuning:
            read_database(Path(self.tuning), level)
        return {"tuned_on": check_tunable(level)} if self.tune else {}

    def _engine(self, target: Target) -> str:
        """Return the engine that is asked for, or the target's first; TargetError where the target hasn't it."""
        if self.engine == AUTO:
            raise ConfigError("compile.engine=auto is for `edgepipe compress` alone: name an engine")
        chosen = self.engine or target.engines[0]
        if chosen not in target.engines:
            raise TargetError(
                f"the target {target.name} runs {', '.join(target.engines)}, and the recipe asks for {chosen}"
            )
        return chosen

    def _meets_npu(self, target: Target) -> Json:
        """Return the chip and the texts that the ranges come from."""
        from edgepipe.compiling.npu import check_npu
        from edgepipe.quantizers.texts import fingerprint

        if self.cache_dtype == "int8" or self.deflate == "always":
            raise ConfigError("an NPU's bundle has no int8 cache and is not deflated: leave both options out")
        return {"chip": asdict(check_npu(target)), **fingerprint(self._texts())}

    def _level(self, target: Target) -> Level:
        """Return the level of a target's library; ConfigError or TargetError where none can be built."""
        from edgepipe.compiling.library import check_tvm

        level = check_tvm(self.cache_dtype, target, checked=bool(self.check_tokens))
        if self.deflate == "always":
            raise ConfigError(
                "compile.deflate=always: a compiled library reads its weights as they lie; leave it out, or take "
                "onnxruntime"
            )
        return level

    def _check_cache(self, info: ModelInfo) -> None:
        from edgepipe.graph.tasks import GENERATION
        from edgepipe.quantizers.texts import SELF, check_calibration

        if info.task not in GENERATION:
            raise ConfigError(
                f"compile.cache_dtype=int8: expected a model that generates, but {info.name} is for {info.task} and "
                "keeps no cache: leave it out"
            )
        if self.calibration == SELF:
            raise ConfigError('compile.calibration: expected a set or a file, but "self" is neither')
        check_calibration(info, self._texts())

    def _texts(self) -> Calibration:
        from edgepipe.quantizers.texts import Calibration

        return Calibration(source=self.calibration)

    def __call__(self, model: OnnxModel, ctx: Context) -> CompiledModel:
        """Return the bundle, written to a directory of its own."""
        from edgepipe.graph.parts import used_weights

        chosen = self._engine(ctx.target)
        if "exits" in model.spec and "ends" not in model.spec:
            from edgepipe.stages.exits import check_engine

            check_engine(chosen, self.cache_dtype)
        level = self.accuracy_level if self.accuracy_level >= 0 else ctx.target.onnxruntime.accuracy_level
        path = ctx.work_dir / "bundle"
        path.mkdir()
        model = replace(model, weights=model.weights.only(used_weights(model.graphs)))
        if chosen == "qnn":
            from edgepipe.compiling.npu import build_npu

            manifest = build_npu(model, self._wanted_of_npu(), path, ctx)
        elif chosen == "tvm":
            from edgepipe.compiling.library import build_library

            manifest = build_library(model, self._wanted(model, level, self._level(ctx.target)), path, ctx)
        else:
            manifest = self._with_onnxruntime(model, level, path, ctx)
        return CompiledModel(info=model.info, path=path, manifest=manifest, history=model.history)

    def _wanted_of_npu(self) -> WantedOfNpu:
        """Say what a graph for an NPU must be like."""
        from edgepipe.compiling.npu import Wanted

        return Wanted(
            tokens=self.tokens,
            least_share=self.npu_share,
            calibration=self._texts(),
            checked=bool(self.check_tokens),
            exact_tolerance=self.exact_tolerance or _TOLERANCE,
            shipped_tolerance=self.shipped_tolerance or _NPU_TOLERANCE,
        )

    def _wanted(self, model: OnnxModel, accuracy_level: int, level: Level) -> Wanted:
        """Say what a compiled library must be like."""
        from edgepipe.compiling.library import Wanted

        whole = "ends" in model.spec  # such a model keeps no cache, or a float32 one
        exact = _TOLERANCE if whole else _CACHE_TOLERANCES[self.cache_dtype]
        return Wanted(
            level=level,
            accuracy_level=accuracy_level,
            cache_dtype=self.cache_dtype,
            check_tokens=self.check_tokens,
            exact_tolerance=self.exact_tolerance or exact,
            shipped_tolerance=self._allowed(model),
            tune=self.tune,
            tuning=self.tuning,
        )

    def _with_onnxruntime(self, model: OnnxModel, level: int, path: Path, ctx: Context) -> Json:
        """Write graphs of fused operators and their weights; return the manifest."""
        from edgepipe.bundle import write_bundle
        from edgepipe.compiling.deflating import deflate
        from edgepipe.engines import onnxruntime as engine
        from edgepipe.engines.onnxruntime.planned import WeightsFile

        # All lowerings of a model share one layout, so that each runs on the file that ships
        file = WeightsFile()
        seen = self._cache_scales(model, file, path, ctx)
        scales = None if seen is None else seen.scales
        lower = partial(engine.lower, model, cache_dtype=self.cache_dtype, scales=scales, file=file)
        exact, _ = lower(accuracy_level=EXACT, exact=True)
        ranges = self._observe(model, exact, file, path, ctx)
        graphs, _ = lower(accuracy_level=level, ranges=ranges)
        engine.write(graphs, file, path, lambda done, total: ctx.progress("writing weights", done, total))
        shipped = level != EXACT or model.activations is not None
        if self.check_tokens and "ends" in model.spec:
            self._check_traced(model, exact, path, ctx, shipped=shipped)
        elif self.check_tokens:
            self._check_decoder(model, exact, path, ctx, shipped=shipped, seen=seen)
        deflate(model, path, ctx, self.deflate)
        return write_bundle(model, path, file, ctx.recipe, self.cache_dtype)

    def _cache_scales(self, model: OnnxModel, file: WeightsFile, path: Path, ctx: Context) -> CacheScales | None:
        """Return the scales of an int8 cache, found over the calibration texts; None for any other cache."""
        if self.cache_dtype != "int8":
            return None
        from edgepipe.engines import onnxruntime as engine
        from edgepipe.engines.onnxruntime.cache_scales import observe_cache
        from edgepipe.quantizers.texts import DEFAULT_SET, rows_of

        self._check_cache(model.info)
        if "ends" in model.spec:
            raise ConfigError(
                f"compile.cache_dtype=int8: expected a preallocated cache, but that of {model.info.name} grows and "
                "stays float32: leave it out"
            )
        rows = rows_of(model.info, self._texts(), seed=ctx.seed)
        exact, _ = engine.lower(model, accuracy_level=EXACT, exact=True, file=file)  # with a float32 cache
        engine.write({}, file, path, lambda done, total: ctx.progress("writing weights", done, total))
        files = _write_exact(exact, path)
        tell = partial(ctx.progress, "ranges of the cache")
        seen = observe_cache(model, path, files, rows, tell)
        for name in files.values():
            (path / name).unlink()
        ctx.note(f"ranges of the int8 cache from {len(rows)} rows of {self.calibration or DEFAULT_SET}")
        return seen

    def _observe(
        self, model: OnnxModel, exact: Mapping[str, bytes], file: WeightsFile, path: Path, ctx: Context
    ) -> dict[str, dict[str, Range]] | None:
        """Return the ranges of static activations, seen over the calibration set; None where the plan has none."""
        from edgepipe.engines import onnxruntime as engine
        from edgepipe.engines.onnxruntime.ranges import observe_ranges

        plan = model.activations
        if plan is None or plan.kind != "static":
            return None
        engine.write({}, file, path, lambda done, total: ctx.progress("writing weights", done, total))
        files = _write_exact(exact, path)
        ranges = observe_ranges(
            model, plan, path, files, self.cache_dtype, lambda done, total: ctx.progress("ranges", done, total)
        )
        for name in files.values():
            (path / name).unlink()
        found = [one for graph in ranges.values() for one in graph.values()]
        if found:
            widest = max(high - low for low, high in found)
            ctx.note(f"{len(found)} ranges by {plan.ranges} over {plan.calibration}, the widest {widest:.3g}")
        return ranges

    def _allowed(self, model: OnnxModel) -> float:
        """Return how far outputs as shipped may be from the portable ones."""
        plan = model.activations
        usual = _SHIPPED_TOLERANCE if plan is None and self.cache_dtype != "int8" else _PLANNED_TOLERANCE
        if plan is not None and plan.tokens is not None and plan.tokens.bits == 4:
            usual = _FOUR_BIT_TOLERANCE
        return self.shipped_tolerance or usual

    def _check_traced(
        self, model: OnnxModel, exact: Mapping[str, bytes], path: Path, ctx: Context, *, shipped: bool
    ) -> None:
        """Compare the lowered graphs of a traced model with the portable ones on seeded inputs."""
        from edgepipe.graph.evaluate import evaluate
        from edgepipe.graph.parts import seeded_feeds

        exact_errors, shipped_errors = [0.0], [0.0]
        crossed: dict[str, np.ndarray] = {}  # what an encoder gives a decoder
        for number, (name, graph) in enumerate(model.graphs.items()):
            ctx.progress(f"checking the graph {name}", number, len(model.graphs))
            feeds = seeded_feeds(model.spec["ends"][name]["inputs"], model.spec["vocab_size"], ctx.seed + 1)
            feeds = _with_texts(feeds, model.activations, answers=name in ("decoder", "scorer"))
            if model.activations is not None and model.activations.batches:
                feeds = _with_cache(feeds, crossed, partial(evaluate, graph, model.weights))
            expected = evaluate(graph, model.weights, feeds)
            crossed = expected if name == "encoder" else crossed
            exact_graph = path / _write_exact({name: exact[name]}, path)[name]  # beside its weights
            got = _run_graph(exact_graph, feeds)
            exact_graph.unlink()
            ours, theirs = beside_one(got), beside_one(expected)
            exact_errors.append(worst_error([ours[n] for n in theirs], list(theirs.values())))
            if shipped:
                got = _run_graph(path / f"{name}.onnx", feeds)
                names = [n for n in expected if n != GATE]
                shipped_errors.append(worst_loss([got[n] for n in names], [expected[n] for n in names]))
        worst, loss = (float(np.max(errors)) for errors in (exact_errors, shipped_errors))  # NaN stays NaN: refused
        found = f"agrees with the portable graphs: {within('exact', worst, self.exact_tolerance or _TOLERANCE)}"
        ctx.note(found + (f", {within('as shipped', loss, self._allowed(model))}" if shipped else ""))

    def _check_decoder(
        self,
        model: OnnxModel,
        exact: Mapping[str, bytes],
        path: Path,
        ctx: Context,
        *,
        shipped: bool,
        seen: CacheScales | None,
    ) -> None:
        """Compare the lowered decoder, and what stands before it, with the portable graphs."""
        count = min(self.check_tokens, model.spec["context"])
        asked = Asked.seeded(model.spec, count, ctx.seed + 1)
        ids = _with_texts({"input_ids": asked.ids}, model.activations, answers=True)["input_ids"]
        asked = replace(asked, ids=ids, sources=_with_texts(asked.sources, model.activations, answers=False))
        if seen is not None:  # ranges are those of such texts
            ids, source = (np.concatenate(rows).astype(np.int64) for rows in (seen.read, seen.rows))
            sources = {**asked.sources, "input_ids": np.resize(source, asked.sources["input_ids"].shape)}
            asked = replace(asked, ids=np.resize(ids, asked.ids.shape), sources=sources)
        ctx.progress("the portable graph's logits", 0, 3)
        expected = portable(model, asked)
        exact_graphs = _write_exact(exact, path)
        ctx.progress("the lowered graph's logits, exact", 1, 3)
        scales = {} if seen is None else seen.scales
        got = _runin_steps(path, exact_graphs, model, asked, self.cache_dtype, scales)
        for file in exact_graphs.values():
            (path / file).unlink()
        worst = worst_error(got, expected)
        allowed = self.exact_tolerance or _CACHE_TOLERANCES[self.cache_dtype]
        found = f"agrees with the portable graph on {count} tokens: {within('exact', worst, allowed)}"
        if shipped:
            ctx.progress("the lowered graph's logits, as shipped", 2, 3)
            files = {name: f"{name}.onnx" for name in exact}
            got = _runin_steps(path, files, model, asked, self.cache_dtype, scales)
            found += f", {within('as shipped', worst_loss(got, expected), self._allowed(model))}"
        ctx.note(found)
        if "exits" in model.spec:
            self._check_leaving(model, exact, path, ctx)

    def _check_leaving(self, model: OnnxModel, exact: Mapping[str, bytes], path: Path, ctx: Context) -> None:
        """Compare tokens that leave at each exit with the portable graphs, and those that leave at none with them all.

        What is left at none runs other graphs than `decoder`, and must give the same bits.
        """
        from edgepipe.graph.evaluate import logits_leaving
        from edgepipe.runtime.leaving import LeavingDecoder, above, taking
        from edgepipe.runtime.onnxruntime import open_decoder, open_leaving

        exits = len(model.spec["exits"])
        ids = Asked.seeded(model.spec, 2 * exits + 2, ctx.seed + 1).ids
        ways = [(number - 1) % (exits + 1) for number in range(ids.shape[1])]  # the first token never leaves
        exact_graphs = _write_exact(exact, path)
        manifest = {"graphs": exact_graphs, "model": model.spec, "cache": {"dtype": self.cache_dtype}}
        whole, parts = open_decoder(path, manifest, None), open_leaving(path, manifest, None)
        for file in exact_graphs.values():
            (path / file).unlink()
        by_parts = [LeavingDecoder(parts, model.spec, self.cache_dtype, rule) for rule in (above(1), taking(ways))]
        got = [one_by_one(whole, ids), *(one_by_one(decoder, ids) for decoder in by_parts)]
        if not np.array_equal(got[0], got[1]):
            raise ContractError(
                "the parts of the decoder, all run, differ from the graph of all layers: build it again"
            )
        worst = worst_error([got[2]], [logits_leaving(model, ids, ways)])
        allowed = self.exact_tolerance or _CACHE_TOLERANCES[self.cache_dtype]
        ctx.note(f"tokens that leave at the exits agree with the portable graphs: {within('exact', worst, allowed)}")


def _with_texts(feeds: dict[str, np.ndarray], plan: ActivationPlan | None, *, answers: bool) -> dict[str, np.ndarray]:
    """Return feeds with ids of the calibration set, where a plan has one: static ranges are those of such texts.

    `answers` asks for what a decoder reads: behind an encoder those are answers.
    """
    if plan is None or not plan.batches or "input_ids" not in feeds:
        return feeds
    batch = plan.batches[-1]  # of the longest texts
    own = answers and "decoder_input_ids" in batch
    names = ("decoder_input_ids", "decoder_mask") if own else ("input_ids", "attention_mask")
    ids, mask = (batch[name] for name in names)
    return {**feeds, "input_ids": np.resize(ids[mask.astype(bool)], feeds["input_ids"].shape)}


def _with_cache(
    feeds: dict[str, np.ndarray],
    crossed: Mapping[str, np.ndarray],
    run: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Return feeds with the keys and values that the model itself makes, `crossed` those of a source: seeded ones lie
    outside of static ranges.
    """
    own = {name: crossed[name][:, :, : value.shape[2]] for name, value in feeds.items() if name in crossed}
    past = {name: value for name, value in feeds.items() if name.startswith("past_")}
    if not past:
        return {**feeds, **own}
    made = run({**feeds, **own, **{name: value[:, :, :0] for name, value in past.items()}})
    own |= {name: made[name.replace("past_", "present_")][:, :, : value.shape[2]] for name, value in past.items()}
    return {**feeds, **own}


def _write_exact(graphs: Mapping[str, bytes], path: Path) -> dict[str, str]:
    """Write exact graphs beside the weights, which onnxruntime wants there; return their files by name."""
    files = {name: f"exact-{name}.onnx" for name in graphs}
    for name, graph in graphs.items():
        (path / files[name]).write_bytes(graph)
    return files


def _run_graph(graph: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a lowered graph once through the runtime that ships."""
    from edgepipe.runtime.onnxruntime import open_graph

    return open_graph(graph, None).run(feeds)


def _runin_steps(
    path: Path,
    graphs: dict[str, str],
    model: OnnxModel,
    asked: Asked,
    cache_dtype: str,
    scales: Mapping[str, np.ndarray],
) -> list[np.ndarray]:
    """Run the answer as a prompt of n − n//4 tokens and then one by one, through the runtime that ships.

    → what `portable` returns; the scorer's logits are those after the answer's first token.
    """
    from edgepipe.runtime.onnxruntime import open_decoder

    manifest = {"graphs": graphs, "model": model.spec, "cache": {"dtype": cache_dtype}}

    def encoder(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        crossed = _run_graph(path / graphs["encoder"], feeds)
        return {name: array * scales[name] if name in scales else array for name, array in crossed.items()}

    return in_steps(open_decoder(path, manifest, None), encoder if "encoder" in graphs else None, asked)
