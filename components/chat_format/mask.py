"""Which characters, and then which tokens, of a rendered conversation the model must produce."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finemill.artifacts.dataset import IGNORE_INDEX
from finemill.components.chat_format.messages import DroppedRowError, Message
from finemill.components.chat_format.template import BROKEN, MARK_CLOSE, MARK_OPEN, ChatTemplate

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
    complete: bool = True


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

    A turn begins where the generation prompt ends, or where a `{% generation %}` block begins if that is later, and
    ends with its last control token: line breaks after that belong to the template.

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
    unmarked, chunks = _find_chunks(template.render_marked(messages, tools, kwargs))
    if unmarked != text:
        raise DroppedRowError("template_cannot_be_marked")
    numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if any(number not in chunks for number in numbers):
        raise DroppedRowError("template_without_loop_over_messages")
    last = chunks[numbers[-1]]
    header = prompt[last.start :] if prompt.startswith(text[: last.start]) else ""
    turns = [_find_turn(text, chunks[number], header, number, messages[number], control) for number in numbers]
    return Rendered(text, prompt, [_mark_complete(turn, text, messages, template) for turn in turns])


@dataclass(frozen=True)
class _Chunk:
    """What the template wrote for one message, and where in it a generation block begins."""

    start: int
    end: int
    block_start: int = 0


def _find_chunks(marked: str) -> tuple[str, dict[int, _Chunk]]:
    """The text without marks, and the part of it that belongs to each message."""
    pieces = _MARK.split(marked)
    starts: dict[int, int] = {}
    blocks: dict[int, int] = {}
    position, current = len(pieces[0]), -1
    for name, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        if name.isdecimal():
            # A template may run over the messages twice, first to check them: the last time counts.
            current = int(name)
            starts[current] = position
        elif name == "start":
            blocks.setdefault(current, position)
        position += len(piece)
    bounds = [*sorted(starts.values()), position]
    ends = {number: bounds[bounds.index(start) + 1] for number, start in starts.items()}
    chunks = {number: _Chunk(start, ends[number], blocks.get(number, start)) for number, start in starts.items()}
    return "".join(pieces[::2]), chunks


def _find_turn(text: str, chunk: _Chunk, header: str, number: int, message: Message, control: re.Pattern[str]) -> Turn:
    header_end = chunk.start + _shared_header(text[chunk.start : chunk.end], header, control)
    start = max(header_end, chunk.block_start)
    _check_shown(text[chunk.start : chunk.end], message)
    if message.get("tool_calls"):
        said = max((match.start() for match in control.finditer(text, start, chunk.end)), default=start)
    else:
        content = message["content"].strip()
        said = text.rindex(content, chunk.start, chunk.end) + len(content)
    # Adjoining control tokens all end the turn; one that stands on a line of its own closes the whole conversation.
    closing = re.compile(rf"\s*((?:{control.pattern})+)").match(text, said, chunk.end)
    if closing is None:
        return Turn(number, start, start + len(text[start : chunk.end].rstrip()), None)
    return Turn(number, start, closing.end(), closing[1])


def _shared_header(written: str, header: str, control: re.Pattern[str]) -> int:
    """How many characters of the generation prompt stand before the answer in `written`.

    In history a template may write less than the whole prompt: Qwen3 leaves out its empty thinking block. What may be
    missing is cut off after a line break or a control token, so that `<think>` and `<tool_call>` share nothing.
    """
    cuts = {len(header), *(match.end() for match in re.finditer(rf"\n|{control.pattern}", header))}
    return max((cut for cut in cuts if written.startswith(header[:cut])), default=0)


def _mark_complete(turn: Turn, text: str, messages: list[Message], template: ChatTemplate) -> Turn:
    reasoning = messages[turn.message].get(template.reasoning_field or "", "").strip()
    return replace(turn, complete=reasoning in text[turn.start : turn.end])


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
