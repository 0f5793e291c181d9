"""The artifact `rows`: cleaned raw rows, a Parquet file per split."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finemill.artifacts.files import DATA_FILE
from finemill.artifacts.records import Record, read_record
from finemill.artifacts.splits import Split, split_path
from finemill.artifacts.tables import RowWriter, count_rows, iterate_batches

_WRITER = "data-prep"

MixBy = Literal["rows", "tokens", "learned_tokens"]
MixPolicy = Literal["downsample", "upsample", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRow:
    """One raw row.

    `id` is a digest of its content, `source` the source that it came from and `number` its place there, from 1, `shape`
    a name in `rows.shapes.SHAPES`, `row` the row itself as JSON text, so that rows of every shape fit one schema.
    """

    id: str
    source: str
    number: int
    shape: str
    row: str


class Mix(Record):
    """The proportions of the sources among what is trained on: a weight for each, what it counts, and what to do."""

    by: MixBy
    policy: MixPolicy
    max_repeats: int
    weights: dict[str, float]


class RowsSource(Record):
    """A source of rows by its name."""

    uri: str


class RowsReport(Record):
    """What chat-format reads of the report on the rows; without weights there is no mix and all rows are to stay."""

    sources: list[RowsSource]
    mix: Mix | None


def rows_writer(folder: Path, split: Split) -> RowWriter[PreparedRow]:
    """A writer of the rows of one split."""
    return RowWriter(split_path(folder, split), PreparedRow)


def iterate_rows(folder: Path, split: Split, *, batch_rows: int) -> Iterator[list[PreparedRow]]:
    """The rows of a split in order, `batch_rows` at a time. Raises: UserError: the split is missing."""
    return iterate_batches(split_path(folder, split), PreparedRow, _WRITER, batch_rows=batch_rows)


def find_rows(folder: Path, split: Split, ids: Collection[str]) -> dict[str, PreparedRow]:
    """The rows of a split that have these ids. Raises: UserError: the split is missing."""
    return {row.id: row for batch in iterate_rows(folder, split, batch_rows=10_000) for row in batch if row.id in ids}


def num_rows(folder: Path, split: Split) -> int:
    """How many rows a split has. Raises: UserError: the split is missing."""
    return count_rows(split_path(folder, split), PreparedRow, _WRITER)


def read_rows_report(folder: Path) -> RowsReport:
    """Raises: UserError: there is none."""
    return read_record(folder / DATA_FILE, RowsReport, _WRITER)
