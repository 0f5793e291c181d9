"""Tokenized rows for the trainer, cut to the maximum length."""

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from finemill.errors import UserError

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100


def load_rows(dataset: Path, split: str, max_length: int) -> Dataset:
    """`input_ids` and `labels` of a split, each row cut to `max_length` tokens.

    Rows that have no label left after the cut are dropped; both counts are logged.

    Raises: UserError: the file is missing or no row has a label.
    """
    path = dataset / f"{split}.parquet"
    if not path.is_file():
        raise UserError(f"{path.name} not found in the dataset: chat-format writes it; give the reference it printed")
    table = pq.read_table(path, columns=["input_ids", "labels"])
    too_long = pc.sum(pc.greater(pc.list_value_length(table["input_ids"]), max_length)).as_py() or 0
    columns = {name: pc.list_slice(table[name], 0, max_length) for name in ("input_ids", "labels")}
    labelled = [any(label != IGNORE_INDEX for label in row) for row in columns["labels"].to_pylist()]
    rows = pa.table(columns).filter(pa.array(labelled, pa.bool_()))
    if too_long:
        logger.warning("%s: %d of %d rows cut to %d tokens", split, too_long, table.num_rows, max_length)
    if rows.num_rows < table.num_rows:
        logger.warning("%s: %d rows without a label dropped", split, table.num_rows - rows.num_rows)
    if rows.num_rows == 0:
        raise UserError(f"{path.name}: none of its {table.num_rows} rows has a label within max_length {max_length}")
    return Dataset(rows)
