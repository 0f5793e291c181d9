"""What data-prep did, for programs (data.json) and for people (report.md)."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finemill.artifacts.files import DATA_FILE, REJECTED_FILE, REPORT_TEXT
from finemill.artifacts.records import write_json
from finemill.artifacts.splits import Split
from finemill.components.data_prep.clean import Record, SourceCounts
from finemill.components.data_prep.config import DataPrepConfig
from finemill.components.data_prep.quality import advice_for

logger = logging.getLogger(__name__)

_FIRST = 5

Counts = dict[str, dict[str, Any]]


def split_counts(splits: Mapping[Split, Sequence[Record]], config: DataPrepConfig) -> Counts:
    """Per split: rows and characters, and both per source with their shares."""
    return {split: _count(records, config) for split, records in splits.items()}


def _count(records: Sequence[Record], config: DataPrepConfig) -> dict[str, Any]:
    rows = Counter(record.source for record in records)
    characters: Counter[int] = Counter()
    for record in records:
        characters[record.source] += record.num_characters
    return {
        "rows": len(records),
        "characters": characters.total(),
        "sources": [
            {
                "uri": name,
                "rows": rows[number],
                "rows_share": round(rows[number] / max(1, rows.total()), 6),
                "characters": characters[number],
                "characters_share": round(characters[number] / max(1, characters.total()), 6),
                "weight": config.sources[number].weight,
            }
            for number, name in enumerate(config.source_names)
        ],
    }


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
    splits: Counts,
    digests: Mapping[str, str],
) -> dict[str, float]:
    """Write data.json, report.md and rejected.jsonl; return the step's metrics."""
    sources = [
        {
            "uri": name,
            "read": count.read,
            "shapes": dict(sorted(count.shapes.items())),
            "dropped": dict(sorted(count.dropped.items())),
            "first_unknown_rows": count.first("unknown_shape"),
            "unread_columns": dict(sorted(count.unread.items())),
            "flags": {
                name: {"rows": len(numbers), "first": numbers[:_FIRST]} for name, numbers in sorted(count.flags.items())
            },
            "digest": digests.get(f"sources.{number} {source.uri}"),
        }
        for number, (name, source, count) in enumerate(zip(config.source_names, config.sources, counts, strict=True))
    ]
    mix = config.mix
    advice = advice_for(splits["train"]["rows"])
    data = {"sources": sources, "mix": mix.model_dump() if mix else None, "splits": splits, "advice": advice}
    write_json(folder / DATA_FILE, data)
    (folder / REPORT_TEXT).write_text(_markdown(data), encoding="utf-8")
    _write_rejected(folder / REJECTED_FILE, config, counts)
    read = sum(count.read for count in counts)
    dropped = sum((count.dropped for count in counts), start=Counter[str]())
    return {
        "data/rows_read": read,
        "data/rows_dropped": dropped.total(),
        "data/duplicate_fraction": (dropped["duplicate"] + dropped["near_duplicate"]) / read,
        **{f"data/{split}_rows": splits[split]["rows"] for split in splits},
    }


def _write_rejected(path: Path, config: DataPrepConfig, counts: Sequence[SourceCounts]) -> None:
    """A line per row that is left out: its source, its number there, the reason, and the field that it lies in."""
    with path.open("w", encoding="utf-8") as file:
        for name, count in zip(config.source_names, counts, strict=True):
            for number, reason, where in sorted(count.rejected):
                line = {"source": name, "row": number, "reason": reason, "field": where}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


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
    lines += _flag_lines(data["sources"])
    lines += ["", data["advice"]] if data["advice"] else []
    lines += ["", _mix_line(data["mix"]), ""]
    lines += [
        "| split | source | rows | share | characters | share | weight |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for split, counts in data["splits"].items():
        for source in counts["sources"]:
            weight = "" if source["weight"] is None else f"{source['weight']:g}"
            lines.append(
                f"| {split} | {source['uri']} | {source['rows']} | {source['rows_share']:.2%} | {source['characters']} "
                f"| {source['characters_share']:.2%} | {weight} |"
            )
        lines.append(f"| {split} | all | {counts['rows']} | | {counts['characters']} | | |")
    return "\n".join(lines) + "\n"


def _mix_line(mix: Mapping[str, Any] | None) -> str:
    if mix is None:
        return "All rows are kept."
    by = mix["by"].replace("_", " ")
    return f"These are the rows that there are; chat-format mixes them by {by} (policy `{mix['policy']}`)."


def _unread_lines(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    unread = [(s["uri"], name, number) for s in sources for name, number in s["unread_columns"].items()]
    table = ["", "| source | column that is not read | rows |", "| --- | --- | ---: |"]
    return [*table, *(f"| {uri} | {name} | {number} |" for uri, name, number in unread)] if unread else []


def _flag_lines(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    flagged = [(s["uri"], name, flag["rows"], flag["first"]) for s in sources for name, flag in s["flags"].items()]
    table = ["", "| source | doubtful | rows | first |", "| --- | --- | ---: | --- |"]
    lines = (f"| {uri} | {name} | {number} | {', '.join(map(str, first))} |" for uri, name, number, first in flagged)
    return [*table, *lines] if flagged else []


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items()) or "none"
