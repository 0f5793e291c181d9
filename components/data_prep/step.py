"""The step `data-prep`: raw rows in, one Parquet file per split out."""

import logging
from collections import defaultdict
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from finemill.artifacts.rows import PreparedRow, rows_writer
from finemill.artifacts.splits import SPLITS, Split
from finemill.components.data_prep.clean import Record, SourceCounts, Spool, clean_rows
from finemill.components.data_prep.config import DataPrepConfig
from finemill.components.data_prep.dedup import Deduplicator
from finemill.components.data_prep.load import load_source
from finemill.components.data_prep.mix import mix_sources
from finemill.components.data_prep.report import split_counts, warn_of_unread_columns, write_report
from finemill.components.data_prep.split import assign_split, order_key
from finemill.errors import UserError
from finemill.runtime.context import StepContext

logger = logging.getLogger(__name__)

_WRITE_ROWS = 10_000
_PROGRESS_ROWS = 50_000


def run(*, output_dir: Path, config: DataPrepConfig, context: StepContext) -> Mapping[str, float]:
    """Read, clean, deduplicate, split and mix the sources' rows.

    Writes a file of `PreparedRow`s per split, data.json and report.md.
    Memory holds less than 1 kB a row; the rows themselves wait in a temporary file.
    Raises: UserError: a source that cannot be read, rows of no known shape, or a split without rows.
    """
    counts = [SourceCounts() for _ in config.sources]
    with closing(Spool()) as spool:
        splits = _read_splits(config, spool, counts, context)
        mixed = {split: _mix(splits[split], config, split) for split in SPLITS}
        _check_splits(mixed, config, counts)
        _warn_of_losses(config, counts)
        for split, records in mixed.items():
            _write_rows(output_dir, split, records, config, spool)
    warn_of_unread_columns(config, counts)
    return write_report(output_dir, config, counts, split_counts(mixed, config), context.state)


def _read_splits(
    config: DataPrepConfig, spool: Spool, counts: list[SourceCounts], context: StepContext
) -> dict[Split, dict[int, list[Record]]]:
    """The usable rows of each split and source, in the order in which a mix prefers them."""
    dedup = Deduplicator(config)
    splits: dict[Split, dict[int, list[Record]]] = {split: defaultdict(list) for split in SPLITS}
    sizes = {"test_size": config.test_size, "validation_size": config.validation_size}
    for number, source in enumerate(config.sources):
        with closing(load_source(source, config.seed)) as rows:
            for record, text in clean_rows(rows, number, config, spool, counts[number]):
                if counts[number].read % _PROGRESS_ROWS == 0:
                    context.recorder.log_progress(f"{counts[number].read} rows of {source.uri}")
                reason = dedup.reason(record, text)
                if reason:
                    counts[number].drop(record.number, reason)
                else:
                    splits[assign_split(record.prompt_key, seed=config.seed, **sizes)][number].append(record)
        if not counts[number].read:
            raise UserError(f"{source.uri}: no rows in it; check sources[].uri, name and split")
        context.recorder.log_progress(f"{counts[number].read} rows read from {source.uri}")
    for groups in splits.values():
        for records in groups.values():
            records.sort(key=lambda record: order_key(record.row_id, config.seed))
    return splits


def _mix(groups: dict[int, list[Record]], config: DataPrepConfig, split: Split) -> list[Record]:
    """The split's rows in a random order that is always the same; a repeated row comes again after all others."""
    rounds: dict[str, int] = defaultdict(int)
    keyed = []
    for records in mix_sources(groups, config, split).values():
        for record in records:
            keyed.append(((rounds[record.row_id], order_key(record.row_id, config.seed)), record))
            rounds[record.row_id] += 1
    keyed.sort(key=lambda pair: pair[0])
    return [record for _, record in keyed]


def _check_splits(mixed: dict[Split, list[Record]], config: DataPrepConfig, counts: list[SourceCounts]) -> None:
    """Raises: UserError: a split that was asked for is empty."""
    num_rows = sum(len(records) for records in mixed.values())
    if not num_rows:
        reasons = sum((count.dropped for count in counts), start=type(counts[0].dropped)())
        listed = ", ".join(f"{reason} {number}" for reason, number in sorted(reasons.items()))
        raise UserError(f"no row is left of {sum(count.read for count in counts)} read (left out: {listed})")
    sizes: dict[Split, float] = {"train": 1.0, "validation": config.validation_size, "test": config.test_size}
    for split, size in sizes.items():
        if size and not mixed[split]:
            advice = "lower test_size and validation_size" if split == "train" else f"raise {split}_size or set it to 0"
            raise UserError(f"the {split} split got none of {num_rows} rows; add rows, or {advice}")
    held_out = {record.prompt_key for split in ("validation", "test") for record in mixed[split]}
    assert held_out.isdisjoint(record.prompt_key for record in mixed["train"]), "a held-out prompt is in train"


def _warn_of_losses(config: DataPrepConfig, counts: list[SourceCounts]) -> None:
    for source, count in zip(config.sources, counts, strict=True):
        if count.dropped:
            reasons = ", ".join(f"{reason} {number}" for reason, number in count.dropped.most_common())
            total = count.dropped.total()
            logger.warning("%s: %d of %d rows left out (%s)", source.uri, total, count.read, reasons)


def _write_rows(folder: Path, split: Split, records: list[Record], config: DataPrepConfig, spool: Spool) -> None:
    with rows_writer(folder, split) as writer:
        for start in range(0, len(records), _WRITE_ROWS):
            writer.write(
                [
                    PreparedRow(
                        id=record.row_id,
                        source=config.sources[record.source].uri,
                        shape=record.shape,
                        row=spool.read(record.offset),
                    )
                    for record in records[start : start + _WRITE_ROWS]
                ]
            )
