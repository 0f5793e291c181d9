"""The artifact `change`: whether there is anything new to train on."""

from pathlib import Path

from finemill.artifacts.files import CHANGE_FILE
from finemill.artifacts.records import Record, read_record, write_record


class Change(Record):
    """A dataset's digest beside the one that the newest version was trained on; None where there is no version."""

    registered_model_name: str
    newest_version: int | None
    trained_on: str | None
    dataset: str
    changed: bool


def write_change(folder: Path, change: Change) -> None:
    """Write the record, which is all that the artifact holds."""
    write_record(folder / CHANGE_FILE, change)


def read_change(folder: Path) -> Change:
    """What detect-change wrote. Raises: UserError: the file is missing or of another version."""
    return read_record(folder / CHANGE_FILE, Change, "detect-change")
