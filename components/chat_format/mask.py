"""Which characters, and then which tokens, of a rendered conversation the model must produce."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finemill.components.chat_format.messages import DroppedRowError, Message
from finemill.components.chat_format.template import (
    BROKEN,
    GENERATION_END,
    GENERATION_START,
    MARK_CLOSE,
    MARK_OPEN,
    ChatTemplate,
)

IGNORE_INDEX = -100
_MARK = re.compile(f"{MARK_OPEN}(\\w+){MARK_CLOSE}")


@dataclass(frozen=True)
class Turn:
    """An assistant turn in the rendered text: characters [start, end), its end-of-turn token included.

    `message` is its index. `end_token` is that token, None if the template writes none. `complete` is False where the
    template leaves out the turn's thinking block, so that the text is not what the model produces.
    """

    message: int
    start: int
    end: int
    end_token: str | None
    complete: bool


@dataclass(frozen=True)
class Rendered:
    """A conversation's text, the text up to its last answer, and the assistant turns in it."""

    text: str
    prompt: str
    turns: Sequence[Turn]


def render_turns(
    template: ChatTemplate, messages: list[Message], tools: Any, kwargs: Mapping[str, Any], control: re.Pattern[str]
) -> Rendered:
    """Render a conversation that ends with an assistant turn, and find what the model must produce.

    A turn begins where the generation prompt ends and ends with its last control token: line breaks after that belong
    to the template. `{% generation %}` markers, where the template has them, give the beginning.

    Args:
        template: the chat template.
        messages: checked messages, prepared for the template.
        tools: function descriptions or None.
        kwargs: further variables of the template.
        control: matches the tokenizer's control tokens.
    Raises: DroppedRowError: the template refuses the conversation, or does not show a turn as it is.
    """
    text = template.render(messages, tools, kwargs)
    prompt = template.render(messages[:-1], tools, kwargs, prompt=True)
    before = template.render(messages[:-1], tools, kwargs)
    header = prompt.removeprefix(before) if prompt.startswith(before) else ""
    unmarked, chunks = _find_chunks(template.render_marked(messages, tools, kwargs))
    if unmarked != text:
        raise DroppedRowError("template marks change the text")
    numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    missing = [number for number in numbers if number not in chunks]
    if missing:
        raise DroppedRowError("template has no loop over messages; add {% generation %} markers to it")
    turns = [
        _find_turn(text, chunks[number], header, number, messages[number], template, control) for number in numbers
    ]
    if text.startswith(prompt) and turns[-1].start < len(prompt) <= turns[-1].end:
        turns[-1] = Turn(**{**vars(turns[-1]), "start": len(prompt)})
    return Rendered(text, prompt, turns)


@dataclass(frozen=True)
class _Chunk:
    """What the template wrote for one message; `start` is marked exactly by a generation block."""

    start: int
    end: int
    exact: bool = False


def _find_chunks(marked: str) -> tuple[str, dict[int, _Chunk]]:
    """The text without marks, and the part of it that belongs to each message."""
    pieces = _MARK.split(marked)
    starts: dict[int, int] = {}
    blocks: dict[int, tuple[int, int]] = {}
    position, current, opened = len(pieces[0]), -1, 0
    for name, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        if name.isdecimal():
            # A template may run over the messages twice, first to check them: the last time counts.
            current = int(name)
            starts[current] = position
        elif name == "start":
            opened = position
        else:
            blocks[current] = (opened, position)
        position += len(piece)
    bounds = [*sorted(starts.values()), position]
    chunks = {number: _Chunk(start, bounds[bounds.index(start) + 1]) for number, start in starts.items()}
    chunks |= {number: _Chunk(start, end, exact=True) for number, (start, end) in blocks.items()}
    return "".join(pieces[::2]), chunks


def _find_turn(
    text: str,
    chunk: _Chunk,
    header: str,
    number: int,
    message: Message,
    template: ChatTemplate,
    control: re.Pattern[str],
) -> Turn:
    written = text[chunk.start : chunk.end]
    # In history a template may write less than the generation prompt has: Qwen3's empty thinking block is left out.
    start = chunk.start if chunk.exact else chunk.start + len(os.path.commonprefix([written, header]))
    _check_shown(text[start : chunk.end], message)
    last = max(control.finditer(text, start, chunk.end), key=lambda match: match.end(), default=None)
    closed = last is not None and not text[last.end() : chunk.end].strip()
    end = last.end() if last is not None and closed else start + len(text[start : chunk.end].rstrip())
    field = template.reasoning_field
    complete = field is None or message.get(field, "").strip() in written
    return Turn(number, start, end, last.group() if last is not None and closed else None, complete)


def _check_shown(written: str, message: Message) -> None:
    """Raises: DroppedRowError: the template leaves out or changes what the assistant says."""
    content = message["content"].strip()
    if content not in written:
        thought = content.startswith("<think>") and content.partition("</think>")[2].strip() in written
        raise DroppedRowError("template_removes_thinking" if thought else "template_changes_answer")
    for call in message.get("tool_calls", ()):
        if call["function"]["name"] not in written:
            raise DroppedRowError("template_without_tool_calls")


def label_tokens(
    input_ids: Sequence[int], offsets: NDArray[np.int64], spans: Sequence[tuple[int, int]]
) -> NDArray[np.int32]:
    """Labels that train on the spans only.

    Args:
        input_ids: token ids, length T.
        offsets: characters [start, end) of each token, shape (T, 2).
        spans: half-open character ranges, in order.
    Returns: labels, shape (T,), int32: the id of every token that lies within a span, `IGNORE_INDEX` elsewhere.
    """
    inside = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        inside |= (offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 1] > offsets[:, 0])
    return np.where(inside, np.asarray(input_ids, dtype=np.int32), IGNORE_INDEX).astype(np.int32)


def without_broken(text: str, positions: Sequence[int]) -> list[int]:
    """Where characters of `text` are once `BROKEN` is taken out of it."""
    return [position - text.count(BROKEN, 0, position) for position in positions]
