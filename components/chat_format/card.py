"""The data card: where the training set comes from, what became of it, what is in it, and what of it is learned.

The facts are `data_card.json`; `data_card.html`, which needs nothing but itself, and `data_card.md` show them.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from numpy.typing import NDArray

from finemill.artifacts.dataset import IGNORE_INDEX, DatasetReport, DatasetRow, SourceReport, read_dataset_rows
from finemill.artifacts.files import DATA_CARD_FILE, DATA_CARD_PAGE, DATA_CARD_TEXT
from finemill.artifacts.records import write_json
from finemill.artifacts.rows import RowsReport, RowsSource, find_rows, read_rows_report
from finemill.components.chat_format.advice import advice_on
from finemill.components.chat_format.config import ChatFormatConfig
from finemill.components.chat_format.packing import PACKED_ROWS, packing
from finemill.components.chat_format.report import SplitCounts
from finemill.components.chat_format.tokenize import ChatTokenizer

_NUM_EXAMPLES = 24
_SHOWN_CHARACTERS = 6000
_FIRST_ROWS = 2000


def write_card(
    folder: Path,
    rows: Path,
    train: SplitCounts,
    dataset: DatasetReport,
    tokenizer: ChatTokenizer,
    config: ChatFormatConfig,
    *,
    has_own_template: bool,
) -> None:
    """Write the three files.

    Args:
        folder: the dataset, its splits written.
        rows: data-prep's output, with data.json.
        train: the counts of the training rows.
        dataset: what dataset.json says.
        tokenizer: the base model's, which decodes examples.
        config: the step's; packs of sequences are filled up to its `max_length`.
        has_own_template: whether the base brings a chat template.
    """
    prepared = read_rows_report(rows)
    lengths, packed = train.lengths, packing(train.lengths[:PACKED_ROWS].tolist(), config.max_length)
    padding, first = packed.get("padding_in_batches_of_8", 0.0), read_dataset_rows(folder, "train", _FIRST_ROWS)
    facts = {
        "sources": [_source(own, before) for own, before in zip(dataset.sources, prepared.sources, strict=True)],
        "left_out": list(_left_out(prepared, dataset)),
        "advice": list(advice_on(train, config, padding, size=prepared.advice, has_own_template=has_own_template)),
        **dataset.model_dump(
            include={"splits", "mix", "tokenizer_sha256", "chat_template_sha256", "end_of_turn_tokens"}
        ),
        "lengths": histogram(lengths),
        "packing": packed,
        "training": _training_time(lengths, config) if config.estimate else None,
        "scripts": _scripts(first),
        "examples": list(_examples(_of_all_sources(first), rows, tokenizer)),
    }
    write_json(folder / DATA_CARD_FILE, facts)
    (folder / DATA_CARD_PAGE).write_text(_render("data_card.html.jinja", facts, escape=True), encoding="utf-8")
    (folder / DATA_CARD_TEXT).write_text(_render("data_card.md.jinja", facts, escape=False), encoding="utf-8")


def _duration(hours: float) -> str:
    """Hours as people say them."""
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} seconds"
    return f"{hours * 60:.0f} minutes" if hours < 1 else f"{hours:,.1f} hours"


def _training_time(lengths: NDArray[np.integer[Any]], config: ChatFormatConfig) -> dict[str, Any]:
    # The planner is imported only where it is asked.
    from finemill.components.chat_format.duration import training_time

    return training_time(lengths, config)


def _source(own: SourceReport, before: RowsSource) -> dict[str, Any]:
    """A source at each stage."""
    return {
        **own.model_dump(),
        "read": before.read,
        "left_out_by_data_prep": sum(before.dropped.values()),
        "left_out_by_chat_format": sum(own.rows_dropped.values()),
        **before.model_dump(include={"shapes", "unread_columns", "flags", "digest"}),
    }


def _left_out(prepared: RowsReport, dataset: DatasetReport) -> Iterator[dict[str, Any]]:
    """Rows by source and reason, the commonest first; of chat-format's those of the training rows."""
    dropped = [("data-prep", source.uri, source.dropped) for source in prepared.sources]
    dropped += [("chat-format", source.uri, source.rows_dropped) for source in dataset.sources]
    for stage, uri, reasons in dropped:
        for reason, number in sorted(reasons.items(), key=lambda item: -item[1]):
            yield {"stage": stage, "source": uri, "reason": reason, "rows": number}


def histogram(lengths: NDArray[np.integer[Any]]) -> list[dict[str, int]]:
    """How many sequences have how many tokens: from a power of two, or the half way to the next, up to the next."""
    if not len(lengths):
        return []
    edges, longest = [0], int(lengths.max())
    while edges[-1] <= longest:
        edges.append(16 if edges[-1] < 16 else edges[-1] * 3 // 2 if edges[-1].bit_count() == 1 else edges[-1] * 4 // 3)
    counts = np.histogram(lengths, edges)[0].tolist()
    bins = [{"from": low, "to": high, "examples": n} for low, high, n in zip(edges, edges[1:], counts, strict=False)]
    first = next(place for place, own in enumerate(bins) if own["examples"])
    return bins[first:]


def _scripts(rows: Sequence[DatasetRow]) -> dict[str, float]:
    """The share of letters by script in what is asked and said."""
    letters: Counter[str] = Counter()
    for row in rows:
        said = [message["content"] for message in json.loads(row.messages)] or [row.completion]
        letters.update(character for text in said for character in text if character.isalpha())
    scripts: Counter[str] = Counter()
    for letter, number in letters.items():
        scripts[unicodedata.name(letter, "OTHER").split()[0].split("-")[0]] += number
    # Names are capitals: LATIN, CJK.
    return {
        name if name == "CJK" else name.title(): round(number / letters.total(), 4)
        for name, number in scripts.most_common(8)
    }


def _of_all_sources(rows: Sequence[DatasetRow]) -> list[DatasetRow]:
    """Some of the rows, from every source the same number as far as there are."""
    turns = Counter[str]()
    ranked = []
    for row in rows:
        turns[row.source] += 1
        ranked.append((turns[row.source], row))
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])[:_NUM_EXAMPLES]]


def _examples(shown: Sequence[DatasetRow], rows: Path, tokenizer: ChatTokenizer) -> Iterator[dict[str, Any]]:
    """Examples as pieces that are learned or not, and the rows that they were made of."""
    raw = find_rows(rows, "train", {row.id.partition("-")[0] for row in shown})
    for row in shown:
        record = raw[row.id.partition("-")[0]]
        yield {
            "id": row.id,
            "source": row.source,
            "row": record.number,
            "shape": record.shape,
            "tokens": len(row.input_ids),
            "learned_tokens": sum(label != IGNORE_INDEX for label in row.labels),
            "raw": record.row[:_SHOWN_CHARACTERS],
            "pieces": _pieces(row, tokenizer),
            "rejected": row.rejected,
        }


def _pieces(row: DatasetRow, tokenizer: ChatTokenizer) -> list[dict[str, Any]]:
    pieces, room = [], _SHOWN_CHARACTERS
    pairs = zip(row.input_ids, row.labels, strict=True)
    for learned, run in groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX):
        text = tokenizer.decode([token for token, _ in run])
        pieces.append({"learned": learned, "text": text[:room] + ("\u2026" if len(text) > room else "")})
        room -= len(text)
        if room <= 0:
            break
    return pieces


def _render(name: str, facts: Mapping[str, Any], *, escape: bool) -> str:
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["share"] = lambda value: f"{value:.1%}"
    environment.filters["duration"] = _duration
    environment.filters["number"] = lambda value: f"{value:,.0f}"
    return environment.get_template(name).render(facts)
