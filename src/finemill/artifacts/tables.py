"""Parquet files whose columns are the fields of a frozen dataclass: a column's name and type are written once, there.

A reader takes the class that has the columns it needs, so that only those are read.
"""

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from finemill.artifacts.columns import to_column
from finemill.errors import UserError

RowT = TypeVar("RowT")

_TYPES: dict[Any, pa.DataType] = {
    str: pa.string(),
    bool: pa.bool_(),
    int: pa.int64(),
    float: pa.float64(),
    list[int]: pa.list_(pa.int32()),
}


def schema_of(row_type: type) -> pa.Schema:
    """A column per field of the dataclass `row_type`, in the order of its fields; token ids are int32."""
    hints = get_type_hints(row_type)
    return pa.schema([(field.name, _TYPES[_without_none(hints[field.name])]) for field in fields(row_type)])


def _without_none(hint: Any) -> Any:
    """The type of a column's values, which may all be missing; one of a few words is text."""
    if get_origin(hint) in (types.UnionType, Union):
        hint = get_args(hint)[0]
    return str if get_origin(hint) is Literal else hint


def to_record_batch(row_type: type[RowT], rows: Sequence[RowT]) -> pa.RecordBatch:
    """Rows as Arrow holds them, with the columns of their class."""
    schema = schema_of(row_type)
    return pa.record_batch([to_column([getattr(row, f.name) for row in rows], f.type) for f in schema], schema=schema)


def columns_of(row_type: type, values: Sequence[Mapping[str, Any]]) -> pa.RecordBatch:
    """The same of each row's values by name; token ids may be arrays."""
    schema = schema_of(row_type)
    return pa.record_batch(
        [to_column([row[field.name] for row in values], field.type) for field in schema], schema=schema
    )


class RowWriter(Generic[RowT]):
    """One Parquet file of rows of one class; a context manager."""

    def __init__(self, path: Path, row_type: type[RowT]) -> None:
        self._row_type = row_type
        self._schema = schema_of(row_type)
        # Nothing looks for the least and the largest text, and memory holds them for all row groups.
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd", write_statistics=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def write(self, rows: Sequence[RowT]) -> None:
        """Append rows as one row group."""
        self.write_batch(to_record_batch(self._row_type, rows))

    def write_batch(self, batch: pa.RecordBatch) -> None:
        """Append rows of the same class as one row group."""
        if batch.num_rows:
            self._writer.write_batch(batch.select(self._schema.names))


def write_rows(path: Path, row_type: type[RowT], rows: Sequence[RowT]) -> None:
    """Write a file in one piece."""
    with RowWriter(path, row_type) as writer:
        writer.write(rows)


def iterate_batches(
    path: Path, row_type: type[RowT], writer: str, *, batch_rows: int, first: int = 0, step: int = 1
) -> Iterator[list[RowT]]:
    """The rows of a file in order, `batch_rows` at a time.

    Args:
        path: the file.
        row_type: the class of its rows.
        writer: the step that writes such a file, for the message.
        batch_rows: rows of a batch; the last has what is left.
        first: number of the first batch that is taken, from 0.
        step: after it every `step`-th one is.
    Raises: UserError: there is no such file, or it lacks a column.
    """
    names = _checked_columns(path, row_type, writer)
    with pq.ParquetFile(path) as file:
        for batch in islice(_read_batches(file, batch_rows, names), first, None, step):
            columns = [batch.column(name).to_pylist() for name in names]
            yield [row_type(**dict(zip(names, values, strict=True))) for values in zip(*columns, strict=True)]


def count_rows(path: Path, row_type: type, writer: str) -> int:
    """How many rows a file has. Raises: UserError: as `iterate_batches`."""
    _checked_columns(path, row_type, writer)
    return int(pq.read_metadata(path).num_rows)


def iterate_record_batches(
    path: Path, *, batch_rows: int, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows of a file in order as Arrow holds them, at most `batch_rows` at a time, with all columns or some."""
    with pq.ParquetFile(path) as file:
        yield from _read_batches(file, batch_rows, columns)


def _read_batches(file: pq.ParquetFile, batch_rows: int, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    """Batches of `batch_rows`, the last with what is left.

    Each row group is opened by itself: a reader of all of them opens them all before the first row.
    """
    waiting: list[pa.RecordBatch] = []
    for group in range(file.num_row_groups):
        for batch in file.iter_batches(batch_size=batch_rows, row_groups=[group], columns=columns):
            waiting.append(batch)
            if sum(part.num_rows for part in waiting) >= batch_rows:
                joined = _one_batch(waiting)
                yield joined.slice(0, batch_rows)
                waiting = [joined.slice(batch_rows)] if joined.num_rows > batch_rows else []
    if waiting:
        yield _one_batch(waiting)


def _one_batch(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    return batches[0] if len(batches) == 1 else pa.Table.from_batches(batches).combine_chunks().to_batches()[0]


def read_rows(path: Path, row_type: type[RowT], writer: str, *, limit: int | None = None) -> list[RowT]:
    """The first `limit` rows of a file, all by default. Raises: UserError: as `iterate_batches`."""
    return [row_type(**record) for record in read_columns(path, row_type, writer).slice(0, limit).to_pylist()]


def read_columns(path: Path, row_type: type, writer: str) -> pa.Table:
    """The columns of `row_type` in the order of its fields. Raises: UserError: as `iterate_batches`."""
    names = _checked_columns(path, row_type, writer)
    # `pq.read_table` would load pandas for its data sets of many files.
    with pq.ParquetFile(path) as file:
        return file.read(names).select(names)


def _checked_columns(path: Path, row_type: type, writer: str) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path} not found: {writer} writes it; pass the reference it printed")
    names = [field.name for field in fields(row_type)]
    missing = [name for name in names if name not in pq.read_schema(path).names]
    if missing:
        raise UserError(
            f"{path} has no column {', '.join(missing)}: another version of finemill wrote it; run {writer} again"
        )
    return names
