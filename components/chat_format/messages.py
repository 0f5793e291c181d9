"""Rows of every known shape as messages: roles system, user, assistant and tool, as transformers' templates take them.

An assistant message may have `reasoning_content` (its thinking block) and `tool_calls`
(`[{"type": "function", "function": {"name": ..., "arguments": {...}}}]`).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from finemill.rows.answers import final_answer
from finemill.rows.reasons import DroppedRowError
from finemill.rows.shapes import ROLES, Row, as_turns, completion, conversation, turn_role
from finemill.rows.thinking import split_thinking

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """What a row says. `text` is set instead of messages for a plain document.

    `answer` is the final answer for exact match, `rejected` a worse last message than the one in `messages`.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    answer: str | None = None
    rejected: Message | None = None
    text: str | None = None


def to_conversation(row: Row, shape: str) -> Conversation:
    """Convert a row of `shape` (a name in `rows.shapes.SHAPES`) and check it.

    Raises: DroppedRowError: empty turns, roles out of order, a thinking block that does not end, no answer.
    """
    result = _CONVERTERS[shape](row)
    if result.text is None:
        check_messages(result.messages)
        if result.rejected is not None:
            check_messages([*result.messages[:-1], result.rejected])
    return result


def check_messages(messages: list[Message]) -> None:
    """Raises: DroppedRowError: not system?, (user, assistant, (tool+, assistant)*)+, or a turn without content."""
    expected: tuple[str, ...] = ("system", "user")
    for message in messages:
        role = message["role"]
        if role not in expected:
            raise DroppedRowError("tool_without_call" if role == "tool" else "role_order")
        said = split_thinking(message["content"])[1] if role == "assistant" else message["content"]
        has_content = bool(said.strip()) or bool(message.get("tool_calls"))
        if role in ("user", "assistant") and not has_content:
            raise DroppedRowError("empty_turn")
        if role == "system":
            expected = ("user",)
        elif role == "user":
            expected = ("assistant",)
        elif role == "tool":
            expected = ("tool", "assistant")
        else:
            expected = ("tool",) if message.get("tool_calls") else ("user",)
    if not messages or messages[-1]["role"] != "assistant":
        raise DroppedRowError("no_final_answer")


def user(text: str) -> Message:
    """A user message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """An assistant message; a thinking block stays in its content."""
    return {"role": "assistant", "content": text}


def _from_messages(row: Row) -> Conversation:
    messages = to_messages(conversation(row))
    return Conversation([*_system(row), *messages], to_tools(row.get("tools")))


def _system(row: Row) -> list[Message]:
    """The system message that some data sets keep in a column of its own."""
    system = row.get("system")
    return [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []


def to_messages(turns: list[Row]) -> list[Message]:
    """OpenAI or ShareGPT turns; an assistant's text and the tool calls that follow it are one message."""
    messages: list[Message] = []
    for turn in turns:
        message = _to_message(turn)
        previous: Message = messages[-1] if messages else {"role": ""}
        if message.get("tool_calls") and not message["content"] and previous["role"] == "assistant":
            previous["tool_calls"] = [*previous.get("tool_calls", []), *message["tool_calls"]]
        else:
            messages.append(message)
    return messages


def _to_message(turn: Row) -> Message:
    name = turn_role(turn)
    role = ROLES.get(name)
    if role is None:
        raise DroppedRowError("unknown_role")
    content = _content(turn.get("content", turn.get("value")))
    if name == "function_call":
        return {"role": role, "content": "", "tool_calls": _tool_calls(content)}
    if role != "assistant":
        kept = {key: turn[key] for key in ("name", "tool_call_id") if role == "tool" and turn.get(key)}
        return {"role": role, "content": content, **kept}
    message = assistant(content)
    reasoning = turn.get("reasoning_content")
    if isinstance(reasoning, str) and reasoning.strip():
        message["reasoning_content"] = reasoning.strip()
    if turn.get("tool_calls"):
        message["tool_calls"] = _tool_calls(turn["tool_calls"])
    return message


def _content(content: Any) -> str:
    """The text of a turn; of a list of parts all must be text."""
    if content is None:
        return ""
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise DroppedRowError("not_text")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise DroppedRowError("not_text")
    return content


def _tool_calls(value: Any) -> list[dict[str, Any]]:
    """One call or a list, as objects or JSON text, arguments always as an object."""
    calls = _loads(value)
    return [_tool_call(call) for call in (calls if isinstance(calls, list) else [calls])]


def _tool_call(value: Any) -> dict[str, Any]:
    call = _loads(value)
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DroppedRowError("bad_tool_call")
    arguments = _loads(function.get("arguments") or {})
    if not isinstance(arguments, Mapping):
        raise DroppedRowError("bad_tool_call")
    kept = {"id": call["id"]} if call.get("id") else {}
    return {**kept, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def to_tools(value: Any) -> list[dict[str, Any]] | None:
    """Function descriptions, as objects or JSON text, each `{"type": "function", "function": ...}`; None for none."""
    tools = _loads(value, reason="bad_tools") if value else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DroppedRowError("bad_tools")
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools]


def _loads(value: Any, reason: str = "bad_tool_call") -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise DroppedRowError(reason) from None


def _from_preference(row: Row) -> Conversation:
    prompt, chosen, rejected = (
        row.get("prompt") or conversation(row),
        as_turns(row["chosen"]),
        as_turns(row["rejected"]),
    )
    before = [user(prompt)] if isinstance(prompt, str) else to_messages(prompt or chosen[:-1])
    better, worse = (
        assistant(answer) if isinstance(answer, str) else to_messages(answer[-1:])[0] for answer in (chosen, rejected)
    )
    if better == worse:
        raise DroppedRowError("chosen_is_rejected")
    return Conversation([*before, better], to_tools(row.get("tools")), rejected=worse)


def _from_pair(row: Row, prompt: str, answer: str, final: str | None = None) -> Conversation:
    return Conversation([*_system(row), user(prompt), assistant(answer)], answer=final)


def _from_alpaca(row: Row) -> Conversation:
    return _from_pair(row, "\n\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"])


def _from_question(row: Row) -> Conversation:
    """GSM8K's answers end with `#### <final answer>`; without that mark there is no exact answer."""
    final = final_answer(row["answer"]) if "####" in row["answer"] else None
    return _from_pair(row, row["question"], row["answer"], final)


def _from_reasoning(row: Row) -> Conversation:
    expected = row.get("expected_answer")
    final = str(expected) if expected not in (None, "") else final_answer(row["generated_solution"])
    return _from_pair(row, row["problem"], row["generated_solution"], final)


def _from_turns(row: Row) -> Conversation:
    questions, answers = row["turns"], row.get("reference") or []
    if len(questions) != len(answers) or not all(isinstance(answer, str) for answer in answers):
        raise DroppedRowError("no_answer")
    pairs = zip(questions, answers, strict=True)
    return Conversation([message for question, answer in pairs for message in (user(question), assistant(answer))])


_CONVERTERS: Mapping[str, Callable[[Row], Conversation]] = {
    "preference": _from_preference,
    "messages": _from_messages,
    "sharegpt": _from_messages,
    "reasoning": _from_reasoning,
    "alpaca": _from_alpaca,
    "prompt_completion": lambda row: _from_pair(row, row["prompt"], completion(row) or ""),
    "question_answer": _from_question,
    "turns": _from_turns,
    "text": lambda row: Conversation([], text=row["text"]),
}
