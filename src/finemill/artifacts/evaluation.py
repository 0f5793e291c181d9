"""The artifact `evaluation`: what base and tuned model answered to held-out rows, and their scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
from pydantic import FiniteFloat, RootModel, ValidationError

from finemill.artifacts.files import METRICS_FILE, SAMPLES_FILE
from finemill.artifacts.records import write_json
from finemill.artifacts.tables import read_rows, schema_of, write_rows
from finemill.errors import UserError

Outcome = Literal["right", "wrong", "cut_off"]
"""Outcome of a row with a known answer: `cut_off` where the model was stopped before it gave one."""
_WRITER = "eval"


@dataclass(frozen=True, kw_only=True)
class SampleScores:
    """The scores of one model on one held-out row.

    None where a score does not apply: exact match without a known answer, and so on.
    """

    id: str
    source: str
    model: str
    """`base`, `tuned`, or the name of another model that was asked."""
    exact_match: bool | None = None
    rouge1: float | None = None
    """F1 of common words, without case; rouge2 of common word pairs, rougeL of the longest common subsequence. On rows
    without a known answer: where the text itself is what was asked for."""
    rouge2: float | None = None
    rougeL: float | None = None  # noqa: N815 the metric's name
    bleu: float | None = None
    """Sentence BLEU, and chrF of characters, on the same rows."""
    chrf: float | None = None
    tool_calls: bool | None = None
    """Whether the tool calls are those of the reference, with their arguments, in order; on rows that have some."""
    tool_names: float | None = None
    """F1 of the functions called; then the share of the calls with the right arguments, and of names in order."""
    tool_arguments: float | None = None
    tool_order: float | None = None
    schema_ok: bool | None = None
    """Whether the answer keeps the configured JSON schema, and the configured pattern."""
    pattern_ok: bool | None = None
    loss: float | None = None
    """Mean negative log-likelihood of the reference's assistant tokens, nats."""
    num_tokens: int
    """Assistant tokens that `loss` is over."""
    num_generated_tokens: int
    finished: bool
    """The model ended its turn by itself."""
    format_ok: bool
    """Finished, thinking where and only where the reference thinks, every thinking block closed, and text after it."""
    think_closed: bool | None = None
    """Whether the thinking block that the completion opens is closed; None if it opens none."""
    prefers_chosen: bool | None = None
    """Whether the reference is likelier than the worse answer, per token."""
    outcome: Outcome | None = None

    @property
    def cut_off(self) -> bool | None:
        """Whether the answer was cut before it gave one; None for rows without a known answer."""
        return None if self.outcome is None else self.outcome == "cut_off"


SCORES = frozenset(
    column.name
    for column in schema_of(SampleScores)
    if pa.types.is_floating(column.type) or pa.types.is_boolean(column.type)
) | {"cut_off"}
"""The attributes of `SampleScores` that are scores."""


@dataclass(frozen=True, kw_only=True)
class Sample(SampleScores):
    """The same with the texts."""

    prompt: str
    completion: str
    """What the model wrote."""
    reference: str
    answer: str | None = None
    """The right final answer."""
    final_answer: str | None = None
    """The completion's final answer; looked for only where there is a right one."""
    rejected: str | None = None
    """A worse answer than the reference, of rows that have one."""


def shown_columns(sample: Sample) -> dict[str, str | float | None]:
    """What people compare of a row in a table, by the names that it has there."""
    return {
        "id": sample.id,
        "source": sample.source,
        "model": sample.model,
        "prompt": sample.prompt,
        "completion": sample.completion,
        "reference": sample.reference,
        "answer": sample.answer,
        "final_answer": sample.final_answer,
        "outcome": sample.outcome,
        "exact_match": sample.exact_match,
        "rougeL": sample.rougeL,
        "chrf": sample.chrf,
        "loss": sample.loss,
        "num_generated_tokens": sample.num_generated_tokens,
        "finished": sample.finished,
    }


def write_samples(folder: Path, samples: Sequence[Sample]) -> None:
    """A row per held-out row and model."""
    write_rows(folder / SAMPLES_FILE, Sample, samples)


def read_samples(folder: Path) -> list[Sample]:
    """The samples in the file's order. Raises: UserError: the file is missing or of another version."""
    return read_rows(folder / SAMPLES_FILE, Sample, _WRITER)


def read_sample_scores(folder: Path) -> list[SampleScores]:
    """The same without the texts."""
    return read_rows(folder / SAMPLES_FILE, SampleScores, _WRITER)


class _Metrics(RootModel[dict[str, FiniteFloat]]):
    """A value per flat name."""


def write_metrics(folder: Path, metrics: Mapping[str, float]) -> None:
    """The metrics of both models, by the names that the manifest has them under."""
    write_json(folder / METRICS_FILE, dict(metrics))


def read_metrics(folder: Path) -> dict[str, float]:
    """What `write_metrics` wrote. Raises: UserError: the file is missing or holds something else."""
    path = folder / METRICS_FILE
    try:
        return _Metrics.model_validate_json(path.read_bytes()).root
    except (FileNotFoundError, ValidationError):
        raise UserError(f"{path} is missing or no list of metrics: {_WRITER} writes it; run {_WRITER} again") from None
