"""`finemill score FILE`: score predictions that exist already, without a model."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from finemill.artifacts.metrics import Z95
from finemill.commands.parser import CommandParser
from finemill.errors import UserError
from finemill.metrics.scoring import METRICS, Mean, Prediction, Value, means, read_predictions, score_predictions


def execute(name: str, arguments: list[str]) -> int:
    """Score a file and print the means as a table, or everything as JSON lines. Returns: the exit code."""
    parsed = _parser(name).parse_args(arguments)
    rows = _read(parsed.file)
    metrics = [part.strip() for part in parsed.metrics.split(",") if part.strip()]
    schema = _read_text(parsed.schema) if parsed.schema else None
    scores = score_predictions(rows, metrics, schema=schema, pattern=parsed.pattern)
    groups = _groups(rows, scores)
    if parsed.json:
        _print_json(rows, scores, groups)
    else:
        print(_table(groups))
    return 0


def _parser(name: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=f"finemill {name}",
        description="Score predictions that exist already. A line of FILE is a JSON object with `prediction` and "
        "`reference`, a list where any of several is right; `source` groups the means, `prompt` and `finished` say "
        "where the thinking began and whether the answer was cut, `schema` and `pattern` are a row's own rules.",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help="JSON lines; - for standard input")
    parser.add_argument("--metrics", required=True, metavar="NAMES", help=f"with commas, of {', '.join(METRICS)}")
    parser.add_argument(
        "--schema", type=Path, metavar="FILE", help="JSON schema for the metric json (default: any JSON)"
    )
    parser.add_argument("--pattern", metavar="REGEX", help="regular expression for the metric regex")
    parser.add_argument("--json", action="store_true", help="an object per row, and the means as the last")
    return parser


def _read(file: str) -> list[Prediction]:
    if file == "-":
        return read_predictions(sys.stdin, "standard input")
    return read_predictions(_read_text(Path(file)).split("\n"), file)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start})") from None


def _groups(rows: Sequence[Prediction], scores: Sequence[Mapping[str, Value]]) -> dict[str | None, dict[str, Mean]]:
    """Means over all rows, under None, and over those of each source."""
    groups: dict[str | None, dict[str, Mean]] = {None: means(rows, scores)}
    for source in sorted({row.source for row in rows if row.source is not None}):
        pairs = [(row, score) for row, score in zip(rows, scores, strict=True) if row.source == source]
        groups[source] = means([row for row, _ in pairs], [score for _, score in pairs])
    return groups


def _print_json(
    rows: Sequence[Prediction], scores: Sequence[Mapping[str, Value]], groups: Mapping[str | None, Mapping[str, Mean]]
) -> None:
    for row, score in zip(rows, scores, strict=True):
        source = {} if row.source is None else {"source": row.source}
        print(json.dumps({"line": row.line, **source, **score}, ensure_ascii=False, allow_nan=False))
    found = {source: {metric: asdict(value) for metric, value in group.items()} for source, group in groups.items()}
    by_source = {source: group for source, group in found.items() if source is not None}
    summary = {"means": found[None], **({"by_source": by_source} if by_source else {})}
    print(json.dumps(summary, ensure_ascii=False, allow_nan=False))


def _table(groups: Mapping[str | None, Mapping[str, Mean]]) -> str:
    """A line per source and metric: rows, mean, and half the width of its 95 % interval."""
    head = ["source", "metric", "rows", "mean", "95 %"]
    cells = [
        [
            "all" if source is None else source or "(none)",
            metric,
            str(value.rows),
            f"{value.mean:.4f}",
            f"± {Z95 * value.stderr:.4f}",
        ]
        for source, group in groups.items()
        for metric, value in group.items()
    ]
    if len(groups) == 1:
        head, cells = head[1:], [row[1:] for row in cells]
    widths = [max(len(row[column]) for row in [head, *cells]) for column in range(len(head))]
    text_columns = len(head) - 3
    lines = [
        "  ".join(
            cell.ljust(width) if column < text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *cells]
    ]
    return "\n".join(lines)
