"""The step `chat-format`: rows in, token ids and labels out."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from finemill.artifacts.dataset import dataset_writer
from finemill.artifacts.files import CHAT_FILE
from finemill.artifacts.rows import PreparedRow, iterate_rows
from finemill.artifacts.splits import SPLITS
from finemill.components.chat_format.config import ChatFormatConfig
from finemill.components.chat_format.example import Draft, Example
from finemill.components.chat_format.formatter import Formatter
from finemill.components.chat_format.report import (
    SplitCounts,
    list_reasons,
    warn_of_losses,
    warn_of_missing_ends,
    write_report,
)
from finemill.components.chat_format.template import load_templates
from finemill.components.chat_format.tokenize import load_tokenizer
from finemill.errors import UserError
from finemill.rows.reasons import DroppedRowError
from finemill.runtime.context import StepContext

_BATCH_ROWS = 1000


def run(
    *, rows: Path, base_model: Path, output_dir: Path, config: ChatFormatConfig, context: StepContext
) -> Mapping[str, float]:
    """Turn rows into messages, render and tokenize them, and label what the assistant says.

    Writes a file of `DatasetRow`s per split, chat_template.jinja, chat.jsonl (the training conversations) and
    dataset.json.
    Raises: UserError: a base without tokenizer or template, or no training row is left.
    """
    tokenizer = load_tokenizer(base_model)
    templates = load_templates(base_model, config.chat_template_path, tokenizer.named_tokens)
    formatter = Formatter(tokenizer, templates, config)
    counts = {split: SplitCounts() for split in SPLITS}
    with (output_dir / CHAT_FILE).open("w", encoding="utf-8") as chat:
        for split in SPLITS:
            with dataset_writer(output_dir, split) as writer:
                for batch in iterate_rows(rows, split, batch_rows=_BATCH_ROWS):
                    examples = list(_format_batch(formatter, batch, counts[split], unroll=split == "train"))
                    writer.write([example.row for example in examples])
                    if split == "train":
                        chat.writelines(example.chat_line for example in examples)
                    context.recorder.log_progress(f"{split}: {counts[split].read} rows")
    if not counts["train"].examples:
        reasons = list_reasons(counts["train"].dropped)
        raise UserError(f"no training row is left of {counts['train'].read} (left out: {reasons or 'none'})")
    warn_of_losses(counts)
    warn_of_missing_ends(counts["train"])
    (output_dir / "chat_template.jinja").write_text(templates.default.source, encoding="utf-8")
    return write_report(output_dir, counts, tokenizer, templates.default)


def _format_batch(
    formatter: Formatter, batch: list[PreparedRow], counts: SplitCounts, *, unroll: bool
) -> Iterator[Example]:
    """Render row by row, tokenize all at once: the tokenizer works in parallel."""
    drafts: list[Draft] = []
    for record in batch:
        counts.read += 1
        try:
            row_drafts = formatter.drafts(record, json.loads(record.row), unroll=unroll)
        except DroppedRowError as reason:
            counts.dropped[str(reason)] += 1
        else:
            drafts += row_drafts
    tokens = formatter.tokenizer.encode([draft.text for draft in drafts])
    rejected = iter(formatter.tokenizer.encode([draft.rejected.text for draft in drafts if draft.rejected]))
    for draft, draft_tokens in zip(drafts, tokens, strict=True):
        rejected_tokens = next(rejected) if draft.rejected else None
        try:
            example = formatter.finish(draft, draft_tokens, rejected_tokens)
        except DroppedRowError as reason:
            counts.dropped[str(reason)] += 1
        else:
            counts.add(example)
            yield example
