"""Tokenized rows for the trainer, cut to the maximum length; texts, which are learned whole, into pieces of it."""

import logging
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from finemill.artifacts.dataset import IGNORE_INDEX, LabelledColumns, read_labelled
from finemill.artifacts.splits import Split
from finemill.errors import UserError

logger = logging.getLogger(__name__)


def load_rows(dataset: Path, split: Split, max_length: int) -> Dataset:
    """`input_ids` and `labels` of a split, each row cut to `max_length` tokens.

    A row whose every token is learned, a text for continued pre-training, becomes several of which none is lost. Rows
    that have no label left after the cut are dropped, and so are those of one token, before which there is nothing to
    predict it from; both counts are logged.

    Raises: UserError: the file is missing or no row has a label.
    """
    found = _cut_texts(read_labelled(dataset, split), max_length)
    num_rows = len(found.input_ids)
    too_long = pc.sum(pc.greater(pc.list_value_length(found.input_ids), max_length)).as_py() or 0
    input_ids, labels = (pc.list_slice(column, 0, max_length) for column in (found.input_ids, found.labels))
    labelled = [any(label != IGNORE_INDEX for label in row[1:]) for row in labels.to_pylist()]
    # The names are those that TRL's trainers read.
    rows = pa.table({"input_ids": input_ids, "labels": labels}).filter(pa.array(labelled, pa.bool_()))
    if too_long:
        logger.warning("%s: %d of %d rows cut to %d tokens", split, too_long, num_rows, max_length)
    if rows.num_rows < num_rows:
        logger.warning("%s: %d rows without a label dropped", split, num_rows - rows.num_rows)
    if rows.num_rows == 0:
        raise UserError(f"{split}: none of its {num_rows} rows has a label within max_length {max_length}")
    return Dataset(rows)


def _cut_texts(found: LabelledColumns, max_length: int) -> LabelledColumns:
    """The same rows, those that are learned from the first token to the last in pieces of `max_length`.

    A last piece of one token, which nothing would predict, gets the one before it as well.
    """
    too_long = pc.greater(pc.list_value_length(found.input_ids), max_length)
    if not pc.any(too_long).as_py():
        return found
    columns: tuple[list[list[int]], list[list[int]]] = [], []
    for input_ids, labels in zip(found.input_ids.to_pylist(), found.labels.to_pylist(), strict=True):
        step = max_length if IGNORE_INDEX not in labels else len(labels)
        starts = list(range(0, len(labels), step))
        if len(starts) > 1 and len(labels) % step == 1 and step > 2:
            starts[-1] -= 1
        for start, stop in pairwise([*starts, len(labels)]):
            columns[0].append(input_ids[start:stop])
            columns[1].append(labels[start:stop])
    kinds = found.input_ids.type, found.labels.type
    return LabelledColumns(*(pa.chunked_array([rows], kind) for rows, kind in zip(columns, kinds, strict=True)))
