"""The step `chat-format`: rows in, token ids and labels out."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TextIO

import pyarrow as pa

from finemill.artifacts.dataset import ADDED_TOKENS_FILE, CHAT_TEMPLATE_FILE, write_dataset_report
from finemill.artifacts.files import CHAT_FILE, REJECTED_FILE
from finemill.artifacts.records import write_json
from finemill.artifacts.rows import num_rows, read_rows_report
from finemill.artifacts.splits import SPLITS, Split
from finemill.components.chat_format.batch import FormattedBatch
from finemill.components.chat_format.card import write_card
from finemill.components.chat_format.config import ChatFormatConfig
from finemill.components.chat_format.formatter import load_formatter
from finemill.components.chat_format.report import (
    SplitCounts,
    describe,
    list_reasons,
    report_metrics,
    warn_of_losses,
    warn_of_missing_ends,
    warn_of_mix,
)
from finemill.components.chat_format.workers import FormatWork, format_rows
from finemill.components.chat_format.write import write_split
from finemill.errors import UserError
from finemill.runtime.context import StepContext

_BATCH_ROWS = 1000


def run(
    *, rows: Path, base_model: Path, output_dir: Path, config: ChatFormatConfig, context: StepContext
) -> Mapping[str, float]:
    """Turn rows into messages, render and tokenize them, and label what the assistant says.

    Writes a file of `DatasetRow`s per split, chat_template.jinja, chat.jsonl (the training conversations),
    rejected.jsonl, dataset.json, and the data card: data_card.html, .md and .json.
    Raises: UserError: a base without tokenizer or template, or no training row is left.
    """
    formatter = load_formatter(base_model, config)
    counts = {split: SplitCounts() for split in SPLITS}
    asked = read_rows_report(rows)
    with (
        (output_dir / CHAT_FILE).open("w", encoding="utf-8") as chat,
        (output_dir / REJECTED_FILE).open("w", encoding="utf-8") as rejected,
    ):
        for split in SPLITS:
            num_proc = min(config.num_proc, num_rows(rows, split) // _BATCH_ROWS) or 1
            work = FormatWork(rows, split, _BATCH_ROWS, base_model, config)
            with closing(format_rows(work, formatter, num_proc=num_proc)) as formatted:
                batches = _count(formatted, split, counts[split], rejected, context)
                write_split(output_dir, split, batches, counts[split], asked.mix, chat if split == "train" else None)
    train = counts["train"]
    if not train.examples:
        reasons = list_reasons(train.rows_dropped)
        raise UserError(f"no training row is left of {train.read.total()} (left out: {reasons or 'none'})")
    warn_of_losses(counts)
    warn_of_missing_ends(train)
    if asked.mix:
        warn_of_mix(train, asked.mix)
    if formatter.template is not None:
        (output_dir / CHAT_TEMPLATE_FILE).write_text(formatter.template.source, encoding="utf-8")
    if new_tokens := formatter.tokenizer.new_tokens:
        write_json(output_dir / ADDED_TOKENS_FILE, new_tokens)
    described = describe(counts, asked, formatter.tokenizer, formatter.template)
    write_dataset_report(output_dir, described)
    own = formatter.template is not None and config.chat_template is None
    write_card(output_dir, rows, train, described, formatter.tokenizer, config, has_own_template=own)
    return report_metrics(counts, asked)


def _count(
    formatted: Iterator[FormattedBatch], split: Split, counts: SplitCounts, rejected: TextIO, context: StepContext
) -> Iterator[pa.RecordBatch]:
    """The examples of batches; what else they hold is added up."""
    for batch in formatted:
        counts.add_all(batch.counts)
        rejected.write(batch.rejected)
        yield batch.examples
        context.recorder.log_progress(f"{split}: {counts.read.total()} rows")
