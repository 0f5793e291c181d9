"""Rows that a benchmark has, too: whoever trains on them measures what was learned by heart."""

import re
from collections.abc import Iterator
from contextlib import closing

from finemill.components.data_prep.config import DataPrepConfig, Source
from finemill.components.data_prep.load import load_source
from finemill.components.data_prep.read import Damaged, Row
from finemill.components.data_prep.units import runs_of, units_of
from finemill.errors import UserError
from finemill.rows.conversation import whole_text
from finemill.rows.identity import normalize_text
from finemill.rows.reasons import DroppedRowError
from finemill.rows.shapes import detect_shape, to_conversation

# Shorter texts are in every data set: "what is the capital of france" is no leak.
_FEWEST_UNITS = 8
_PUNCTUATION = re.compile(r"[^\w\s]|_")


class Benchmarks:
    """The runs of units of the named files' rows, and where each stands first."""

    def __init__(self, config: DataPrepConfig) -> None:
        self._length = config.benchmark_ngram
        self._runs: dict[int, str] = {}
        self._lengths: set[int] = set()
        for uri in config.benchmarks:
            for number, text in _texts(uri, config.seed):
                self._add(text, f"row {number} of {uri}")

    def _add(self, text: str, place: str) -> None:
        units = _words(normalize_text(text))
        if len(units) >= min(self._length, _FEWEST_UNITS):
            self._lengths.add(min(self._length, len(units)))
            for run in runs_of(units, self._length):
                self._runs.setdefault(hash(run), place)

    def check(self, text: str) -> None:
        """Raises: DroppedRowError: the normalized text shares a run with a benchmark, or holds a short one whole."""
        if not self._runs:
            return
        units = _words(text)
        for length in sorted(self._lengths):
            for run in runs_of(units, length) if len(units) >= length else ():
                if (place := self._runs.get(hash(run))) is not None:
                    raise DroppedRowError("benchmark", place)


def _words(text: str) -> list[str]:
    """Units without punctuation, which copies differ in."""
    return units_of(_PUNCTUATION.sub(" ", text))


def _texts(uri: str, seed: int) -> Iterator[tuple[int, str]]:
    """What each row of a benchmark says: its question where its shape is known, else its longest text."""
    found = False
    with closing(load_source(Source(uri=uri), seed)) as rows:
        for number, row in enumerate(rows, start=1):
            for text in () if isinstance(row, Damaged) else _texts_of(row):
                found = True
                yield number, text
    if not found:
        raise UserError(f"benchmarks: {uri} has no row with a text; check the file")


def _texts_of(row: Row) -> Iterator[str]:
    try:
        conversation = to_conversation(row, detect_shape(row) or "text")
    except DroppedRowError:
        texts = [value for value in row.values() if isinstance(value, str)]
        yield from sorted(texts, key=len)[-1:]
        return
    if conversation.text is not None:
        yield whole_text(conversation)
    for message in conversation.messages:
        if message["role"] in ("user", "assistant"):
            yield message["content"]
