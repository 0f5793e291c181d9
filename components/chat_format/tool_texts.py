"""Functions, calls and results as texts, in Hermes' way, for templates that have no place for them."""

import json
from collections.abc import Sequence
from typing import Any

from finemill.artifacts.messages import Message
from finemill.rows.tools import Tool


def with_tool_texts(messages: Sequence[Message], tools: Sequence[Tool] | None, *, calls: bool) -> list[Message]:
    """Messages of which the system's lists the functions; with `calls`, calls are text and results the user's turns.

    Args:
        messages: of one conversation.
        tools: the functions, None for none to list.
        calls: whether the template shows no calls either.
    """
    written = _with_call_texts(messages) if calls else list(messages)
    if not tools:
        return written
    described = "\n".join(
        (
            "You may call one or more functions. Their signatures:\n<tools>",
            *(json.dumps(tool, ensure_ascii=False) for tool in tools),
            "</tools>\n\nA call is a JSON object within tags:",
            '<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>',
        )
    )
    if written[0]["role"] != "system":
        return [{"role": "system", "content": described}, *written]
    return [{**written[0], "content": f"{written[0]['content']}\n\n{described}"}, *written[1:]]


def _with_call_texts(messages: Sequence[Message]) -> list[Message]:
    written: list[Message] = []
    for before, message in zip([None, *messages], messages, strict=False):
        if message["role"] == "tool":
            message = {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
        elif message.get("tool_calls"):
            texts = [message["content"], *map(_call_text, message["tool_calls"])]
            message = {key: value for key, value in message.items() if key != "tool_calls"}
            message["content"] = "\n".join(filter(None, texts))
        if before is not None and before["role"] == "tool" and message["role"] == "user":
            # Of several results, and a question after them, one turn.
            written[-1] = {"role": "user", "content": f"{written[-1]['content']}\n{message['content']}"}
        else:
            written.append(message)
    return written


def _call_text(call: dict[str, Any]) -> str:
    named = {key: call["function"][key] for key in ("name", "arguments")}
    return f"<tool_call>\n{json.dumps(named, ensure_ascii=False)}\n</tool_call>"
