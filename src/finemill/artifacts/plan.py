"""The artifact `plan`: what preflight checked, and what it found."""

from pathlib import Path
from typing import Any

from finemill.artifacts.files import PLAN_FILE
from finemill.artifacts.records import Record, read_record, write_record


class RunPlan(Record):
    """A run's base model at its exact revision, its store, and every step's configuration with its defaults."""

    base_model: str | None
    store: str
    steps: dict[str, dict[str, Any]]
    gpu_memory_gib: float | None = None
    """GiB of GPU memory that training needs at least."""


def write_plan(folder: Path, plan: RunPlan) -> None:
    """Write the record, which is all that the artifact holds."""
    write_record(folder / PLAN_FILE, plan)


def read_plan(folder: Path) -> RunPlan:
    """What preflight wrote. Raises: UserError: the file is missing or of another version."""
    return read_record(folder / PLAN_FILE, RunPlan, "preflight")
