"""The step `chat-format`: rows in, token ids and labels out."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

from finemill.artifacts.files import CHAT_FILE, REJECTED_FILE
from finemill.artifacts.rows import PreparedRow, iterate_rows, read_rows_report
from finemill.artifacts.splits import SPLITS, Split
from finemill.components.chat_format.config import ChatFormatConfig
from finemill.components.chat_format.example import Draft, Example
from finemill.components.chat_format.formatter import Formatter
from finemill.components.chat_format.report import (
    SplitCounts,
    list_reasons,
    warn_of_losses,
    warn_of_missing_ends,
    warn_of_mix,
    write_report,
)
from finemill.components.chat_format.template import load_templates
from finemill.components.chat_format.tokenize import load_tokenizer
from finemill.components.chat_format.write import write_split
from finemill.errors import UserError
from finemill.rows.reasons import WHOLE_ROW, DroppedRowError
from finemill.runtime.context import StepContext

_BATCH_ROWS = 1000


def run(
    *, rows: Path, base_model: Path, output_dir: Path, config: ChatFormatConfig, context: StepContext
) -> Mapping[str, float]:
    """Turn rows into messages, render and tokenize them, and label what the assistant says.

    Writes a file of `DatasetRow`s per split, chat_template.jinja, chat.jsonl (the training conversations),
    rejected.jsonl and dataset.json.
    Raises: UserError: a base without tokenizer or template, or no training row is left.
    """
    tokenizer = load_tokenizer(base_model)
    templates = load_templates(base_model, config.chat_template_path, tokenizer.named_tokens)
    formatter = Formatter(tokenizer, templates, config)
    counts = {split: SplitCounts() for split in SPLITS}
    asked = read_rows_report(rows)
    with (
        (output_dir / CHAT_FILE).open("w", encoding="utf-8") as chat,
        (output_dir / REJECTED_FILE).open("w", encoding="utf-8") as rejected,
    ):
        for split in SPLITS:
            batches = _format_split(rows, split, formatter, counts[split], rejected, context)
            write_split(output_dir, split, batches, counts[split], asked.mix, chat if split == "train" else None)
    train = counts["train"]
    if not train.examples:
        reasons = list_reasons(train.rows_dropped)
        raise UserError(f"no training row is left of {train.read.total()} (left out: {reasons or 'none'})")
    warn_of_losses(counts)
    warn_of_missing_ends(train)
    if asked.mix:
        warn_of_mix(train, asked.mix)
    (output_dir / "chat_template.jinja").write_text(templates.default.source, encoding="utf-8")
    return write_report(output_dir, counts, asked, tokenizer, templates.default)


def _format_split(
    rows: Path, split: Split, formatter: Formatter, counts: SplitCounts, rejected: TextIO, context: StepContext
) -> Iterator[list[Example]]:
    for batch in iterate_rows(rows, split, batch_rows=_BATCH_ROWS):
        yield _format_batch(formatter, batch, counts, rejected, unroll=split == "train")
        context.recorder.log_progress(f"{split}: {counts.read.total()} rows")


def _format_batch(
    formatter: Formatter, batch: list[PreparedRow], counts: SplitCounts, rejected: TextIO, *, unroll: bool
) -> list[Example]:
    """Render row by row, tokenize all at once: the tokenizer works in parallel."""
    drafts: list[Draft] = []
    reasons: dict[int, list[DroppedRowError]] = defaultdict(list)
    numbers: list[int] = []
    for number, record in enumerate(batch):
        counts.read[record.source] += 1
        try:
            row_drafts = formatter.drafts(record, json.loads(record.row), unroll=unroll)
        except DroppedRowError as error:
            reasons[number].append(error)
        else:
            drafts += row_drafts
            numbers += [number] * len(row_drafts)
    examples = []
    formatted = set()
    for number, example in zip(numbers, formatter.finish_all(drafts), strict=True):
        if isinstance(example, DroppedRowError):
            reasons[number].append(example)
        else:
            formatted.add(number)
            counts.add(example)
            examples.append(example)
    for number, found in sorted(reasons.items()):
        record = batch[number]
        if number in formatted:
            counts.examples_dropped.update(map(str, found))
        else:
            reason = str(found[0])
            counts.dropped[record.source][reason] += 1
            line = {
                "source": record.source,
                "row": record.number,
                "reason": reason,
                "field": found[0].field or WHOLE_ROW,
            }
            rejected.write(json.dumps(line, ensure_ascii=False) + "\n")
    return examples
