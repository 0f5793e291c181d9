"""The dataset's Parquet files."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from finemill.components.chat_format.example import Example

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("messages", pa.string()),
        ("tools", pa.string()),
        ("chat_template_kwargs", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("rejected", pa.string()),
        ("rejected_input_ids", pa.list_(pa.int32())),
        ("rejected_labels", pa.list_(pa.int32())),
        ("answer", pa.string()),
    ]
)
"""`messages`, `tools` and `chat_template_kwargs` are JSON text, so that rows of every shape fit one schema."""


class DatasetWriter:
    """One Parquet file; a context manager."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def write(self, examples: Sequence[Example]) -> None:
        """Append examples as one row group."""
        if not examples:
            return
        drafts = [example.draft for example in examples]
        columns: list[list[Any]] = [
            [draft.record["id"] for draft in drafts],
            [draft.record["source"] for draft in drafts],
            [_json(draft.messages) for draft in drafts],
            [_json(draft.conversation.tools) if draft.conversation.tools else None for draft in drafts],
            [_json(draft.kwargs) for draft in drafts],
            [example.input_ids for example in examples],
            [example.labels for example in examples],
            [draft.prompt for draft in drafts],
            [draft.completion for draft in drafts],
            [draft.rejected.answer if draft.rejected else None for draft in drafts],
            [example.rejected.input_ids if example.rejected else None for example in examples],
            [example.rejected.labels if example.rejected else None for example in examples],
            [draft.conversation.answer for draft in drafts],
        ]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        self._writer.write_table(pa.table(arrays, schema=SCHEMA))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
