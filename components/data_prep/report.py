"""What data-prep did, for programs (data.json) and for people (report.md)."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from finemill.artifacts.files import REJECTED_FILE, REPORT_TEXT
from finemill.artifacts.rows import (
    FlaggedRows,
    Mix,
    RowsReport,
    RowsSource,
    RowsSplit,
    SplitSource,
    write_rows_report,
)
from finemill.artifacts.splits import Split
from finemill.components.data_prep.clean import SourceCounts
from finemill.components.data_prep.config import DataPrepConfig
from finemill.components.data_prep.index import RowIndex
from finemill.components.data_prep.quality import advice_for

logger = logging.getLogger(__name__)


def split_counts(rows: Mapping[Split, Mapping[int, tuple[int, int]]], config: DataPrepConfig) -> dict[Split, RowsSplit]:
    """Per split: rows and characters, and both per source with their shares."""
    return {split: _count(sources, config) for split, sources in rows.items()}


def _count(sources: Mapping[int, tuple[int, int]], config: DataPrepConfig) -> RowsSplit:
    rows, characters = (Counter({source: both[part] for source, both in sources.items()}) for part in (0, 1))
    listed = [
        SplitSource(
            uri=name,
            rows=rows[number],
            rows_share=round(rows[number] / max(1, rows.total()), 6),
            characters=characters[number],
            characters_share=round(characters[number] / max(1, characters.total()), 6),
            weight=config.sources[number].weight,
        )
        for number, name in enumerate(config.source_names)
    ]
    return RowsSplit(rows=rows.total(), characters=characters.total(), sources=listed)


def warn_of_losses(config: DataPrepConfig, counts: Sequence[SourceCounts]) -> None:
    """Log for each source what was left out."""
    for source, count in zip(config.sources, counts, strict=True):
        lost = Counter({reason: number for reason, number in count.dropped.items() if reason != "not_sampled"})
        if lost:
            reasons = ", ".join(f"{reason} {number}" for reason, number in lost.most_common())
            logger.warning("%s: %d of %d rows left out (%s)", source.uri, lost.total(), count.read, reasons)


def write_report(
    folder: Path,
    config: DataPrepConfig,
    counts: Sequence[SourceCounts],
    splits: dict[Split, RowsSplit],
    index: RowIndex,
    digests: Mapping[str, str],
) -> dict[str, float]:
    """Write data.json, report.md and rejected.jsonl; return the step's metrics."""
    named = enumerate(zip(config.source_names, config.sources, counts, strict=True))
    sources = [
        _source(name, count, digests.get(f"sources.{number} {source.uri}")) for number, (name, source, count) in named
    ]
    report = RowsReport(sources=sources, mix=config.mix, splits=splits, advice=advice_for(splits["train"].rows))
    write_rows_report(folder, report)
    (folder / REPORT_TEXT).write_text(_markdown(report), encoding="utf-8")
    _write_rejected(folder / REJECTED_FILE, config, index)
    read = sum(count.read for count in counts)
    dropped = sum((count.dropped for count in counts), start=Counter[str]())
    return {
        "data/rows_read": read,
        "data/rows_dropped": dropped.total(),
        "data/duplicate_fraction": (dropped["duplicate"] + dropped["near_duplicate"]) / read,
        **{f"data/{split}_rows": counted.rows for split, counted in splits.items()},
    }


def _source(name: str, count: SourceCounts, digest: str | None) -> RowsSource:
    flags = {flag: FlaggedRows(rows=number, first=count.first(flag)) for flag, number in sorted(count.flags.items())}
    return RowsSource(
        uri=name,
        read=count.read,
        shapes=dict(sorted(count.shapes.items())),
        dropped=dict(sorted(count.dropped.items())),
        first_unknown_rows=count.first("unknown_shape"),
        unread_columns=dict(sorted(count.unread.items())),
        flags=flags,
        digest=digest,
    )


def _write_rejected(path: Path, config: DataPrepConfig, index: RowIndex) -> None:
    """A line per row that is left out: its source, its number there, the reason, and the field that it lies in."""
    with path.open("w", encoding="utf-8") as file:
        for source, name in enumerate(config.source_names):
            for number, reason, where in index.rejected(source):
                line = {"source": name, "row": number, "reason": reason, "field": where}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def warn_of_unread_columns(config: DataPrepConfig, counts: Sequence[SourceCounts]) -> None:
    """Log for each source what its rows hold that nothing is made of."""
    for source, count in zip(config.sources, counts, strict=True):
        if count.unread:
            listed = ", ".join(f"{name} ({number} rows)" for name, number in count.unread.most_common())
            logger.warning("%s: columns that are not read: %s", source.uri, listed)


def _markdown(report: RowsReport) -> str:
    lines = ["# Data", "", "| source | read | shapes | left out |", "| --- | ---: | --- | --- |"]
    for source in report.sources:
        unknown = source.first_unknown_rows
        note = f" (no known shape: first rows {', '.join(map(str, unknown))})" if unknown else ""
        cells = source.uri, source.read, _listed(source.shapes), _listed(source.dropped) + note
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    lines += _unread_lines(report.sources)
    lines += _flag_lines(report.sources)
    lines += ["", report.advice] if report.advice else []
    lines += ["", _mix_line(report.mix), ""]
    lines += [
        "| split | source | rows | share | characters | share | weight |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for split, counts in report.splits.items():
        for part in counts.sources:
            weight = "" if part.weight is None else f"{part.weight:g}"
            lines.append(
                f"| {split} | {part.uri} | {part.rows} | {part.rows_share:.2%} | {part.characters} "
                f"| {part.characters_share:.2%} | {weight} |"
            )
        lines.append(f"| {split} | all | {counts.rows} | | {counts.characters} | | |")
    return "\n".join(lines) + "\n"


def _mix_line(mix: Mix | None) -> str:
    if mix is None:
        return "All rows are kept."
    by = mix.by.replace("_", " ")
    return f"These are the rows that there are; chat-format mixes them by {by} (policy `{mix.policy}`)."


def _unread_lines(sources: Sequence[RowsSource]) -> list[str]:
    unread = [(source.uri, name, number) for source in sources for name, number in source.unread_columns.items()]
    table = ["", "| source | column that is not read | rows |", "| --- | --- | ---: |"]
    return [*table, *(f"| {uri} | {name} | {number} |" for uri, name, number in unread)] if unread else []


def _flag_lines(sources: Sequence[RowsSource]) -> list[str]:
    flagged = [(source.uri, name, flag) for source in sources for name, flag in source.flags.items()]
    table = ["", "| source | doubtful | rows | first |", "| --- | --- | ---: | --- |"]
    lines = (f"| {uri} | {name} | {flag.rows} | {', '.join(map(str, flag.first))} |" for uri, name, flag in flagged)
    return [*table, *lines] if flagged else []


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items()) or "none"
