"""A small set of tasks that any chat model should still do after tuning: instructions, arithmetic, reading.

45 questions, shipped beside this file, each scored by a rule: a pattern, a JSON schema, or its final answer. They tell
forgetting from learning; no figure on them says how good a model is.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finemill.artifacts.metrics import MODELS, ModelName, delta_metric, model_metric, stderr_of
from finemill.errors import UserError
from finemill.metrics.maths import judge
from finemill.metrics.rules import keeps_pattern, keeps_schema
from finemill.metrics.statistics import mean, paired_rate_error, rate_error
from finemill.models.generation import Answer
from finemill.rows.answers import with_opening

_FILE = Path(__file__).with_name("regression.jsonl")
PREFIX = "regression"


@dataclass(frozen=True)
class RegressionRow:
    """One question; exactly one of `answer`, `pattern` and `schema` says what is right."""

    id: str
    task: str
    question: str
    answer: str | None = None
    pattern: str | None = None
    schema: str | None = None

    def is_right(self, prompt: str, answer: Answer) -> bool:
        """Whether an answer to the rendered `prompt` is right; one that was cut keeps no form."""
        text = with_opening(prompt, answer.text)
        if self.answer is not None:
            return judge(self.answer, text, finished=answer.finished).outcome == "right"
        if self.schema is not None:
            return answer.finished and keeps_schema(text, self.schema)
        return answer.finished and keeps_pattern(text, self.pattern or "")


@dataclass(frozen=True)
class RegressionSet:
    """The questions with their prompts, as the model's template renders them."""

    rows: tuple[RegressionRow, ...]
    prompts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]


def read_regression_set(tokenizer: Any) -> RegressionSet:
    """Raises: UserError: the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise UserError("eval: regression asks in chats, and the tokenizer has no chat template: leave it off")
    rows = tuple(_row(json.loads(line)) for line in _FILE.read_text(encoding="utf-8").splitlines())
    prompts = tuple(
        str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row.question}], tokenize=False, add_generation_prompt=True
            )
        )
        for row in rows
    )
    ids = tuple(tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts)
    return RegressionSet(rows, prompts, ids)


def _row(record: dict[str, Any]) -> RegressionRow:
    schema = record.pop("schema", None)
    return RegressionRow(**record, schema=json.dumps(schema) if schema else None)


def score_regression(questions: RegressionSet, answers: Mapping[ModelName, Sequence[Answer]]) -> dict[str, float]:
    """`eval/<model>/regression/accuracy` and per task `regression/<task>`, with errors and paired changes."""
    right = {
        model: [
            row.is_right(prompt, answer)
            for row, prompt, answer in zip(questions.rows, questions.prompts, answers[model], strict=True)
        ]
        for model in MODELS
    }
    groups = {"accuracy": list(range(len(questions.rows)))}
    for index, row in enumerate(questions.rows):
        groups.setdefault(row.task, []).append(index)
    metrics: dict[str, float] = {}
    for name, indices in groups.items():
        key = f"{PREFIX}/{name}"
        for model in MODELS:
            values = [float(right[model][index]) for index in indices]
            metrics[model_metric(model, key)] = mean(values)
            metrics[stderr_of(model_metric(model, key))] = rate_error(values)
        changes = [float(right["tuned"][index]) - right["base"][index] for index in indices]
        metrics[delta_metric(key)] = mean(changes)
        metrics[stderr_of(delta_metric(key))] = paired_rate_error(changes)
    return metrics
