"""Predictions that exist already, scored row by row by any of the metrics, and the means of the scores."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finemill.errors import UserError
from finemill.metrics.choices import macro_f1, macro_f1_rows, read_label
from finemill.metrics.maths import judge
from finemill.metrics.rules import keeps_pattern, keeps_schema, read_schema
from finemill.metrics.statistics import mean, rate_error, standard_error
from finemill.metrics.text import bleu, chrf, rouge_scores
from finemill.metrics.tool_calls import read_tool_calls, score_tool_calls
from finemill.rows.answers import after_thinking, find_answer, with_opening

Value = float | bool | str | None


@dataclass(frozen=True)
class Prediction:
    """A row to score."""

    line: int
    prediction: str
    reference: str | None = None
    other_references: tuple[str, ...] = ()
    """Others that are as good: the best one counts."""
    source: str | None = None
    prompt: str = ""
    """The rendered prompt, for templates that open the thinking block."""
    finished: bool = True
    """Whether the model ended its turn; False for an answer that was cut."""
    schema: str | None = None
    pattern: str | None = None

    @property
    def text(self) -> str:
        """The prediction with its thinking block, whichever side opened it."""
        return with_opening(self.prompt, self.prediction)

    @property
    def gold(self) -> str:
        """Raises: UserError: there is no reference."""
        if self.reference is None:
            raise UserError(f"line {self.line} has no `reference`, which this metric compares with")
        return self.reference

    @property
    def golds(self) -> tuple[str, ...]:
        """Every reference. Raises: UserError: there is none."""
        return (self.gold, *self.other_references)


@dataclass(frozen=True)
class Mean:
    """The mean of one score over `rows` rows, and its standard error."""

    mean: float
    stderr: float
    rows: int


def read_predictions(lines: Iterable[str], where: str) -> list[Prediction]:
    """Parse JSON lines: `prediction`, and if given `reference`, `source`, `prompt`, `finished`, `schema`, `pattern`.

    Raises: UserError: a line is no object, or a field has another type; or there is no line.
    """
    rows = [_read_line(line, number, where) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise UserError(f"{where} holds no rows: write a JSON object with `prediction` and `reference` per line")
    return rows


def _read_line(line: str, number: int, where: str) -> Prediction:
    try:
        record = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}, line {number} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}, line {number} holds a {type(record).__name__}; a JSON object per line is needed")
    if not isinstance(record.get("prediction"), str):
        found = f"is {json.dumps(record['prediction'])[:40]}" if "prediction" in record else "is missing"
        raise UserError(f"{where}, line {number}: `prediction` {found}; it is the text that the model wrote")
    finished = record.get("finished", True)
    if not isinstance(finished, bool):
        raise UserError(f"{where}, line {number}: `finished` is {json.dumps(finished)[:40]}; it is true or false")
    reference, *others = _references(record.get("reference"))
    return Prediction(
        number,
        _as_text(record["prediction"]) or "",
        reference=reference,
        other_references=tuple(other for other in others if other),
        source=_as_text(record.get("source")),
        prompt=_as_text(record.get("prompt")) or "",
        finished=finished,
        schema=_as_text(record.get("schema")),
        pattern=_as_text(record.get("pattern")),
    )


def _references(value: Any) -> list[str | None]:
    """A list of texts as several references, anything else as one."""
    several = isinstance(value, list) and value and all(isinstance(one, str) for one in value)
    return [_as_text(one) for one in (value if several else [value])]


def _as_text(value: Any) -> str | None:
    """Text as it is, None as None, anything else, a number or a list of tool calls, as JSON."""
    text = value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    # Half of a pair of escapes is no character and cannot be printed.
    return re.sub("[\ud800-\udfff]", "\ufffd", text) if text else text


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _maths(rows: Sequence[Prediction]) -> list[dict[str, Value]]:
    scores: list[dict[str, Value]] = []
    for row in rows:
        verdicts = [judge(_worked(gold), row.text, prompt=row.prompt, finished=row.finished) for gold in row.golds]
        verdict = next((one for one in verdicts if one.outcome == "right"), verdicts[0])
        right, cut = verdict.outcome == "right", verdict.outcome == "cut_off"
        scores.append(
            {"exact_match": right, "cut_off": cut, "outcome": verdict.outcome, "final_answer": verdict.final_answer}
        )
    return scores


def _worked(gold: str) -> str:
    """The final answer of a reference that is a worked solution."""
    found = find_answer(gold) if "####" in gold or "\\boxed" in gold else None
    return found.text if found else gold


def _rouge(rows: Sequence[Prediction]) -> list[dict[str, Value]]:
    return _likeness(rows, rouge_scores)


def _bleu(rows: Sequence[Prediction]) -> list[dict[str, Value]]:
    return _likeness(rows, lambda gold, said: {"bleu": bleu(gold, said)})


def _chrf(rows: Sequence[Prediction]) -> list[dict[str, Value]]:
    return _likeness(rows, lambda gold, said: {"chrf": chrf(gold, said)})


def _likeness(rows: Sequence[Prediction], score: Callable[[str, str], Mapping[str, float]]) -> list[dict[str, Value]]:
    """Scores against the reference that is most like the answer, each on its own."""
    found: list[dict[str, Value]] = []
    for row in rows:
        each = [score(after_thinking(gold), after_thinking(row.text)) for gold in row.golds]
        found.append({name: max(one[name] for one in each) for name in each[0]})
    return found


def _choice(rows: Sequence[Prediction]) -> list[dict[str, Value]]:
    golds = _labels_of(rows)
    labels = sorted(set(golds))
    if all(re.fullmatch("[A-J]", label) for label in labels):
        # A choice that is never the right one may still be said.
        labels = list("ABCDEFGHIJ")
    found = [read_label(row.text, labels) if row.finished else None for row in rows]
    return [{"accuracy": label == gold, "label": label} for gold, label in zip(golds, found, strict=True)]


def _labels_of(rows: Sequence[Prediction]) -> list[str]:
    """The right labels: of `(B)` or `b.` the letter, of `Yes` and `yes` the one that comes first."""
    spelled: dict[str, str] = {}
    golds = []
    for row in rows:
        if row.other_references:
            raise UserError(f"line {row.line} has several references; `choice` compares with one label")
        letter = re.fullmatch(r"\s*\(?([A-Ja-j])[).]?\s*", row.gold)
        label = letter[1].upper() if letter else row.gold.strip()
        golds.append(spelled.setdefault(label.casefold(), label))
    return golds


def _json(rows: Sequence[Prediction], schema: str | None) -> list[dict[str, Value]]:
    return [{"json_ok": row.finished and keeps_schema(row.text, row.schema or schema or "{}")} for row in rows]


def _regex(rows: Sequence[Prediction], pattern: str | None) -> list[dict[str, Value]]:
    scores: list[dict[str, Value]] = []
    for row in rows:
        rule = pattern if row.pattern is None else row.pattern
        if rule is None:
            raise UserError(f"line {row.line} has no `pattern`: give one per line, or --pattern for all")
        scores.append({"regex_ok": row.finished and keeps_pattern(row.text, rule)})
    return scores


def _tools(rows: Sequence[Prediction]) -> list[dict[str, Value]]:
    found = [score_tool_calls(read_tool_calls(row.gold), read_tool_calls(row.text)) for row in rows]
    return [
        {"tool_names": one.names, "tool_arguments": one.arguments, "tool_order": one.order, "tool_calls": one.exact}
        for one in found
    ]


METRICS = ("maths", "rouge", "bleu", "chrf", "choice", "json", "regex", "tools")


def score_predictions(
    rows: Sequence[Prediction], metrics: Sequence[str], *, schema: str | None = None, pattern: str | None = None
) -> list[dict[str, Value]]:
    """The scores of each row by name: rates as true and false, shares as 0 to 1, texts beside them.

    Args:
        metrics: of `METRICS`.
        schema: JSON schema for rows without one of their own; any JSON if there is none at all.
        pattern: regular expression, likewise.
    Raises: UserError: an unknown metric, a row without what a metric needs, a schema or pattern that is none.
    """
    functions: Mapping[str, Callable[[], list[dict[str, Value]]]] = {
        "maths": lambda: _maths(rows),
        "rouge": lambda: _rouge(rows),
        "bleu": lambda: _bleu(rows),
        "chrf": lambda: _chrf(rows),
        "choice": lambda: _choice(rows),
        "json": lambda: _json(rows, read_schema(schema) if schema else None),
        "regex": lambda: _regex(rows, pattern),
        "tools": lambda: _tools(rows),
    }
    unknown = [name for name in metrics if name not in functions]
    if unknown or not metrics:
        raise UserError(f"unknown metric '{', '.join(unknown)}'; the metrics are {', '.join(METRICS)}")
    columns = [functions[name]() for name in dict.fromkeys(metrics)]
    return [{name: value for part in parts for name, value in part.items()} for parts in zip(*columns, strict=True)]


def means(rows: Sequence[Prediction], scores: Sequence[Mapping[str, Value]]) -> dict[str, Mean]:
    """The mean of every number among the scores of some rows, and the macro F1 of the labels if there are some."""
    found: dict[str, Mean] = {}
    for name in scores[0] if scores else ():
        values = [row[name] for row in scores]
        numbers = [float(value) for value in values if isinstance(value, bool | float)]
        if len(numbers) == len(values):
            error = rate_error if all(isinstance(value, bool) for value in values) else standard_error
            found[name] = Mean(mean(numbers), error(numbers), len(numbers))
    if "accuracy" in found:
        golds = [label.casefold() for label in _labels_of(rows)]
        labels = golds, [label.casefold() if (label := _as_text(score["label"])) else None for score in scores]
        found["macro_f1"] = Mean(macro_f1(*labels), standard_error(macro_f1_rows(*labels)), len(rows))
    return found
