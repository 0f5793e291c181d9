"""The thinking block of an assistant's turn: in a field of its own, or written at the start of the content."""

import re
from collections.abc import Mapping
from typing import Any

from finemill.rows.reasons import DroppedRowError

_BLOCK = re.compile(r"\s*<think>(?P<reasoning>.*?)</think>(?P<content>.*)", re.DOTALL)
# Without `<think>`, which some models' prompts end with, only a line of its own can be told from a mention.
_CLOSED = re.compile(r"(?P<reasoning>(?:(?!</?think>).)*)\n[ \t]*</think>[ \t]*\r?\n(?P<content>.*)", re.DOTALL)
# A second block that begins in the first, which a mention in a sentence does not, and one that ends once more.
_OPENED_AGAIN = re.compile(r"\A\s*<think>|\n[ \t]*<think>[ \t]*(?:\n|\Z)")
# What OpenThinker and Sky-T1, Kimi, Magistral, and Command A have for the tags, and for what follows them: control
# tokens of theirs, which are text to any other tokenizer.
OTHER_TAGS = {
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "\u25c1think\u25b7": "\u25c1/think\u25b7",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
}
_ANSWER_TAGS = {"<|begin_of_solution|>": "<|end_of_solution|>", "<|START_RESPONSE|>": "<|END_RESPONSE|>"}
# At an end, where Qwen3's users write it; one within the text is mentioned.
_SWITCH = re.compile(r"(?:\A\s*/(no_)?think(?=\s|\Z))|(?:(?<=\s)/(no_)?think\s*\Z)")


def split_thinking(text: str) -> tuple[str | None, str]:
    """The thinking block at the start of `text`, None if there is none, and the rest.

    Line breaks around both are left out, as templates that split the block off do; without a block the rest is `text`
    itself. A block that only closes counts if `</think>` stands alone on a line and nowhere else.
    Raises: DroppedRowError: a block that does not end, or a second one after it.
    """
    if "think>" not in text:
        return None, text
    match = _BLOCK.match(text)
    if match is None:
        if text.lstrip().startswith("<think>"):
            raise DroppedRowError("unclosed_thinking")
        match = _CLOSED.match(text)
        if match is None or "</think>" in match["content"]:
            return None, text
    if match["content"].lstrip().startswith(("<think>", "</think>")) or _OPENED_AGAIN.search(match["reasoning"]):
        raise DroppedRowError("two_thinking_blocks")
    return match["reasoning"].strip("\r\n"), match["content"].lstrip("\r\n")


def in_think_tags(content: str) -> str:
    """An answer that begins with another family's tags with its thinking in `<think>`; any other as it is.

    Raises: DroppedRowError: a block that does not end, or a second one after it.
    """
    text = content.strip()
    opening = next((tag for tag in OTHER_TAGS if text.startswith(tag)), None)
    if opening is None:
        return content
    reasoning, closed, answer = text.removeprefix(opening).partition(OTHER_TAGS[opening])
    if not closed:
        raise DroppedRowError("unclosed_thinking")
    if opening in reasoning or opening in answer or closed in answer:
        raise DroppedRowError("two_thinking_blocks")
    answer = answer.strip()
    for begin, end in _ANSWER_TAGS.items():
        if answer.startswith(begin) and answer.endswith(end):
            answer = answer.removeprefix(begin).removesuffix(end).strip()
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{answer}"


def bare_thinking(text: str, content: str) -> str:
    """A thinking block that stands apart from its answer, `content`, without the tags that some write around it.

    Raises: DroppedRowError: another text than the answer follows the block.
    """
    if "think>" not in text:
        return text
    bare, _, rest = text.strip().removeprefix("<think>").partition("</think>")
    if _OPENED_AGAIN.search(bare) or rest.strip() not in ("", content.strip()):
        raise DroppedRowError("two_thinking_blocks")
    return bare


def switch_of(question: str) -> bool | None:
    """What `/think` or `/no_think` at an end of a question asks for: the last of them; None where there is neither."""
    found = [first or last for first, last in _SWITCH.findall(question)] if "think" in question else []
    return not found[-1] if found else None


def thinking_of(message: Mapping[str, Any]) -> str:
    """What an assistant message thinks before it speaks, "" for nothing."""
    return message.get("reasoning_content") or split_thinking(message["content"])[0] or ""


def without_thinking(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without its thinking block; any other than an assistant's as it is."""
    if message["role"] != "assistant":
        return dict(message)
    kept = {key: value for key, value in message.items() if key != "reasoning_content"}
    return {**kept, "content": split_thinking(message["content"])[1]}


def with_thinking(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with a thinking block, an empty one if it has none; any other than an assistant's as it is."""
    thinks = message.get("reasoning_content") is not None or split_thinking(message["content"])[0] is not None
    return dict(message) if message["role"] != "assistant" or thinks else {**message, "reasoning_content": ""}
