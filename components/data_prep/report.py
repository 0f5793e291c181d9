"""What data-prep did, for programs (data.json) and for people (report.md)."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finemill.artifacts.files import DATA_FILE, REPORT_TEXT
from finemill.artifacts.records import write_json
from finemill.artifacts.splits import Split
from finemill.components.data_prep.clean import Record, SourceCounts
from finemill.components.data_prep.config import DataPrepConfig

logger = logging.getLogger(__name__)

Counts = dict[str, dict[str, Any]]


def split_counts(mixed: Mapping[Split, Sequence[Record]], config: DataPrepConfig) -> Counts:
    """Per split: rows, characters, and both per source with the share of what the mix goes by."""
    return {split: _count(records, config) for split, records in mixed.items()}


def _count(records: Sequence[Record], config: DataPrepConfig) -> dict[str, Any]:
    rows = Counter(record.source for record in records)
    characters: Counter[int] = Counter()
    for record in records:
        characters[record.source] += record.num_characters
    shared = rows if config.mix_by == "rows" else characters
    total = max(1, sum(shared.values()))
    return {
        "rows": len(records),
        "different_rows": len({record.row_id for record in records}),
        "characters": sum(characters.values()),
        "sources": [
            {
                "uri": source.uri,
                "rows": rows[number],
                "characters": characters[number],
                "share": round(shared[number] / total, 6),
                "weight": source.weight,
            }
            for number, source in enumerate(config.sources)
        ],
    }


def write_report(
    folder: Path,
    config: DataPrepConfig,
    counts: Sequence[SourceCounts],
    splits: Counts,
    digests: Mapping[str, str],
) -> dict[str, float]:
    """Write data.json and report.md; return the step's metrics."""
    sources = [
        {
            "uri": source.uri,
            "read": count.read,
            "shapes": dict(sorted(count.shapes.items())),
            "dropped": dict(sorted(count.dropped.items())),
            "first_unknown_rows": count.first("unknown_shape"),
            "unread_columns": dict(sorted(count.unread.items())),
            "digest": digests.get(f"sources.{number} {source.uri}"),
        }
        for number, (source, count) in enumerate(zip(config.sources, counts, strict=True))
    ]
    data = {"sources": sources, "mix_by": config.mix_by, "mix_policy": config.mix_policy, "splits": splits}
    write_json(folder / DATA_FILE, data)
    (folder / REPORT_TEXT).write_text(_markdown(data), encoding="utf-8")
    read = sum(count.read for count in counts)
    dropped = sum((count.dropped for count in counts), start=Counter[str]())
    return {
        "data/rows_read": read,
        "data/rows_dropped": dropped.total(),
        "data/duplicate_fraction": (dropped["duplicate"] + dropped["near_duplicate"]) / read,
        **{f"data/{split}_rows": splits[split]["rows"] for split in splits},
    }


def warn_of_unread_columns(config: DataPrepConfig, counts: Sequence[SourceCounts]) -> None:
    """Log for each source what its rows hold that nothing is made of."""
    for source, count in zip(config.sources, counts, strict=True):
        if count.unread:
            listed = ", ".join(f"{name} ({number} rows)" for name, number in count.unread.most_common())
            logger.warning("%s: columns that are not read: %s", source.uri, listed)


def _markdown(data: Mapping[str, Any]) -> str:
    lines = ["# Data", "", "| source | read | shapes | left out |", "| --- | ---: | --- | --- |"]
    for source in data["sources"]:
        unknown = source["first_unknown_rows"]
        note = f" (no known shape: first rows {', '.join(map(str, unknown))})" if unknown else ""
        cells = source["uri"], source["read"], _listed(source["shapes"]), _listed(source["dropped"]) + note
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    lines += _unread_lines(data["sources"])
    lines += ["", f"Shares are by {data['mix_by']}, policy `{data['mix_policy']}`."]
    lines += [
        "",
        "| split | source | rows | characters | share | weight |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for split, counts in data["splits"].items():
        for source in counts["sources"]:
            weight = "" if source["weight"] is None else f"{source['weight']:g}"
            lines.append(
                f"| {split} | {source['uri']} | {source['rows']} | {source['characters']} | {source['share']:.2%} "
                f"| {weight} |"
            )
        repeated = counts["rows"] - counts["different_rows"]
        note = f" ({repeated} repeated)" if repeated else ""
        lines.append(f"| {split} | all | {counts['rows']}{note} | {counts['characters']} | | |")
    return "\n".join(lines) + "\n"


def _unread_lines(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    unread = [(s["uri"], name, number) for s in sources for name, number in s["unread_columns"].items()]
    table = ["", "| source | column that is not read | rows |", "| --- | --- | ---: |"]
    return [*table, *(f"| {uri} | {name} | {number} |" for uri, name, number in unread)] if unread else []


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items()) or "none"
