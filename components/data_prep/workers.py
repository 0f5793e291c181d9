"""A source's rows cleaned in several processes."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from finemill.components.data_prep.benchmark import Benchmarks
from finemill.components.data_prep.clean import CleanBatch, Cleaner
from finemill.components.data_prep.config import DataPrepConfig
from finemill.components.data_prep.load import LocalFile, SourceFiles, find_source_rows
from finemill.components.data_prep.read import UnreadRow
from finemill.runtime.workers import in_turns

_BATCH_ROWS = 1000
# Of a batch; one row may have more.
_BATCH_BYTES = 4 << 20
# A process more is worth its start, most of a second, from so many bytes of files for each on.
_PROCESS_BYTES = 2 << 20


@dataclass(frozen=True)
class CleanWork:
    """Rows to clean: of a source's batches of up to `batch_rows` rows those from number `first` on, each `step`-th.

    The others are found, too, but not parsed.
    """

    files: Sequence[LocalFile]
    source: int
    config: DataPrepConfig
    batch_rows: int
    first: int = 0
    step: int = 1

    def run(self) -> Iterator[CleanBatch]:
        """Read and clean them in order."""
        return self.run_with(Benchmarks(self.config))

    def run_with(self, benchmarks: Benchmarks) -> Iterator[CleanBatch]:
        """The same with benchmarks that are there already."""
        cleaner = Cleaner(self.source, self.config, benchmarks)
        number = 1
        rows = find_source_rows(self.files, self.config.sources[self.source])
        for place, batch in enumerate(batches_of(rows, self.batch_rows)):
            if place % self.step == self.first:
                yield cleaner.clean(batch, number)
            number += len(batch)


def clean_source(
    files: SourceFiles, source: int, config: DataPrepConfig, benchmarks: Benchmarks
) -> Generator[CleanBatch, None, None]:
    """Clean the rows of a source, batch by batch in order, with up to `num_proc` processes.

    Raises: StepError: as in one process. TemporaryError: a process was killed.
    """
    work = CleanWork(files, source, config, _BATCH_ROWS)
    num_proc = _num_proc(files, source, config)
    if num_proc == 1:
        return in_turns(work.run_with(benchmarks), [])
    own, *others = (replace(work, files=list(files), first=place, step=num_proc) for place in range(num_proc))
    return in_turns(own.run_with(benchmarks), others)


def _num_proc(files: SourceFiles, source: int, config: DataPrepConfig) -> int:
    """How many processes are worth it: files that are not here yet may be more than what is asked for."""
    if not files.are_here and config.sources[source].max_rows is not None:
        return 1
    if config.num_proc == 1:
        return 1
    return max(1, min(config.num_proc, sum(file.path.stat().st_size for file in files) // _PROCESS_BYTES))


def batches_of(rows: Iterable[UnreadRow], batch_rows: int) -> Iterator[list[UnreadRow]]:
    """Rows in batches of `batch_rows`, fewer where they are long."""
    batch: list[UnreadRow] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += row.size
        if len(batch) == batch_rows or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
