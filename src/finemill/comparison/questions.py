"""The questions that models are compared on: a dataset's held-out rows, or files of the user's own."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finemill.artifacts.dataset import DatasetRow
from finemill.artifacts.splits import Split, split_path
from finemill.artifacts.tables import read_rows as read_table_rows
from finemill.components.data_prep.read import Damaged, is_data_file, read_rows
from finemill.errors import UserError
from finemill.rows.reasons import DroppedRowError
from finemill.rows.shapes import detect_shape, to_conversation
from finemill.rows.thinking import split_thinking
from finemill.storage.store import artifact_folder

_OR_FILE = ", or a .jsonl, .json, .parquet or .csv file"


@dataclass(frozen=True)
class Question:
    """A chat that is to be answered, and what a good answer is."""

    id: str
    source: str
    messages: tuple[dict[str, str], ...]
    """Up to the last user's turn; thinking of earlier answers left out."""
    reference: str
    """The answer that the row has, without its thinking."""
    answer: str | None
    """The right final answer."""
    thinking: bool | None = None
    """Whether the row was formatted with thinking; None where its template had no say."""


@dataclass(frozen=True)
class Questions:
    """The questions of a file, and how many rows gave none, by reason."""

    rows: list[Question]
    left_out: Counter[str]


def read_questions(where: str, split: Split = "test") -> Questions:
    """Read the questions at `where`.

    Args:
        where: a dataset of chat-format's, as a reference or a folder; or a file of any shape that data-prep reads.
        split: of a dataset.
    Raises: UserError: there is nothing of the kind, or no row with a question and an answer.
    """
    if Path(where).is_file() and is_data_file(where):
        found = _of_file(Path(where))
    else:
        found = _of_dataset(artifact_folder(where, "dataset", "chat-format", _OR_FILE), split)
    if not found.rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in found.left_out.most_common(3))
        raise UserError(f"--rows {where}: no row has a question and a reference answer ({reasons or 'it is empty'})")
    return found


def _of_dataset(folder: Path, split: Split) -> Questions:
    kept: list[Question] = []
    left_out: Counter[str] = Counter()
    for row in read_table_rows(split_path(folder, split), DatasetRow, "chat-format"):
        if row.tools:
            left_out["with tools"] += 1
            continue
        messages = json.loads(row.messages)
        question = _question(row.id, row.source, messages, row.answer)
        if question is None:
            left_out["without a chat"] += 1
            continue
        thinking = json.loads(row.chat_template_kwargs).get("enable_thinking")
        kept.append(replace(question, thinking=thinking if isinstance(thinking, bool) else None))
    return Questions(kept, left_out)


def _of_file(path: Path) -> Questions:
    kept: list[Question] = []
    left_out: Counter[str] = Counter()
    for row in read_rows(path):
        try:
            kept.append(_from_row(row, path.name))
        except DroppedRowError as reason:
            left_out[str(reason).replace("_", " ")] += 1
    return Questions(kept, left_out)


def _from_row(row: dict[str, Any] | Damaged, source: str) -> Question:
    if isinstance(row, Damaged):
        raise DroppedRowError("damaged")
    shape = detect_shape(row)
    if shape is None:
        raise DroppedRowError("without a reference")
    conversation = to_conversation(row, shape)
    if conversation.tools:
        raise DroppedRowError("with tools")
    content = json.dumps(conversation.messages, sort_keys=True, default=str)
    row_id = hashlib.sha256(content.encode()).hexdigest()[:16]
    question = _question(row_id, source, conversation.messages, conversation.answer)
    if question is None:
        raise DroppedRowError("without a chat")
    return question


def _question(row_id: str, source: str, messages: Sequence[dict[str, Any]], answer: str | None) -> Question | None:
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls"):
        return None
    asked = tuple(_turns(messages[:-1]))
    return Question(row_id, source, asked, split_thinking(messages[-1]["content"])[1].strip(), answer)


def _turns(messages: Sequence[dict[str, Any]]) -> Iterator[dict[str, str]]:
    for message in messages:
        content = message["content"]
        plain = split_thinking(content)[1] if message["role"] == "assistant" else content
        yield {"role": message["role"], "content": plain}
