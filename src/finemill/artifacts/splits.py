"""The splits that rows are divided into, each a Parquet file of its name."""

from pathlib import Path
from typing import Literal, get_args

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def split_path(folder: Path, split: Split) -> Path:
    """The file of a split in a `rows` or `dataset` artifact."""
    return folder / f"{split}.parquet"
