"""The artifact `champion-evaluation`: the champion, and where its scores are."""

from pathlib import Path

from finemill.artifacts.files import CHAMPION_FILE
from finemill.artifacts.records import Record, read_record, write_record


class Champion(Record):
    """The champion's version and the reference of its evaluation; None where a model has no champion."""

    registered_model_name: str
    champion: int | None = None
    evaluation: str | None = None


def write_champion(folder: Path, champion: Champion) -> None:
    """Write the record, which is all that the artifact holds."""
    write_record(folder / CHAMPION_FILE, champion)


def read_champion(folder: Path) -> Champion:
    """What score-champion wrote. Raises: UserError: the file is missing or of another version."""
    return read_record(folder / CHAMPION_FILE, Champion, "score-champion")
