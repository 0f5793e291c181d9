import json
from typing import Any

import pytest

from finemill.components.chat_format.messages import to_conversation
from finemill.rows.reasons import DroppedRowError
from finemill.rows.shapes import detect_shape

TOOL = {"name": "get_rate", "description": "Exchange rate", "parameters": {"type": "object", "properties": {}}}
CALL = {"name": "get_rate", "arguments": {"to": "EUR"}}
FUNCTION_CALL = {"type": "function", "function": CALL}


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    shape = detect_shape(row)
    assert shape is not None
    return to_conversation(row, shape).messages


def sharegpt(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


def pair(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": pair("2+2?", "4")},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}, pair("", "4")[1]]},
        sharegpt(("human", "2+2?"), ("gpt", "4")),
        {"instruction": "2+2?", "input": "", "output": "4"},
        {"prompt": "2+2?", "completion": "4"},
        {"prompt": "2+2?", "response": "4"},
        {"question": "2+2?", "answer": "4"},
        {"problem": "2+2?", "generated_solution": "4", "expected_answer": "4"},
        {"turns": ["2+2?"], "reference": ["4"]},
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"chosen": pair("2+2?", "4"), "rejected": pair("2+2?", "5")},
        {
            **sharegpt(("human", "2+2?")),
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
    ],
)  # fmt: skip
def test_every_shape_gives_the_same_messages(row: dict[str, Any]) -> None:
    assert messages_of(row) == pair("2+2?", "4")


def test_alpaca_input_follows_the_instruction() -> None:
    row = {"instruction": "Translate.", "input": "Hund", "output": "dog", "system": "Be brief."}
    assert messages_of(row) == [{"role": "system", "content": "Be brief."}, *pair("Translate.\n\nHund", "dog")]


def test_texts_stay_as_they_are() -> None:
    solution = "<think>\n2+2 = 4\n</think>\n\n  It is 4.\n"
    row = {"problem": "2+2?", "generated_solution": solution, "expected_answer": "4"}
    conversation = to_conversation(row, "reasoning")
    assert conversation.messages[1] == {"role": "assistant", "content": solution}
    assert conversation.answer == "4"


def test_gsm8k_answers_end_with_the_final_answer() -> None:
    row = {"question": "How many?", "answer": "16 - 3 = 13\n#### 1,013"}
    assert to_conversation(row, "question_answer").answer == "1013"
    assert to_conversation({"question": "Who?", "answer": "Louis 14"}, "question_answer").answer is None


def test_sharegpt_tool_calls_become_function_calls() -> None:
    turns = [
        ("human", "Rate?"),
        ("function_call", json.dumps(CALL)),
        ("observation", '{"rate": 1.1}'),
        ("gpt", "It is 1.1."),
    ]
    conversation = to_conversation({**sharegpt(*turns), "tools": json.dumps([TOOL])}, "sharegpt")
    assert conversation.messages == [
        {"role": "user", "content": "Rate?"},
        {"role": "assistant", "content": "", "tool_calls": [FUNCTION_CALL]},
        {"role": "tool", "content": '{"rate": 1.1}'},
        {"role": "assistant", "content": "It is 1.1."},
    ]
    assert conversation.tools == [{"type": "function", "function": TOOL}]


def test_openai_arguments_in_json_text_become_objects() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_rate", "arguments": '{"to": "EUR"}'}}
    row = {
        "messages": [
            {"role": "user", "content": "Rate?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "1.1"},
            {"role": "assistant", "content": "It is 1.1.", "tool_calls": None},
        ],
        "tools": [{"type": "function", "function": TOOL}],
    }
    messages = messages_of(row)
    assert messages[1]["tool_calls"] == [{"id": "c1", **FUNCTION_CALL}]
    assert messages[2]["tool_call_id"] == "c1"


def test_text_and_the_call_after_it_are_one_turn() -> None:
    turns = [
        ("human", "Rate?"),
        ("gpt", "Let me see."),
        ("function_call", json.dumps(CALL)),
        ("observation", "1"),
        ("gpt", "1"),
    ]
    assert messages_of(sharegpt(*turns))[1] == {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [FUNCTION_CALL],
    }  # fmt: skip


def test_the_worse_answer_of_a_preference_is_kept() -> None:
    conversation = to_conversation({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "preference")
    assert conversation.rejected == {"role": "assistant", "content": "5"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (sharegpt(("gpt", "Hello"), ("human", "Hi")), "role_order"),
        (sharegpt(("human", "a"), ("human", "b"), ("gpt", "c")), "role_order"),
        (sharegpt(("human", "a"), ("gpt", "b"), ("gpt", "c")), "role_order"),
        (sharegpt(("human", "a"), ("system", "b"), ("gpt", "c")), "role_order"),
        (sharegpt(("human", "a"), ("observation", "b"), ("gpt", "c")), "tool_without_call"),
        (sharegpt(("human", "a"), ("gpt", "b"), ("human", "c")), "no_final_answer"),
        (sharegpt(("system", "a")), "no_final_answer"),
        (sharegpt(("human", " "), ("gpt", "b")), "empty_turn"),
        (sharegpt(("human", "a"), ("gpt", "\n"), ("human", "b"), ("gpt", "c")), "empty_turn"),
        (sharegpt(("human", "a"), ("gpt", "<think>hm")), "unclosed_thinking"),
        (sharegpt(("human", "a"), ("moderator", "b")), "unknown_role"),
        (sharegpt(("human", "a"), ("function_call", "not JSON")), "bad_tool_call"),
        (sharegpt(("human", "a"), ("function_call", '{"arguments": {}}')), "bad_tool_call"),
        (sharegpt(("human", "a"), ("function_call", '{"name": "f", "arguments": "[1]"}')), "bad_tool_call"),
        ({**sharegpt(("human", "a"), ("gpt", "b")), "tools": "{"}, "bad_tools"),
        ({**sharegpt(("human", "a"), ("gpt", "b")), "tools": {"name": "f"}}, "bad_tools"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, *pair("", "b")[1:]]}, "not_text"),
        ({"turns": ["a", "b"]}, "no_answer"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen_is_rejected"),
    ],
)
def test_rows_that_cannot_be_used_have_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DroppedRowError, match=f"^{reason}$"):
        messages_of(row)
