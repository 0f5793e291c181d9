"""An answer as it is written, piece by piece: its thinking apart from what it says."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from finemill.rows.answers import CLOSE_MARKS, CLOSES, OPEN_MARKS, OPENS, THINK_CLOSE, THINK_OPEN


@dataclass(frozen=True)
class Piece:
    """Some characters of an answer."""

    text: str
    thinking: bool = False


@dataclass(frozen=True)
class End:
    """How an answer ended; numbers of tokens are None where a server does not say."""

    finished: bool
    num_tokens: int | None = None
    num_prompt_tokens: int | None = None


@dataclass(frozen=True)
class Reply:
    """A whole answer; `thinking` is "" for none."""

    thinking: str
    answer: str
    finished: bool
    num_tokens: int | None
    num_prompt_tokens: int | None = field(default=None, compare=False)

    @property
    def is_cut(self) -> bool:
        """Whether it ends inside its thinking."""
        return bool(self.thinking) and not self.answer and not self.finished

    @property
    def text(self) -> str:
        """As the model wrote it, so that what ends inside its thinking has no answer."""
        if not self.thinking:
            return self.answer
        opened = f"{THINK_OPEN}\n{self.thinking}"
        return f"{opened}\n{THINK_CLOSE}\n\n{self.answer}" if self.answer else opened


def collect(stream: Iterable[Piece | End]) -> Reply:
    """The whole of a stream. A block that closes without having been opened is thinking all the same."""
    pieces: list[Piece] = []
    end = End(finished=False)
    for event in stream:
        if isinstance(event, End):
            end = event
        else:
            pieces.append(event)
    thinking = "".join(piece.text for piece in pieces if piece.thinking)
    unopened, _, answer = "".join(piece.text for piece in pieces if not piece.thinking).rpartition(THINK_CLOSE)
    return Reply((thinking + unopened).strip(), answer.strip(), end.finished, end.num_tokens, end.num_prompt_tokens)


def _may_go_on(end: str, marks: Iterable[str]) -> bool:
    """Whether a mark begins with `end` and is longer."""
    return any(len(mark) > len(end) and mark.casefold().startswith(end.casefold()) for mark in marks)


class ThinkingSplitter:
    """Tells thinking from answer in text that comes in pieces of any size, and leaves the marks of any family out.

    Args:
        opened: whether the prompt has opened the block already.
    """

    def __init__(self, *, opened: bool = False) -> None:
        self._thinking = opened
        self._waiting = ""
        self._at_start = True

    def add(self, text: str) -> Iterator[Piece]:
        """What is certain after `text`; the rest waits for the next call."""
        self._waiting += text
        yield from self._split(final=False)

    def _split(self, *, final: bool) -> Iterator[Piece]:
        while True:
            pattern, marks = (CLOSES, CLOSE_MARKS) if self._thinking else (OPENS, OPEN_MARKS)
            found = pattern.search(self._waiting)
            # A longer mark may begin as a shorter one does.
            if not found or (not final and _may_go_on(self._waiting[found.start() :], marks)):
                break
            yield from self._piece(self._waiting[: found.start()])
            self._thinking, self._waiting, self._at_start = not self._thinking, self._waiting[found.end() :], True
        # The end may be the beginning of a mark.
        sizes = range(min(len(self._waiting), max(map(len, marks))), 0, -1)
        kept = next((size for size in sizes if _may_go_on(self._waiting[-size:], marks)), 0)
        ready = self._waiting[: len(self._waiting) - kept]
        self._waiting = self._waiting[len(ready) :]
        yield from self._piece(ready)

    def close(self) -> Iterator[Piece]:
        """What waited for more."""
        yield from self._split(final=True)
        yield from self._piece(self._waiting)
        self._waiting = ""

    def _piece(self, text: str) -> Iterator[Piece]:
        """The line breaks that templates write around the marks are no part of what is said."""
        if self._at_start:
            text = text.lstrip("\r\n")
        if text:
            self._at_start = False
            yield Piece(text, self._thinking)
