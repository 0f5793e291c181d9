"""The step `data-prep`: raw rows in, one Parquet file per split out."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

from finemill.artifacts.rows import PreparedRow, rows_writer
from finemill.artifacts.splits import SPLITS, Split
from finemill.components.data_prep.benchmark import Benchmarks
from finemill.components.data_prep.clean import Record, SourceCounts, Spool, clean_rows
from finemill.components.data_prep.config import DataPrepConfig
from finemill.components.data_prep.dedup import Deduplicator
from finemill.components.data_prep.load import load_source
from finemill.components.data_prep.report import (
    split_counts,
    warn_of_losses,
    warn_of_unread_columns,
    write_report,
)
from finemill.components.data_prep.split import assign_split, is_sampled, order_key
from finemill.errors import UserError
from finemill.rows.reasons import DroppedRowError
from finemill.runtime.context import StepContext

_WRITE_ROWS = 10_000
_PROGRESS_ROWS = 50_000


def run(*, output_dir: Path, config: DataPrepConfig, context: StepContext) -> Mapping[str, float]:
    """Read, clean, deduplicate and split the sources' rows.

    Writes a file of `PreparedRow`s per split, data.json, report.md and rejected.jsonl.
    Memory holds less than 1 kB a row; the rows themselves wait in a temporary file.
    Raises: UserError: a source that cannot be read, rows of no known shape, or a split without rows.
    """
    counts = [SourceCounts() for _ in config.sources]
    with closing(Spool()) as spool:
        splits = _read_splits(config, spool, counts, context)
        _check_splits(splits, config, counts)
        for split, records in splits.items():
            _write_rows(output_dir, split, records, config, spool)
    warn_of_losses(config, counts)
    warn_of_unread_columns(config, counts)
    return write_report(output_dir, config, counts, split_counts(splits, config), context.state)


def _read_splits(
    config: DataPrepConfig, spool: Spool, counts: list[SourceCounts], context: StepContext
) -> dict[Split, list[Record]]:
    """The usable rows of each split, in a random order that is always the same."""
    checks = (Deduplicator(config), Benchmarks(config))
    read: list[Record] = []
    # A row that is held out and elsewhere, too, stays held out.
    numbers = sorted(range(len(config.sources)), key=lambda number: config.sources[number].into in (None, "train"))
    for number in numbers:
        read += _read_source(number, config, spool, counts[number], checks, context)
    near = checks[0].near_duplicates(read)
    splits: dict[Split, list[Record]] = {split: [] for split in SPLITS}
    for place, record in enumerate(read):
        if place in near:
            counts[record.source].drop(record.number, "near_duplicate", near[place])
        else:
            splits[_split_of(record, config)].append(record)
    _leave_out_held_out(splits, counts)
    for records in splits.values():
        records.sort(key=lambda record: (order_key(record.row_id, config.seed), record.source, record.number))
    return splits


def _read_source(
    number: int,
    config: DataPrepConfig,
    spool: Spool,
    counts: SourceCounts,
    checks: tuple[Deduplicator, Benchmarks],
    context: StepContext,
) -> Iterator[Record]:
    """The usable rows of a source that no row before them repeats."""
    source = config.sources[number]
    with closing(load_source(source, config.seed)) as rows:
        for record, text in clean_rows(rows, number, config, spool, counts):
            if counts.read % _PROGRESS_ROWS == 0:
                context.recorder.log_progress(f"{counts.read} rows of {source.uri}")
            if source.sample is not None and not is_sampled(record.row_id, source.sample, config.seed):
                counts.dropped["not_sampled"] += 1
                continue
            try:
                for check in reversed(checks):
                    check.check(record, text)
            except DroppedRowError as reason:
                counts.drop(record.number, str(reason), reason.field)
            else:
                yield record
    if not counts.read:
        raise UserError(f"{source.uri}: no rows in it; check sources[].uri, name and split")
    context.recorder.log_progress(f"{counts.read} rows read from {source.uri}")


def _split_of(record: Record, config: DataPrepConfig) -> Split:
    """The split that the row's source goes to, or the one of its first question, of those that have no own source."""
    own = {source.into for source in config.sources}
    into = config.sources[record.source].into
    test_size = 0.0 if "test" in own else config.test_size
    validation_size = 0.0 if "validation" in own else config.validation_size
    sizes = {"test_size": test_size, "validation_size": validation_size}
    return into or assign_split(record.prompt_key, seed=config.seed, **sizes)


def _leave_out_held_out(splits: dict[Split, list[Record]], counts: list[SourceCounts]) -> None:
    """Leave rows out of training that begin with a held-out question, and out of validation with one of the test.

    Only rows of sources that go into a split of their own can meet such a question elsewhere.
    """
    held_out: set[bytes] = set()
    for split in reversed(SPLITS):
        for record in splits[split]:
            if record.prompt_key in held_out:
                counts[record.source].drop(record.number, "held_out_question")
        splits[split] = [record for record in splits[split] if record.prompt_key not in held_out]
        held_out |= {record.prompt_key for record in splits[split]}


def _check_splits(splits: dict[Split, list[Record]], config: DataPrepConfig, counts: list[SourceCounts]) -> None:
    """Raises: UserError: a split that was asked for is empty, or a weighted source gives no row to it."""
    num_rows = sum(map(len, splits.values()))
    if not num_rows:
        reasons = sum((count.dropped for count in counts), start=type(counts[0].dropped)())
        listed = ", ".join(f"{reason} {number}" for reason, number in sorted(reasons.items()))
        raise UserError(f"no row is left of {sum(count.read for count in counts)} read (left out: {listed})")
    sizes: dict[Split, float] = {"train": 1.0, "validation": config.validation_size, "test": config.test_size}
    for split, size in sizes.items():
        if size and not splits[split]:
            advice = "lower test_size and validation_size" if split == "train" else f"raise {split}_size or set it to 0"
            raise UserError(f"the {split} split got none of {num_rows} rows; add rows, or {advice}")
        _check_weights(split, splits[split], config)
    held_out = {record.prompt_key for split in ("validation", "test") for record in splits[split]}
    assert held_out.isdisjoint(record.prompt_key for record in splits["train"]), "a held-out question is in train"


def _check_weights(split: Split, records: list[Record], config: DataPrepConfig) -> None:
    """Raises: UserError: a weighted source has no row in a split that others have rows in."""
    found = {record.source for record in records}
    if not found or any(config.sources[number].weight is None for number in found):
        return
    for number, source in enumerate(config.sources):
        if source.weight is not None and number not in found:
            advice = "" if split == "train" else f", raise {split}_size, or set it to 0"
            raise UserError(
                f"{config.source_names[number]}: no row in the {split} split, so the sources' weights cannot be kept; "
                f"add rows{advice}"
            )


def _write_rows(folder: Path, split: Split, records: list[Record], config: DataPrepConfig, spool: Spool) -> None:
    names = config.source_names
    with rows_writer(folder, split) as writer:
        for start in range(0, len(records), _WRITE_ROWS):
            writer.write(
                [
                    PreparedRow(
                        id=record.row_id,
                        source=names[record.source],
                        number=record.number,
                        shape=record.shape,
                        row=spool.read(record.offset),
                    )
                    for record in records[start : start + _WRITE_ROWS]
                ]
            )
