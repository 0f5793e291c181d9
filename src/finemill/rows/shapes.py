"""The shapes of rows that public data sets come in: how each is told from the others, its prompt and its answer."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "ipython"), "tool"),
}
"""The role, as transformers' templates take it, of every name that data sets give a speaker."""


@dataclass(frozen=True)
class Shape:
    """One shape: its columns as people read them, a test, and the texts that identify a row of it."""

    columns: str
    matches: Callable[[Row], bool]
    texts: Callable[[Row], tuple[str, str]]


def detect_shape(row: Row) -> str | None:
    """The name in `SHAPES` of the first shape that `row` has, None if it has none."""
    return next((name for name, shape in SHAPES.items() if shape.matches(row)), None)


def prompt_and_answer(row: Row, shape: str) -> tuple[str, str]:
    """What a model is asked, system prompt excluded, and what it should answer.

    The prompt of a conversation is everything before its last answer, so that two rows with the same prompt test the
    same thing whatever their shapes.
    """
    return SHAPES[shape].texts(row)


def parse_json_columns(row: dict[str, Any]) -> dict[str, Any]:
    """Lists and objects for the values that hold them as JSON text, as CSV and some Parquet files do."""
    for column in ("messages", "conversations", "chosen", "rejected", "turns"):
        value = row.get(column)
        if isinstance(value, str) and value[:1] in "[{" and value[-1:] in "]}":
            try:
                row[column] = json.loads(value)
            except ValueError:
                continue
    return row


def turn_role(turn: Row) -> str:
    """The role of a turn in either spelling, `role` or ShareGPT's `from`; "" if it has none."""
    role = turn.get("role") or turn.get("from")
    return role.strip().lower() if isinstance(role, str) else ""


def turn_text(turn: Row) -> str:
    """The text of a turn: `content`, its text parts, or ShareGPT's `value`; tool calls as JSON."""
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    text = content if isinstance(content, str) else ""
    reasoning = turn.get("reasoning_content")
    if isinstance(reasoning, str):
        text = f"{reasoning}\n{text}"
    if turn.get("tool_calls"):
        text += json.dumps(turn["tool_calls"], ensure_ascii=False, default=str)
    return text


def is_turn_list(value: object) -> bool:
    """Whether `value` is a list of objects that each have a role."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, Mapping) and bool(turn_role(turn)) for turn in value)
    )


def _says(turn: Row, role: str) -> bool:
    """Whether `role` is the speaker's, whatever the data set calls it."""
    return ROLES.get(turn_role(turn)) == role


def _has_texts(row: Row, *columns: str) -> bool:
    return all(isinstance(row.get(column), str) for column in columns)


def _conversation_texts(turns: list[Row]) -> tuple[str, str]:
    spoken = [turn for turn in turns if not _says(turn, "system")]
    last = max((i for i, turn in enumerate(spoken) if _says(turn, "assistant")), default=len(spoken))
    return "\n".join(map(turn_text, spoken[:last])), "\n".join(map(turn_text, spoken[last : last + 1]))


def _is_preference(row: Row) -> bool:
    asked = isinstance(row.get("prompt"), str) or is_turn_list(row.get("prompt")) or is_turn_list(conversation(row))
    answers = [row.get("chosen"), row.get("rejected")]
    if all(is_turn_list(answer) for answer in answers):
        return True
    return asked and all(isinstance(answer, str) or is_turn_list(as_turns(answer)) for answer in answers)


def conversation(row: Row) -> Any:
    """The turns of a conversation, whichever column holds them."""
    return row.get("conversations") or row.get("conversation") or row.get("messages")


def as_turns(answer: Any) -> Any:
    """One turn as a list of one, anything else unchanged."""
    return [answer] if isinstance(answer, Mapping) else answer


def _preference_texts(row: Row) -> tuple[str, str]:
    chosen = as_turns(row["chosen"])
    prompt = row.get("prompt") or conversation(row) or (chosen[:-1] if isinstance(chosen, list) else "")
    asked = prompt if isinstance(prompt, str) else _conversation_texts(list(prompt))[0]
    if not isinstance(prompt, str) and _says(prompt[-1], "assistant"):
        asked = "\n".join(turn_text(turn) for turn in prompt if not _says(turn, "system"))
    return asked, chosen if isinstance(chosen, str) else turn_text(chosen[-1])


def completion(row: Row) -> str | None:
    """The answer to a `prompt`, under the names it goes by."""
    return next((row[name] for name in ("completion", "response") if isinstance(row.get(name), str)), None)


def _alpaca_texts(row: Row) -> tuple[str, str]:
    return "\n\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"]


def _turns_texts(row: Row) -> tuple[str, str]:
    return "\n".join(row["turns"]), "\n".join(map(str, row.get("reference") or []))


def _is_turns(row: Row) -> bool:
    turns = row.get("turns")
    return isinstance(turns, list) and bool(turns) and all(isinstance(turn, str) for turn in turns)


SHAPES: Mapping[str, Shape] = {
    "preference": Shape(
        "prompt or conversations, chosen, rejected",
        _is_preference,
        _preference_texts,
    ),
    "messages": Shape(
        "messages (role, content)",
        lambda row: is_turn_list(row.get("messages")),
        lambda row: _conversation_texts(row["messages"]),
    ),
    "sharegpt": Shape(
        "conversations (from, value)",
        lambda row: is_turn_list(conversation(row)),
        lambda row: _conversation_texts(conversation(row)),
    ),
    "reasoning": Shape(
        "problem, generated_solution, expected_answer",
        lambda row: _has_texts(row, "problem", "generated_solution"),
        lambda row: (row["problem"], row["generated_solution"]),
    ),
    "alpaca": Shape(
        "instruction, input, output",
        lambda row: _has_texts(row, "instruction", "output"),
        _alpaca_texts,
    ),
    "prompt_completion": Shape(
        "prompt, completion",
        lambda row: _has_texts(row, "prompt") and completion(row) is not None,
        lambda row: (row["prompt"], completion(row) or ""),
    ),
    "question_answer": Shape(
        "question, answer",
        lambda row: _has_texts(row, "question", "answer"),
        lambda row: (row["question"], row["answer"]),
    ),
    "turns": Shape("turns, reference", _is_turns, _turns_texts),
    "text": Shape("text", lambda row: _has_texts(row, "text"), lambda row: (row["text"], "")),
}
"""Every known shape by name, the more specific before the more general."""
