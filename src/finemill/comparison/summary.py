"""A line per model and mode: scores with their errors, and the change from the first model row by row."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from finemill.artifacts.comparison import ComparedAnswer
from finemill.metrics.maths import equal_answers
from finemill.metrics.repeats import majority, pass_at_k
from finemill.metrics.statistics import mean, paired_rate_error, rate_error, standard_error

_Rows = Mapping[str, list[ComparedAnswer]]
"""One model's answers in one mode by question, in the order of the samples."""


@dataclass(frozen=True)
class Score:
    """A mean over questions, its standard error, and over how many."""

    mean: float
    stderr: float
    rows: int


@dataclass(frozen=True)
class Line:
    """What one model reaches in one mode."""

    model: str
    mode: str
    num_samples: int
    scores: dict[str, Score]
    """By name. Errors are those of the questions: the samples of one question are not independent of each other."""
    compared: "Headline"
    """The score that `seed_spread` and `change` are about."""
    seed_spread: float | None
    """Standard deviation of that score over the samples; None for one sample."""
    change: Score | None
    """That score less the first line's, on the same questions; None for the first."""


def summarize(answers: Sequence[ComparedAnswer]) -> list[Line]:
    """A line per model and mode, in the order that they were asked in."""
    groups: dict[tuple[str, str], dict[str, list[ComparedAnswer]]] = {}
    for answer in answers:
        groups.setdefault((answer.model, answer.mode), defaultdict(list))[answer.id].append(answer)
    first = next(iter(groups.values()), {})
    compared = headline(answers)
    return [
        _line(model, mode, rows, None if number == 0 else first, compared)
        for number, ((model, mode), rows) in enumerate(groups.items())
    ]


Headline = Literal["exact_match", "rougeL"]


def headline(answers: Sequence[ComparedAnswer]) -> Headline:
    """The score that models are compared by: exact match where any row has a known answer, else ROUGE-L."""
    return "exact_match" if any(answer.exact_match is not None for answer in answers) else "rougeL"


def to_json(lines: Sequence[Line]) -> list[dict[str, object]]:
    """The lines as metrics.json has them."""
    return [asdict(line) for line in lines]


def _line(model: str, mode: str, rows: _Rows, first: _Rows | None, compared: Headline) -> Line:
    num_samples = max(len(samples) for samples in rows.values())
    spread = _spread(rows, num_samples, compared)
    change = _change(rows, first, compared) if first is not None else None
    return Line(model, mode, num_samples, _scores(rows, num_samples), compared, spread, change)


def _scores(rows: _Rows, num_samples: int) -> dict[str, Score]:
    measures: dict[str, Callable[[list[ComparedAnswer]], float | None]] = {
        "exact_match": lambda samples: _mean_of([sample.exact_match for sample in samples]),
        "cut_off": lambda samples: _mean_of([_is_cut(sample) for sample in samples]),
        "rougeL": lambda samples: _mean_of([sample.rougeL for sample in samples]),
        "chrf": lambda samples: _mean_of([sample.chrf for sample in samples]),
        "thinks": lambda samples: _mean_of([sample.thinking_state != "none" for sample in samples]),
        "thinking_closed": lambda samples: _mean_of(
            [None if sample.thinking_state == "none" else sample.thinking_state == "closed" for sample in samples]
        ),
        "thinking_agrees": lambda samples: _mean_of([sample.thinking_agrees for sample in samples]),
        "thinking_characters": lambda samples: _mean_of(
            [sample.thinking_characters for sample in samples if sample.thinking_state != "none"]
        ),
        "tokens": lambda samples: _mean_of([sample.num_tokens for sample in samples]),
        "finished": lambda samples: _mean_of([sample.finished for sample in samples]),
    }
    if num_samples > 1:
        measures[f"pass@{num_samples}"] = _passes
        measures["majority"] = _majority
    found = {}
    for name, measure in measures.items():
        values = [value for samples in rows.values() if (value := measure(samples)) is not None]
        if values:
            # With several samples a question's share is no zero or one.
            rate = all(value in (0.0, 1.0) for value in values) and name not in ("tokens", "thinking_characters")
            found[name] = Score(mean(values), (rate_error if rate else standard_error)(values), len(values))
    return found


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return mean(known) if known else None


def _is_cut(sample: ComparedAnswer) -> bool:
    return sample.outcome == "cut_off" if sample.outcome else not sample.finished


def _passes(samples: list[ComparedAnswer]) -> float | None:
    if samples[0].exact_match is None:
        return None
    return pass_at_k(len(samples), sum(bool(sample.exact_match) for sample in samples), len(samples))


def _majority(samples: list[ComparedAnswer]) -> float | None:
    gold = samples[0].answer
    if gold is None:
        return None
    chosen = majority([sample.final_answer for sample in samples])
    return float(chosen is not None and equal_answers(gold, chosen))


def _spread(rows: _Rows, num_samples: int, compared: Headline) -> float | None:
    if num_samples < 2:
        return None
    runs = [
        _mean_of([getattr(samples[number], compared) for samples in rows.values()]) or 0.0
        for number in range(num_samples)
    ]
    return standard_error(runs) * math.sqrt(len(runs))


def _change(rows: _Rows, first: _Rows, compared: Headline) -> Score | None:
    pairs = [
        [_mean_of([getattr(sample, compared) for sample in side[key]]) for side in (first, rows)]
        for key in rows
        if key in first
    ]
    differences = [after - before for before, after in pairs if before is not None and after is not None]
    if not differences:
        return None
    rate = all(value in (-1.0, 0.0, 1.0) for value in differences)
    return Score(mean(differences), (paired_rate_error if rate else standard_error)(differences), len(differences))
