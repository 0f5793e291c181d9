"""gpt-oss's answers as its chat template writes them: messages one after the other, each in a channel.

`analysis` is thinking, `final` the answer, `commentary` to a function is a call of it.
"""

import re
from dataclasses import dataclass

_MARKS = ("<|channel|>", "<|start|>assistant")
_MESSAGE = re.compile(
    r"\s*(?:<\|start\|>assistant(?P<to>[^<]*))?<\|channel\|>(?P<channel>\w+)(?P<header>[^<]*)(?:<\|constrain\|>\w+\s*)?"
    r"<\|message\|>(?P<text>.*?)(?:<\|end\|>|<\|return\|>|<\|call\|>|\s*\Z|(?=<\|start\|>))",
    re.DOTALL,
)
_FUNCTION = re.compile(r"\bto=(?:functions\.)?(?P<name>[\w.-]+)")
# What a model writes, which may be cut anywhere.
_ANALYSIS = re.compile(r"<\|channel\|>analysis<\|message\|>(?P<thinking>.*?)(?P<end><\|end\|>|\Z)", re.DOTALL)
_AROUND = re.compile(r"<\|start\|>assistant|<\|channel\|>final<\|message\|>|<\|return\|>")


@dataclass(frozen=True)
class ChannelMessage:
    """A message in a channel; `function` is the one that it calls with its text as arguments, None for no call."""

    channel: str
    function: str | None
    text: str


def in_channels(content: str) -> bool:
    """Whether an answer begins as one in channels does."""
    return content.startswith(_MARKS)


def channel_messages(content: str) -> list[ChannelMessage] | None:
    """The messages that an answer consists of, None where it holds anything else."""
    found, position = [], 0
    while position < len(content.rstrip()):
        match = _MESSAGE.match(content, position)
        if match is None:
            return None
        called = _FUNCTION.search(f"{match['to'] or ''} {match['header']}")
        found.append(ChannelMessage(match["channel"], called["name"] if called else None, match["text"]))
        position = match.end()
    return found


def thinking_in_blocks(text: str, begin: str, end: str) -> str:
    """A text that a model wrote in channels with its thinking between `begin` and `end`, which a cut one lacks."""

    def block(match: re.Match[str]) -> str:
        return f"{begin}{match['thinking']}{end if match['end'] else ''}"

    return _AROUND.sub("", _ANALYSIS.sub(block, text)) if "<|channel|>" in text else text
