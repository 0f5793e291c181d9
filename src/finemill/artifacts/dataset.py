"""The artifact `dataset`: conversations as text, token ids and labels, a Parquet file per split.

Each class of rows adds columns to the one above it, so that a step reads what it needs and no more: training the
tokens, a preference training both answers' tokens, what measures models the texts too.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from finemill.artifacts.files import DATASET_FILE
from finemill.artifacts.records import Record, read_record, write_record
from finemill.artifacts.rows import Mix
from finemill.artifacts.splits import Split, split_path
from finemill.artifacts.tables import RowWriter, iterate_batches, iterate_record_batches, read_columns, read_rows
from finemill.errors import UserError

IGNORE_INDEX = -100
"""The label of a token that no loss is taken on."""
CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""The template that the conversations are written with, under transformers' name for it; there is none for texts."""
ADDED_TOKENS_FILE = "added_tokens.json"
"""Ids of tokens that the base's tokenizer lacks, under transformers' name for it; there is none without such tokens."""
_WRITER = "chat-format"
RowType = TypeVar("RowType", bound="HeldOutRow")


@dataclass(frozen=True, kw_only=True)
class LabelledRow:
    """Token ids of a whole conversation, and its labels, both of length T.

    A label is the token's id in the assistant's turns and `IGNORE_INDEX` elsewhere.
    """

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, kw_only=True)
class PreferenceRow(LabelledRow):
    """The same with a worse last turn; None where a row has none."""

    rejected_input_ids: list[int] | None = None
    rejected_labels: list[int] | None = None

    @property
    def rejected_row(self) -> LabelledRow | None:
        """The conversation with the worse turn."""
        if self.rejected_input_ids is None or self.rejected_labels is None:
            return None
        return LabelledRow(input_ids=self.rejected_input_ids, labels=self.rejected_labels)


@dataclass(frozen=True, kw_only=True)
class AnswerRow(PreferenceRow):
    """The same with what the data say of the only answer: whether it is a good one, None for nothing.

    A bad one has no label that is learned; it stands where a worse turn does, as the whole conversation.
    """

    desirable: bool | None = None

    @property
    def answer_row(self) -> LabelledRow | None:
        """The conversation with the answer that is called good or bad; None where the data do not say."""
        return {None: None, True: self, False: self.rejected_row}[self.desirable]


@dataclass(frozen=True, kw_only=True)
class HeldOutRow(AnswerRow):
    """A conversation with what a measurement needs of it.

    `prompt` is the rendered text up to and with the generation prompt of the last assistant turn, `completion` that
    turn as the model should write it, `rejected` the worse turn, `answer` the final answer; None where a row has none.
    """

    id: str
    source: str
    prompt: str
    completion: str
    answer: str | None = None
    rejected: str | None = None

    @property
    def with_rejected(self) -> "HeldOutRow | None":
        """The same conversation as if the worse answer were the right one; None for a row without one."""
        worse = self.rejected_row
        if self.rejected is None or worse is None:
            return None
        return replace(self, completion=self.rejected, input_ids=worse.input_ids, labels=worse.labels)


@dataclass(frozen=True, kw_only=True)
class DatasetRow(HeldOutRow):
    """All that chat-format writes of a conversation.

    `messages`, `tools` (None for none) and `chat_template_kwargs` are JSON text, so that rows of every shape fit one
    schema.
    """

    messages: str
    tools: str | None
    chat_template_kwargs: str


class SourceAmounts(Record):
    """What a source has in the training split: examples, their tokens, the tokens that are learned, each with its share
    of the whole.
    """

    rows: int
    rows_share: float
    tokens: int
    tokens_share: float
    learned_tokens: int
    learned_tokens_share: float


class SourceReport(SourceAmounts):
    """What became of a source's training rows.

    The amounts are those that training gets; `formatted` are those before the mix, `rows_read` and `rows_dropped` count
    rows as data-prep wrote them. `share` is what was asked for, by what the mix counts; None without weights.
    """

    uri: str
    share: float | None
    rows_read: int
    rows_dropped: dict[str, int]
    formatted: SourceAmounts


class TokensPerExample(Record):
    """Lengths of a split's sequences."""

    median: int
    p95: int
    longest: int


class DatasetSplit(Record):
    """What became of a split's rows, and what it has: examples as often as the mix takes them."""

    rows_read: int
    examples: int
    rows_dropped: dict[str, int]
    examples_dropped: dict[str, int]
    examples_left_out_by_mix: int
    examples_repeated_by_mix: int
    examples_truncated: int
    examples_thinking: int
    tokens: int
    tokens_learned: int
    tokens_per_example: TokensPerExample
    examples_unrolled: int
    turns_without_end_token: int


class DatasetReport(Record):
    """How the rows were formatted; without weights there is no mix, for texts no template."""

    tokenizer_sha256: str
    chat_template_sha256: str | None
    eos_token: str | None
    end_of_turn_tokens: dict[str, int]
    mix: Mix | None
    sources: list[SourceReport]
    splits: dict[Split, DatasetSplit]


@dataclass(frozen=True, kw_only=True)
class WrittenChat:
    """What of a row chat.jsonl has, and what decides whether it has it."""

    id: str
    messages: str
    tools: str | None
    desirable: bool | None

    @property
    def is_whole(self) -> bool:
        """Whether it is a conversation, not a document, and none of the parts of one, whose ids have its number."""
        return self.messages != "[]" and "-" not in self.id


def dataset_writer(folder: Path, split: Split) -> RowWriter[DatasetRow]:
    """A writer of the rows of one split."""
    return RowWriter(split_path(folder, split), DatasetRow)


def write_dataset_report(folder: Path, report: DatasetReport) -> None:
    """Put the report beside the rows."""
    write_record(folder / DATASET_FILE, report)


def read_dataset_report(folder: Path) -> DatasetReport:
    """Raises: UserError: there is none."""
    return read_record(folder / DATASET_FILE, DatasetReport, _WRITER)


def iterate_chats(path: Path, *, batch_rows: int) -> Iterator[WrittenChat]:
    """The conversations of a file of examples, in order. Raises: UserError: the file is missing."""
    return chain.from_iterable(iterate_batches(path, WrittenChat, _WRITER, batch_rows=batch_rows))


def read_held_out(dataset: Path, split: Split, limit: int | None = None) -> list[HeldOutRow]:
    """The first `limit` rows of a split, in the file's order, which chat-format fixed.

    Bad answers are none of them: nothing is to be measured against these.

    Raises: UserError: the split is missing or holds no rows.
    """
    path = split_path(dataset, split)
    rows = _without_bad(read_rows(path, HeldOutRow, _WRITER, limit=limit))
    if not rows:
        raise UserError(f"{path} holds no rows: raise the share of the {split} split in data-prep")
    return rows


def read_dataset_rows(dataset: Path, split: Split, limit: int | None = None) -> list[DatasetRow]:
    """The same rows with all that chat-format writes. Raises: UserError: the split is missing."""
    path = split_path(dataset, split)
    if limit is None:
        return _without_bad(read_rows(path, DatasetRow, _WRITER))
    return _without_bad(next(iterate_batches(path, DatasetRow, _WRITER, batch_rows=limit), []))


def _without_bad(rows: list[RowType]) -> list[RowType]:
    return [row for row in rows if row.desirable is not False]


@dataclass(frozen=True)
class LabelledColumns:
    """`LabelledRow` by column, as Arrow holds it: rows by the million without a Python object for each."""

    input_ids: pa.ChunkedArray
    labels: pa.ChunkedArray


def read_labelled(dataset: Path, split: Split) -> LabelledColumns:
    """Token ids and labels of a split. Raises: UserError: the split is missing."""
    return LabelledColumns(*read_columns(split_path(dataset, split), LabelledRow, _WRITER).columns)


def read_lengths(dataset: Path, split: Split) -> list[int]:
    """Tokens of each row of a split, in the file's order; of a preference those of the better conversation."""
    batches = iterate_record_batches(split_path(dataset, split), batch_rows=10_000, columns=["input_ids"])
    return [length for batch in batches for length in np.diff(batch["input_ids"].offsets.to_numpy()).tolist()]


def read_preferences(dataset: Path, split: Split) -> tuple[list[tuple[LabelledRow, LabelledRow]], int]:
    """The split's conversations that have a worse last turn, each with it, and how many rows there are in all.

    Raises: UserError: the split is missing.
    """
    table = read_columns(split_path(dataset, split), PreferenceRow, _WRITER)
    rows = (PreferenceRow(**record) for record in table.drop_null().to_pylist())
    pairs = [(row, worse) for row in rows if (worse := row.rejected_row)]
    # A bad answer alone has no label in the place of the better one.
    return [pair for pair in pairs if any(label != IGNORE_INDEX for label in pair[0].labels)], table.num_rows


def read_answers(dataset: Path, split: Split) -> tuple[list[tuple[LabelledRow, bool]], int]:
    """Conversations whose last answer the data call good (True) or bad, each with that; and how many rows there are.

    Raises: UserError: the split is missing.
    """
    table = read_columns(split_path(dataset, split), AnswerRow, _WRITER)
    rows = (AnswerRow(**record) for record in table.filter(table["desirable"].is_valid()).to_pylist())
    return [(answer, bool(row.desirable)) for row in rows if (answer := row.answer_row)], table.num_rows


def take_chat_template(dataset: Path, tokenizer: Any) -> None:
    """Give a tokenizer the template that the conversations were written with, so that the tuned model keeps it.

    One with several named templates keeps them: a data set has only the default one of them.
    """
    path = dataset / CHAT_TEMPLATE_FILE
    if path.is_file() and not isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = path.read_text(encoding="utf-8")


def read_new_tokens(dataset: Path) -> dict[str, int]:
    """Tokens that the data set has and its base's tokenizer lacks, with their ids; mostly none."""
    path = dataset / ADDED_TOKENS_FILE
    ids: dict[str, int] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return ids


def take_new_tokens(dataset: Path, tokenizer: Any) -> list[int]:
    """Give a tokenizer of transformers the tokens that the conversations were encoded with.

    Returns: their ids, in order; none for most data sets.
    Raises: UserError: there they are others than in the data set: it was encoded for another base.
    """
    from tokenizers import AddedToken

    wanted = read_new_tokens(dataset)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in wanted])
    for token, number in wanted.items():
        found = tokenizer.convert_tokens_to_ids(token)
        if found != number:
            raise UserError(
                f"the data set has {token} as token {number}, and with this base model it is {found}: run {_WRITER} "
                "with the base model that is trained"
            )
    return sorted(wanted.values())


def find_rows(dataset: Path, split: Split, sequences: Sequence[Sequence[int]]) -> list[str]:
    """What the rows are called that hold any of these token sequences, in either of their answers, in the file's order.

    Rows of a file without the column `id` are called by their place, the first being 1.
    """
    path = split_path(dataset, split)
    wanted = {np.asarray(ids, dtype=np.int32).tobytes() for ids in sequences}
    there = set(pq.read_schema(path).names)
    found, place = [], 0
    for batch in iterate_record_batches(path, batch_rows=1024, columns=[name for name in _NAMED if name in there]):
        names = batch["id"].to_pylist() if "id" in there else [str(place + row + 1) for row in range(batch.num_rows)]
        place += batch.num_rows
        tokens = [batch[name] for name in _NAMED[1:] if name in there]
        for row, name in enumerate(names):
            texts = [column[row].values.to_numpy().tobytes() for column in tokens if column[row].is_valid]
            if any(ids in text for text in texts for ids in wanted):
                found.append(name)
    return found


_NAMED = ("id", "input_ids", "rejected_input_ids")


def spread(rows: list[RowType], count: int) -> list[RowType]:
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
