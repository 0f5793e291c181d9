"""Rows a thousand at a time: a batch is formatted by itself, so that any process may do it."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from finemill.artifacts.dataset import DatasetRow
from finemill.artifacts.rows import PreparedRow
from finemill.artifacts.tables import columns_of
from finemill.components.chat_format.example import Draft, Example
from finemill.components.chat_format.formatter import Formatter
from finemill.components.chat_format.report import SplitCounts
from finemill.rows.reasons import WHOLE_ROW, DroppedRowError


@dataclass(frozen=True)
class FormattedBatch:
    """The examples of a batch as `DatasetRow`s, what the report counts, and a line for each row without an example."""

    examples: pa.RecordBatch
    counts: SplitCounts
    rejected: str


def format_batch(formatter: Formatter, rows: Sequence[PreparedRow], *, unroll: bool) -> FormattedBatch:
    """Render row by row, tokenize all at once."""
    counts = SplitCounts()
    drafts: list[Draft] = []
    reasons: dict[int, list[DroppedRowError]] = defaultdict(list)
    numbers: list[int] = []
    for number, record in enumerate(rows):
        counts.read[record.source] += 1
        try:
            row_drafts = formatter.drafts(record, json.loads(record.row), unroll=unroll)
        except DroppedRowError as error:
            reasons[number].append(error)
        else:
            drafts += row_drafts
            numbers += [number] * len(row_drafts)
    examples: list[Example] = []
    formatted = set()
    for number, example in zip(numbers, formatter.finish_all(drafts), strict=True):
        if isinstance(example, DroppedRowError):
            reasons[number].append(example)
        else:
            formatted.add(number)
            counts.add(example)
            examples.append(example)
    rejected = []
    for number, found in sorted(reasons.items()):
        record, reason = rows[number], found[0]
        if number in formatted:
            counts.examples_dropped.update(map(str, found))
        else:
            counts.dropped[record.source][str(reason)] += 1
            place = {"source": record.source, "row": record.number}
            rejected.append({**place, "reason": str(reason), "field": reason.field or WHOLE_ROW})
    return FormattedBatch(
        columns_of(DatasetRow, [example.values for example in examples]),
        counts,
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in rejected),
    )
