"""What is known of each row, in a temporary database: memory holds its cache, however many rows there are."""

import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from finemill.artifacts.splits import SPLITS, Split
from finemill.components.data_prep.record import Record

_CACHE_KIB = 8 * 1024
# So many rows are written at once.
_NEW_ROWS = 1000
_TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA temp_store = FILE;
CREATE TABLE seen (key PRIMARY KEY, source INTEGER, number INTEGER) WITHOUT ROWID;
CREATE TABLE rows (
    place INTEGER PRIMARY KEY, source INTEGER, number INTEGER, row_id TEXT, shape TEXT, prompt_key BLOB,
    characters INTEGER, text_offset INTEGER, split TEXT, position BLOB
);
CREATE TABLE rejected (source INTEGER, number INTEGER, reason TEXT, field TEXT);
BEGIN;
"""
Place = tuple[int, int]
"""A row by the number of its source and its own number there."""


class RowIndex:
    """The usable rows, those that were left out, and what both repeat. Close it to free its disk space."""

    def __init__(self) -> None:
        self._folder = TemporaryDirectory(prefix="finemill-index-")
        self._database = sqlite3.connect(Path(self._folder.name) / "rows.sqlite", isolation_level=None)
        self._database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self._database.executescript(_TABLES)
        self._num_rows = 0
        self._new_rows: list[tuple[Any, ...]] = []

    def close(self) -> None:
        """Free the disk space."""
        self._database.close()
        self._folder.cleanup()

    def first(self, key: str | bytes, place: Place) -> Place:
        """The place of the first row with this key: `place` itself if there was none before."""
        if self._database.execute("INSERT OR IGNORE INTO seen VALUES (?, ?, ?)", (key, *place)).rowcount:
            return place
        found: Place = self._database.execute("SELECT source, number FROM seen WHERE key = ?", (key,)).fetchone()
        return found

    def add(self, record: Record, offset: int) -> None:
        """Remember a usable row, and the offset of its text in the spool."""
        values = (record.source, record.number, record.row_id, record.shape, record.prompt_key)
        place = (record.num_characters, offset, record.split, record.position)
        self._new_rows.append((self._num_rows, *values, *place))
        self._num_rows += 1
        if len(self._new_rows) >= _NEW_ROWS:
            self.complete()

    def complete(self) -> None:
        """Write what was added; before anything is asked about the rows."""
        self._database.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", self._new_rows)
        self._new_rows.clear()

    def reject(self, source: int, rows: Iterable[tuple[int, str, str]]) -> None:
        """Remember rows of a source that are left out: number, reason and field of each."""
        self._database.executemany("INSERT INTO rejected VALUES (?, ?, ?, ?)", ((source, *row) for row in rows))

    def place_of(self, number: int) -> Place:
        """The place of a usable row by its number in the order in which they were added, from 0."""
        found: Place = self._database.execute("SELECT source, number FROM rows WHERE place = ?", (number,)).fetchone()
        return found

    def remove(self, number: int) -> None:
        """Forget a usable row."""
        self._database.execute("DELETE FROM rows WHERE place = ?", (number,))

    def take_held_out(self) -> Iterator[Place]:
        """Remove rows of training that begin with a held-out question, and of validation with one of the test."""
        later = "split = 'test'"
        for split in ("validation", "train"):
            where = f"split = ? AND prompt_key IN (SELECT prompt_key FROM rows WHERE {later})"
            yield from self._database.execute(f"SELECT source, number FROM rows WHERE {where}", (split,)).fetchall()
            self._database.execute(f"DELETE FROM rows WHERE {where}", (split,))
            later = "split IN ('test', 'validation')"

    def counts(self) -> dict[Split, dict[int, tuple[int, int]]]:
        """Rows and characters by source of each split."""
        counts: dict[Split, dict[int, tuple[int, int]]] = {split: {} for split in SPLITS}
        query = "SELECT split, source, count(*), sum(characters) FROM rows GROUP BY split, source"
        for split, source, number, characters in self._database.execute(query):
            counts[split][source] = (number, characters)
        return counts

    def rows(self, split: Split) -> Iterator[tuple[str, int, int, str, int]]:
        """Id, source, number, shape and text's offset of a split's rows, in the order of their positions."""
        query = (
            "SELECT row_id, source, number, shape, text_offset FROM rows WHERE split = ? "
            "ORDER BY position, source, number"
        )
        return self._database.execute(query, (split,))

    def rejected(self, source: int) -> Iterator[tuple[int, str, str]]:
        """Number, reason and field of a source's rows that are left out, in order."""
        query = "SELECT number, reason, field FROM rejected WHERE source = ? ORDER BY number, reason, field"
        return self._database.execute(query, (source,))
