"""Which characters, and then which tokens, of a rendered conversation the model must produce."""

import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finemill.artifacts.dataset import IGNORE_INDEX
from finemill.artifacts.messages import Message
from finemill.components.chat_format.environment import MARK_CLOSE, MARK_OPEN
from finemill.components.chat_format.template import BROKEN, ChatTemplate
from finemill.rows.reasons import DroppedRowError
from finemill.rows.thinking import split_thinking

_MARK = re.compile(f"{MARK_OPEN}(\\w+){MARK_CLOSE}")
_OPENS_THINKING = re.compile(r"<think>\s*\Z")
_EMPTY_THINKING = re.compile(r"<think>\s*</think>\s*")


class Turn(NamedTuple):
    """An assistant turn in the rendered text: characters [start, end), its end-of-turn token included.

    `message` is its index. `end_token` is that token, None if the template writes none. `complete` is False where the
    template leaves out the turn's thinking block, or writes the next message with it, so that the text is not what the
    model produces.
    """

    message: int
    start: int
    end: int
    end_token: str | None
    complete: bool = True


class Rendered(NamedTuple):
    """A conversation's text, the text up to its last answer, the assistant turns in it, and turns of other roles."""

    text: str
    prompt: str
    turns: Sequence[Turn]
    others: Sequence[Turn] = ()


def render_turns(
    template: ChatTemplate,
    messages: list[Message],
    tools: Any,
    kwargs: Mapping[str, Any],
    control: re.Pattern[str],
    roles: Collection[str] = (),
) -> Rendered:
    """Render a conversation that ends with an assistant turn, and find what the model must produce.

    The last turn always follows the prompt that the model gets: where the template writes the conversation before it
    otherwise once it is answered, the text is that prompt and the turn. A turn begins where the generation prompt ends,
    or where a `{% generation %}` block begins if that is later, and ends with its last control token: line breaks after
    that belong to the template.

    Args:
        template: the chat template.
        messages: checked messages, prepared for the template.
        tools: function descriptions or None.
        kwargs: further variables of the template.
        control: matches the tokenizer's control tokens.
        roles: those whose turns are to be found beside the assistant's.
    Raises: DroppedRowError: the template refuses the conversation, or does not show a turn as it is.
    """
    known = template.render_from_skeleton(messages, tools, kwargs)
    marked = known[0] if known else template.render_marked(messages, tools, kwargs)
    text, chunks = _find_chunks(marked)
    if template.keeps_text and text != template.render(messages, tools, kwargs):
        raise DroppedRowError("template_cannot_be_marked")
    numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if any(number not in chunks for number in numbers):
        raise DroppedRowError("template_without_loop_over_messages")
    prompt = known[1] if known else template.render(messages[:-1], tools, kwargs, prompt=True)
    if known is None:
        template.learn_skeleton(messages, tools, kwargs, (marked, prompt))
    last = chunks[numbers[-1]]
    if text.startswith(prompt):
        header = prompt[last.start :]
    else:
        header = _generation_prompt(template, messages, tools, kwargs, prompt)
        answer = _after_prompt(text[last.start : last.end], header, messages[-1], template, control)
        unmarked, chunks = _find_chunks(template.render_marked(messages[:-1], tools, kwargs, prompt=True))
        if unmarked != prompt:
            raise DroppedRowError("template_cannot_be_marked")
        text = prompt + answer
        chunks[numbers[-1]] = _Chunk(len(prompt) - len(header), len(text))
    turns = [_find_turn(text, chunks[number], header, number, messages[number], control) for number in numbers]
    # What a tool answers is written with the call, as in Gemma 4: the model stops before it.
    joined = {number - 1 for number, chunk in chunks.items() if chunk.start == chunk.end}
    turns = [turn._replace(complete=False) if turn.message in joined else turn for turn in turns]
    others = [
        _find_other_turn(text, chunks.get(number), number, message["content"].strip(), control)
        for number, message in enumerate(messages)
        if message["role"] in roles and message["role"] != "assistant"
    ]
    return Rendered(text, prompt, [_mark_complete(turn, text, messages, template) for turn in turns], others)


def _find_other_turn(text: str, chunk: "_Chunk | None", number: int, content: str, control: re.Pattern[str]) -> Turn:
    """What another role says and the tokens that end it; if that is written otherwise, all that the template writes.

    The first message, a system's, some templates write before they go over the others.
    """
    begin, end = (0, len(text)) if chunk is None else (chunk.start if number else 0, chunk.end)
    start = text.find(content, begin, end)
    start, said = (begin, end) if start < 0 else (start, start + len(content))
    closing = _closing(control).match(text, said, end)
    return Turn(number, start, said, None) if closing is None else Turn(number, start, closing.end(), closing[1])


def _generation_prompt(
    template: ChatTemplate, messages: list[Message], tools: Any, kwargs: Mapping[str, Any], prompt: str
) -> str:
    """What `add_generation_prompt` puts after the conversation."""
    without = template.render(messages[:-1], tools, kwargs)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, without, strict=False)))
    return prompt[shared:]


def _after_prompt(written: str, header: str, message: Message, template: ChatTemplate, control: re.Pattern[str]) -> str:
    """What the template wrote for the last message, as the model must produce it after the generation prompt.

    Raises: DroppedRowError: the generation prompt is not what stands before the answer.
    """
    shared = _shared_header(written, header, control)
    missing, answer = header[shared:], written[shared:]
    if _OPENS_THINKING.search(missing):
        reasoning = template.thinking_of(message)
        if reasoning is None:
            raise DroppedRowError("prompt_opens_thinking")
        return f"{reasoning}\n</think>\n\n{answer.lstrip()}"
    if missing and not _EMPTY_THINKING.fullmatch(missing):
        raise DroppedRowError("template_changes_prompt")
    return answer


class _Chunk(NamedTuple):
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
            starts.pop(current, None)
            starts[current] = position
        elif name == "start":
            blocks.setdefault(current, position)
        position += len(piece)
    # In the order of the text; of a message that is written with the one before it nothing is left.
    ends = [*starts.values(), position][1:]
    chunks = {
        number: _Chunk(start, end, blocks.get(number, start))
        for (number, start), end in zip(starts.items(), ends, strict=True)
    }
    return "".join(pieces[::2]), chunks


def _find_turn(text: str, chunk: _Chunk, header: str, number: int, message: Message, control: re.Pattern[str]) -> Turn:
    header_end = chunk.start + _shared_header(text[chunk.start : chunk.end], header, control)
    start = max(header_end, chunk.block_start)
    content = _shown_content(text[chunk.start : chunk.end], message)
    if message.get("tool_calls"):
        said = max((match.start() for match in control.finditer(text, start, chunk.end)), default=start)
    else:
        said = text.rindex(content, chunk.start, chunk.end) + len(content)
    # Adjoining control tokens all end the turn; one that stands on a line of its own closes the whole conversation.
    closing = _closing(control).match(text, said, chunk.end)
    if closing is None:
        return Turn(number, start, start + len(text[start : chunk.end].rstrip()), None)
    return Turn(number, start, closing.end(), closing[1])


def _shared_header(written: str, header: str, control: re.Pattern[str]) -> int:
    """How many characters of the generation prompt stand before the answer in `written`.

    In history a template may write less than the whole prompt: Qwen3 leaves out its empty thinking block. What may be
    missing is cut off after a line break or a control token, so that `<think>` and `<tool_call>` share nothing.
    """
    return next((cut for cut in _cuts(header, control) if written.startswith(header[:cut])), 0)


@lru_cache(maxsize=64)
def _closing(control: re.Pattern[str]) -> re.Pattern[str]:
    """Control tokens one after the other."""
    return re.compile(rf"\s*((?:{control.pattern})+)")


@lru_cache(maxsize=1024)
def _cuts(header: str, control: re.Pattern[str]) -> list[int]:
    """Where a generation prompt may be cut off, the longest part first: conversations have the same few prompts."""
    return sorted(
        {len(header), *(match.end() for match in re.finditer(rf"\n|{control.pattern}", header))}, reverse=True
    )


def _mark_complete(turn: Turn, text: str, messages: list[Message], template: ChatTemplate) -> Turn:
    reasoning = template.thinking_of(messages[turn.message]) or ""
    complete = not reasoning or reasoning.strip() in text[turn.start : turn.end]
    return turn if complete else turn._replace(complete=False)


def _shown_content(written: str, message: Message) -> str:
    """What the assistant says as the template writes it, with its thinking block if that is in the content and shown.

    Raises: DroppedRowError: the template leaves out or changes what the assistant says.
    """
    for call in message.get("tool_calls", ()):
        if any(name not in written for name in (call["function"]["name"], *call["function"]["arguments"])):
            raise DroppedRowError("template_without_tool_calls", "tool_calls")
    content: str = message["content"].strip()
    if content not in written:
        content = split_thinking(message["content"])[1].strip()
    if content not in written:
        raise DroppedRowError("template_changes_answer")
    return content


def label_tokens(
    input_ids: NDArray[np.int32], offsets: NDArray[np.int64], spans: Sequence[tuple[int, int]]
) -> NDArray[np.int32]:
    """Labels that train on the spans only.

    One rule at the edges: a token is learned if it holds a character of a span. So is the token that joins the end of
    the prompt with the first letters of the answer, and an end-of-turn token that takes in the line break after it.
    A token without characters is learned if it stands within a span or at its start.

    Args:
        input_ids: token ids, int32, shape (T,).
        offsets: characters, or bytes, [start, end) of each token in order, shape (T, 2).
        spans: half-open ranges of them, in order.
    Returns: labels, shape (T,), int32: the ids of the tokens of the spans, `IGNORE_INDEX` elsewhere.
    """
    labels = np.full(len(input_ids), IGNORE_INDEX, np.int32)
    starts, ends = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
    firsts = np.searchsorted(ends, [start for start, _ in spans], side="right").tolist()
    lasts = np.searchsorted(starts, [end for _, end in spans]).tolist()
    for first, last in zip(firsts, lasts, strict=True):
        labels[first:last] = input_ids[first:last]
    return labels


def without_broken(text: str, positions: Sequence[int]) -> list[int]:
    """Where characters of `text` are once `BROKEN` is taken out of it."""
    return [position - text.count(BROKEN, 0, position) for position in positions]
