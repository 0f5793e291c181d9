"""A split's examples in their file: all of them, or as often as the mix takes each."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from finemill.artifacts.dataset import dataset_writer, iterate_chats
from finemill.artifacts.rows import Mix
from finemill.artifacts.splits import Split, split_path
from finemill.artifacts.tables import iterate_record_batches
from finemill.components.chat_format.mix import mix_examples
from finemill.components.chat_format.report import SplitCounts

_BATCH_ROWS = 1000


def write_split(
    folder: Path,
    split: Split,
    batches: Iterator[pa.RecordBatch],
    counts: SplitCounts,
    mix: Mix | None,
    chat: TextIO | None,
) -> None:
    """Write the examples as they come; with a mix once more from there, so that the shares hold for what is there.

    Args:
        folder: gets the split's file.
        split: its name.
        batches: the examples.
        counts: has counted them; gets to know how often each is taken.
        mix: the proportions that were asked for.
        chat: gets each conversation that is taken as a line of JSON.
    Raises: UserError: the proportions cannot be kept.
    """
    with TemporaryDirectory(prefix="finemill-dataset-", dir=folder) as scratch:
        place = Path(scratch) if mix else folder
        with dataset_writer(place, split) as writer:
            for examples in batches:
                writer.write_batch(examples)
        if mix and counts.examples and set(counts.read) <= set(mix.weights):
            counts.times = _times(counts, mix, split)
        if mix:
            _write_taken(split_path(place, split), folder, split, counts)
    if chat is not None:
        once = counts.examples if counts.times is None else int((counts.times > 0).sum())
        _write_chat(split_path(folder, split), chat, once)


def _times(counts: SplitCounts, mix: Mix, split: Split) -> NDArray[np.int64]:
    names = [*counts.names, *(name for name in mix.weights if name not in counts.names)]
    return mix_examples(counts.sources, counts.sizes(mix.by), names, mix, split)


def _write_taken(path: Path, folder: Path, split: Split, counts: SplitCounts) -> None:
    """Every example once before any comes again."""
    times = counts.times if counts.times is not None else np.ones(counts.examples, dtype=np.int64)
    with dataset_writer(folder, split) as writer:
        for turn in range(int(times.max(initial=0))):
            start = 0
            for batch in iterate_record_batches(path, batch_rows=_BATCH_ROWS):
                taken = times[start : start + batch.num_rows] > turn
                start += batch.num_rows
                if taken.any():
                    writer.write_batch(batch.filter(pa.array(taken)))


def _write_chat(path: Path, chat: TextIO, once: int) -> None:
    """A line per whole conversation that is to be learned: documents have no messages, and parts of one are in it.

    The first `once` examples are all that there are; what follows repeats them.
    """
    for row in islice(iterate_chats(path, batch_rows=_BATCH_ROWS), once):
        if row.is_whole and row.desirable is not False:
            tools = f', "tools": {row.tools}' if row.tools else ""
            chat.write(f'{{"messages": {row.messages}{tools}}}\n')
