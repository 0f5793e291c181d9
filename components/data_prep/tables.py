"""Rows out of Parquet and Arrow files, as the objects that they were before they became tables."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from finemill.errors import UserError

_BATCH_ROWS = 1024
Decode = Callable[[Any], Any]


def find_table_rows(path: Path, where: str, file_format: str) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
    """The rows of a file in order: of each about how many bytes it has, and what makes an object of it.

    Arrow gives every object all keys that any other has: those that are null are left out inside of columns. JSON
    columns are decoded, maps are objects.
    Raises: UserError: the file is damaged, or of another format; so does what makes the objects.
    """
    with _readable(where, file_format):
        for batch in (_parquet_batches if file_format == "parquet" else _arrow_batches)(path):
            if file_format == "arrow":
                # Offsets and lengths are believed as they stand: damaged ones lead out of the file's memory.
                batch.validate(full=True)
            rows = _TableRows(batch, where, file_format)
            size = batch.nbytes // max(1, batch.num_rows)
            yield from ((size, partial(rows.row, number)) for number in range(batch.num_rows))


class _TableRows:
    """The rows of a batch, which become objects all at once when the first is asked for."""

    def __init__(self, batch: pa.RecordBatch, where: str, file_format: str) -> None:
        self._batch, self._where, self._format = batch, where, file_format

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        decoders = {field.name: decode for field in self._batch.schema if (decode := _decoder(field.type)) is not None}
        with _readable(self._where, self._format):
            return [
                {**row, **{name: decode(row[name]) for name, decode in decoders.items()}}
                for row in self._batch.to_pylist()
            ]

    def row(self, number: int) -> dict[str, Any]:
        """The row of this number, from 0."""
        return self._rows[number]


@contextmanager
def _readable(where: str, file_format: str) -> Iterator[None]:
    """Raises: UserError: instead of what Arrow raises for a file that is damaged, or of another format."""
    try:
        yield
    except (pa.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        kind = "Parquet" if file_format == "parquet" else "Arrow"
        raise UserError(f"{where}: not a readable {kind} file ({str(error).splitlines()[0]})") from None


def _parquet_batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=_BATCH_ROWS)


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Batches of a stream, as `datasets` saves them, or of a file with an index (Feather)."""
    with pa.memory_map(str(path)) as source:
        try:
            yield from pa.ipc.open_stream(source)
            return
        except pa.ArrowInvalid:
            source.seek(0)
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


def _decoder(kind: pa.DataType) -> Decode | None:
    """How values of a type become what they were, None for those that are it already."""
    if isinstance(kind, pa.JsonType):
        return lambda text: None if text is None else json.loads(text)
    if pa.types.is_struct(kind):
        return _struct_decoder({field.name: _decoder(field.type) for field in kind})
    if pa.types.is_map(kind):
        return _struct_decoder({}, _decoder(kind.item_type))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        decode = _decoder(kind.value_type)
        return None if decode is None else lambda values: None if values is None else list(map(decode, values))
    return None


def _struct_decoder(decoders: dict[str, Decode | None], every: Decode | None = None) -> Decode:
    def decode(value: Any) -> Any:
        if value is None:
            return None
        decoded = {}
        for key, item in value.items() if isinstance(value, dict) else value:
            of_key = decoders.get(key, every)
            if item is not None:
                decoded[key] = item if of_key is None else of_key(item)
        return decoded

    return decode
