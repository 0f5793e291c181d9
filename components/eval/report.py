"""report.html, one page that needs nothing else, and report.md, the same scores in a few lines."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from finemill.artifacts.adapter import TrainingRecord, read_training
from finemill.artifacts.chain import ChainLink, chain_table
from finemill.artifacts.evaluation import Sample
from finemill.artifacts.files import REPORT_PAGE, REPORT_TEXT
from finemill.artifacts.metrics import (
    BROKEN,
    FIXED,
    FIXED_RATE,
    MODELS,
    ROWS,
    Z95,
    delta_metric,
    is_stderr,
    metric_parts,
    metrics_of,
    model_metric,
    stderr_of,
)
from finemill.artifacts.records import content_name
from finemill.components.eval.chart import training_chart
from finemill.components.eval.config import EvalConfig
from finemill.components.eval.harness import PREFIX as TASKS
from finemill.components.eval.metrics import sources
from finemill.components.eval.overview import change, heat_map, short_name, verdict, worst_first
from finemill.components.eval.think_lengths import think_lengths
from finemill.runtime.context import StepContext

_MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Measure:
    """A metric as a reader sees it."""

    key: str
    title: str
    meaning: str
    as_percent: bool
    lower_is_better: bool = False


_LENGTH = "generated_tokens"
MEASURES = (
    Measure("exact_match", "Exact match", "final answer equals the expected one", as_percent=True),
    Measure("cut_off_rate", "Cut off", "no answer before the longest length", as_percent=True, lower_is_better=True),
    Measure("rougeL", "ROUGE-L", "overlap with the reference, where there is no single right answer", as_percent=True),
    Measure("bleu", "BLEU", "mean of the rows' own, on the same rows", as_percent=True),
    Measure("chrf", "chrF", "overlap of characters, on the same rows", as_percent=True),
    Measure(
        "preference_accuracy", "Preference accuracy", "chosen answer likelier than the rejected one", as_percent=True
    ),
    Measure("tool_calls", "Tool calls", "those of the reference, with arguments, in order", as_percent=True),
    Measure("schema_ok_rate", "JSON schema", "answers that keep it", as_percent=True),
    Measure("pattern_ok_rate", "Pattern", "answers that match it", as_percent=True),
    Measure("loss", "Loss", "per assistant token of the reference, nats", as_percent=False, lower_is_better=True),
    Measure("perplexity", "Perplexity", "exp of the loss", as_percent=False, lower_is_better=True),
    Measure("format_ok_rate", "Well-formed", "turn ended, thinking block as in the reference", as_percent=True),
    Measure("think_closed_rate", "Thinking closed", "of the thinking blocks opened", as_percent=True),
    Measure("regression/accuracy", "Kept abilities", "45 questions that are not of this data", as_percent=True),
    Measure("regression/instructions", "Kept: instructions", "", as_percent=True),
    Measure("regression/arithmetic", "Kept: arithmetic", "", as_percent=True),
    Measure("regression/reading", "Kept: reading", "", as_percent=True),
    Measure(_LENGTH, "Answer length", "tokens, the end of turn included", as_percent=False),
)


def _task_measures(metrics: Mapping[str, float]) -> list[Measure]:
    """A measure per metric of the tasks of lm-evaluation-harness; shares as per cent."""
    keys = [name for name in metrics_of(metrics, "base") if name.startswith(f"{TASKS}/") and not is_stderr(name)]
    return [
        Measure(
            key,
            key.removeprefix(f"{TASKS}/").replace("/", ", "),
            "lm-evaluation-harness",
            as_percent=all(0 <= metrics[model_metric(model, key)] <= 1 for model in MODELS),
        )
        for key in keys
    ]


_AGAINST = "against"
_OF_OTHERS = ("exact_match", "cut_off_rate", "rougeL", "chrf", "tool_calls", "format_ok_rate", _LENGTH)
_BY_SOURCE = ("exact_match", "rougeL", "preference_accuracy", "loss", "format_ok_rate")


@dataclass(frozen=True)
class TableRow:
    """A line of a table: texts for base, tuned and the difference, each with its 95 % interval, and whether tuned is
    better.
    """

    title: str
    meaning: str
    base: str
    base_interval: str
    tuned: str
    tuned_interval: str
    delta: str
    interval: str
    verdict: str
    """`better`, `worse`, or empty where the difference is within its 95 % interval or has no direction."""


def write_reports(
    output_dir: Path,
    base: Sequence[Sample],
    tuned: Sequence[Sample],
    others: Mapping[str, Sequence[Sample]],
    metrics: Mapping[str, float],
    adapter: Path,
    config: EvalConfig,
    context: StepContext,
    chain: Sequence[ChainLink] = (),
) -> None:
    """Write report.html and report.md.

    Args:
        others: further models' samples by name, of some of the same rows.
        chain: how the further models that were exported differ from what they were made of.
    """
    training = read_training(adapter)
    by_id = {name: {sample.id: sample for sample in samples} for name, samples in others.items()}
    shown = worst_first(list(zip(base, tuned, strict=True)))[: config.report_rows]
    page = _template().render(
        title=_title(context),
        verdict=verdict(metrics),
        heat=heat_map(tuned),
        short_name=short_name,
        **{model: metrics_of(metrics, model) for model in MODELS},
        fixed=metrics.get(FIXED),
        fixed_rate=metrics.get(FIXED_RATE),
        broken=metrics.get(BROKEN),
        rows=headline_rows(metrics),
        by_source=[(name, headline_rows(metrics, f"{part}/")) for name, part in metric_parts(sources(base)).items()],
        chart=training_chart(training) if training else None,
        others=other_models(metrics, others),
        chain=(links := chain_table(chain)),
        chain_titles=list(dict.fromkeys(title for cells in links.values() for title in cells if title != _AGAINST)),
        thinking=think_lengths({"base": base, "tuned": tuned, **others}),
        samples=[
            _shown_sample(one, other, {name: rows[one.id] for name, rows in by_id.items() if one.id in rows})
            for one, other in shown
        ],
        num_rows=len(base),
        sources=sources(base),
        facts=facts(training, config, context),
        number=_number,
    )
    (output_dir / REPORT_PAGE).write_text(page, encoding="utf-8")
    (output_dir / REPORT_TEXT).write_text(_markdown(metrics, others, chain, context), encoding="utf-8")


def headline_rows(metrics: Mapping[str, float], source: str = "") -> list[TableRow]:
    """A line per measure that both models have a value for; `source` is a source's name with a slash, or empty."""
    return [
        _table_row(measure, metrics, source)
        for measure in (*MEASURES, *(() if source else _task_measures(metrics)))
        if not (source and measure.key not in _BY_SOURCE)
        and all(model_metric(model, f"{source}{measure.key}") in metrics for model in MODELS)
    ]


@dataclass(frozen=True)
class OtherCell:
    """A further model's value of a measure, and its change from base on the same rows."""

    value: str
    error: str
    change: str
    interval: str
    verdict: str


@dataclass(frozen=True)
class OtherLine:
    """A further model: its name, how many rows it answered, a cell per measure."""

    name: str
    rows: int
    cells: tuple[OtherCell, ...]


@dataclass(frozen=True)
class OtherModels:
    """The table of further models."""

    titles: tuple[str, ...]
    lines: tuple[OtherLine, ...]


def other_models(metrics: Mapping[str, float], others: Mapping[str, Sequence[Sample]]) -> OtherModels | None:
    """A line per further model, a column per measure that any of them has; None where there is none."""
    shown = [
        measure
        for measure in MEASURES
        if measure.key in _OF_OTHERS and any(model_metric(name, measure.key) in metrics for name in others)
    ]
    lines = [
        OtherLine(name, len(samples), tuple(_other_cell(measure, metrics, name) for measure in shown))
        for name, samples in others.items()
    ]
    return OtherModels(tuple(measure.title for measure in shown), tuple(lines)) if lines else None


def _other_cell(measure: Measure, metrics: Mapping[str, float], name: str) -> OtherCell:
    value = metrics.get(model_metric(name, measure.key))
    delta = metrics.get(model_metric(name, f"delta/{measure.key}"))
    if value is None:
        return OtherCell("", "", "", "", "")
    error = _interval(measure, metrics.get(stderr_of(model_metric(name, measure.key))))
    if delta is None:
        return OtherCell(_value(measure, value), error, "", "", "")
    paired = metrics.get(stderr_of(model_metric(name, f"delta/{measure.key}")), 0.0)
    better = (delta < 0) == measure.lower_is_better
    said = ("better" if better else "worse") if abs(delta) > Z95 * paired else ""
    return OtherCell(_value(measure, value), error, _signed(measure, delta), _interval(measure, paired), said)


def _table_row(measure: Measure, metrics: Mapping[str, float], source: str) -> TableRow:
    names = [model_metric(model, f"{source}{measure.key}") for model in MODELS]
    base, tuned = (metrics[name] for name in names)
    errors = [metrics.get(stderr_of(name)) for name in names]
    delta = tuned - base
    paired = metrics.get(stderr_of(delta_metric(f"{source}{measure.key}")))
    clear = paired is not None and abs(delta) > Z95 * paired
    improved = (delta < 0) == measure.lower_is_better
    return TableRow(
        measure.title,
        "" if source else measure.meaning,
        _value(measure, base),
        _interval(measure, errors[0]),
        _value(measure, tuned),
        _interval(measure, errors[1]),
        _signed(measure, delta),
        _interval(measure, paired),
        ("better" if improved else "worse") if clear else "",
    )


def _value(measure: Measure, value: float) -> str:
    if measure.as_percent:
        return f"{100 * value:.1f} %"
    return f"{value:,.1f}" if measure.key == _LENGTH else _number(value)


def _number(value: float, sign: str = "") -> str:
    """Three digits, trailing zeros too; thousands in full."""
    return format(value, f"{sign},.0f") if abs(value) >= 1000 else format(value, f"{sign}#.3g").rstrip(".")


def _interval(measure: Measure, error: float | None) -> str:
    """Half the width of the 95 % interval of a value with this standard error."""
    if error is None:
        return ""
    return f"± {100 * Z95 * error:.1f}" if measure.as_percent else f"± {Z95 * error:#.2g}"


def _signed(measure: Measure, delta: float) -> str:
    if measure.as_percent:
        return f"{100 * delta:+.1f}".replace("-", _MINUS)
    if measure.key == _LENGTH:
        return f"{delta:+,.1f}".replace("-", _MINUS)
    return _number(delta, "+").replace("-", _MINUS)


@dataclass(frozen=True)
class ShownAnswer:
    """One model's answer in the page."""

    name: str
    sample: Sample
    pieces: list[tuple[str, str]]
    repeats_tuned: bool
    """Whether a further model says what the tuned one says, word for word."""


def _shown_sample(base: Sample, tuned: Sample, others: Mapping[str, Sample]) -> dict[str, Any]:
    named = {"base": base, "tuned": tuned, **others}
    prompt = segments(base.prompt)
    return {
        # The turn that the models write begins below.
        "prompt": prompt[:-1] if prompt and prompt[-1][0] == "role" else prompt,
        "reference": segments(base.reference),
        "rejected": segments(base.rejected or ""),
        "answers": [
            ShownAnswer(
                name,
                sample,
                segments(sample.completion),
                repeats_tuned=name in others and sample.completion == tuned.completion,
            )
            for name, sample in named.items()
        ],
        "answer": base.answer,
        "source": base.source,
        "id": base.id,
        "change": change(base.exact_match, tuned.exact_match),
    }


_SEGMENT = re.compile(
    r"(?P<think><think>.*?(?:</think>|\Z))"
    r"|<\|im_start\|>(?P<chatml_role>\w+)\n|<\|start_header_id\|>(?P<llama_role>\w+)<\|end_header_id\|>\n\n"
    r"|(?P<end><\|(?:im_end|eot_id)\|>\n?)"
    r"|(?P<mark><\|[^|<>]{1,40}\|>)",
    re.DOTALL,
)


def segments(text: str) -> list[tuple[str, str]]:
    """(kind, text) pieces as a reader sees them: `role` for the begin of a turn in ChatML's or Llama 3's form, `think`
    for thinking blocks, `mark` for other special tokens and empty thinking blocks, `text` for the rest.
    """
    pieces: list[tuple[str, str]] = []
    position = 0
    for match in _SEGMENT.finditer(text):
        pieces.append(("text", text[position : match.start()].strip("\n")))
        role = match["chatml_role"] or match["llama_role"]
        if role:
            pieces.append(("role", role))
        elif match["think"]:
            empty = not match["think"].removeprefix("<think>").removesuffix("</think>").strip()
            pieces.append(("mark", "<think></think>") if empty else ("think", match["think"]))
        elif match["mark"]:
            pieces.append(("mark", match["mark"]))
        position = match.end()
    pieces.append(("text", text[position:].strip("\n")))
    return [(kind, piece) for kind, piece in pieces if piece]


def facts(training: TrainingRecord | None, config: EvalConfig, context: StepContext) -> list[tuple[str, str]]:
    """What the scores depend on, by name."""
    references = context.references
    manifests = context.manifests
    decoding = f"temperature {config.temperature:g}, seed {config.seed}" if config.temperature else "greedy"
    found = [
        ("Base model", content_name(references.get("base_model", ""))),
        ("Data set", content_name(references.get("dataset", ""))),
        ("Adapter", content_name(references.get("adapter", ""))),
        ("Split", config.split + (f", at most {config.max_rows} rows" if config.max_rows else "")),
        ("Decoding", f"{decoding}, at most {config.max_new_tokens} tokens"),
        ("Training", _training(training) if training else ""),
    ]
    adapter_config = manifests["adapter"].config if "adapter" in manifests else {}
    found += [
        (key, str(adapter_config[key])) for key in ("lora_r", "lora_alpha", "learning_rate") if key in adapter_config
    ]
    return [(name, value) for name, value in found if value]


def _training(training: TrainingRecord) -> str:
    losses = [loss for _, loss in training.training_losses]
    return f"{training.num_steps} steps, loss {losses[0]:.3g} to {losses[-1]:.3g}" if losses else ""


def _title(context: StepContext) -> str:
    base = context.references.get("base_model", "base model").split("@")[0].rstrip("/")
    return base.split("/")[-1].removeprefix("builtin:") or "base model"


def _markdown(
    metrics: Mapping[str, float],
    others: Mapping[str, Sequence[Sample]],
    chain: Sequence[ChainLink],
    context: StepContext,
) -> str:
    lines = [
        f"# {_title(context)}: base against tuned, {metrics[ROWS]:.0f} held-out rows",
        "",
        verdict(metrics),
        "",
        "| ± 95 % | base | tuned | change |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {one.title} | {one.base} {one.base_interval} | {one.tuned} {one.tuned_interval} "
        f"| {one.delta} {one.interval} |"
        for one in headline_rows(metrics)
    ]
    further = other_models(metrics, others)
    if further:
        lines += [
            "",
            "| model | rows | " + " | ".join(further.titles) + " |",
            "| --- |" + " ---: |" * (1 + len(further.titles)),
        ]
        lines += [
            f"| {line.name} | {line.rows} | "
            + " | ".join(f"{cell.value} ({cell.change} {cell.interval})".replace("( )", "") for cell in line.cells)
            + " |"
            for line in further.lines
        ]
    links = chain_table(chain)
    if links:
        titles = list(dict.fromkeys(title for cells in links.values() for title in cells))
        lines += ["", f"| form | {' | '.join(titles)} |", "| --- | --- |" + " ---: |" * (len(titles) - 1)]
        lines += [
            f"| {name} | {' | '.join(cells.get(title, '') for title in titles)} |" for name, cells in links.items()
        ]
    return "\n".join(re.sub(r" +\|", " |", line) for line in lines) + "\n"


def _template() -> Any:
    folder = Path(__file__).parent
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.jinja")
