"""The artifact `rows`: cleaned raw rows, a Parquet file per split."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finemill.artifacts.splits import Split, split_path
from finemill.artifacts.tables import RowWriter, iterate_batches

_WRITER = "data-prep"


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRow:
    """One raw row.

    `id` is a digest of its content, `source` the URI that it came from, `shape` a name in `rows.shapes.SHAPES`, `row`
    the row itself as JSON text, so that rows of every shape fit one schema.
    """

    id: str
    source: str
    shape: str
    row: str


def rows_writer(folder: Path, split: Split) -> RowWriter[PreparedRow]:
    """A writer of the rows of one split."""
    return RowWriter(split_path(folder, split), PreparedRow)


def iterate_rows(folder: Path, split: Split, *, batch_rows: int) -> Iterator[list[PreparedRow]]:
    """The rows of a split in order, `batch_rows` at a time. Raises: UserError: the split is missing."""
    return iterate_batches(split_path(folder, split), PreparedRow, _WRITER, batch_rows=batch_rows)
