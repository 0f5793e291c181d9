"""The artifact `decision`: whether a version became champion, and why."""

from pathlib import Path

from finemill.artifacts.files import DECISION_FILE
from finemill.artifacts.records import Record, read_record, write_record


class GateResult(Record):
    """One check. `difference` and `lower_bound` are positive where the new version is better; None where unused."""

    metric: str
    rule: str
    passed: bool
    value: float
    other: float | None = None
    difference: float | None = None
    lower_bound: float | None = None
    num_rows: int | None = None
    p_value: float | None = None
    """Chance of such rows if the rule did not hold: exact McNemar where rows are right or wrong, else the bootstrap."""
    adjusted_p_value: float | None = None
    """The same by Holm's correction over all required comparisons, where that was asked for."""


class Decision(Record):
    """Whether a version becomes champion, and every check that says so."""

    registered_model_name: str
    version: int
    champion_before: int | None
    promoted: bool
    summary: str
    confidence: float
    gates: tuple[GateResult, ...]
    evaluation: str
    champion_evaluation: str | None
    approved: str | None = None
    """When, by whom and why the version was approved, if it was."""
    decided: str = ""
    """When."""


def write_decision(folder: Path, decision: Decision) -> None:
    """Write the decision for programs."""
    write_record(folder / DECISION_FILE, decision)


def read_decision(folder: Path) -> Decision:
    """What promote wrote. Raises: UserError: the file is missing or of another version."""
    return read_record(folder / DECISION_FILE, Decision, "promote")
