"""The step `data-prep`: raw rows in, one Parquet file per split out."""

from collections.abc import Iterable, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path

from finemill.artifacts.rows import PreparedRow, rows_writer
from finemill.artifacts.splits import SPLITS, Split
from finemill.components.data_prep.benchmark import Benchmarks
from finemill.components.data_prep.clean import CleanBatch, SourceCounts, check_all_counts, check_counts
from finemill.components.data_prep.config import DataPrepConfig
from finemill.components.data_prep.dedup import Deduplicator
from finemill.components.data_prep.index import RowIndex
from finemill.components.data_prep.load import source_files
from finemill.components.data_prep.report import (
    split_counts,
    warn_of_losses,
    warn_of_unread_columns,
    write_report,
)
from finemill.components.data_prep.spool import Spool
from finemill.components.data_prep.workers import clean_source
from finemill.errors import UserError
from finemill.rows.reasons import DroppedRowError
from finemill.runtime.context import StepContext

_WRITE_ROWS = 10_000
_PROGRESS_ROWS = 50_000


def run(*, output_dir: Path, config: DataPrepConfig, context: StepContext) -> Mapping[str, float]:
    """Read, clean, deduplicate and split the sources' rows.

    Writes a file of `PreparedRow`s per split, data.json, report.md and rejected.jsonl. Rows, and what is known of them,
    wait on disk: memory does not grow with their number, but for the signatures of `dedup: minhash`.
    Raises: UserError: a source that cannot be read, rows of no known shape, or a split without rows.
    """
    with closing(Spool()) as spool, closing(RowIndex()) as index:
        counts = [SourceCounts() for _ in config.sources]
        _read_rows(config, spool, index, counts, context)
        rows = index.counts()
        _check_splits(rows, config, counts)
        for split in SPLITS:
            _write_rows(output_dir, split, config, index, spool)
        warn_of_losses(config, counts)
        warn_of_unread_columns(config, counts)
        return write_report(output_dir, config, counts, split_counts(rows, config), index, context.state)


def _read_rows(
    config: DataPrepConfig, spool: Spool, index: RowIndex, counts: list[SourceCounts], context: StepContext
) -> None:
    """Put the usable rows of all sources into the index."""
    deduplicator, benchmarks = Deduplicator(config, index), Benchmarks(config)
    # A row that is held out and elsewhere, too, stays held out.
    numbers = sorted(range(len(config.sources)), key=lambda number: config.sources[number].into in (None, "train"))
    for number in numbers:
        with (
            source_files(config.sources[number], config.seed) as files,
            closing(clean_source(files, number, config, benchmarks)) as batches,
        ):
            _read_source(batches, number, config, spool, index, counts[number], deduplicator, context)
    index.complete()
    for number, (source, row), repeated in deduplicator.near_duplicates():
        index.remove(number)
        counts[source].drop(row, "near_duplicate", repeated)
    for source, row in index.take_held_out():
        counts[source].drop(row, "held_out_question")
    for number, count in enumerate(counts):
        index.reject(number, count.take_rejected())


def _read_source(
    batches: Iterable[CleanBatch],
    number: int,
    config: DataPrepConfig,
    spool: Spool,
    index: RowIndex,
    counts: SourceCounts,
    deduplicator: Deduplicator,
    context: StepContext,
) -> None:
    source, told = config.sources[number], 0
    for batch in batches:
        counts.add(batch.counts)
        check_counts(counts, source, config)
        for record in batch.records:
            try:
                deduplicator.check(record)
            except DroppedRowError as reason:
                counts.drop(record.number, str(reason), reason.field)
            else:
                index.add(record, spool.append(record.text))
        index.reject(number, counts.take_rejected())
        if counts.read >= told + _PROGRESS_ROWS:
            told = counts.read
            context.recorder.log_progress(f"{counts.read} rows of {source.uri}")
    check_all_counts(counts, source)
    context.recorder.log_progress(f"{counts.read} rows read from {source.uri}")


def _check_splits(
    rows: Mapping[Split, Mapping[int, tuple[int, int]]], config: DataPrepConfig, counts: list[SourceCounts]
) -> None:
    """Raises: UserError: a split that was asked for is empty, or a weighted source gives no row to it."""
    sizes = {split: sum(number for number, _ in sources.values()) for split, sources in rows.items()}
    num_rows = sum(sizes.values())
    if not num_rows:
        reasons = sum((count.dropped for count in counts), start=type(counts[0].dropped)())
        listed = ", ".join(f"{reason} {number}" for reason, number in sorted(reasons.items()))
        raise UserError(f"no row is left of {sum(count.read for count in counts)} read (left out: {listed})")
    asked: dict[Split, float] = {"train": 1.0, "validation": config.validation_size, "test": config.test_size}
    for split, size in asked.items():
        if size and not sizes[split]:
            advice = "lower test_size and validation_size" if split == "train" else f"raise {split}_size or set it to 0"
            raise UserError(f"the {split} split got none of {num_rows} rows; add rows, or {advice}")
        _check_weights(split, set(rows[split]), config)


def _check_weights(split: Split, found: set[int], config: DataPrepConfig) -> None:
    """Raises: UserError: a weighted source has no row in a split that others have rows in."""
    if not found or any(config.sources[number].weight is None for number in found):
        return
    for number, source in enumerate(config.sources):
        if source.weight is not None and number not in found:
            advice = "" if split == "train" else f", raise {split}_size, or set it to 0"
            raise UserError(
                f"{config.source_names[number]}: no row in the {split} split, so the sources' weights cannot be kept; "
                f"add rows{advice}"
            )


def _write_rows(folder: Path, split: Split, config: DataPrepConfig, index: RowIndex, spool: Spool) -> None:
    names = config.source_names
    rows = (
        PreparedRow(id=row_id, source=names[source], number=number, shape=shape, row=spool.read(offset))
        for row_id, source, number, shape, offset in index.rows(split)
    )
    with rows_writer(folder, split) as writer:
        while batch := list(islice(rows, _WRITE_ROWS)):
            writer.write(batch)
