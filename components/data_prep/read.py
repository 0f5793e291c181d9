"""Rows out of files: JSON, JSONL, Parquet, Arrow, CSV and text, the text formats also compressed."""

import bz2
import csv
import gzip
import itertools
import json
import logging
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from finemill.components.data_prep.json_values import JsonValues
from finemill.components.data_prep.tables import find_table_rows
from finemill.components.data_prep.wrapped import hub_rows, split_lists, squad_rows, unwrapped
from finemill.errors import UserError
from finemill.rows.shapes import detect_shape
from finemill.rows.speakers import turn_list

logger = logging.getLogger(__name__)

Row = dict[str, Any]

FORMATS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".jl": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".text": "text",
}


def _open_zstd(path: Path) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")


COMPRESSIONS: Mapping[str, tuple[bytes, Callable[[Path], Any]]] = {
    ".gz": (b"\x1f\x8b", gzip.GzipFile),
    ".gzip": (b"\x1f\x8b", gzip.GzipFile),
    ".bz2": (b"BZh", bz2.BZ2File),
    ".xz": (b"\xfd7zXZ", lzma.LZMAFile),
    ".lzma": (b"\x5d\x00\x00", lzma.LZMAFile),
    ".zst": (b"\x28\xb5\x2f\xfd", _open_zstd),
    ".zstd": (b"\x28\xb5\x2f\xfd", _open_zstd),
}
"""How compressed files may end, how they begin, and how they are opened."""


@dataclass(frozen=True)
class Damaged:
    """A row that cannot be read: where it stands, and what is wrong with it."""

    where: str
    problem: str


class UnreadRow(NamedTuple):
    """A row that is found, and parsed by who wants it: about how many bytes it has, and what parses it."""

    size: int
    read: Callable[[], Row | Damaged]


_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_TABLES = {b"PAR1": "parquet", b"ARROW1": "arrow"}
# What holds files of rows, and has to be unpacked.
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
# So much of a file shows what is in it.
_SNIFFED, _SNIFFED_LINES, _LONGEST_FIRST = 4096, 50, 1 << 22
_MAX_CHARACTERS = 2**28
"""Characters of the longest row of a text format: more than any book, less than what a gigabyte of memory holds."""


def is_data_file(name: str) -> bool:
    """Whether the name ends like a format that can be read."""
    return _ending(name) in FORMATS


def read_rows(
    path: Path, file_format: str = "auto", shown_as: str | None = None, split: str | None = None
) -> Iterator[Row | Damaged]:
    """The rows of one file, in order; a damaged line is one of them.

    Of a JSON file that has a list for each split, those of `split`, or all. A row of a text file is one document: the
    lines up to the next blank line, as `{"text": ...}`.
    Raises: UserError: names the file and the line from which on it cannot be read.
    """
    return (row.read() for row in find_rows(path, file_format, shown_as, split))


def find_rows(
    path: Path, file_format: str = "auto", shown_as: str | None = None, split: str | None = None
) -> Iterator[UnreadRow]:
    """The rows that `read_rows` reads; finding those of JSONL and of tables takes a small part of the time.

    Raises: UserError: as `read_rows`; what is wrong with a row of a table is raised where that is read.
    """
    where = shown_as or str(path)
    if file_format == "auto":
        file_format = _table_format(path) or FORMATS.get(_ending(path.name), "")
        if not file_format:
            ending = "".join(path.suffixes[-2:]) if path.suffix.lower() in COMPRESSIONS else path.suffix
            packed = _ending(path.name) in _ARCHIVES
            advice = (
                "unpack it and give the folder" if packed else "set format to json, jsonl, parquet, arrow, csv or text"
            )
            raise UserError(f"{where}: cannot tell the format from the ending '{ending}'; {advice}")
        if file_format == "text" and _is_json(lambda: _open_text(path, "surrogateescape")):
            file_format = "json"
    try:
        if file_format not in ("json", "jsonl"):
            _check_split(where, split)
        if file_format in ("parquet", "arrow"):
            yield from (UnreadRow(size, read) for size, read in find_table_rows(path, where, file_format))
            return
        # Of JSONL a line that is no UTF-8 is one damaged row.
        errors = "surrogateescape" if file_format == "jsonl" else "strict"
        open_file: Callable[[], TextIO] = lambda: _open_text(path, errors)  # noqa: E731
        if file_format in ("json", "jsonl"):
            yield from (_read_json if file_format == "json" else _read_jsonl)(open_file, where, split)
        else:
            yield from (_read_csv if file_format == "csv" else _read_text)(open_file, where)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text at byte {error.start}; convert the file, or correct format") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        kind = {".gz": "gzip", ".gzip": "gzip"}.get(path.suffix.lower(), path.suffix.lower())
        raise UserError(f"{where}: not a complete {kind} file; fetch or compress it again") from None


def _table_format(path: Path) -> str | None:
    """The format of a file that begins as Parquet's or Arrow's do, whatever it is called; None for others."""
    with path.open("rb") as file:
        begin = file.read(6)
    return next((name for magic, name in _TABLES.items() if begin.startswith(magic)), None)


def _ending(name: str) -> str:
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _open_text(path: Path, errors: str) -> TextIO:
    opened = _opener(path)
    with opened(path) as file:
        encoding = "utf-16" if file.read(2) in _UTF_16 else "utf-8-sig"
    # newline="": the csv module needs line ends as they are, the other readers strip them.
    return TextIOWrapper(opened(path), encoding=encoding, newline="", errors=errors)


def _opener(path: Path) -> Callable[[Path], Any]:
    """How a file is opened: compressed if it begins so, or is called so and does not begin as JSON does."""
    plain: Callable[[Path], Any] = lambda path: path.open("rb")  # noqa: E731
    with plain(path) as file:
        begin = file.read(8)
    if begin.lstrip()[:1] in (b"{", b"["):
        return plain
    named = COMPRESSIONS.get(path.suffix.lower(), (b"", plain))[1]
    return next((opened for magic, opened in COMPRESSIONS.values() if begin.startswith(magic)), named)


def _is_json(open_file: Callable[[], TextIO]) -> bool:
    """Whether a file named as text begins with an object, or a list of them, on its first line or over many."""
    with open_file() as file:
        begin = file.read(_SNIFFED).lstrip()
    return re.match(r'\[?\s*\{\s*"(?:[^"\\\\]|\\\\.)*"\s*:', begin) is not None


def _lines(file: TextIO, where: str) -> Iterator[str]:
    """The lines of a file. Raises: UserError: one is longer than a row may be, as a small compressed file can hold."""
    for number in itertools.count(1):
        line = file.readline(_MAX_CHARACTERS + 1)
        if not line:
            return
        _check_length(len(line), f"{where}, line {number}")
        yield line


def _check_length(characters: int, where: str) -> None:
    if characters > _MAX_CHARACTERS:
        raise UserError(f"{where}: more than {_MAX_CHARACTERS} characters in one row: split it, or correct format")


def _read_jsonl(open_file: Callable[[], TextIO], where: str, split: str | None) -> Iterator[UnreadRow]:
    with open_file() as file:
        begin = next((line.strip() for line in iter(lambda: file.readline(_SNIFFED), "") if line.strip()), "")
    if begin == "{" or (re.match(r"\[\s*(?:\{|\Z)", begin) and not _has_value_lines(open_file, (Damaged,))):
        # One list, or objects over several lines, under the name of the other format.
        yield from _read_values(open_file, where, split)
        return
    if _is_wrapper(open_file):
        yield from _read_values(open_file, where, split)
        return
    _check_split(where, split)
    with open_file() as file:
        for number, line in enumerate(_lines(file, where), start=1):
            if line.strip():
                yield UnreadRow(len(line), partial(_parse_line, line, where, number))


def _parse_line(line: str, file: str, number: int) -> Row | Damaged:
    line, where = line.strip(), f"{file}, line {number}"
    try:
        line.encode()
        # A list's objects that lost its brackets keep their commas.
        return _as_row(json.loads(line[:-1] if line.endswith("},") else line), where)
    except UnicodeEncodeError:
        return Damaged(where, "not UTF-8 text")
    except json.JSONDecodeError as error:
        return Damaged(where, f"not valid JSON ({error.msg} at column {error.colno})")
    except ValueError as error:
        return Damaged(where, f"not valid JSON ({error})")
    except RecursionError:
        return Damaged(where, "not readable JSON (nested too deeply)")


def _read_json(open_file: Callable[[], TextIO], where: str, split: str | None) -> Iterator[UnreadRow]:
    """A list of objects, or objects one after the other; one object per line, as many files so named hold, is JSONL."""
    with open_file() as file:
        first = next((letter for letter in iter(lambda: file.read(1), "") if letter.strip()), "")
    if first not in ("", "[", "{"):
        raise UserError(f"{where}: not JSON rows: it begins with {first!r}, where a list '[' or an object '{{' is read")
    if _has_value_lines(open_file, ()):
        yield from _read_jsonl(open_file, where, split)
        return
    yield from _read_values(open_file, where, split)


def _read_values(open_file: Callable[[], TextIO], where: str, split: str | None) -> Iterator[UnreadRow]:
    with open_file() as file:
        values = JsonValues(file, where)
        is_list = values.peek() == "["
        if is_list:
            _check_split(where, split)
        found = values.items() if is_list else _unwrapped(values, where, split)
        passed = 0
        for number, value in enumerate(found, start=1):
            yield _found(_as_row(value, f"{where}, row {number}"), values.characters - passed)
            passed = values.characters
        if values.peek():
            raise values.error("Extra data")


def _has_value_lines(open_file: Callable[[], TextIO], also: tuple[type, ...]) -> bool:
    """Whether the first line is a row by itself, and another follows; one of the types `also` is as good as a row.

    What is longer than a conversation is no line but a list, which is read a row at a time.
    """
    with open_file() as file:
        lines = (line for line in iter(lambda: file.readline(_LONGEST_FIRST), "") if line.strip())
        first, second = next(lines, ""), next(lines, "")
    if not second or len(first) == _LONGEST_FIRST:
        return False
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(_as_row(value, ""), (dict, *also))


def _is_wrapper(open_file: Callable[[], TextIO]) -> bool:
    """Whether the only line of a file is an object with rows in it."""
    with open_file() as file:
        lines = (line for line in iter(lambda: file.readline(_LONGEST_FIRST), "") if line.strip())
        first, second = next(lines, ""), next(lines, "")
    if second or not first.startswith("{"):
        return False
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool(split_lists(value) or squad_rows(value) or hub_rows(value))


def _unwrapped(values: JsonValues, where: str, split: str | None) -> Iterator[Any]:
    """Objects one after the other; of a single one that is no row itself, the rows that it holds."""
    first = values.value()
    if not values.peek() and (lists := split_lists(first)):
        yield from _of_split(lists, where, split)
        return
    _check_split(where, split)
    if not values.peek() and (rows := squad_rows(first) or hub_rows(first) or _rows_in(first)):
        yield from rows
        return
    yield first
    while values.skip(",") or values.peek() == "{":
        yield values.value()


def _check_split(where: str, split: str | None) -> None:
    """Check a split that a file without splits is asked for: all its rows are `train`, as in `datasets`.

    Raises: UserError: it is another one, and not the one that the file's name says.
    """
    if split is not None and split != "train" and not split_pattern(split).search(where):
        raise UserError(f"{where}: no split '{split}' in it, and its name does not say so; leave split out")


def split_pattern(split: str) -> re.Pattern[str]:
    """How the path of a split's file says so: train.jsonl, train-00000-of-00002.parquet, train/x.csv."""
    return re.compile(rf"(?:^|[/._-]){re.escape(split)}(?:[/._-]|$)", re.IGNORECASE)


def _of_split(lists: Mapping[str, list[Any]], where: str, split: str | None) -> Iterator[Any]:
    """The rows of one split, of all without a name. Raises: UserError: there is none of that name."""
    if split is not None and split not in lists:
        raise UserError(f"{where}: no split '{split}'; it has {', '.join(lists)}")
    if split is None and len(lists) > 1:
        logger.warning("%s: the rows of %s are read as one; name one of them with split", where, " and ".join(lists))
    for name, rows in lists.items():
        if split in (None, name):
            yield from rows


def _rows_in(value: dict[str, Any]) -> list[Row]:
    """The rows of an object: a list of them beside descriptions, rows by name, or cells by column, as pandas writes."""
    shape = detect_shape(value)
    lists = [v for v in value.values() if isinstance(v, list) and v and all(isinstance(row, dict) for row in v)]
    if shape is None and len(lists) == 1:
        return lists[0]
    if shape is None and value and all(isinstance(row, dict) and detect_shape(row) for row in value.values()):
        return list(value.values())
    names, cells = value.get("columns"), value.get("data")
    if isinstance(names, list) and isinstance(cells, list) and all(isinstance(row, list) for row in cells):
        # pandas' `orient="split"`.
        return [dict(zip(names, row, strict=False)) for row in cells]
    columns = [list(v.values()) if isinstance(v, dict) else v for v in value.values()]
    if shape in ("messages", "sharegpt", "turns") or len(columns) < 2 or not all(isinstance(c, list) for c in columns):
        return []
    if len(set(map(len, columns))) != 1 or not columns[0]:
        return []
    rows = [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    return rows if detect_shape(rows[0]) else []


def _found(row: Row | Damaged, size: int) -> UnreadRow:
    """A row that had to be parsed to be found."""
    return UnreadRow(size, lambda: row)


def _as_row(value: Any, where: str) -> Row | Damaged:
    if isinstance(value, list) and turn_list(value):
        return {"messages": value}
    if not isinstance(value, dict):
        return Damaged(where, f"a row is an object with columns, found {type(value).__name__}")
    row = unwrapped(value)
    return Damaged(where, row) if isinstance(row, str) else row


def _read_csv(open_file: Callable[[], TextIO], where: str) -> Iterator[UnreadRow]:
    csv.field_size_limit(_MAX_CHARACTERS)
    with open_file() as file:
        begin = list(itertools.islice(_csv_lines(file, where), _SNIFFED_LINES))
    delimiter = max(",\t;|", key=lambda delimiter: _cells_in_common(begin, delimiter))
    with open_file() as file:
        reader = csv.DictReader(_csv_lines(file, where), delimiter=delimiter, strict=True)
        try:
            names = reader.fieldnames or ()
        except csv.Error as error:
            raise UserError(f"{where}, line 1: not valid CSV ({error})") from None
        if twice := [name for number, name in enumerate(names) if name.strip() and name in names[:number]]:
            raise UserError(f"{where}, line 1: two columns are called '{twice[0]}': rename one of them")
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                if str(error) == "unexpected end of data":
                    # A quote that is not closed, which takes all the lines that follow into its cell.
                    raise UserError(f"{where}, line {reader.line_num}: not valid CSV ({error})") from None
                # The line of the error is not counted yet.
                yield _found(Damaged(f"{where}, line {reader.line_num + 1}", f"not valid CSV ({error})"), 0)
                continue
            if row is None:
                return
            if None in row or None in row.values():
                problem = (
                    f"the row has another number of cells than the header ({len(names)}); "
                    "quote cells that hold commas or line breaks"
                )
                yield _found(Damaged(f"{where}, line {reader.line_num}", problem), 0)
            else:
                yield _found(row, sum(map(len, row.values())))


def _csv_lines(file: TextIO, where: str) -> Iterator[str]:
    """The lines from the header on: before it there may be blank ones, and Excel's `sep=;`."""
    return itertools.dropwhile(lambda line: re.fullmatch(r"(?:sep=.)?\s*", line), _lines(file, where))


def _cells_in_common(lines: list[str], delimiter: str) -> tuple[int, int]:
    """How many of a file's first rows have as many cells as its header, and how many cells that are; (0, 0) for one."""
    try:
        rows = list(csv.reader(lines, delimiter=delimiter))
    except csv.Error:
        return 0, 0
    width = len(rows[0]) if rows else 0
    return (sum(len(row) == width for row in rows), width) if width > 1 else (0, 0)


def _read_text(open_file: Callable[[], TextIO], where: str) -> Iterator[UnreadRow]:
    document: list[str] = []
    length = 0
    with open_file() as file:
        for number, line in enumerate(_lines(file, where), start=1):
            if line.strip():
                document.append(line.rstrip("\r\n"))
                length += len(line)
                _check_length(length, f"{where}, line {number}")
            elif document:
                yield _found({"text": "\n".join(document)}, length)
                document, length = [], 0
    if document:
        yield _found({"text": "\n".join(document)}, length)
