"""The models and forms of benchmarks/quantized.py: tables of records, and the options that each row means."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from benchmarks.e2e import MAX_SOURCE, MAX_TARGET
from edgepipe.artifacts import Json
from edgepipe.measuring.metrics import Evaluation

GROUP = 32
THREADS = 1
TOKENS = 8192  # of the text that gives perplexity, from its beginning
STEPS, DECODER_STEPS = 400, 100  # of training on the grid; SmolLM2 is as large as twenty of the others
MAX_DROP = "1%"  # what `--bits mixed` means
ALPHA = 0.9  # SmoothQuant's, the best of those that benchmarks/int8.py tried on MiniLM
Settings = tuple[tuple[str, str, object], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Name one model, and how it is scored."""

    name: str
    label: str
    source: str  # a package's name, or a student's folder in runs/
    how: Evaluation
    data: str  # a file of DIR
    quality: str  # what a column calls the metric
    unit: float = 100.0  # what the metric is multiplied by there
    part: str = ""  # what of the file is scored, where not all is
    made_by: str = ""  # the benchmark that trains it
    settings: Settings = ()  # of export and compile
    options: dict[str, object] = field(default_factory=dict)  # of quantize, unless the form keeps what came
    learns: dict[str, object] = field(default_factory=dict)  # of quantize, in forms that are trained
    targets: bool = True  # the training data have labels, answers or next tokens
    search: tuple[str, ...] | None = ()  # of `edgepipe eval` in forms that are searched; None: on a text of edgepipe's

    @property
    def lower(self) -> bool:
        """Say whether less is better."""
        return self.how.described.better == "lower"


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Name one way to quantize, and its options; None: not compressed."""

    name: str
    label: str
    options: dict[str, object] | None = None
    models: tuple[str, ...] = ()  # empty: all
    keeps: bool = False  # the grid a model came on
    max_drop: str = ""  # a budget that bits and groups are searched for
    own_texts: bool = False  # calibrated on texts like those that it's scored on


MODELS = (
    Model(
        name="minilm",
        label="Sentence encoder `minilm-l6-v2`",
        source="minilm-l6-v2",
        how=Evaluation(metric="spearman", threads=THREADS),
        data="stsb-dev.tsv",
        quality="Spearman × 100",
        targets=False,
        search=("limit=1000",),
    ),
    Model(
        name="encoder",
        label="Encoder student (classifier of SST-2)",
        source="embedding/classifier-0/student",
        how=Evaluation(metric="accuracy", threads=THREADS, batch=32),
        data="sst2-dev.tsv",
        quality="accuracy, %",
        made_by="embedding",
        settings=(("export", "context", 512),),
        search=("limit=1000",),
    ),
    Model(
        name="pair",
        label="Encoder-decoder student (E2E)",
        source="e2e/adapted-KD-0/student",
        how=Evaluation(metric="bleu", threads=THREADS, max_new_tokens=MAX_TARGET - 1),
        data="e2e-dev.csv",
        part="those of meanings that nothing was trained on",
        quality="BLEU",
        unit=1.0,
        made_by="e2e",
        settings=(("export", "context", MAX_SOURCE + MAX_TARGET), ("compile", "cache_dtype", "float32")),
        learns={"tokens": MAX_SOURCE, "held_out": 0.03},
        search=("limit=100", f"max_new_tokens={MAX_TARGET - 1}"),
    ),
    Model(
        name="decoder",
        label="Decoder `smollm2-135m`",
        source="smollm2-135m",
        how=Evaluation(metric="perplexity", threads=THREADS, tokens=TOKENS),
        data="wikitext2-valid.txt",
        part=f"its first {TOKENS:,} tokens",
        quality="perplexity",
        unit=1.0,
        settings=(("export", "context", 1024),),
        options={"import": False},
        learns={"tokens": 96, "held_out": 0.02, "batch": 16, "steps": DECODER_STEPS},
        search=None,
    ),
)


def _codes(bits: int, method: str, models: tuple[str, ...] = ()) -> Form:
    options: dict[str, object] = {"method": method, "bits": bits, "group": GROUP, "symmetric": True}
    label = f"{bits}-bit, {method}" + (" (zero points)" if method == "hqq" else "")
    return Form(name=f"{method} {bits}", label=label, options=options, models=models)


def _with_zero_points(method: str) -> Form:
    """Return 4 bits on the grid that HQQ has by nature: does it, or the method, make the difference?"""
    options = {**(_codes(4, method).options or {}), "symmetric": False}
    return Form(
        name=f"{method} 4, zero points", label=f"4-bit, {method} (zero points)", options=options, models=("pair",)
    )


def _sampled(shown: str, more: dict[str, object], *, own_texts: bool = False) -> Form:
    """Return GPTQ at two bits, where texts count most, with other texts than by default."""
    options = {**(_codes(2, "gptq").options or {}), **more}
    name, label = f"gptq 2, {shown}", f"2-bit, gptq, {shown}"
    return Form(name=name, label=label, options=options, models=("minilm",), own_texts=own_texts)


def _activations(name: str, shown: str, more: dict[str, object]) -> Form:
    return Form(name=name, label=f"8-bit, activations {shown}", options={"bits": 8, **more})


# Training on the grid, as benchmarks/qat.py has it; a model's `learns` come over these.
_TRAINS: dict[str, object] = {"steps": STEPS, "held_out": 0.005, "tokens": 48, "learning_rate": 2e-4}
_W4A4: dict[str, object] = {"bits": 4, "activations": "dynamic", "activation_bits": 4}
METHODS = ("rtn", "gptq", "awq", "hqq", "autoround")
FLOAT = Form(name="float32", label="float32")
_SMALLEST = Form(
    name="rtn 4, embedding 4",
    label="4-bit, rtn, embedding 4-bit",
    options={"bits": 4, "group": GROUP, "symmetric": True, "embedding_bits": 4},
    models=("decoder",),
)
FORMS = (
    FLOAT,
    Form(name="kept", label="as it came: Q4_1, embedding Q8_0", options={}, models=("decoder",), keeps=True),
    _activations("dynamic", "dynamic", {"activations": "dynamic"}),
    _activations("static", "static, min-max", {"activations": "static"}),
    _activations("smooth", f"static, SmoothQuant {ALPHA}", {"activations": "static", "smooth": ALPHA}),
    *(_codes(4, method) for method in METHODS),
    *(_with_zero_points(method) for method in ("rtn", "awq")),
    _SMALLEST,
    *(_codes(2, method, ("minilm",)) for method in METHODS),
    *(_sampled(f"{count} texts", {"samples": count}) for count in (4, 16, 32)),
    *(_sampled(f"{count} tokens a text", {"tokens": count}) for count in (8, 16)),
    *(_sampled(f"{n} of its own texts", {"samples": n}, own_texts=True) for n in (64, 512)),
    Form(name="w4a4", label="4-bit, activations 4-bit, rounded", options=_W4A4),
    Form(name="w4a4 trained", label="4-bit, activations 4-bit, trained", options={**_W4A4, **_TRAINS}),
    Form(name="ternary", label="ternary, activations 8-bit, trained", options={"bits": 1.58, **_TRAINS}),
    Form(
        name=f"mixed {MAX_DROP}",
        label=f"mixed, searched for a drop of {MAX_DROP} at most",
        options={},
        max_drop=MAX_DROP,
    ),
)
# What a form is timed in turn with besides float32, by model and form: on one thread and on two.
BESIDE = {
    ("decoder", "kept"): _SMALLEST.name,
    ("decoder", "ternary"): "rtn 4",
    ("pair", "ternary"): "rtn 4",
}
# Why neither GPTQ nor AWQ reaches rounding to nearest, by model and bits, where that is so; the page shows it.
NOTES: dict[tuple[str, int], str] = {}


def row_name(model: Model, form: Form) -> str:
    """Return what a row is called."""
    return f"{model.name} {form.name}"


ROWS = tuple((model, form) for model in MODELS for form in FORMS if not form.models or model.name in form.models)


def settings_of(model: Model, form: Form) -> Json:
    """Return the options of quantize that make a row, as JSON keeps them."""
    if form.options is None:
        return {}
    options = {**({} if form.keeps else model.options), **form.options}
    if learns(form):
        options |= model.learns
    if form.name == "ternary":  # rounding grows, and labels count where there are any
        options["strength_steps"] = model.learns.get("steps", STEPS) // 4
        options["targets"] = float(model.targets)
    found: Json = json.loads(json.dumps(options))
    return found


def learns(form: Form) -> bool:
    """Say whether a form is trained."""
    return "steps" in (form.options or {})
