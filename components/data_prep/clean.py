"""From raw rows to records: a known shape, an identity, a length; or the reason why a row is left out."""

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from finemill.components.data_prep.benchmark import Benchmarks
from finemill.components.data_prep.config import DataPrepConfig, Source
from finemill.components.data_prep.dedup import sketch_of
from finemill.components.data_prep.load import name_columns
from finemill.components.data_prep.quality import flags_of
from finemill.components.data_prep.read import Damaged, Row, UnreadRow
from finemill.components.data_prep.record import Record
from finemill.components.data_prep.split import is_sampled, order_key, split_of
from finemill.errors import UserError
from finemill.rows.conversation import Conversation, num_characters, whole_text
from finemill.rows.identity import normalize_text, question_key, row_id, text_key
from finemill.rows.reasons import WHOLE_ROW, DroppedRowError
from finemill.rows.shapes import SHAPES, detect_shape, to_conversation

logger = logging.getLogger(__name__)

_MAX_SHOWN = 5
# Of answers numbered from 1 more than one in so many names the last choice; fewer are damage.
_BEYOND_LAST = 20
_MAX_FIELD = 200
_SURROGATE = re.compile("[\ud800-\udfff]")
_TEXT = json.JSONEncoder(ensure_ascii=False, default=str)


@dataclass
class SourceCounts:
    """What became of a source's rows, or of some of them.

    `rejected` has number, reason and field of each that is left out, until they are taken; `flags` counts doubtful ones
    by flag. `columns` are those that the configuration names and a row had, `last_columns` those of the last row,
    `unknown_columns` those of the last row of no known shape. `damage` says what is wrong with damaged rows.
    """

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    columns: set[str] = field(default_factory=set)
    last_columns: tuple[str, ...] = ()
    unknown_columns: str = "none"
    damage: list[Damaged] = field(default_factory=list)
    rejected: list[tuple[int, str, str]] = field(default_factory=list)
    _first: dict[str, list[int]] = field(default_factory=dict)

    def drop(self, number: int, reason: str, where: str = "") -> None:
        """Count a row that is left out, and say where in it the reason lies: nowhere in particular in the whole row."""
        self.dropped[reason] += 1
        self._note(reason, number)
        self.rejected.append((number, reason, where or WHOLE_ROW))

    def flag(self, number: int, name: str) -> None:
        """Count a doubtful row."""
        self.flags[name] += 1
        self._note(name, number)

    def add(self, later: "SourceCounts") -> None:
        """Count what became of the rows that follow."""
        self.read += later.read
        for name in ("dropped", "shapes", "unread", "flags"):
            getattr(self, name).update(getattr(later, name))
        self.columns |= later.columns
        self.last_columns = later.last_columns or self.last_columns
        if later.dropped["unknown_shape"]:
            self.unknown_columns = later.unknown_columns
        self.damage += later.damage
        self.rejected += later.rejected
        for name, numbers in later._first.items():
            for number in numbers:
                self._note(name, number)

    def take_rejected(self) -> list[tuple[int, str, str]]:
        """Those that were left out since the last call."""
        taken, self.rejected = self.rejected, []
        return taken

    def _note(self, name: str, number: int) -> None:
        numbers = self._first.setdefault(name, [])
        if len(numbers) < _MAX_SHOWN:
            numbers.append(number)

    def first(self, name: str) -> list[int]:
        """Numbers of the first rows left out for a reason, or with a flag."""
        return self._first.get(name, [])


class CleanBatch(NamedTuple):
    """The usable rows of a batch in order, and what became of the others."""

    records: list[Record]
    counts: SourceCounts


class Cleaner:
    """Makes records of one source's rows, each by itself, so that any process may do it."""

    def __init__(self, source: int, config: DataPrepConfig, benchmarks: Benchmarks) -> None:
        self._number, self._source, self._config = source, config.sources[source], config
        self._benchmarks = benchmarks
        self._named = {*self._source.columns.values(), *self._source.remove_columns}

    def clean(self, rows: Sequence[UnreadRow], first: int) -> CleanBatch:
        """The rows that can be used; `first` is the number of the first row in the source."""
        batch = CleanBatch([], SourceCounts(read=len(rows)))
        for number, unread in enumerate(rows, start=first):
            row = unread.read()
            if isinstance(row, Damaged):
                batch.counts.damage.append(row)
                batch.counts.drop(number, "damaged", f"{row.where}: {row.problem}"[:_MAX_FIELD])
                continue
            try:
                record = self._record(row, number, batch.counts)
            except DroppedRowError as reason:
                batch.counts.drop(number, str(reason), reason.field)
                continue
            if self._source.sample is None or is_sampled(record.row_id, self._source.sample, self._config.seed):
                batch.records.append(record)
            else:
                batch.counts.dropped["not_sampled"] += 1
        return batch

    def _record(self, row: Row, number: int, counts: SourceCounts) -> Record:
        """Raises: DroppedRowError: the row cannot be used, or is not wanted."""
        config = self._config
        counts.last_columns = tuple(map(str, row))
        counts.columns |= self._named.intersection(row)
        row = name_columns(row, self._source)
        shape = self._source.shape or detect_shape(row, self._source.columns)
        if shape is None:
            counts.unknown_columns = ", ".join(map(str, row)) or "none"
            raise DroppedRowError("unknown_shape", f"columns {counts.unknown_columns}"[:_MAX_FIELD])
        counts.shapes[shape] += 1
        conversation = to_conversation(row, shape, bad_answers=config.labelled_bad == "keep")
        text = _row_text(row, conversation, config)
        counts.unread.update(conversation.unread)
        flags = flags_of(conversation)
        for flag in flags:
            counts.flag(number, flag)
        unwanted = next((flag for flag in flags if flag in config.drop_flagged), None)
        if unwanted is not None:
            raise DroppedRowError(unwanted)
        said, identity = normalize_text(whole_text(conversation)), row_id(row)
        try:
            prompt_key, whole_key = question_key(conversation), text_key(said)
        except UnicodeEncodeError:
            # Escaped in a text that holds JSON, where the row as it is written does not show it.
            raise DroppedRowError("not_unicode") from None
        self._benchmarks.check(said)
        return Record(
            source=self._number,
            number=number,
            row_id=identity,
            shape=shape,
            prompt_key=prompt_key,
            text_key=whole_key,
            sketch=sketch_of(said) if config.dedup == "minhash" else None,
            num_characters=num_characters(conversation),
            split=split_of(self._number, prompt_key, config),
            position=order_key(identity, config.seed),
            text=text,
        )


def check_counts(counts: SourceCounts, source: Source, config: DataPrepConfig) -> None:
    """Log damaged rows that were not logged yet.

    Raises: UserError: too many are damaged, or a row has no known shape and `unknown_rows` is `error`.
    """
    before = counts.dropped["damaged"] - len(counts.damage)
    for number, row in enumerate(counts.damage, start=before + 1):
        if number > config.max_damaged_rows:
            raise UserError(
                f"{row.where}: {row.problem}; correct it, set format if the file is something else, or raise "
                f"max_damaged_rows ({config.max_damaged_rows})"
            )
        logger.warning("%s: %s; the row is left out", row.where, row.problem)
    counts.damage.clear()
    if counts.dropped["unknown_shape"] and config.unknown_rows == "error":
        raise UserError(_unknown_message(source, counts))


def check_all_counts(counts: SourceCounts, source: Source) -> None:
    """Raises: UserError: the source has no rows, none of a known shape, or a column was named that none has."""
    if not counts.read:
        raise UserError(f"{source.uri}: no rows in it; check sources[].uri, name and split")
    missing = {*source.columns.values(), *source.remove_columns} - counts.columns
    if missing and counts.last_columns:
        listed, found = ", ".join(map(repr, sorted(missing))), ", ".join(sorted(counts.last_columns))
        raise UserError(f"{source.uri}: columns: no column {listed}; the rows have {found}")
    if not counts.shapes:
        raise UserError(_unknown_message(source, counts))
    beyond, choices = counts.dropped["choice_beyond_last"], counts.shapes["multiple_choice"]
    if beyond * _BEYOND_LAST > choices:
        raise UserError(
            f"{source.uri}: {beyond} of {choices} rows number a choice after the last (first: row "
            f"{', '.join(map(str, counts.first('choice_beyond_last')))}): they count from 1, and "
            "from 0 is read; subtract 1, or write letters"
        )


def _row_text(row: Row, conversation: Conversation, config: DataPrepConfig) -> str:
    """The row as JSON. Raises: DroppedRowError: too short, too long, or not Unicode."""
    length = num_characters(conversation)
    if length < config.min_characters:
        raise DroppedRowError("too_short", f"{length} characters")
    if config.max_characters is not None and length > config.max_characters:
        raise DroppedRowError("too_long", f"{length} characters")
    text = _TEXT.encode(row)
    if not _is_unicode(text):
        raise DroppedRowError("not_unicode")
    return text


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON's escapes allow and UTF-8 does not."""
    return text.isascii() or not _SURROGATE.search(text)


def _unknown_message(source: Source, counts: SourceCounts) -> str:
    if counts.dropped["damaged"] == counts.read:
        return f"{source.uri}: all {counts.read} rows are damaged; set format if the file is something else"
    known = "; ".join(shape.columns for shape in SHAPES.values())
    rows = ", ".join(map(str, counts.first("unknown_shape")))
    number = counts.dropped["unknown_shape"]
    return (
        f"{source.uri}: {number} of {counts.read} rows have no known shape (first: row {rows}; columns "
        f"{counts.unknown_columns}); known are: {known}. Name the columns with sources[].columns"
    )
