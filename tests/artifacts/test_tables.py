from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq
import pytest

from finemill.artifacts.tables import RowWriter, iterate_batches, read_columns, read_rows, schema_of, write_rows
from finemill.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Short:
    ids: list[int]


@dataclass(frozen=True, kw_only=True)
class Long(Short):
    name: str
    score: float | None = None
    count: int = 0
    right: bool | None = None
    word: Literal["a", "b"] | None = None


ROWS = [Long(ids=[1, 2], name="a", score=0.5, count=3, right=True, word="b"), Long(ids=[], name="é")]


def test_rows_survive_the_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", Long, ROWS)
    assert read_rows(tmp_path / "a.parquet", Long, "merge") == ROWS
    assert read_rows(tmp_path / "a.parquet", Long, "merge", limit=1) == ROWS[:1]


def test_a_file_without_rows_has_its_columns_and_types(tmp_path: Path) -> None:
    with RowWriter(tmp_path / "a.parquet", Long) as writer:
        writer.write([])
    assert pq.read_schema(tmp_path / "a.parquet") == schema_of(Long)
    assert [str(kind) for kind in schema_of(Long).types] == [
        "list<item: int32>",
        "string",
        "double",
        "int64",
        "bool",
        "string",
    ]
    assert read_rows(tmp_path / "a.parquet", Long, "merge") == []


def test_a_reader_takes_the_columns_of_its_class(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", Long, ROWS)
    assert read_columns(tmp_path / "a.parquet", Short, "merge").column_names == ["ids"]
    assert read_rows(tmp_path / "a.parquet", Short, "merge") == [Short(ids=[1, 2]), Short(ids=[])]


@pytest.mark.parametrize("groups", [[5], [3, 2], [1, 1, 1, 1, 1], [2, 2, 1]])
def test_batches_come_in_order(tmp_path: Path, groups: list[int]) -> None:
    numbers = iter(range(5))
    with RowWriter(tmp_path / "a.parquet", Short) as writer:
        for group in groups:
            writer.write([Short(ids=[next(numbers)]) for _ in range(group)])
    batches = iterate_batches(tmp_path / "a.parquet", Short, "merge", batch_rows=2)
    assert [[row.ids[0] for row in batch] for batch in batches] == [[0, 1], [2, 3], [4]]
    some = iterate_batches(tmp_path / "a.parquet", Short, "merge", batch_rows=2, first=1, step=2)
    assert [[row.ids[0] for row in batch] for batch in some] == [[2, 3]]


def test_what_is_missing_is_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.parquet not found: merge writes it; pass the reference it printed"):
        read_rows(tmp_path / "a.parquet", Short, "merge")
    write_rows(tmp_path / "a.parquet", Short, [])
    with pytest.raises(
        UserError, match=r"no column name, score, count, right, word: another version .* run merge again"
    ):
        read_rows(tmp_path / "a.parquet", Long, "merge")
