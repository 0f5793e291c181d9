"""Batches formatted in several processes."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from finemill.artifacts.rows import iterate_rows
from finemill.artifacts.splits import Split
from finemill.components.chat_format.batch import FormattedBatch, format_batch
from finemill.components.chat_format.config import ChatFormatConfig
from finemill.components.chat_format.formatter import Formatter, load_formatter
from finemill.runtime.workers import in_turns


@dataclass(frozen=True)
class FormatWork:
    """Rows to format: of a split's batches of `batch_rows` rows those from number `first` on, each `step`-th."""

    rows: Path
    split: Split
    batch_rows: int
    base_model: Path
    config: ChatFormatConfig
    first: int = 0
    step: int = 1

    def run(self) -> Iterator[FormattedBatch]:
        """Read and format them in order."""
        return self.run_with(load_formatter(self.base_model, self.config))

    def run_with(self, formatter: Formatter) -> Iterator[FormattedBatch]:
        """The same with a formatter that is there already."""
        batches = iterate_rows(self.rows, self.split, batch_rows=self.batch_rows, first=self.first, step=self.step)
        return (format_batch(formatter, batch, unroll=self.split == "train") for batch in batches)


def format_rows(work: FormatWork, formatter: Formatter, *, num_proc: int) -> Generator[FormattedBatch, None, None]:
    """Format the batches of a split, all of them, in order.

    Args:
        work: which rows; turns that are rewritten get examples of their own in the training split.
        formatter: what formats them in this process.
        num_proc: how many processes there are, this one among them: each reads and formats every `num_proc`-th batch.
    Raises: StepError: as in one process. TemporaryError: a process was killed.
    """
    own, *others = (replace(work, first=place, step=num_proc) for place in range(num_proc))
    return in_turns(own.run_with(formatter), others)
