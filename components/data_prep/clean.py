"""From raw rows to records: a known shape, an identity, a length; or the reason why a row is left out."""

import json
import logging
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from finemill.components.data_prep.config import DataPrepConfig, Source
from finemill.components.data_prep.quality import flags_of
from finemill.components.data_prep.read import Damaged, Row
from finemill.errors import UserError
from finemill.rows.conversation import Conversation, num_characters, whole_text
from finemill.rows.identity import normalize_text, question_key, row_id, text_key
from finemill.rows.reasons import WHOLE_ROW, DroppedRowError
from finemill.rows.shapes import SHAPES, detect_shape, to_conversation

logger = logging.getLogger(__name__)

_MAX_SHOWN = 5
_MAX_FIELD = 200
_SURROGATE = re.compile("[\ud800-\udfff]")
_TEXT = json.JSONEncoder(ensure_ascii=False, default=str)


@dataclass(frozen=True, slots=True)
class Record:
    """What is kept of a row; its text lies in the spool.

    `number` counts from 1 in the source. `row_id` and the keys are sha256 digests: of the row, of its normalized first
    question, of everything it says, normalized.
    """

    source: int
    number: int
    row_id: str
    shape: str
    prompt_key: bytes
    text_key: bytes
    num_characters: int
    offset: int


@dataclass
class SourceCounts:
    """What became of a source's rows.

    `reject` gets number, reason and field of each that is left out; `flags` counts doubtful ones by flag.
    """

    reject: Callable[[int, str, str], None] = lambda number, reason, field: None
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    _first: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    def drop(self, number: int, reason: str, where: str = "") -> None:
        """Count a row that is left out, and say where in it the reason lies: nowhere in particular in the whole row."""
        self.dropped[reason] += 1
        self._note(reason, number)
        self.reject(number, reason, where or WHOLE_ROW)

    def flag(self, number: int, name: str) -> None:
        """Count a doubtful row."""
        self.flags[name] += 1
        self._note(name, number)

    def _note(self, name: str, number: int) -> None:
        if len(self._first[name]) < _MAX_SHOWN:
            self._first[name].append(number)

    def first(self, name: str) -> list[int]:
        """Numbers of the first rows left out for a reason, or with a flag."""
        return self._first.get(name, [])


class Spool:
    """Row texts in a temporary file."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="finemill-rows-")  # noqa: SIM115 - lives as long as the spool

    def append(self, text: str) -> int:
        """Store a text without line breaks and return its offset."""
        offset = self._file.tell()
        self._file.write(text.encode() + b"\n")
        return offset

    def read(self, offset: int) -> str:
        """The text stored at `offset`. Nothing may be appended afterwards."""
        self._file.seek(offset)
        return self._file.readline()[:-1].decode()

    def close(self) -> None:
        """Free the disk space."""
        self._file.close()


def clean_rows(
    rows: Iterable[Row | Damaged], number: int, config: DataPrepConfig, spool: Spool, counts: SourceCounts
) -> Iterator[tuple[Record, str]]:
    """Records of the rows that can be used, each with its normalized text for near-duplicate search.

    Raises: UserError: no row of the source has a known shape, or one has none and `unknown_rows` is `error`.
    """
    source, columns = config.sources[number], "none"
    for row in rows:
        counts.read += 1
        if isinstance(row, Damaged):
            _count_damaged(row, counts, config)
            continue
        shape = source.shape or detect_shape(row, source.columns)
        if shape is None:
            columns = ", ".join(map(str, row)) or "none"
            counts.drop(counts.read, "unknown_shape", f"columns {columns}"[:_MAX_FIELD])
            if config.unknown_rows == "error":
                raise UserError(_unknown_message(source, counts, columns))
            continue
        counts.shapes[shape] += 1
        try:
            conversation = to_conversation(row, shape, bad_answers=config.labelled_bad == "keep")
            text = _row_text(row, conversation, config)
        except DroppedRowError as reason:
            counts.drop(counts.read, str(reason), reason.field)
            continue
        counts.unread.update(conversation.unread)
        flags = flags_of(conversation)
        for flag in flags:
            counts.flag(counts.read, flag)
        unwanted = next((flag for flag in flags if flag in config.drop_flagged), None)
        if unwanted is not None:
            counts.drop(counts.read, unwanted)
            continue
        said = normalize_text(whole_text(conversation))
        record = Record(
            source=number,
            number=counts.read,
            row_id=row_id(row),
            shape=shape,
            prompt_key=question_key(conversation),
            text_key=text_key(said),
            num_characters=num_characters(conversation),
            offset=spool.append(text),
        )
        yield record, said
    if counts.read and not counts.shapes:
        raise UserError(_unknown_message(source, counts, columns))


def _count_damaged(row: Damaged, counts: SourceCounts, config: DataPrepConfig) -> None:
    counts.drop(counts.read, "damaged", f"{row.where}: {row.problem}"[:_MAX_FIELD])
    if counts.dropped["damaged"] > config.max_damaged_rows:
        raise UserError(
            f"{row.where}: {row.problem}; correct it, set format if the file is something else, or raise "
            f"max_damaged_rows ({config.max_damaged_rows})"
        )
    logger.warning("%s: %s; the row is left out", row.where, row.problem)


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


def _unknown_message(source: Source, counts: SourceCounts, columns: str) -> str:
    if counts.dropped["damaged"] == counts.read:
        return f"{source.uri}: all {counts.read} rows are damaged; set format if the file is something else"
    known = "; ".join(shape.columns for shape in SHAPES.values())
    rows = ", ".join(map(str, counts.first("unknown_shape")))
    number = counts.dropped["unknown_shape"]
    return (
        f"{source.uri}: {number} of {counts.read} rows have no known shape (first: row {rows}; columns {columns}); "
        f"known are: {known}. Name the columns with sources[].columns"
    )
