import json
from typing import Any

import pytest

from finemill.rows.reader import Reader
from finemill.rows.reasons import DroppedRowError
from finemill.rows.shapes import detect_shape, to_conversation
from finemill.rows.speakers import turn_list
from finemill.rows.turns import to_messages

Row = dict[str, Any]
CALL = {"name": "get_rate", "arguments": {"to": "EUR"}}
FUNCTION_CALL = {"type": "function", "function": CALL}
USER = {"role": "user", "content": "Rate?"}


def messages_of(turns: list[Row]) -> list[Row]:
    return to_messages(turn_list(turns) or [], Reader({}), "messages")


def conversation_of(*turns: tuple[str, Any], **columns: Any) -> list[Row]:
    row = {"conversations": [{"from": role, "value": value} for role, value in turns], **columns}
    messages: list[Row] = to_conversation(row, detect_shape(row) or "").messages
    return messages


@pytest.mark.parametrize(
    ("role", "known"),
    [
        ("developer", "system"), ("Human", "user"), ("prompter", "user"), ("AI", "assistant"), ("bard", "assistant"),
        ("observation", "tool"), ("tool_response", "tool"), ("function-response", "tool"), ("ipython", "tool"),
    ],
)  # fmt: skip
def test_roles_are_known_by_all_their_names(role: str, known: str) -> None:
    assert messages_of([{"from": role, "value": "a"}]) == [{"role": known, "content": "a"}]


@pytest.mark.parametrize("call", ["function_call", "tool_call"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(CALL),
        json.dumps([CALL]),
        json.dumps({"name": "get_rate", "parameters": {"to": "EUR"}}),
        json.dumps({"name": "get_rate", "input": {"to": "EUR"}}),
        json.dumps({"function": "get_rate", "arguments": '{"to": "EUR"}'}),
        f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>",
        json.dumps(FUNCTION_CALL),
    ],
)
def test_calls_are_read_in_every_spelling(call: str, text: str) -> None:
    messages = conversation_of(("human", "Rate?"), (call, text), ("observation", "1.1"), ("gpt", "It is 1.1."))
    assert messages == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [FUNCTION_CALL]},
        {"role": "tool", "content": "1.1"},
        {"role": "assistant", "content": "It is 1.1."},
    ]


def test_openai_messages_keep_ids_and_read_arguments() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_rate", "arguments": '{"to": "EUR"}'}}
    messages = messages_of(
        [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": {"rate": 1.1}},
            {"role": "assistant", "content": "It is 1.1.", "tool_calls": None},
        ]
    )
    assert messages[1]["tool_calls"] == [{"id": "c1", **FUNCTION_CALL}]
    assert messages[2] == {"role": "tool", "content": '{"rate": 1.1}', "tool_call_id": "c1"}


@pytest.mark.parametrize("content", ["On it.", None])
def test_old_function_calls_are_calls(content: str | None) -> None:
    turn = {"role": "assistant", "content": content, "function_call": {**CALL, "arguments": '{"to": "EUR"}'}}
    messages = messages_of([USER, turn, {"role": "function", "name": "get_rate", "content": "1.1"}])
    assert messages[1] == {"role": "assistant", "content": content or "", "tool_calls": [FUNCTION_CALL]}
    assert messages[2] == {"role": "tool", "name": "get_rate", "content": "1.1"}


@pytest.mark.parametrize("key", ["tool_calls", "tool_call", "function_calls", "calls", "toolCalls"])
def test_calls_beside_a_text_are_read_under_every_name(key: str) -> None:
    message = messages_of([USER, {"role": "assistant", "content": "On it.", key: [CALL]}])[1]
    assert message == {"role": "assistant", "content": "On it.", "tool_calls": [FUNCTION_CALL]}


@pytest.mark.parametrize("key", ["content", "result", "output", "response", "observation"])
def test_a_tools_result_is_read_under_every_name(key: str) -> None:
    assert messages_of([{"role": "tool", key: "1.1"}]) == [{"role": "tool", "content": "1.1"}]


def test_anthropic_parts_are_calls_and_results() -> None:
    use = {"type": "tool_use", "id": "t1", "name": "get_rate", "input": {"to": "EUR"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "1.1"}]}
    messages = messages_of(
        [
            USER,
            {"role": "assistant", "content": [{"type": "text", "text": "I look."}, use]},
            {"role": "user", "content": [result]},
        ]
    )
    assert messages[1:] == [
        {"role": "assistant", "content": "I look.", "tool_calls": [{"id": "t1", **FUNCTION_CALL}]},
        {"role": "tool", "content": "1.1", "tool_call_id": "t1"},
    ]


TEXT, RESULT = {"role": "assistant", "content": "It is 1.1."}, {"role": "tool", "content": "1.1"}


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "user", "parts": [{"text": "Rate?"}]},
         {"role": "model", "parts": [{"functionCall": {"name": "get_rate", "args": {"to": "EUR"}}}]},
         {"role": "function", "parts": [{"functionResponse": {"name": "get_rate", "response": "1.1"}}]},
         {"role": "model", "parts": [{"text": "It is 1.1."}]}],
        [{"role": "user", "content": [{"text": "Rate?"}]},
         {"role": "assistant",
          "content": [{"toolUse": {"toolUseId": "a", "name": "get_rate", "input": {"to": "EUR"}}}]},
         {"role": "user", "content": [{"toolResult": {"toolUseId": "a", "content": [{"json": 1.1}]}}]}, TEXT],
        [{"type": "human", "content": "Rate?"},
         {"type": "ai", "content": "", "tool_calls": [{"name": "get_rate", "args": {"to": "EUR"}, "id": "a"}]},
         {"type": "tool", "content": "1.1", "tool_call_id": "a"}, {"type": "ai", "content": "It is 1.1."}],
        [{"type": "human", "data": {"content": "Rate?"}},
         {"type": "ai", "data": {"content": "", "tool_calls": [{"name": "get_rate", "args": {"to": "EUR"}}]}},
         {"type": "ToolMessage", "content": "1.1"}, {"type": "AIMessage", "content": "It is 1.1."}],
        [USER, {"type": "function_call", "call_id": "a", "name": "get_rate", "arguments": '{"to": "EUR"}'},
         {"type": "function_call_output", "call_id": "a", "output": "1.1"}, TEXT],
        [USER, {"role": "assistant", "channel": "commentary", "recipient": "functions.get_rate",
                "content": '{"to": "EUR"}'},
         {"role": "tool", "name": "functions.get_rate", "content": "1.1"}, {**TEXT, "channel": "final"}],
        [USER, {"role": "assistant", "content": "", "tool_calls": {"0": FUNCTION_CALL}}, RESULT, TEXT],
    ],
    ids=["gemini", "bedrock", "langchain", "langchain-data", "responses", "channels", "by-number"],
)  # fmt: skip
def test_a_call_its_result_and_the_answer_are_read_as_every_library_writes_them(turns: list[Row]) -> None:
    messages = to_conversation({"messages": turns}, "messages").messages
    called = [{"type": call["type"], "function": call["function"]} for call in messages[1].pop("tool_calls")]
    names = {"id", "name", "tool_call_id"}
    assert called == [FUNCTION_CALL]
    assert [{k: v for k, v in message.items() if k not in names} for message in messages] == [
        USER, {"role": "assistant", "content": ""}, RESULT, TEXT,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ['<function=f>{"x": 1}</function>', "[f(x=1)]", "Thought: I look.\nAction: f\nAction Input: {}"]
)
def test_a_result_may_follow_a_call_that_is_text_in_any_familys_way(text: str) -> None:
    turns = [USER, {"role": "assistant", "content": text}, RESULT, TEXT]
    assert to_conversation({"messages": turns}, "messages").messages == turns


def test_what_parts_hold_that_is_not_read_is_named() -> None:
    part = {"type": "text", "text": "1.1", "citations": [{"url": "a"}], "cache_control": None}
    reader = Reader({})
    to_messages([USER, {"role": "assistant", "content": [part]}], reader, "messages")
    assert reader.unread == ["messages[].content[].citations"]


def test_text_and_the_call_after_it_are_one_turn() -> None:
    messages = conversation_of(("human", "Rate?"), ("gpt", "Let me see."), ("function_call", json.dumps(CALL)))
    assert messages[1] == {"role": "assistant", "content": "Let me see.", "tool_calls": [FUNCTION_CALL]}


THOUGHT = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}


@pytest.mark.parametrize(
    "turns",
    [
        *([{"role": "assistant", "content": "4", key: "2 and 2"}] for key in
          ("reasoning_content", "reasoning", "thinking", "thought", "cot")),
        [{"from": "gpt", "value": "4", "thinking": "\n2 and 2\n"}],
        [{"role": "assistant", "content": "4", "thinking": [{"type": "text", "text": "2 and 2"}]}],
        [{"role": "assistant", "content": [
            {"type": "thinking", "thinking": "2 and 2"}, {"type": "text", "text": "4"}]}],
        [{"role": "assistant", "content": [
            {"type": "thinking", "thinking": [{"type": "text", "text": "2 and 2"}]}, {"type": "text", "text": "4"}]}],
        [{"role": "assistant", "channel": "analysis", "content": "2 and 2"},
         {"role": "assistant", "channel": "final", "content": "4"}],
        [{"role": "assistant", "content": "4", "reasoning": {"content": "2 and 2"}}],
        [{"role": "assistant", "content": "4", "reasoningContent": "2 and 2"}],
        [{"role": "assistant", "content": "4", "thinking_blocks": [{"type": "thinking", "thinking": "2 and 2"}]}],
        [{"role": "thinking", "content": "2 and 2"}, {"role": "assistant", "content": "4"}],
        [{"role": "model", "parts": [{"text": "2 and 2", "thought": True}, {"text": "4"}]}],
        [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "2 and 2"}]},
         {"role": "assistant", "content": [{"type": "output_text", "text": "4"}]}],
        [{"role": "assistant", "content": [
            {"reasoningContent": {"reasoningText": {"text": "2 and 2"}}}, {"text": "4"}]}],
        [{"role": "assistant", "content": "4", "reasoning": "2 and 2",
          "reasoning_details": [{"type": "reasoning.text", "text": "2 and 2"}]}],
        [{"role": "assistant", "content": "<|channel|>analysis<|message|>2 and 2<|end|>"
          "<|start|>assistant<|channel|>final<|message|>4<|return|>"}],
        [{"role": "assistant", "content": "4", "reasoning_details": [{"type": "reasoning.text", "text": "2 and 2"}]}],
        [{"role": "assistant", "content": "4", "reasoning": [{"step": 1, "thought": "2 and 2"}]}],
        [{"role": "assistant", "content": "4", "additional_kwargs": {"reasoning_content": "2 and 2"}}],
        [{"role": "assistant", "content": "4", "provider_specific_fields": {"reasoning_content": "2 and 2"}}],
    ],
)  # fmt: skip
def test_thinking_is_read_under_every_name(turns: list[Row]) -> None:
    assert messages_of([USER, *turns]) == [USER, THOUGHT]


@pytest.mark.parametrize("name", ["my_thinking", "inner_monologue", "analysis", "gold_cot"])
def test_an_answer_is_not_learned_without_thinking_under_a_name_that_is_not_known(name: str) -> None:
    with pytest.raises(DroppedRowError, match=r"^thinking_not_read$"):
        messages_of([USER, {"role": "assistant", "content": "4", name: "2 and 2"}])
    assert len(messages_of([USER, {"role": "assistant", "content": "4", name: "high"}])) == 2


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"reasoning": {"steps": ["2 and 2"]}}, "thinking_not_read"),
        ({"reasoning": [{"type": "reasoning.encrypted", "data": "gAAA"}]}, "thinking_not_read"),
        ({"metadata": {"reasoning": "2 and 2"}}, "thinking_not_read"),
        ({"toolInvocations": [{"toolName": "f", "args": {}}]}, "calls_not_read"),
        ({"actions": '[{"name": "f", "arguments": {}}]'}, "calls_not_read"),
    ],
)
def test_an_answer_is_not_learned_without_what_belongs_to_it_and_is_not_read(more: Row, reason: str) -> None:
    with pytest.raises(DroppedRowError, match=f"^{reason}$"):
        messages_of([USER, {"role": "assistant", "content": "4", **more}])


@pytest.mark.parametrize("more", [{"metadata": {"tokens": 5}}, {"tool_versions": {"a": 1}}, {"actions": "none"}])
def test_what_says_something_else_about_an_answer_is_only_not_read(more: Row) -> None:
    assert messages_of([USER, {"role": "assistant", "content": "4", **more}])[1]["content"] == "4"


def test_channels_are_thinking_calls_and_an_answer() -> None:
    analysis, begin = "<|channel|>analysis<|message|>2 and 2<|end|>", "<|start|>assistant"
    call = f'{begin}<|channel|>commentary to=functions.get_rate <|constrain|>json<|message|>{{"to": "EUR"}}<|call|>'
    said = messages_of([USER, {"role": "assistant", "content": analysis + call}])[1]
    assert said == {"role": "assistant", "content": "", "reasoning_content": "2 and 2", "tool_calls": [FUNCTION_CALL]}
    only = messages_of([USER, {"role": "assistant", "content": "<|channel|>final<|message|>4<|return|>"}])[1]
    assert only == {"role": "assistant", "content": "4"}
    preamble = f"{analysis}{begin}<|channel|>commentary<|message|>I add.<|end|>{begin}<|channel|>final<|message|>4"
    for text in (preamble, "<|channel|>analysis 4"):
        with pytest.raises(DroppedRowError, match=r"^channels_not_read$"):
            messages_of([USER, {"role": "assistant", "content": text}])


def test_systems_at_the_begin_are_one_and_others_stand_where_they_are() -> None:
    systems = [("system", "Be kind."), ("system", "Be short."), ("system", "Be kind.")]
    messages = conversation_of(
        *systems, ("human", "a"), ("gpt", "b"), ("system", "Be long."), ("human", "c"), ("gpt", "d")
    )
    assert [message["content"] for message in messages] == ["Be kind.\n\nBe short.", "a", "b", "Be long.", "c", "d"]


def test_a_question_may_follow_a_tools_result() -> None:
    call = ("function_call", json.dumps(CALL))
    messages = conversation_of(
        ("human", "Rate?"), call, ("observation", "1.1"), ("human", "Well?"), ("gpt", "It is 1.1.")
    )
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "user", "assistant"]


def test_thinking_in_the_content_stays_there_and_is_not_doubled() -> None:
    written = {"role": "assistant", "content": "<think>\n2 and 2\n</think>\n\n4"}
    assert messages_of([USER, {**written, "reasoning_content": "2 and 2"}]) == [USER, written]
    with pytest.raises(DroppedRowError, match=r"^two_thinking_blocks$"):
        messages_of([USER, {**written, "reasoning_content": "3 and 1"}])


def test_thinking_before_a_call_is_kept() -> None:
    text = f"<think>\nEuros.\n</think>\n{json.dumps(CALL)}"
    call = conversation_of(("human", "Rate?"), ("function_call", text))[1]
    assert call == {"role": "assistant", "content": "", "reasoning_content": "Euros.", "tool_calls": [FUNCTION_CALL]}


@pytest.mark.parametrize(
    "excluded",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"train": False},
        {"loss": False},
        {"training": "false"},
        {"loss_mask": "0"},
        {"metadata": {"train": False}},
        {"meta": {"weight": 0}},
    ],
)
def test_turns_that_the_data_exclude_are_marked(excluded: Row) -> None:
    turns = [USER, {"role": "assistant", "content": "5", **excluded}, USER, {"role": "assistant", "content": "4"}]
    assert [message.get("weight") for message in messages_of(turns)] == [None, 0, None, None]
    assert "weight" not in messages_of([USER, {"role": "assistant", "content": "5", next(iter(excluded)): 1}])[1]


@pytest.mark.parametrize("key", ["mask", "masked", "ignore", "excluded"])
def test_turns_are_excluded_by_names_that_say_so(key: str) -> None:
    turns: list[Row] = [USER, {"role": "assistant", "content": "5", key: True}, USER]
    turns.append({"role": "assistant", "content": "4"})
    assert [message.get("weight") for message in messages_of(turns)] == [None, 0, None, None]
    assert "weight" not in messages_of([USER, {"role": "assistant", "content": "5", key: False}])[1]


def test_nothing_after_the_last_learned_answer_is_kept() -> None:
    answers = [{"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5", "train": False}]
    row = {"messages": [USER, answers[0], USER, answers[1]]}
    assert to_conversation(row, "messages").messages == [USER, answers[0]]
    with pytest.raises(DroppedRowError, match=r"^no_learned_turn$"):
        to_conversation({"messages": [USER, answers[1]]}, "messages")


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([("gpt", "Hello"), ("human", "Hi")], "role_order"),
        ([("human", "a"), ("human", "b"), ("gpt", "c")], "role_order"),
        ([("human", "a"), ("gpt", "b"), ("gpt", "c")], "role_order"),
        ([("human", "a"), ("system", "b"), ("gpt", "c")], "role_order"),
        ([("human", "a"), ("observation", "b"), ("gpt", "c")], "tool_without_call"),
        ([("human", "a"), ("gpt", "b"), ("human", "c")], "no_final_answer"),
        ([("system", "a")], "no_final_answer"),
        ([("human", " "), ("gpt", "b")], "empty_turn"),
        ([("human", "a"), ("gpt", "\n"), ("human", "b"), ("gpt", "c")], "empty_turn"),
        ([("human", "a"), ("gpt", "<think>hm")], "unclosed_thinking"),
        ([("human", "a"), ("gpt", "<think>hm</think>")], "empty_turn"),
        ([("human", "a"), ("moderator", "b")], "unknown_role"),
        ([("human", "a"), ("function_call", "not JSON")], "bad_tool_call"),
        ([("human", "a"), ("function_call", '{"arguments": {}}')], "bad_tool_call"),
        ([("human", "a"), ("function_call", '{"name": "f"}')], "bad_tool_call"),
        ([("human", "a"), ("function_call", '{"name": "f", "arguments": "[1]"}')], "bad_tool_call"),
        ([("human", "<image>\nWho is it?"), ("gpt", "b")], "not_text"),
        ([("human", "Who is it?\n<image>"), ("gpt", "b")], "not_text"),
        ([("human", "<video>\nWho is it?"), ("gpt", "b")], "not_text"),
        ([("human", [{"type": "image"}]), ("gpt", "b")], "not_text"),
        ([("human", [{"type": "image", "text": ""}, {"type": "text", "text": "Who?"}]), ("gpt", "b")], "not_text"),
        ([("human", [{"type": "text", "text": "Who?", "image_url": "a"}]), ("gpt", "b")], "not_text"),
        ([("human", {"a": 1}), ("gpt", "b")], "not_text"),
        *(
            ([("human", text), ("gpt", "b")], "not_text")
            for text in (
                "<|vision_start|><|image_pad|><|vision_end|>Who?",
                "[IMG]Who?",
                "Picture 1: <img>a.jpg</img>\nWho?",
                "<audio>What is said?",
                "See data:image/png;base64,iVBO",
            )
        ),
    ],
)
def test_turns_that_cannot_be_used_have_a_reason(turns: list[tuple[str, Any]], reason: str) -> None:
    with pytest.raises(DroppedRowError, match=f"^{reason}$"):
        conversation_of(*turns)


def test_a_picture_that_is_only_mentioned_is_text() -> None:
    for text in (
        "Write <svg><image></image></svg> with a <video> element.",
        "<audio> tags: how?",
        "<video>a</video> why?",
    ):
        assert conversation_of(("human", text), ("gpt", "b"))[0]["content"] == text


@pytest.mark.parametrize("empty", [{"tool_calls": [None]}, {"function_call": {"name": None, "arguments": None}}])
def test_calls_that_arrow_writes_as_null_are_none(empty: Row) -> None:
    assert messages_of([USER, {"role": "assistant", "content": "4", **empty}])[1] == {
        "role": "assistant",
        "content": "4",
    }


def test_turns_of_which_only_a_part_is_learned_are_refused() -> None:
    detail = [{"begin_offset": 0, "end_offset": 3, "train": False}]
    with pytest.raises(DroppedRowError, match=r"^partly_excluded_turn$"):
        messages_of([USER, {"role": "assistant", "content": "No: 4.", "train_detail": detail}])
