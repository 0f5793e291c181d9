"""The artifact `rows`: cleaned raw rows, a Parquet file per split."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finemill.artifacts.files import DATA_FILE
from finemill.artifacts.records import Record, read_record, write_record
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


class FlaggedRows(Record):
    """How many rows of a source are doubtful in one way, and the numbers of the first."""

    rows: int
    first: list[int]


class RowsSource(Record):
    """What became of the rows of one source; `uri` is its name.

    `read` counts all rows, `shapes` those of each known shape, `dropped` those left out by reason, `unread_columns`
    those that hold a column which nothing is made of, `flags` doubtful ones. `digest` is that of the source's files.
    """

    uri: str
    read: int
    shapes: dict[str, int]
    dropped: dict[str, int]
    first_unknown_rows: list[int]
    unread_columns: dict[str, int]
    flags: dict[str, FlaggedRows]
    digest: str | None


class SplitSource(Record):
    """What a source has in a split: rows and characters, each with its share; `weight` is what was asked for."""

    uri: str
    rows: int
    rows_share: float
    characters: int
    characters_share: float
    weight: float | None


class RowsSplit(Record):
    """What a split has."""

    rows: int
    characters: int
    sources: list[SplitSource]


class RowsReport(Record):
    """The report on the rows; without weights there is no mix and all rows are to stay.

    `advice` says what a training set of this size is good for, None where there is nothing to say.
    """

    sources: list[RowsSource]
    mix: Mix | None
    splits: dict[Split, RowsSplit]
    advice: str | None


def rows_writer(folder: Path, split: Split) -> RowWriter[PreparedRow]:
    """A writer of the rows of one split."""
    return RowWriter(split_path(folder, split), PreparedRow)


def iterate_rows(
    folder: Path, split: Split, *, batch_rows: int, first: int = 0, step: int = 1
) -> Iterator[list[PreparedRow]]:
    """The rows of a split in order, `batch_rows` at a time, of these batches every `step`-th one from `first` on.

    Raises: UserError: the split is missing.
    """
    path = split_path(folder, split)
    return iterate_batches(path, PreparedRow, _WRITER, batch_rows=batch_rows, first=first, step=step)


def find_rows(folder: Path, split: Split, ids: Collection[str]) -> dict[str, PreparedRow]:
    """The rows of a split that have these ids. Raises: UserError: the split is missing."""
    return {row.id: row for batch in iterate_rows(folder, split, batch_rows=1000) for row in batch if row.id in ids}


def num_rows(folder: Path, split: Split) -> int:
    """How many rows a split has. Raises: UserError: the split is missing."""
    return count_rows(split_path(folder, split), PreparedRow, _WRITER)


def write_rows_report(folder: Path, report: RowsReport) -> None:
    """Put the report beside the rows."""
    write_record(folder / DATA_FILE, report)


def read_rows_report(folder: Path) -> RowsReport:
    """Raises: UserError: there is none."""
    return read_record(folder / DATA_FILE, RowsReport, _WRITER)
