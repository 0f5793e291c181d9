"""A comparison: what each of several models answered to the same questions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finemill.artifacts.evaluation import Outcome
from finemill.artifacts.files import SAMPLES_FILE
from finemill.artifacts.tables import read_rows, write_rows

Mode = Literal["template", "thinking", "plain"]
"""How a model is asked: as the row was formatted, or else as its template has it; with thinking; without."""
ThinkingState = Literal["none", "closed", "cut"]


@dataclass(frozen=True, kw_only=True)
class ComparedAnswer:
    """One answer of one model in one mode. None where a value does not apply."""

    id: str
    source: str
    question: str
    """The last user's turn."""
    reference: str
    answer: str | None = None
    """The right final answer."""
    model: str
    mode: Mode
    sample: int
    """Number of the sample, from 0."""
    thinking: str
    completion: str
    """What the model said after its thinking."""
    final_answer: str | None = None
    outcome: Outcome | None = None
    exact_match: bool | None = None
    rougeL: float | None = None  # noqa: N815 the metric's name
    chrf: float | None = None
    thinking_state: ThinkingState
    """`cut` where the answer ends inside its thinking."""
    thinking_characters: int
    thinking_agrees: bool | None = None
    """Whether the answer that the thinking ends with is the final one; None where either has none."""
    num_tokens: int | None = None
    """Tokens written, thinking included; None where a server does not say."""
    finished: bool


def write_answers(folder: Path, answers: Sequence[ComparedAnswer]) -> None:
    """A row per question, model, mode and sample."""
    write_rows(folder / SAMPLES_FILE, ComparedAnswer, answers)


def read_answers(folder: Path) -> list[ComparedAnswer]:
    """The answers in the file's order. Raises: UserError: the file is missing or of another version."""
    return read_rows(folder / SAMPLES_FILE, ComparedAnswer, "compare")
