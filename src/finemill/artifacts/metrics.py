"""Names of metrics as manifests, `metrics.json`, MLflow and the gates of `promote` have them.

An evaluation's are `eval/<model>/<metric>` over all rows and `eval/<model>/<source>/<metric>` over those of one source,
each with its standard error under the same name and `_stderr`. A dataset's `dataset/sources/<source>/<measure>` say
what each source has in the training split.
"""

import itertools
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

ModelName = Literal["base", "tuned"]
MODELS: tuple[ModelName, ...] = get_args(ModelName)

Z95 = 1.96
"""Standard errors in half of a 95 % interval."""

ROWS = "eval/rows"
FIXED = "eval/fixed"
"""Number of problems that only the tuned model answers; `eval/fixed_rate` is their share of those that base fails."""
FIXED_RATE = "eval/fixed_rate"
BROKEN = "eval/broken"
"""Number of problems that only the base answers; `eval/broken_rate` is their share of those that base answers."""
BROKEN_RATE = "eval/broken_rate"


Rate = Literal[
    "exact_match",
    "cut_off",
    "tool_calls",
    "schema_ok",
    "pattern_ok",
    "prefers_chosen",
    "format_ok",
    "think_closed",
    "finished",
]
"""A score of one answer that is yes or no, by its name in `evaluation.SampleScores`."""
Amount = Literal["rouge1", "rouge2", "rougeL", "bleu", "chrf", "tool_names", "tool_arguments", "tool_order"]
"""A score that is a number from 0 to 1."""
Score = Rate | Amount | Literal["loss"]
RATES: tuple[Rate, ...] = get_args(Rate)
MEANS: tuple[Rate | Amount, ...] = (*RATES, *get_args(Amount))
"""Scores whose mean is a metric; a loss has its own weights."""

METRIC_OF_SCORE: dict[Score, str] = {
    "cut_off": "cut_off_rate",
    "schema_ok": "schema_ok_rate",
    "pattern_ok": "pattern_ok_rate",
    "prefers_chosen": "preference_accuracy",
    "format_ok": "format_ok_rate",
    "think_closed": "think_closed_rate",
    "finished": "finished_rate",
}
"""Names of the metrics that are the mean of a score of another name: rates carry it in theirs."""


_OF_MACHINE = frozenset(
    {
        "seconds",
        "tokens_per_second",
        "mfu",
        "peak_memory_bytes",
        "memory_before_bytes",
        "memory_share",
        "checkpoint_seconds",
    }
)
_LONGEST_PART = 120


def model_metric(model: str, metric: str) -> str:
    """The name of a metric of one model; `metric` may begin with a source."""
    return f"eval/{model}/{metric}"


def delta_metric(metric: str) -> str:
    """The name of a metric's change, tuned less base, from the differences row by row."""
    return f"eval/delta/{metric}"


def stderr_of(metric: str) -> str:
    """The name of a metric's standard error."""
    return f"{metric}_stderr"


def metrics_of(metrics: Mapping[str, float], model: str) -> dict[str, float]:
    """One model's metrics of all, by what follows the model's name."""
    prefix = model_metric(model, "")
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}


def is_stderr(metric: str) -> bool:
    """Whether this is a standard error."""
    return metric.endswith("_stderr")


def is_total(name: str) -> bool:
    """Whether a metric, by its whole name, is over all rows: not of one source, and no standard error."""
    return name.count("/") <= 2 and not is_stderr(name)


def is_of_machine(name: str) -> bool:
    """Whether a metric tells of the machine and its load, so that the next run of the same step has another value."""
    return name.rpartition("/")[2] in _OF_MACHINE


def metric_parts(names: Iterable[str]) -> dict[str, str]:
    """A part of a metric's name for each source, of its own even where sources differ in signs or capitals only.

    MLflow takes letters and digits of any script, `_`, `.` and `-`, and 250 characters in all; of a long name the end
    counts. A mark that no letter carries, as some scripts write vowels, is none for it.
    """
    parts: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        plain = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", name)).strip(".")[-_LONGEST_PART:] or "_"
        numbered = (f"{plain}-{number}" for number in itertools.count(2))
        part = next(text for text in itertools.chain([plain], numbered) if text.casefold() not in taken)
        taken.add(part.casefold())
        parts[name] = part
    return parts


def mix_metric(part: str, measure: str) -> str:
    """The name of what a source has in the training split: `rows`, `tokens`, `learned_tokens`; or the `share` asked.

    `part` stands for the source, as `metric_parts` gives it.
    """
    return f"dataset/sources/{part}/{measure}"


def mix_of(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """What each source has in the training split, by the part of its metrics' names and by measure."""
    found: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        if name.startswith("dataset/sources/"):
            source, measure = name.removeprefix("dataset/sources/").rsplit("/", 1)
            found.setdefault(source, {})[measure] = value
    return found
