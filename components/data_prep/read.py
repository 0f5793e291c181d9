"""Rows out of files: JSON, JSONL, Parquet, CSV and text, the text formats gzipped too."""

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from finemill.errors import UserError

Row = dict[str, Any]

FORMATS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".text": "text",
}
_PARQUET_BATCH_ROWS = 1024


def is_data_file(name: str) -> bool:
    """Whether the name ends like a format that can be read."""
    return _ending(name) in FORMATS


def read_rows(path: Path, file_format: str = "auto", shown_as: str | None = None) -> Iterator[Row]:
    """The rows of one file, in order.

    A row of a text file is one document: the lines up to the next blank line, as `{"text": ...}`.
    Raises: UserError: names the file and the line or row that cannot be read.
    """
    where = shown_as or str(path)
    if file_format == "auto":
        file_format = FORMATS.get(_ending(path.name), "")
        if not file_format:
            raise UserError(
                f"{where}: cannot tell the format from the ending '{path.suffix}'; "
                "set format to json, jsonl, parquet, csv or text"
            )
    try:
        if file_format == "parquet":
            yield from _read_parquet(path, where)
            return
        with _open_text(path) as file:
            yield from _TEXT_READERS[file_format](file, where)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text at byte {error.start}; convert the file, or correct format") from None
    except (gzip.BadGzipFile, EOFError):
        raise UserError(f"{where}: not a complete gzip file; fetch or compress it again") from None


def _ending(name: str) -> str:
    return Path(name.lower().removesuffix(".gz")).suffix


def _open_text(path: Path) -> TextIO:
    # newline="": the csv module needs line ends as they are, the other readers strip them.
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _read_jsonl(file: TextIO, where: str) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield _as_row(_parse(line.strip(), where, number), f"{where}, line {number}")


def _read_json(file: TextIO, where: str) -> Iterator[Row]:
    """A list of objects; one object a line, as many files named .json hold, is read as JSONL."""
    first = file.read(1)
    while first.isspace():
        first = file.read(1)
    if first == "[":
        for number, value in enumerate(_parse(first + file.read(), where, 1), start=1):
            yield _as_row(value, f"{where}, row {number}")
        return
    if first not in ("", "{"):
        raise UserError(f"{where}: not JSON rows: it begins with {first!r}, where a list '[' or an object '{{' is read")
    file.seek(0)
    yield from _read_jsonl(file, where)


def _parse(text: str, where: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        line = first_line + getattr(error, "lineno", 1) - 1
        reason = getattr(error, "msg", str(error))
        column = getattr(error, "colno", 1)
        raise UserError(
            f"{where}, line {line}: not valid JSON ({reason} at column {column}); "
            "correct the line, or set format if the file is something else"
        ) from None


def _as_row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{where}: a row is an object with columns, found {type(value).__name__}")
    return value


def _read_csv(file: TextIO, where: str) -> Iterator[Row]:
    header = file.readline()
    file.seek(0)
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(file, delimiter="\t" if header.count("\t") > header.count(",") else ",", strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{where}, line {reader.line_num}: the row has another number of cells than the header "
                    f"({len(reader.fieldnames or ())}); quote cells that hold commas or line breaks"
                )
            yield dict(row)
    except csv.Error as error:
        raise UserError(f"{where}, line {reader.line_num}: not valid CSV ({error})") from None


def _read_text(file: TextIO, where: str) -> Iterator[Row]:
    document: list[str] = []
    for line in file:
        if line.strip():
            document.append(line.rstrip("\r\n"))
        elif document:
            yield {"text": "\n".join(document)}
            document = []
    if document:
        yield {"text": "\n".join(document)}


def _read_parquet(path: Path, where: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise UserError(f"{where}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


_TEXT_READERS = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "text": _read_text}
