"""The artifact `version`: which version of which registered model was made of what."""

from pathlib import Path

from finemill.artifacts.files import VERSION_FILE
from finemill.artifacts.records import Record, read_record, write_record


class VersionRecord(Record):
    """A version as it was registered.

    `digest` is the sha256 over the digests of `artifacts`, whose references are by port; `source` is where MLflow finds
    the files, `run_id` its run.
    """

    registered_model_name: str
    version: int
    alias: str
    registry: str
    run_id: str | None
    source: str
    digest: str
    artifacts: dict[str, str]


def write_version(folder: Path, record: VersionRecord) -> None:
    """Write the record, which is all that the artifact holds."""
    write_record(folder / VERSION_FILE, record)


def read_version(folder: Path) -> VersionRecord:
    """What register wrote. Raises: UserError: the file is missing or of another version."""
    return read_record(folder / VERSION_FILE, VersionRecord, "register")
