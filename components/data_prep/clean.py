"""From raw rows to records: a known shape, an identity, a length; or the reason why a row is left out."""

import hashlib
import json
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from finemill.components.data_prep.config import DataPrepConfig, Source
from finemill.components.data_prep.read import Row
from finemill.errors import UserError
from finemill.rows.shapes import SHAPES, detect_shape, prompt_and_answer

_MAX_SHOWN = 5
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Record:
    """What is kept in memory of a row; its text lies in the spool.

    `row_id` and the keys are sha256 digests: of the row, of its normalized prompt, of its normalized prompt and answer.
    """

    source: int
    row_id: str
    shape: str
    prompt_key: bytes
    text_key: bytes
    num_characters: int
    offset: int


@dataclass
class SourceCounts:
    """What became of a source's rows."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    unknown_rows: list[int] = field(default_factory=list)


class Spool:
    """Row texts in a temporary file, so that memory holds only records."""

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
    rows: Iterable[Row], number: int, config: DataPrepConfig, spool: Spool, counts: SourceCounts
) -> Iterator[tuple[Record, str]]:
    """Records of the rows that can be used, each with its normalized text for near-duplicate search.

    Raises: UserError: no row of the source has a known shape, or one has none and `unknown_rows` is `error`.
    """
    source, columns = config.sources[number], "none"
    for row in rows:
        counts.read += 1
        shape = detect_shape(row)
        if shape is None:
            columns = ", ".join(map(str, row)) or "none"
            _count_unknown(source, counts, columns, stop=config.unknown_rows == "error")
            continue
        counts.shapes[shape] += 1
        prompt, answer = prompt_and_answer(row, shape)
        text = json.dumps(row, ensure_ascii=False, default=str)
        reason = _drop_reason(prompt, answer, shape, config) or (None if _is_unicode(text) else "not_unicode")
        if reason:
            counts.dropped[reason] += 1
            continue
        normal_prompt, normal_answer = normalize_text(prompt), normalize_text(answer)
        record = Record(
            source=number,
            row_id=_digest(json.dumps(row, ensure_ascii=False, sort_keys=True, default=str)).hex()[:16],
            shape=shape,
            prompt_key=_digest(normal_prompt),
            text_key=_digest(f"{normal_prompt}\0{normal_answer}\0{row.get('tools')}"),
            num_characters=len(prompt) + len(answer),
            offset=spool.append(text),
        )
        yield record, f"{normal_prompt} {normal_answer}"
    if counts.read and not counts.shapes:
        raise UserError(_unknown_message(source, counts, columns))


def normalize_text(text: str) -> str:
    """One spelling for texts that differ only in case, character width or white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _drop_reason(prompt: str, answer: str, shape: str, config: DataPrepConfig) -> str | None:
    length = len(prompt) + len(answer)
    if not prompt.strip():
        return "empty"
    if shape not in ("text", "turns") and not answer.strip():
        return "no_answer"
    if length < config.min_characters:
        return "too_short"
    if config.max_characters is not None and length > config.max_characters:
        return "too_long"
    return None


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON's escapes allow and UTF-8 does not."""
    return text.isascii() or not _SURROGATE.search(text)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


def _count_unknown(source: Source, counts: SourceCounts, columns: str, *, stop: bool) -> None:
    counts.dropped["unknown_shape"] += 1
    if len(counts.unknown_rows) < _MAX_SHOWN:
        counts.unknown_rows.append(counts.read)
    if stop:
        raise UserError(_unknown_message(source, counts, columns))


def _unknown_message(source: Source, counts: SourceCounts, columns: str) -> str:
    known = "; ".join(shape.columns for shape in SHAPES.values())
    rows = ", ".join(map(str, counts.unknown_rows))
    number = counts.dropped["unknown_shape"]
    return (
        f"{source.uri}: {number} of {counts.read} rows have no known shape (first: row {rows}; columns {columns}); "
        f"known are: {known}. Name the columns with sources[].columns"
    )
