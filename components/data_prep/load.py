"""Where rows come from: every source as a list of files with digests, local before they are read."""

import hashlib
import logging
import re
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, overload
from urllib.parse import urlsplit

from finemill.artifacts.manifest import sha256_file
from finemill.components.data_prep.config import DataPrepConfig, Source
from finemill.components.data_prep.hub import snapshot_dataset
from finemill.components.data_prep.read import (
    COMPRESSIONS,
    FORMATS,
    Damaged,
    Row,
    UnreadRow,
    find_rows,
    is_data_file,
    split_pattern,
)
from finemill.errors import UserError
from finemill.rows.shapes import KNOWN_COLUMNS
from finemill.rows.speakers import known_name
from finemill.storage.base import local_path
from finemill.tracking.settings import Tracking

logger = logging.getLogger(__name__)

EXAMPLE_ROWS = 2000
"""Rows of an `example:` source without `max_rows`."""

_PART = re.compile(r"[^\[\]]*\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\]")
# What `datasets`, the hub and LLaMA-Factory write beside the rows.
_DESCRIPTIONS = (
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json", "metadata.json"),
    *("config.json", "schema.json", "package.json", "manifest.json"),
)
# Texts about the data, by how their names begin.
_TEXTS_BESIDE = re.compile(
    r"(?:readme|licen[cs]e|copying|notice|authors|contributors|changelog|changes|citation|requirements|sha\d*sums?"
    r"|md5sums?|checksums?)(?:[._-][\w.-]*)?\.(?:txt|text)"
)
# Ends of files that no one takes for rows.
_ABOUT_DATA = (".md", ".rst", ".py", ".sh", ".lock", ".metadata", ".png", ".jpg", ".svg", ".sha256", ".md5")
_MOST_SHOWN = 8


@dataclass(frozen=True)
class DataFile:
    """A file of rows: what to call it, what identifies its bytes, and how to get it as a local path.

    `is_here` says that it need not be fetched.
    """

    name: str
    digest: Callable[[], str]
    fetch: Callable[[Path], Path]
    is_here: bool = False


class LocalFile(NamedTuple):
    """A file of rows on this machine; `name` is what to call it."""

    name: str
    path: Path


class SourceFiles(Sequence[LocalFile]):
    """The files of a source, each fetched into `folder` when it is first asked for."""

    def __init__(self, files: Sequence[DataFile], folder: Path) -> None:
        self._files, self._folder = files, folder
        self._paths: dict[int, Path] = {}

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, number: int) -> LocalFile: ...

    @overload
    def __getitem__(self, number: slice) -> list[LocalFile]: ...

    def __getitem__(self, number: int | slice) -> LocalFile | list[LocalFile]:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        file = self._files[number]
        if number not in self._paths:
            self._paths[number] = file.fetch(self._folder)
        return LocalFile(file.name, self._paths[number])

    @property
    def are_here(self) -> bool:
        """Whether none need be fetched."""
        return all(file.is_here for file in self._files)


def source_digests(inputs: Mapping[str, str], config: DataPrepConfig, tracking: Tracking) -> dict[str, str]:
    """What the output depends on outside of the store: a digest per source over the sha256 of its files.

    S3 objects count with their ETags, so that nothing is downloaded when the output is there already.
    Raises: UserError: a source is missing, empty or out of reach.
    """
    digests = {}
    named = [(f"sources.{number} {source.uri}", source) for number, source in enumerate(config.sources)]
    named += [(f"benchmarks.{number} {uri}", Source(uri=uri)) for number, uri in enumerate(config.benchmarks)]
    for name, source in named:
        try:
            lines = [f"{file.digest()} {file.name}\n" for file in locate_files(source, config.seed)]
        except OSError as error:
            raise UserError(f"source '{source.uri}' cannot be read: {error.strerror} ({error.filename})") from None
        digests[name] = hashlib.sha256("".join(lines).encode()).hexdigest()
    return digests


@contextmanager
def source_files(source: Source, seed: int) -> Iterator[SourceFiles]:
    """The files of a source; those that were fetched are gone afterwards.

    Raises: UserError: no such place, or no data file in it.
    """
    with TemporaryDirectory(prefix="finemill-source-") as folder:
        found = _find_files(source, seed)
        files = _select_files(found, source)
        _warn_of_others(found, source)
        yield SourceFiles(files, Path(folder))


def find_source_rows(files: Sequence[LocalFile], source: Source) -> Iterator[UnreadRow]:
    """The rows of a source's files in order, those of its `split` and at most `max_rows`, columns as they are."""

    def rows() -> Iterator[UnreadRow]:
        for file in files:
            yield from find_rows(file.path, source.format, file.name, split_name(source.split))

    start, stop = row_range(source, lambda: sum(1 for _ in rows()))
    return islice(islice(rows(), start, stop), source.max_rows)


def load_source(source: Source, seed: int) -> Generator[Row | Damaged, None, None]:
    """The rows of a source in order, columns renamed; close it to free its temporary folder."""
    with source_files(source, seed) as files:
        for found in find_source_rows(files, source):
            row = found.read()
            yield row if isinstance(row, Damaged) else name_columns(row, source)


def split_name(split: str | None) -> str | None:
    """A split without the part of it that is asked for: `train` of `train[:30%]`; None for all files."""
    return None if split is None else split.partition("[")[0] or None


def row_range(source: Source, count: Callable[[], int]) -> tuple[int, int | None]:
    """The first row that a source's `split` asks for and the one after the last, None for the end.

    Args:
        source: the source.
        count: counts its rows, which shares and places from the end need.
    Raises: UserError: not a part in `datasets`' way.
    """
    split = source.split or ""
    if "[" not in split:
        return 0, None
    match = _PART.fullmatch(split)
    if match is None:
        raise UserError(f"{source.uri}: split '{split}': write a part as train[:30%], train[1000:2000] or train[-10%:]")
    if not any(edge and (edge.endswith("%") or edge.startswith("-")) for edge in match.groups()):
        return int(match["start"] or 0), int(match["stop"]) if match["stop"] else None
    total = count()
    return _place(match["start"] or "0", total), _place(match["stop"], total) if match["stop"] else total


def _place(edge: str, total: int) -> int:
    """A place as `datasets` finds it: shares to the nearest row, places before the begin from the end."""
    place = round(total * int(edge[:-1]) / 100) if edge.endswith("%") else int(edge)
    return max(0, place + total if place < 0 else min(place, total))


def name_columns(row: Row, source: Source) -> Row:
    """The row with its columns under the names that are known.

    Those in `columns` first; others whose name is known but for its spelling, as `Instruction` and `systemPrompt`; all
    others stay. Where a
    renamed column takes the name of another, that one is kept as `NAME (other)`, which nothing reads.
    """
    given = {column: known for known, column in source.columns.items()}
    if not given and not source.remove_columns and all(known_name(column, KNOWN_COLUMNS) == column for column in row):
        return row
    named: Row = {given[column]: value for column, value in row.items() if column in given}
    for column, value in row.items():
        if column in given or column in source.remove_columns:
            continue
        known = known_name(column, KNOWN_COLUMNS)
        name = column if known in row else known
        named[f"{name} (other)" if name in named else name] = value
    return named


def locate_files(source: Source, seed: int) -> list[DataFile]:
    """The data files of a source in the order of their names.

    Raises: UserError: no such place, or no data file in it that `name` and `split` leave.
    """
    return _select_files(_find_files(source, seed), source)


def _find_files(source: Source, seed: int) -> dict[str, DataFile]:
    """All files of a source by their paths in its folder, "" for a single one."""
    scheme = urlsplit(source.uri).scheme
    if scheme == "example":
        return {"": _example_file(source, seed)}
    if scheme == "s3":
        from finemill.components.data_prep.s3_files import list_s3_files

        return {name: DataFile(f.uri, f.digest, f.download) for name, f in list_s3_files(source.uri).items()}
    if scheme == "hf":
        return _local_files(snapshot_dataset(source.uri, source.name, split_name(source.split)), source.uri)
    if scheme in ("", "file"):
        return _local_files(local_path(source.uri).expanduser(), source.uri)
    raise UserError(
        f"source '{source.uri}': unknown scheme '{scheme}'; allowed are a path, file://, s3://bucket/key, "
        "hf://datasets/org/name@revision and example:NAME"
    )


def _select_files(files: dict[str, DataFile], source: Source) -> list[DataFile]:
    """The single file that a URI names, or of many those that can be read and that `name` and `split` ask for."""
    if set(files) == {""}:
        return list(files.values())
    chosen = [name for name in sorted(files) if is_data_file(name) and not _is_beside_data(name)]
    if source.name is not None:
        chosen = [name for name in chosen if source.name in name.split("/")[:-1]]
    if (split := split_name(source.split)) is not None:
        chosen = [name for name in chosen if split_pattern(split).search(name)]
    if not chosen:
        asked = "".join(f" of {key} '{getattr(source, key)}'" for key in ("name", "split") if getattr(source, key))
        found = ", ".join(sorted(files)[:8]) or "nothing"
        raise UserError(
            f"source '{source.uri}': no data file{asked} there (found {found}); files that are read end with "
            f"{', '.join(FORMATS)}, the text formats also with {', '.join(COMPRESSIONS)}; names that begin with . or _ "
            "and descriptions of data sets are passed over"
        )
    return [files[name] for name in chosen]


def _warn_of_others(files: Collection[str], source: Source) -> None:
    """Log which files of a folder are not read though they may hold rows."""
    others = [name for name in sorted(files) if name and not is_data_file(name) and not _is_beside_data(name)]
    others = [name for name in others if Path(name).suffix and Path(name).suffix.lower() not in _ABOUT_DATA]
    if others:
        shown = ", ".join(others[:_MOST_SHOWN]) + (" and others" if len(others) > _MOST_SHOWN else "")
        logger.warning("%s: %d files that are not read: %s", source.uri, len(others), shown)


def _is_beside_data(name: str) -> bool:
    """Whether a file in a folder only describes the data, or is hidden, as Arrow's own data sets have it."""
    *_, file = parts = name.split("/")
    hidden = any(part.startswith((".", "_")) for part in parts)
    described = file.lower() in _DESCRIPTIONS or _TEXTS_BESIDE.fullmatch(file.lower()) is not None
    return hidden or described or (file.startswith("cache-") and file.endswith(".arrow"))


def _local_files(place: Path, uri: str) -> dict[str, DataFile]:
    if place.is_file():
        return {"": _local_file(place, uri)}
    if not place.is_dir():
        raise UserError(f"source '{uri}' not found: there is no such file or folder; check sources[].uri")
    paths = sorted(path for path in place.rglob("*") if path.is_file())
    names = {path.relative_to(place).as_posix(): path for path in paths}
    return {name: _local_file(path, f"{uri.rstrip('/')}/{name}") for name, path in names.items()}


def _local_file(path: Path, name: str) -> DataFile:
    return DataFile(name, lambda: sha256_file(path), lambda _: path, is_here=True)


def _example_file(source: Source, seed: int) -> DataFile:
    """Example data are made where they are read: what they depend on is their recipe."""
    name = source.uri.removeprefix("example:")
    num_rows = source.max_rows or EXAMPLE_ROWS

    def write(folder: Path) -> Path:
        from finemill.rows.examples.generate import write_example_data

        return write_example_data(name, folder, seed, num_rows)

    return DataFile(source.uri, lambda: f"{seed} {num_rows}", write)
