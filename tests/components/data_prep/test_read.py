import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finemill.components.data_prep.read import Damaged, is_data_file, read_rows
from finemill.errors import UserError

ROWS = [{"question": f"Wie viel ist {n}+1?", "answer": f"“{n + 1}”"} for n in range(3)]


def zstd(data: bytes) -> bytes:
    compressed: bytes = pa.Codec("zstd").compress(data, asbytes=True)
    return compressed


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    compressed: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".gzip": gzip.compress,
        ".lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
        ".zst": zstd,
    }
    path.write_bytes(compressed.get(path.suffix.lower(), bytes)(text.encode()))
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
        ("a.JSONL.GZ", JSONL),
        ("a.jsonl.bz2", JSONL),
        ("a.jsonl.xz", JSONL),
        ("a.json.zst", json.dumps(ROWS)),
        ("a.json", "\n".join(json.dumps(row, indent=1) for row in ROWS)),
        ("a.json", json.dumps({"version": 1, "data": ROWS}, indent=1)),
        ("a.json", json.dumps({"version": 1, "data": ROWS})),
        ("a.json", json.dumps({f"row {number}": row for number, row in enumerate(ROWS)})),
        ("a.json", json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]})),
        ("a.json", json.dumps({name: {str(n): row[name] for n, row in enumerate(ROWS)} for name in ROWS[0]})),
        ("a.json", json.dumps({"columns": list(ROWS[0]), "index": [0, 1, 2], "data": [[*r.values()] for r in ROWS]})),
        ("a.jsonl", json.dumps(ROWS)),
        ("a.jsonl", json.dumps(ROWS, indent=1)),
        ("a.jsonl", "\n".join(json.dumps(row, indent=1) for row in ROWS)),
        ("a.jsonlines", JSONL),
        ("a.txt", JSONL),
        ("a.txt", json.dumps(ROWS)),
        ("a.csv", CSV.replace(",", ";")),
        ("a.csv", CSV.replace(",", "|")),
        ("a.csv", "sep=;\n\n" + CSV.replace(",", ";")),
        ("a.jsonl", JSONL.replace("}", "},")),
        ("a.jsonl.gzip", JSONL),
        ("a.jsonl.lzma", JSONL),
    ],
)
def test_text_formats_give_the_same_rows(tmp_path: Path, name: str, text: str) -> None:
    assert list(read_rows(written(tmp_path, name, text))) == ROWS


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet")) == ROWS


def test_tables_are_known_by_how_they_begin(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.jsonl")
    assert list(read_rows(tmp_path / "a.jsonl")) == ROWS


def test_a_long_list_on_one_line_is_read_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finemill.components.data_prep.read._LONGEST_FIRST", 64)
    monkeypatch.setattr("finemill.components.data_prep.read._MAX_CHARACTERS", 128)
    for name in ("a.json", "a.jsonl"):
        assert list(read_rows(written(tmp_path, name, json.dumps(ROWS * 9)))) == ROWS * 9


@pytest.mark.parametrize(("name", "end"), [("a.json", "list"), ("a.jsonl", "lines")])
def test_a_list_of_turns_is_a_row(tmp_path: Path, name: str, end: str) -> None:
    chats = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}."}] for n in range(2)]
    text = json.dumps(chats) if end == "list" else "\n".join(map(json.dumps, chats))
    assert list(read_rows(written(tmp_path, name, text))) == [{"messages": chat} for chat in chats]


def test_a_text_document_ends_at_a_blank_line(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "\n\nOne\nstill one\n \n\nTwo")
    assert list(read_rows(path)) == [{"text": "One\nstill one"}, {"text": "Two"}]


def test_csv_cells_may_hold_line_breaks(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", 'prompt,completion\r\n"a\r\nb",c\r\n')
    assert list(read_rows(path)) == [{"prompt": "a\r\nb", "completion": "c"}]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 1: two columns are called 'answer': rename one of them$"):
        list(read_rows(written(tmp_path, "a.csv", "question,answer,answer\na,b,c\n")))


def test_the_delimiter_is_the_one_that_rows_and_header_share(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "prompt;answer (a, b, or c)\n1, 2, 3?;c\n4?;b\n")
    assert list(read_rows(path)) == [
        {"prompt": p, "answer (a, b, or c)": a} for p, a in (("1, 2, 3?", "c"), ("4?", "b"))
    ]


def test_a_set_format_overrides_the_ending(tmp_path: Path) -> None:
    assert list(read_rows(written(tmp_path, "rows.data", JSONL), "jsonl")) == ROWS


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b'[\n{"a": 1},\n{"a" 2}\n]', "a.json, line 3: not valid JSON"),
        ("a.json", b'"text"', "not JSON rows"),
        ("a.csv", b'a,b\n"1,2\n', "not valid CSV"),
        ("a.json", b'[{"a": 1}] x', "a.json, line 1: not valid JSON .Extra data at column 12"),
        ("a.json", b'[{"a": 1}', "a.json, line 1: not valid JSON"),
        ("a.csv", b"\xff\xfa", "not UTF-8 text at byte 0"),
        ("a.arrow", b"not really", "not a readable Arrow file"),
        ("a.jsonl.zst", b"not zstd", "not a complete .zst file"),
        ("a.jsonl.xz", b"not xz", "not a complete .xz file"),
        ("a.jsonl.gz", b"not gzip", "not a complete gzip file"),
        ("a.parquet", b"PAR1 not really", "not a readable Parquet file"),
        ("a.docx", b"", "cannot tell the format from the ending '.docx'"),
        ("a.tar.gz", b"", "ending '.tar.gz'; unpack it and give the folder"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "data", "where", "problem"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n{"a": 2}', "line 3", "not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n{"a": 2}', "line 2", "a row is an object with columns, found list"),
        ("a.jsonl", b'[{"b": 1}]\n{"a": 1}\n{"a": 2}', "line 1", "a row is an object with columns, found list"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n{"a": 2}', "line 2", "not UTF-8 text"),
        ("a.jsonl", b'{"a": 1}\n' + b"[" * 5000 + b'\n{"a": 2}', "line 2", "nested too deeply"),
        ("a.jsonl", b'{"a": 1}\n{"a": ' + b"1" * 5000 + b'}\n{"a": 2}', "line 2", "not valid JSON"),
        ("a.json", b'[{"a": 1}, 5, {"a": 2}]', "row 2", "a row is an object with columns, found int"),
        ("a.csv", b"a\n1\n1,2,3\n2\n", "line 3", "the row has another number of cells than the header"),
        ("a.csv", b"a,b\n1,2\n1\n2,2\n", "line 3", "the row has another number of cells"),
        ("a.csv", b'a,b\n1,2\n"1 \\"3\\"",2\n2,2\n', "line 3", "not valid CSV"),
    ],
)
def test_a_damaged_row_is_named_and_the_others_are_read(
    tmp_path: Path, name: str, data: bytes, where: str, problem: str
) -> None:
    (tmp_path / name).write_bytes(data)
    rows = list(read_rows(tmp_path / name))
    assert [str(row["a"]) for row in rows if isinstance(row, dict)] == ["1", "2"]
    (damaged,) = (row for row in rows if isinstance(row, Damaged))
    assert damaged.where == f"{tmp_path / name}, {where}"
    assert problem in damaged.problem


def test_one_object_is_one_row_even_if_it_holds_a_list(tmp_path: Path) -> None:
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    for indent in (None, 2):
        assert list(read_rows(written(tmp_path, "a.json", json.dumps(row, indent=indent)))) == [row]


def test_data_files_are_told_by_their_endings() -> None:
    assert [name for name in ("a.parquet", "b.JSONL.gz", "README.md", "data") if is_data_file(name)] == [
        "a.parquet",
        "b.JSONL.gz",
    ]


def test_how_a_file_begins_tells_how_it_is_packed_and_encoded(tmp_path: Path) -> None:
    for name, data in (
        ("packed.jsonl", gzip.compress(JSONL.encode())),
        ("unpacked.jsonl.gz", JSONL.encode()),
        ("windows.jsonl", JSONL.encode("utf-16")),
        ("windows.json.gz", gzip.compress(json.dumps(ROWS).encode("utf-16"))),
    ):
        (tmp_path / name).write_bytes(data)
        assert list(read_rows(tmp_path / name)) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.txt.gz"])
def test_a_row_of_endless_length_out_of_a_small_file_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finemill.components.data_prep.read._MAX_CHARACTERS", 2**16)
    long = "x" * 2**17
    text = {"csv": f"text\n{long}\n", "txt": "y\n" + "\n".join(["x" * 100] * 1000)}.get(
        name.split(".")[1], json.dumps({"text": long}) + "\n{}\n"
    )
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    with pytest.raises(UserError, match=r"line \d+: more than 65536 characters in one row"):
        list(read_rows(tmp_path / name))
