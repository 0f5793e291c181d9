import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finemill.components.data_prep.read import is_data_file, read_rows
from finemill.errors import UserError

ROWS = [{"question": f"Wie viel ist {n}+1?", "answer": f"“{n + 1}”"} for n in range(3)]


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


JSONL = "\n".join(json.dumps(row) for row in ROWS)
CSV = "question,answer\n" + "\n".join(f'"{row["question"]}",{row["answer"]}' for row in ROWS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", JSONL + "\n"),
        ("a.jsonl", JSONL.replace("\n", "\r\n\r\n")),
        ("a.jsonl.gz", JSONL),
        ("a.jsonl", "\ufeff" + JSONL),
        ("a.json", json.dumps(ROWS)),
        ("a.json", " \n" + json.dumps(ROWS, indent=2)),
        ("a.json", JSONL),
        ("a.csv", CSV),
        ("a.csv.gz", CSV),
        ("a.tsv", CSV.replace(",", "\t")),
    ],
)
def test_text_formats_give_the_same_rows(tmp_path: Path, name: str, text: str) -> None:
    assert list(read_rows(written(tmp_path, name, text))) == ROWS


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet")) == ROWS


def test_a_text_document_ends_at_a_blank_line(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "\n\nOne\nstill one\n \n\nTwo")
    assert list(read_rows(path)) == [{"text": "One\nstill one"}, {"text": "Two"}]


def test_csv_cells_may_hold_line_breaks(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", 'prompt,completion\r\n"a\r\nb",c\r\n')
    assert list(read_rows(path)) == [{"prompt": "a\r\nb", "completion": "c"}]


def test_a_set_format_overrides_the_ending(tmp_path: Path) -> None:
    assert list(read_rows(written(tmp_path, "rows.data", JSONL), "jsonl")) == ROWS


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": ', "a.jsonl, line 3: not valid JSON"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1: a row is an object with columns, found list"),
        ("a.json", b'[\n{"a": 1},\n{"a" 2}\n]', "a.json, line 3: not valid JSON"),
        ("a.json", b"[1]", "row 1: a row is an object with columns, found int"),
        ("a.json", b'"text"', "not JSON rows"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "a.csv, line 3: the row has another number of cells than the header"),
        ("a.csv", b"a,b\n1\n", "a.csv, line 2: the row has another number of cells"),
        ("a.csv", b'a,b\n"1,2\n', "not valid CSV"),
        ("a.jsonl", b"\xff\xfe", "not UTF-8 text at byte 0"),
        ("a.jsonl.gz", b"not gzip", "not a complete gzip file"),
        ("a.parquet", b"PAR1 not really", "not a readable Parquet file"),
        ("a.docx", b"", "cannot tell the format from the ending '.docx'"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        list(read_rows(tmp_path / name))


def test_data_files_are_told_by_their_endings() -> None:
    assert [name for name in ("a.parquet", "b.JSONL.gz", "README.md", "data") if is_data_file(name)] == [
        "a.parquet",
        "b.JSONL.gz",
    ]
