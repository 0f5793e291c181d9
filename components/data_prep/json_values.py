"""JSON values out of a file, a piece at a time: memory holds one value, however long the list is."""

import json
from collections.abc import Iterator
from typing import Any, TextIO

from finemill.errors import UserError

_PIECE = 1 << 20
# Errors of a value that is cut off stand near the end of what was read, but for a text, which begins anywhere.
_NEAR_END = 1 << 12


class JsonValues:
    """The values of a file, one after the other, with or without commas between them.

    `where` names the file in messages.
    """

    def __init__(self, file: TextIO, where: str) -> None:
        self._file = file
        self._where = where
        self._decoder = json.JSONDecoder()
        self._buffer, self._position, self._ended = "", 0, False
        # Lines, and characters of the last one, that are done and dropped.
        self._lines, self._columns = 0, 0
        self._dropped = 0

    @property
    def characters(self) -> int:
        """How many characters are read so far."""
        return self._dropped + self._position

    def peek(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            rest = len(self._buffer) - self._position
            stripped = len(self._buffer[self._position : self._position + 64].lstrip())
            skipped = min(rest, 64) - stripped
            self._position += skipped
            if stripped:
                return self._buffer[self._position]
            if skipped == 0 and not self._read_more():
                return ""

    def skip(self, character: str) -> bool:
        """Whether that character comes next; it is passed by."""
        found = self.peek() == character
        self._position += found
        return found

    def value(self) -> Any:
        """The next value. Raises: UserError: there is none; names the line."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                failure = self.error(error.msg, error.pos)
                cut_off = error.pos > len(self._buffer) - _NEAR_END or error.msg.startswith("Unterminated string")
                if not cut_off or not self._read_more():
                    raise failure from None
            except (ValueError, RecursionError) as error:
                reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
                raise self.error(reason) from None
            else:
                # A number may go on after the piece.
                if end < len(self._buffer) or not self._read_more():
                    self._position = end
                    return value

    def items(self) -> Iterator[Any]:
        """The values of the list that comes next. Raises: UserError: it does not end, or is no list."""
        self.skip("[")
        while not self.skip("]"):
            yield self.value()
            if not self.skip(",") and self.peek() != "]":
                raise self.error("Expecting ',' delimiter")

    def _read_more(self) -> bool:
        """Drop what is done and read at least as much as is left, so that a long value is not tried too often."""
        if self._ended:
            return False
        self._lines += self._buffer.count("\n", 0, self._position)
        line_end = self._buffer.rfind("\n", 0, self._position)
        self._columns = self._position - line_end - 1 if line_end >= 0 else self._columns + self._position
        self._dropped += self._position
        self._buffer = self._buffer[self._position :]
        self._position = 0
        piece = self._file.read(max(_PIECE, len(self._buffer)))
        self._ended = not piece
        self._buffer += piece
        return not self._ended

    def error(self, reason: str, position: int | None = None) -> UserError:
        """That the JSON at a position, the current one by default, is not valid."""
        position = self._position if position is None else position
        line = self._lines + self._buffer.count("\n", 0, position) + 1
        line_end = self._buffer.rfind("\n", 0, position)
        column = position - line_end if line_end >= 0 else self._columns + position + 1
        return UserError(
            f"{self._where}, line {line}: not valid JSON ({reason} at column {column}); "
            "correct the line, or set format if the file is something else"
        )
