"""What a row says, whatever its shape: messages in order, or a document."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

from finemill.artifacts.messages import Message
from finemill.rows.reasons import DroppedRowError
from finemill.rows.thinking import split_thinking
from finemill.rows.tools import Tool, check_call, has_call_text

# A picture's place in a question, as LLaVA and others mark it: at one end; other media on a line of their own, or
# at the begin if they are no element of HTML; and what marks nothing else anywhere.
_SHOWS_MEDIA = re.compile(
    r"\s*(?:<\|?image(?:[ _]?\d+)?\|?>|\[IMG\])|\s*<\|?(?:video|audio|speech)\|?>(?![^\n]*</|[ \t]*(?:tag|element)s?\b)"
    r"|.*(?:<\|?image(?:[ _]?\d+)?\|?>|\[IMG\])\s*\Z|.*\n<\|?(?:video|audio|speech)\|?>\s*\Z"
    r"|.*(?:<\|(?:vision_start|image_pad|video_pad|audio_start|AUDIO|IMAGE|begin_of_image)\|>|<img>[^<\n]*\.\w{3,4}</img>"
    r"|data:(?:image|audio|video)/[\w.+-]+;base64,)",
    re.DOTALL,
)


_MAY_SHOW_MEDIA = re.compile(r"<\|?(?:im|vi|au|sp|AUDIO|IMAGE|begin)|\[IMG\]|;base64,")
# ToolACE's calls, whose functions have names of several words: `[Market Trends API(country="us")]`.
_NAMED_CALLS = re.compile(r"\s*\[[A-Za-z][^\[\]()\n]*\(.*\)\]\s*", re.DOTALL)


@dataclass(frozen=True)
class Conversation:
    """What a row says. `text` is set instead of messages for a plain document.

    `answer` is the final answer for exact match. Of a preference, `messages` end with the better answer, and `rejected`
    are as many of the same messages with the worse one after them. `desirable` says whether the data call the last
    answer good, None where they say nothing. `unread` are the columns, and the keys of turns
    (`messages[].name`), that hold something which is used nowhere.
    """

    messages: list[Message]
    tools: list[Tool] | None = None
    answer: str | None = None
    rejected: list[Message] | None = None
    text: str | None = None
    desirable: bool | None = None
    unread: Sequence[str] = field(default=())


def checked(conversation: Conversation) -> Conversation:
    """The conversation as it is learned: arguments of calls settled, nothing after the last learned answer.

    Raises: DroppedRowError: empty turns, roles out of order, a thinking block that does not end, pictures.
    """
    if conversation.text is not None:
        return conversation
    given = _with_one_system(conversation.messages)
    messages = _until_learned(_with_checked_calls(given, conversation.tools))
    check_messages(messages)
    if conversation.rejected is None:
        return conversation if messages is conversation.messages else replace(conversation, messages=messages)
    rejected = _with_checked_calls(_with_one_system(conversation.rejected), conversation.tools)
    check_messages(rejected)
    return replace(conversation, messages=messages, rejected=rejected)


def first_question(conversation: Conversation) -> str:
    """What decides a row's split: the first question, so that conversations that begin alike stay together."""
    if conversation.text is not None:
        return conversation.text
    return str(next(message["content"] for message in conversation.messages if message["role"] == "user"))


def num_characters(conversation: Conversation) -> int:
    """Length of all that is said, system message aside."""
    if conversation.text is not None:
        return len(conversation.text)
    spoken = [*conversation.messages, *(conversation.rejected or ())[-1:]]
    return sum(len(m["content"]) + len(m.get("reasoning_content", "")) for m in spoken if m["role"] != "system")


def check_messages(messages: Sequence[Message]) -> None:
    """Check that the messages are (system?, user, assistant, (tool+, assistant)*, tool*)+ and end with an answer.

    Which of them a chat template can show is the template's to say.
    Raises: DroppedRowError: they are not, or a turn has no content.
    """
    expected: tuple[str, ...] = ("system", "user")
    for number, message in enumerate(messages, start=1):
        role, content, where = message["role"], message["content"], f"turn {number}"
        if role == "tool" and expected == ("user", "system") and _calls_in_text(messages[number - 2]):
            expected = ("tool",)
        if role not in expected:
            raise DroppedRowError("tool_without_call" if role == "tool" else "role_order", where)
        said = _said(message, where)
        if role in ("user", "assistant") and not said.strip() and not message.get("tool_calls"):
            raise DroppedRowError("empty_turn", where)
        if role == "user" and _MAY_SHOW_MEDIA.search(content) and _SHOWS_MEDIA.match(content):
            raise DroppedRowError("not_text", where)
        if role == "system":
            expected = ("user",)
        elif role == "user":
            expected = ("assistant",)
        elif role == "tool":
            expected = ("tool", "assistant", "user")
        elif message.get("tool_calls"):
            expected = ("tool",)
        else:
            expected = ("user", "system")
    if not messages or messages[-1]["role"] != "assistant":
        raise DroppedRowError("no_final_answer", f"turn {len(messages)}")


def _calls_in_text(message: Message) -> bool:
    if message["role"] != "assistant":
        return False
    said = split_thinking(message["content"])[1]
    return has_call_text(said) or _NAMED_CALLS.fullmatch(said) is not None


def _said(message: Message, where: str) -> str:
    if message["role"] != "assistant":
        return str(message["content"])
    try:
        return split_thinking(message["content"])[1]
    except DroppedRowError as reason:
        raise reason.within(where) from None


def _with_one_system(messages: list[Message]) -> list[Message]:
    """The messages, those of the system at the begin as one: templates show the first of them, some no other."""
    number = sum(1 for _ in takewhile(lambda message: message["role"] == "system", messages))
    if number < 2:
        return messages
    texts = dict.fromkeys(message["content"] for message in messages[:number])
    return [{**messages[0], "content": "\n\n".join(texts)}, *messages[number:]]


def _with_checked_calls(messages: list[Message], tools: list[Tool] | None) -> list[Message]:
    if not any("tool_calls" in message for message in messages):
        return messages
    checked_messages = []
    for number, message in enumerate(messages, start=1):
        try:
            calls = [check_call(call, tools) for call in message.get("tool_calls", ())]
        except DroppedRowError as reason:
            raise reason.within(f"turn {number}") from None
        checked_messages.append({**message, "tool_calls": calls} if calls else message)
    return checked_messages


def _until_learned(messages: list[Message]) -> list[Message]:
    """The messages up to the last answer that is to be learned."""
    said = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    learned = [number for number in said if messages[number].get("weight") != 0]
    if said and not learned:
        raise DroppedRowError("no_learned_turn")
    if not said or learned[-1] == len(messages) - 1 or messages[-1]["role"] != "assistant":
        return messages
    return messages[: learned[-1] + 1]


def whole_text(conversation: Conversation) -> str:
    """Everything that a conversation says, for comparing it with others: roles, texts, calls, tools, the worse answer.

    Two rows that teach the same have the same text, whatever their shapes.
    """
    if conversation.text is not None:
        return conversation.text
    parts = [json.dumps(conversation.tools, default=str) if conversation.tools else "null"]
    for message in conversation.messages:
        parts += _message_texts(message)
    if conversation.desirable is False:
        parts.append("undesirable")
    for message in conversation.rejected or ():
        parts += ["rejected", *_message_texts(message)]
    return "\0".join(parts)


def _message_texts(message: Message) -> Iterator[str]:
    content = message["content"]
    if message["role"] == "assistant":
        reasoning, content = split_thinking(content)
        yield message.get("reasoning_content") or reasoning or ""
        calls = message.get("tool_calls")
        yield json.dumps([call["function"] for call in calls], default=str) if calls else "[]"
        yield str(message.get("weight"))
    yield message["role"]
    yield content
