import json
from typing import Any

import pytest

from finemill.rows.reasons import DroppedRowError
from finemill.rows.tools import check_call, has_call_text, split_call_text, split_response_text, to_calls, to_tools

PARAMETERS = {"type": "object", "properties": {"to": {"type": "string"}}, "required": ["to"]}
FUNCTION = {"name": "get_rate", "description": "Exchange rate", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
NO_ARGUMENTS = to_tools([{"name": "get_time", "parameters": {"type": "object", "properties": {}}}])


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        [FUNCTION],
        [{"type": "function", **FUNCTION}],
        [{"name": "get_rate", "description": "Exchange rate", "input_schema": PARAMETERS}],
    ],
)
def test_functions_are_described_in_every_spelling(tools: list[Any]) -> None:
    assert to_tools(tools) == to_tools(json.dumps(tools)) == to_tools([json.dumps(tool) for tool in tools]) == [TOOL]


@pytest.mark.parametrize("tools", ["{", {"a": 1}, [5], ["f"], [{"description": "no name"}]])
def test_what_describes_no_function_is_refused(tools: Any) -> None:
    with pytest.raises(DroppedRowError, match=r"^bad_tools$"):
        to_tools(tools)
    assert to_tools("None") is to_tools([None]) is to_tools("") is to_tools([]) is to_tools(None) is None


def call(value: Any, tools: list[Any] | None = None) -> Any:
    (read,) = to_calls(value)
    return check_call(read, tools)["function"]["arguments"]


def test_a_call_has_arguments_only_without_them_if_the_function_needs_none() -> None:
    assert call({"name": "get_time", "arguments": None}) == {}
    assert call({"name": "get_time", "arguments": "{}"}) == {}
    assert call({"name": "get_time"}, NO_ARGUMENTS) == {}
    for value, tools in (
        ({"name": "f"}, None),
        ({"name": "get_rate", "arguments": {}}, [TOOL]),
        ({"name": "f", "to": 1}, None),
        ({"name": "get_time", "wanted": {"to": 1}}, NO_ARGUMENTS),
    ):
        with pytest.raises(DroppedRowError, match=r"^bad_tool_call$"):
            call(value, tools)


def test_null_arguments_that_the_function_does_not_declare_are_left_out() -> None:
    arguments = {"to": "EUR", "room": None}
    assert call({"name": "get_rate", "arguments": arguments}, [TOOL]) == {"to": "EUR"}
    assert call({"name": "get_rate", "arguments": arguments}) == arguments


def test_null_arguments_stay_only_where_the_schema_lets_them_be_null() -> None:
    """`datasets` writes every row's keys into every other, into the schemas as well."""
    kinds = {"to": {"type": "string", "enum": None}, "days": {"type": ["integer", "null"]}, "room": None, "any": {}}
    (tool,) = to_tools([{"name": "get_rate", "parameters": {"properties": kinds, "required": None}}]) or []
    assert tool["function"]["parameters"] == {
        "properties": {"to": {"type": "string", "enum": None}, "days": {"type": ["integer", "null"]}, "any": {}}
    }
    arguments = dict.fromkeys(("to", "days", "room", "any")) | {"to": "EUR"}
    assert call({"name": "get_rate", "arguments": arguments}, [tool]) == {"to": "EUR", "days": None, "any": None}
    inner = {"type": "object", "properties": {"a": {"type": "integer"}}}
    (nested,) = to_tools([{"name": "f", "parameters": {"properties": {"o": inner, "l": {"items": inner}}}}]) or []
    arguments = {"o": {"a": 1, "b": None}, "l": [{"a": None, "b": None, "c": 2}]}
    assert call({"name": "f", "arguments": arguments}, [nested]) == {"o": {"a": 1}, "l": [{"c": 2}]}
    with pytest.raises(DroppedRowError, match=r"^bad_tool_call$"):
        call({"name": "get_rate", "arguments": {"to": None}}, [TOOL])


@pytest.mark.parametrize("key", ["tool_input", "args", "input", "parameters", "function_args", "argument"])
def test_arguments_are_read_under_every_name(key: str) -> None:
    assert call({"name": "get_rate", key: {"to": "EUR"}}, [TOOL]) == {"to": "EUR"}


@pytest.mark.parametrize(
    "value",
    [
        {"get_rate": {"to": "EUR"}},
        {"function": {"name": "get_rate"}, "arguments": {"to": "EUR"}},
        {"name": "get_rate", "arguments": [{"name": "to", "value": "EUR"}]},
    ],
)
def test_calls_are_read_in_other_forms(value: Any) -> None:
    assert call(value, [TOOL]) == {"to": "EUR"}


DEEPSEEK = (
    "I look.<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>"
    'function<\uff5ctool\u2581sep\uff5c>f\n```json\n{"x": "it is"}\n```'
    "<\uff5ctool\u2581call\u2581end\uff5c><\uff5ctool\u2581calls\u2581end\uff5c>"
)


@pytest.mark.parametrize(
    "text",
    [
        """I look. <functioncall> {"name": "f", "arguments": '{"x": "it is"}'} <|endoftext|>""",
        'I look.[TOOL_CALLS][{"name": "f", "arguments": {"x": "it is"}}]',
        'I look.<|python_tag|>{"name": "f", "parameters": {"x": "it is"}}<|eom_id|>',
        'I look.[TOOL_CALLS]f[ARGS]{"x": "it is"}</s>',
        'I look.<function=f>{"x": "it is"}</function>',
        'I look.<|tool_call|>[{"name": "f", "arguments": {"x": "it is"}}]<|/tool_call|>',
        DEEPSEEK,
    ],
)
def test_calls_in_the_text_of_other_families_are_read(text: str) -> None:
    content, (call,) = split_call_text(text)
    assert (has_call_text(text), content) == (True, "I look.")
    assert call["function"] == {"name": "f", "arguments": {"x": "it is"}}


def test_calls_written_as_text_are_read() -> None:
    first, second = ('{"name": "a", "arguments": {"x": 1}}', '{"name": "b", "arguments": {}}')
    text = f"I look.\n<tool_call>\n{first}\n</tool_call>\n<tool_call>\n{second}\n</tool_call>"
    content, calls = split_call_text(text)
    assert content == "I look."
    assert [(c["function"]["name"], c["function"]["arguments"]) for c in calls] == [("a", {"x": 1}), ("b", {})]
    assert split_call_text("No call.") == ("No call.", [])
    with pytest.raises(DroppedRowError, match=r"^bad_tool_call$"):
        split_call_text("<tool_call>\nnot JSON\n</tool_call>")
    with pytest.raises(DroppedRowError, match=r"^bad_tool_call$"):
        split_call_text('<tool_call>{"name": "a", "arguments": {}}</tool_call> and more')


@pytest.mark.parametrize(
    "text",
    [
        "I look.[TOOL_CALLS]f[ARGS]{broken",
        'I look.<function=f>{"x": 1}</function> and then I answer.',
        '{"name": "Bob", "input": {"x": 1}}',
        "[f(x=1)]",
        "Thought: I look.\nAction: f\nAction Input: {}",
    ],
)
def test_text_that_is_not_only_calls_after_a_mark_stays_text(text: str) -> None:
    assert split_call_text(text) == (text, [])


def test_functions_are_read_as_gemini_and_bedrock_write_them() -> None:
    schema = {"type": "object"}
    read = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    assert to_tools([{"functionDeclarations": [{"name": "f", "parameters": schema}]}]) == read
    assert to_tools({"tools": [{"toolSpec": {"name": "f", "inputSchema": {"json": schema}}}]}) == read


def test_results_written_as_text_are_unwrapped() -> None:
    assert split_response_text("<tool_response>\nok\n</tool_response>") == ["ok"]
    assert split_response_text("<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response>") == [
        "a",
        "b",
    ]
    assert split_response_text("ok <tool_response>") == ["ok <tool_response>"]
