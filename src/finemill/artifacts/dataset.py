"""Rows of a `dataset` artifact as the steps that measure models read them."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from finemill.errors import UserError

IGNORE_INDEX = -100
"""The label of a token that no loss is taken on."""


@dataclass(frozen=True)
class HeldOutRow:
    """One conversation.

    `prompt` is the rendered text up to and with the generation prompt of the last assistant turn, `completion` that
    turn as the model should write it, `answer` its final answer if it has one. `input_ids` and `labels` cover the whole
    conversation; a label is `IGNORE_INDEX` outside the assistant's turns. Of a preference `rejected` is a worse last
    turn, and `rejected_input_ids` and `rejected_labels` are the conversation with it.
    """

    id: str
    source: str
    input_ids: list[int]
    labels: list[int]
    prompt: str
    completion: str
    answer: str | None
    rejected: str | None = None
    rejected_input_ids: list[int] | None = None
    rejected_labels: list[int] | None = None

    @property
    def with_rejected(self) -> "HeldOutRow | None":
        """The same conversation as if the worse answer were the right one; None for a row without one."""
        if self.rejected is None or self.rejected_input_ids is None or self.rejected_labels is None:
            return None
        return replace(self, completion=self.rejected, input_ids=self.rejected_input_ids, labels=self.rejected_labels)


def read_rows(dataset: Path, split: str, limit: int | None = None) -> list[HeldOutRow]:
    """The first `limit` rows of a split, in the file's order, which chat-format fixed.

    Raises: UserError: the split is missing or holds no rows.
    """
    import pyarrow.parquet as pq

    path = dataset / f"{split}.parquet"
    if not path.is_file():
        raise UserError(f"{path} not found: chat-format writes it; pass the dataset it printed")
    table = pq.read_table(path, columns=[field.name for field in fields(HeldOutRow)])
    records: list[dict[str, Any]] = table.slice(0, limit).to_pylist()
    if not records:
        raise UserError(f"{path} holds no rows: raise the share of the {split} split in data-prep")
    return [HeldOutRow(**record) for record in records]


def spread(rows: list[HeldOutRow], count: int) -> list[HeldOutRow]:
    """At most `count` rows, evenly spaced, so that every part of the file has its share."""
    if count >= len(rows):
        return rows
    return [rows[index * len(rows) // count] for index in range(count)]


def prompt_ids(row: HeldOutRow, tokenizer: Any) -> list[int]:
    """Token ids of the row's prompt.

    Taken from `input_ids` before the last assistant turn, where marks of control tokens that a user typed are ordinary
    text, as they were in training; the prompt is tokenized anew only where that turn was cut off. A row without any
    prompt, a document, begins with the tokenizer's first token.
    """
    labelled = [position for position, label in enumerate(row.labels) if label != IGNORE_INDEX]
    start = next((p for p in reversed(labelled) if p == 0 or row.labels[p - 1] == IGNORE_INDEX), 0)
    ids = row.input_ids[:start]
    if tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) != row.prompt:
        ids = tokenizer(row.prompt, add_special_tokens=False)["input_ids"]
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return list(ids) or [first]
