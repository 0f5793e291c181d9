"""What synthesize did: data.json for the steps that read the rows, report.md for people."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from finemill.artifacts.files import REPORT_TEXT
from finemill.artifacts.rows import RowsReport, RowsSplit, SplitSource, iterate_rows, write_rows_report
from finemill.artifacts.splits import SPLITS, Split
from finemill.components.synthesize.client import Spent
from finemill.components.synthesize.config import SynthesizeConfig

_BATCH_ROWS = 1000


def write_report(
    folder: Path,
    before: RowsReport,
    config: SynthesizeConfig,
    model: str,
    dropped: Mapping[str, Counter[str]],
    spent: Spent,
) -> None:
    """Write data.json and report.md.

    Args:
        folder: the output, its splits written.
        before: the report on the rows that were asked about: sources and mix stay.
        config: the step's.
        model: the server's name for it.
        dropped: rows that nothing was made of, by source and reason.
        spent: what it cost.
    """
    sources = [
        source.model_copy(update={"dropped": dict(Counter(source.dropped) + dropped.get(source.uri, Counter()))})
        for source in before.sources
    ]
    splits: dict[Split, RowsSplit] = {split: _count(folder, split, before) for split in SPLITS}
    write_rows_report(folder, RowsReport(sources=sources, mix=before.mix, splits=splits, advice=None))
    (folder / REPORT_TEXT).write_text(_markdown(config, model, splits, dropped, spent), encoding="utf-8")


def _count(folder: Path, split: Split, before: RowsReport) -> RowsSplit:
    rows: Counter[str] = Counter()
    characters: dict[str, int] = defaultdict(int)
    for batch in iterate_rows(folder, split, batch_rows=_BATCH_ROWS):
        for row in batch:
            rows[row.source] += 1
            characters[row.source] += len(row.row)
    total = sum(characters.values())
    weights = before.mix.weights if before.mix else {}
    sources = [
        SplitSource(
            uri=source.uri,
            rows=rows[source.uri],
            rows_share=round(rows[source.uri] / max(1, rows.total()), 6),
            characters=characters[source.uri],
            characters_share=round(characters[source.uri] / max(1, total), 6),
            weight=weights.get(source.uri),
        )
        for source in before.sources
    ]
    return RowsSplit(rows=rows.total(), characters=total, sources=sources)


def _markdown(
    config: SynthesizeConfig,
    model: str,
    splits: Mapping[Split, RowsSplit],
    dropped: Mapping[str, Counter[str]],
    spent: Spent,
) -> str:
    lines = ["# Synthetic rows", "", f"Task `{config.task}`, model `{model}`.", ""]
    lines += ["| split | rows |", "| --- | ---: |", *(f"| {split} | {count.rows} |" for split, count in splits.items())]
    reasons = sum(dropped.values(), start=Counter[str]())
    if reasons:
        lines += ["", "| nothing made of a row | rows |", "| --- | ---: |"]
        lines += [f"| {reason} | {number} |" for reason, number in reasons.most_common()]
    lines += [
        "",
        "| requests | repeated | prompt tokens | reply tokens | cost |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    amounts = spent.requests, spent.retries, spent.prompt_tokens, spent.reply_tokens, f"{spent.cost(config):.4g}"
    lines.append(f"| {' | '.join(map(str, amounts))} |")
    return "\n".join(lines) + "\n"
