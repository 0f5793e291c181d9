from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from finemill.components.data_prep.tables import find_table_rows
from finemill.errors import UserError


def read_table(path: Path, file_format: str) -> list[dict[str, Any]]:
    return [read() for _, read in find_table_rows(path, "a", file_format)]


CALLS = [
    {
        "calls": [{"name": "dim", "arguments": {"room": "hall", "level": None}}],
        "tools": {"dim": {"room": {"type": "s"}}},
    },
    {"calls": [{"name": "find", "arguments": {"origin": "Ulm"}}], "tools": {"find": {"origin": {"type": "s"}}}},
    {"calls": None, "tools": None},
]


@pytest.mark.parametrize("file_format", ["parquet", "stream", "feather"])
def test_keys_that_are_null_because_another_row_has_them_are_left_out(tmp_path: Path, file_format: str) -> None:
    table, path = pa.Table.from_pylist(CALLS), tmp_path / "a"
    if file_format == "parquet":
        pq.write_table(table, path)
    elif file_format == "feather":
        pyarrow.feather.write_feather(table, str(path), compression="uncompressed")
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    read = read_table(path, "parquet" if file_format == "parquet" else "arrow")
    assert read == [
        {"calls": [{"name": "dim", "arguments": {"room": "hall"}}], "tools": {"dim": {"room": {"type": "s"}}}},
        {"calls": [{"name": "find", "arguments": {"origin": "Ulm"}}], "tools": {"find": {"origin": {"type": "s"}}}},
        {"calls": None, "tools": None},
    ]


def test_json_columns_and_maps_are_decoded_and_their_own_nulls_stay(tmp_path: Path) -> None:
    json_text = pa.json_(pa.string())
    schema = pa.schema(
        [
            ("messages", pa.list_(json_text)),
            ("tool", pa.struct([("name", pa.string()), ("schema", json_text)])),
            ("options", pa.map_(pa.string(), pa.int64())),
        ]
    )
    columns = [
        pa.array([['{"role": "user", "content": null}', '"plain"']], pa.list_(pa.string())),
        pa.array(
            [{"name": "f", "schema": '{"default": null}'}], pa.struct([("name", pa.string()), ("schema", pa.string())])
        ),
        pa.array([[("A", 1), ("B", None)]], pa.map_(pa.string(), pa.int64())),
    ]
    table = pa.table([column.cast(field.type) for column, field in zip(columns, schema, strict=True)], schema=schema)
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet", "parquet") == [
        {
            "messages": [{"role": "user", "content": None}, "plain"],
            "tool": {"name": "f", "schema": {"default": None}},
            "options": {"A": 1},
        }
    ]


def test_an_arrow_file_with_any_byte_damaged_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    table = pa.Table.from_pylist([{"prompt": "a", "completion": "b"}] * 20)
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table)
    sound = path.read_bytes()
    refused = 0
    for position in range(len(sound)):
        path.write_bytes(sound[:position] + bytes([sound[position] ^ 0x80]) + sound[position + 1 :])
        try:
            read_table(path, "arrow")
        except UserError:
            refused += 1
    assert refused > 100
